"""How numbers are widened, narrowed and added exactly in Triton: csrc/common/numeric.h, on tiles.

bfloat16 is converted by integer arithmetic. A GPU's own conversion gives the same bits, Triton's interpreter's does not: it
truncates where it narrows and loses subnormals both ways.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIMBS = tl.constexpr(44)  # of radix 2^32, in units of 2^-1074
LIMB_LANES = tl.constexpr(64)


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """A number that is a multiple of UNIT, in a form from which the compiler sees it: then it loads 16 bytes at once."""
    return x.to(tl.int64) // UNIT * UNIT


@triton.jit
def from_bf16_bits(pattern):
    """fp32 of bf16 patterns."""
    return (pattern.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16_bits(x):
    """bf16 patterns of fp32, int32, to nearest even. A NaN stays one, quieted."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest).to(tl.int32)


@triton.jit
def widen(raw, WIDE: tl.constexpr):
    """Values as they are loaded, in fp32 or fp64."""
    if raw.dtype == tl.bfloat16:
        return from_bf16_bits(raw.to(tl.uint16, bitcast=True)).to(WIDE)
    else:
        return raw.to(WIDE)


@triton.jit
def bf16_bits_of(raw):
    """bf16 patterns of values as they are loaded, int32; a double goes through float, as in torch."""
    if raw.dtype == tl.bfloat16:
        return raw.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return to_bf16_bits(raw.to(tl.float32))


@triton.jit
def bits_of(x):
    """Bit patterns, as integers of the same width."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    elif x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int64, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bit patterns of |x|: their order is the order of the magnitudes, NaN beyond infinity."""
    if x.dtype.primitive_bitwidth == 16:
        return bits_of(x).to(tl.int32) & 0x7FFF
    elif x.dtype.primitive_bitwidth == 32:
        return bits_of(x) & 0x7FFFFFFF
    else:
        return bits_of(x) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def bits_set(byte):
    """How many bits a byte has, int32."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp64, of normal numbers."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def level_above(largest):
    """The lowest level whose 2^40 units exceed a positive double; level k counts in units of 2^(32 k - 1074)."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52).to(tl.int32)
    return (tl.maximum(exponent, 1) + 52 - 40 + 31) // 32


@triton.jit
def add_exactly(values, limbs):
    """Limbs, int64 [64], with up to 4096 non-negative doubles below 2^256 added: no bit is lost, so no order matters.

    Adding and subtracting a large constant cuts each value at one power of two. The pieces of a level are multiples of its
    unit and below 2^40 of them, so their sum is exact; what is left goes on to a lower level (csrc/common/cpu/exact_sum.inl).
    """
    lane = tl.arange(0, LIMB_LANES)
    largest = tl.max(values)
    level = level_above(largest)
    while largest > 0:
        cutter = power_of_two(32 * level - 1022) * 1.5  # 1.5 * 2^52 units: its last place is one unit
        pieces = (values + cutter) - cutter
        values -= pieces
        scale = 1074 - 32 * level  # up to 1074: two factors, each a normal double
        total = (tl.sum(pieces) * power_of_two(scale >> 1) * power_of_two(scale - (scale >> 1))).to(tl.int64)
        limbs += tl.where(lane == level, total & 0xFFFFFFFF, 0) + tl.where(lane == level + 1, total >> 32, 0)
        largest = tl.max(tl.abs(values))
        level = tl.minimum(level - 1, level_above(largest))
    return limbs


@triton.jit
def add_units(sums, integer, shift):
    """Adds integer * 2^shift units to limbs in memory, for each of a vector; 0 <= integer < 2^63."""
    limb, bits = shift >> 5, (shift & 31).to(tl.int64)
    some = integer > 0
    low = (integer & 0xFFFFFFFF) << bits
    high = (integer >> 32) << bits
    tl.atomic_add(sums + limb, low & 0xFFFFFFFF, some, sem="relaxed")
    tl.atomic_add(sums + limb + 1, (low >> 32) + (high & 0xFFFFFFFF), some, sem="relaxed")
    tl.atomic_add(sums + limb + 2, high >> 32, some, sem="relaxed")


@triton.jit
def carry(sums, ROWS: tl.constexpr):
    """Each limb but the last of every row below 2^32: the one form of a sum."""
    row = sums + tl.arange(0, ROWS) * LIMBS
    above = tl.zeros([ROWS], tl.int64)
    for limb in range(LIMBS - 1):
        value = tl.load(row + limb) + above
        tl.store(row + limb, value & 0xFFFFFFFF)
        above = value >> 32
    tl.store(row + LIMBS - 1, tl.load(row + LIMBS - 1) + above)
