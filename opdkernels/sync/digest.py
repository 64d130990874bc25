r"""The additive digest of a tensor: a sum over its coordinates, which changes update in O(changed).

For a tensor of coordinates of b bits, with flat position i and bits v_i as an unsigned integer, modulo 2^64:

    H = sum_i mix(i * 2^b + v_i)             for b = 8, 16, 32
    H = sum_i mix(mix(i) xor v_i)            for b = 64

    mix(x):  z = x + 0x9E3779B97F4A7C15
             z = (z xor z >> 30) * 0xBF58476D1CE4E5B9
             z = (z xor z >> 27) * 0x94D049BB133111EB
             z xor z >> 31

The digest does not depend on the order of the coordinates, and the digests of shards add up. If the coordinates of a
set S change, H' is H minus the sum of their old terms plus the sum of their new terms; coordinates in S that did not
change contribute 0. It detects accidental differences, not deliberate ones. The dtype and the shape are not part of it.
For b = 32, positions count modulo 2^32.

Source: G. Steele, D. Lea, C. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014; mix is the finaliser
of S. Vigna's splitmix64.
"""

from __future__ import annotations

import torch

from opdkernels.ops.patch import BITS, bits, to_int64

WORD = (1 << 64) - 1
SEED, FACTOR_1, FACTOR_2 = to_int64([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB]).tolist()
CHUNK = 1 << 16  # coordinates; 512 KiB of int64, which stay in the cache of a core


def mix_(words: torch.Tensor) -> torch.Tensor:
    """Replaces int64 words by their mix, modulo 2^64; the masks remove the sign bits of a right shift."""
    words += SEED
    words ^= (words >> 30) & ((1 << 34) - 1)
    words *= FACTOR_1
    words ^= (words >> 27) & ((1 << 37) - 1)
    words *= FACTOR_2
    words ^= (words >> 31) & ((1 << 33) - 1)
    return words


def mix(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns the term of each coordinate, int64 [n], of its position (int64 [n]) and its bits (integers [n])."""
    width = 8 * values.element_size()
    if width == 64:
        return mix_(mix_(positions.clone()) ^ values)
    return mix_((positions << width) | (values.long() & ((1 << width) - 1)))


def digest_at(positions: torch.Tensor, values: torch.Tensor) -> int:
    """Returns the sum of the terms of some coordinates of a tensor.

    Args:
        positions: Flat positions in the full tensor, int64 [n].
        values: Values at these positions, [n], of any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        An unsigned integer of 64 bits.

    >>> w = torch.tensor([1.0, 2.0, 3.0])
    >>> digest_at(torch.tensor([2, 0, 1]), w[[2, 0, 1]]) == additive_digest(w)
    True
    """
    integers = values.view(BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(integers), CHUNK):
        total += mix(positions[start : start + CHUNK], integers[start : start + CHUNK]).sum()
    return int(total) & WORD


def additive_digest(tensor: torch.Tensor, start: int = 0) -> int:
    """Returns the additive digest of a tensor, or of a shard of consecutive coordinates.

    Args:
        tensor: Tensor of any dtype of 1, 2, 4 or 8 bytes, with any strides.
        start: Flat position of its first coordinate in the full tensor.

    Returns:
        An unsigned integer of 64 bits; 0 for an empty tensor.

    Raises:
        TypeError: The dtype is not supported.

    >>> w = torch.tensor([1.0, 2.0, 3.0])
    >>> (additive_digest(w[:2]) + additive_digest(w[2:], start=2)) % 2**64 == additive_digest(w)
    True
    """
    integers = bits(tensor)
    total = torch.zeros((), dtype=torch.int64, device=integers.device)
    for first in range(0, len(integers), CHUNK):
        values = integers[first : first + CHUNK]
        positions = torch.arange(start + first, start + first + len(values), device=values.device)
        total += mix(positions, values).sum()
    return int(total) & WORD


def update_digest(digest: int, positions: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> int:
    """Returns the digest of a tensor after the values at some positions change from `old` to `new`, in O(changed).

    >>> w, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, 3.0])
    >>> at = torch.tensor([1])
    >>> update_digest(additive_digest(w), at, w[at], v[at]) == additive_digest(v)
    True
    """
    return (digest - digest_at(positions, old) + digest_at(positions, new)) & WORD
