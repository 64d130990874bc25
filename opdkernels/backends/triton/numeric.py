"""How numbers are widened, rounded and summed exactly in Triton: csrc/common/numeric.h, on tiles.

bfloat16 is converted by integer arithmetic. A GPU's own conversion gives the same bits; Triton's interpreter does not:
it truncates instead of rounding and loses subnormals in both directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opdkernels.backends.layout import SUM_LIMBS, SUM_SHIFT

SUM_LIMBS, SUM_SHIFT = tl.constexpr(SUM_LIMBS), tl.constexpr(SUM_SHIFT)
LIMB_LANES = tl.constexpr(64)  # a power of two that holds SUM_LIMBS


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """x, a multiple of UNIT, written so that the compiler knows it: it then loads 16 bytes at once."""
    return x.to(tl.int64) // UNIT * UNIT


@triton.jit
def from_bf16_bits(bits):
    """fp32 of bf16 bits."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16_bits(x):
    """bf16 bits of fp32, int32, rounded to nearest even. A NaN stays a quiet NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, nearest).to(tl.int32)


@triton.jit
def widen(raw, WIDE: tl.constexpr):
    """Loaded values in WIDE: fp32 or fp64."""
    if raw.dtype == tl.bfloat16:
        return from_bf16_bits(raw.to(tl.uint16, bitcast=True)).to(WIDE)
    else:
        return raw.to(WIDE)


@triton.jit
def bf16_bits_of(raw):
    """bf16 bits of loaded values, int32; a double is rounded to float first, as in torch."""
    if raw.dtype == tl.bfloat16:
        return raw.to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        return to_bf16_bits(raw.to(tl.float32))


@triton.jit
def bits_of(x):
    """Bits of values, as integers of the same width."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    elif x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int64, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|: their order is the order of the magnitudes, with NaN above infinity."""
    if x.dtype.primitive_bitwidth == 16:
        return bits_of(x).to(tl.int32) & 0x7FFF
    elif x.dtype.primitive_bitwidth == 32:
        return bits_of(x) & 0x7FFFFFFF
    else:
        return bits_of(x) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def bits_set(byte):
    """Number of bits set in a byte, int32."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp64, for exponents of normal numbers."""
    return ((exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def level_above(largest):
    """The lowest level whose 2^40 units exceed a positive double; the unit of level k is 2^(32 k - 1074)."""
    exponent = (largest.to(tl.int64, bitcast=True) >> 52).to(tl.int32)
    return (tl.maximum(exponent, 1) + 52 - 40 + 31) // 32


@triton.jit
def add_exactly(values, limbs):
    """Limbs, int64 [LIMB_LANES], plus up to 4096 non-negative doubles below 2^256, exactly, so in any order.

    Adding and subtracting a large constant cuts each value at one power of two. The pieces of a level are multiples of
    its unit and below 2^40 of them, so their sum is exact; the remainder is added at a lower level
    (csrc/common/cpu/exact_sum.inl).
    """
    lane = tl.arange(0, LIMB_LANES)
    largest = tl.max(values)
    level = level_above(largest)
    while largest > 0:
        cutter = power_of_two(32 * level - 1022) * 1.5  # 1.5 * 2^52 units: its last place is one unit
        pieces = (values + cutter) - cutter
        values -= pieces
        scale = SUM_SHIFT - 32 * level  # up to 1074: two factors, each a normal double
        total = (tl.sum(pieces) * power_of_two(scale >> 1) * power_of_two(scale - (scale >> 1))).to(tl.int64)
        limbs += tl.where(lane == level, total & 0xFFFFFFFF, 0) + tl.where(lane == level + 1, total >> 32, 0)
        largest = tl.max(tl.abs(values))
        level = tl.minimum(level - 1, level_above(largest))
    return limbs


@triton.jit
def add_units(sums_ptr, integer, shift):
    """Adds integer * 2^shift units to the limbs at sums_ptr, int64, for each element; 0 <= integer < 2^63."""
    limb, bits = shift >> 5, (shift & 31).to(tl.int64)
    nonzero = integer > 0
    low = (integer & 0xFFFFFFFF) << bits
    high = (integer >> 32) << bits
    tl.atomic_add(sums_ptr + limb, low & 0xFFFFFFFF, nonzero, sem="relaxed")
    tl.atomic_add(sums_ptr + limb + 1, (low >> 32) + (high & 0xFFFFFFFF), nonzero, sem="relaxed")
    tl.atomic_add(sums_ptr + limb + 2, high >> 32, nonzero, sem="relaxed")


@triton.jit
def propagate_carry(sums_ptr, ROWS: tl.constexpr):
    """Makes every limb but the last of each sum less than 2^32, the canonical form; int64 [ROWS, SUM_LIMBS]."""
    row = sums_ptr + tl.arange(0, ROWS) * SUM_LIMBS
    above = tl.zeros([ROWS], tl.int64)
    for limb in range(SUM_LIMBS - 1):
        value = tl.load(row + limb) + above
        tl.store(row + limb, value & 0xFFFFFFFF)
        above = value >> 32
    tl.store(row + SUM_LIMBS - 1, tl.load(row + SUM_LIMBS - 1) + above)
