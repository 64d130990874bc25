"""Layout of the outputs of `patch` and constants of its digests, written once for Python and Triton.

csrc/patch/patch.h repeats it for C++ and CUDA; tests/ops/test_layout.py compares.
"""

from __future__ import annotations

BLOCK = 1 << 16  # coordinates of one count, one sequence of positions and one digest: an offset has 16 bits
VALID = 1 << 62  # status of the GPU kernels if no block is invalid: larger than any block index

# XXH3-128, seed 0 (Y. Collet, xxHash, version 0.8), of inputs whose length is a multiple of HASH_UNIT.
HASH_UNIT = 1024  # bytes between two scrambles: 16 stripes of 8 words
HASH_PRIME32_1, HASH_PRIME32_2, HASH_PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
HASH_PRIME64_1, HASH_PRIME64_2, HASH_PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
HASH_PRIME64_4, HASH_PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
HASH_AVALANCHE = 0x165667919E3779F9
HASH_START = (  # initial state, eight words
    HASH_PRIME32_3,
    HASH_PRIME64_1,
    HASH_PRIME64_2,
    HASH_PRIME64_3,
    HASH_PRIME64_4,
    HASH_PRIME32_2,
    HASH_PRIME64_5,
    HASH_PRIME32_1,
)
HASH_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
HASH_SECRET_BYTES = 192

# Offsets in HASH_SECRET: the keys of the last stripe of a block, of the scramble, and of the low and the high word of
# the digest. The keys of the other stripes are at 0, 8, 16, ...
HASH_LAST = HASH_SECRET_BYTES - 71
HASH_SCRAMBLE = HASH_SECRET_BYTES - 64
HASH_LOW = 11
HASH_HIGH = HASH_SECRET_BYTES - 75


def blocks_of(numel: int) -> int:
    """Returns the number of blocks of a tensor of `numel` elements."""
    return -(-numel // BLOCK)
