r"""`delta`: every per-coordinate metric of a pair of tensors, from one pass over both.

For W (base) and W' (trained), per coordinate:

    stored view    delta = W' - W in fp32 (fp64 where either tensor is fp64)
    visible view   delta = bf16(bf16(W') - bf16(W)): what a bf16 deployment sees

bf16 has 2^15 magnitudes. Integer histograms of |W|, of |delta| and of |W| of the changed coordinates, over these
magnitudes, therefore give every metric at any threshold that is chosen later, without sorting. Sums are exact integers.
The result, the *tally*, is a commutative monoid: tallies of threads, slices, machines and resumed runs merge to the
same bits. A coordinate is excluded, and counted as non-finite, where W, W' or their visible delta is not finite.

Source: arXiv 2606.13657 (the metrics); the histograms are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.backends.layout import BINS, INFINITY_BITS, SUM_LIMBS, SUM_SHIFT
from opdkernels.ops import register, to_local
from opdkernels.ops.arguments import validate_input, validate_memory, validate_tensor
from opdkernels.ops.delta.layout import (
    COUNT_BIT_EQUAL,
    COUNT_LE,
    COUNT_LT,
    COUNT_NONFINITE,
    COUNT_NUMEL,
    COUNT_ULP,
    COUNT_UNCHANGED_RTOL,
    HIST_BASE,
    HIST_BASE_CHANGED,
    HIST_BASE_OVER,
    HIST_DELTA,
    HIST_DELTA_STORED,
    HIST_TRAINED_CHANGED,
    MAX_VISIBLE_THRESHOLDS,
    NUM_COUNTS,
    NUM_SUMS,
    SUM_BASE_SQ,
    SUM_DELTA_ABS,
    SUM_DELTA_SQ,
    SUM_TRAINED_SQ,
    ULP_BINS,
    ULP_REACH,
)

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)  # of stored |delta|
DEFAULT_THRESHOLD_BITS = (0, 0x3727, 0x3728)  # visible |delta| > 0, > 1e-5, > bf16(1e-5) = 1.00136e-5
RTOL = 1e-3  # of `unchanged_rtol`
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

with np.errstate(invalid="ignore"):  # the last bins are NaN
    # float64 [BINS]: the magnitude that each bin counts.
    magnitudes: np.ndarray = (np.arange(BINS, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)

SCHEMA = (
    "delta_(Tensor base, Tensor trained, int[] threshold_bits, float[] thresholds, Tensor(a!) tables, "
    "Tensor(b!) counts, Tensor(c!) sums, Tensor(d!) maximum, Tensor(e!)? mask) -> ()"
)


def fake(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    torch._check(base.numel() == trained.numel(), lambda: f"sizes differ: {base.shape} and {trained.shape}")


def bf16_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of a bf16 tensor, int64 of the same shape."""
    return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def same_bits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where the bits are equal, bool.

    Two dtypes are compared after widening, where a NaN has no payload to compare and so equals nothing.
    """
    if x.dtype != y.dtype:
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return same_bits(x.to(wide), y.to(wide)) & ~x.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(integers) == y.view(integers)


def base_and_delta(base: torch.Tensor, trained: torch.Tensor, visible: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W and delta of one view: fp32, or fp64 in the stored view where either tensor is fp64."""
    if visible:
        w = base.bfloat16().float()
        return w, (trained.bfloat16().float() - w).bfloat16().float()
    wide = torch.float64 if torch.float64 in (base.dtype, trained.dtype) else torch.float32
    w = base.to(wide)
    return w, trained.to(wide) - w


def exact_total(values: torch.Tensor) -> int:
    """The sum of fp64 values as an integer in units of 2^-1074."""
    mantissa, exponent = torch.frexp(values)
    integer, shift = (mantissa * 2.0**53).to(torch.int64), exponent.to(torch.int64) + SUM_SHIFT - 53
    integer = integer >> (-shift).clamp(min=0)  # subnormals have trailing zeros
    total = 0
    for s in shift.clamp(min=0).unique().tolist():
        chosen = integer[shift.clamp(min=0) == s]
        total += (int((chosen >> 26).sum()) << (26 + s)) + (int((chosen & 0x3FFFFFF).sum()) << s)
    return total


def to_limbs(total: int) -> list[int]:
    """The SUM_LIMBS limbs of an exact sum."""
    return [total >> 32 * i & 0xFFFFFFFF for i in range(SUM_LIMBS - 1)] + [total >> 32 * (SUM_LIMBS - 1)]


def from_limbs(limbs: Sequence[int]) -> int:
    """The exact sum that limbs hold, as an integer in units of 2^-1074."""
    return sum(int(limb) << 32 * i for i, limb in enumerate(limbs) if limb)


def reference(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,  # int64 [HIST_BASE_OVER + len(threshold_bits), BINS]
    counts: torch.Tensor,  # int64 [NUM_COUNTS]
    sums: torch.Tensor,  # int64 [NUM_SUMS, SUM_LIMBS]
    maximum: torch.Tensor,  # fp64 [1]
    mask: torch.Tensor | None,  # uint8 [ceil(n / 8)]
) -> None:
    """The definition, in plain PyTorch. Adds to `tables`, `counts`, `sums` and `maximum`; writes `mask`."""
    base, trained = base.flatten(), trained.flatten()
    wide = torch.float64 if torch.float64 in (base.dtype, trained.dtype) else torch.float32
    x, y = base.to(wide), trained.to(wide)
    w, v = x.float().bfloat16(), y.float().bfloat16()
    abs_w, abs_v = bf16_bits(w) & 0x7FFF, bf16_bits(v) & 0x7FFF
    visible = bf16_bits((v.float() - w.float()).bfloat16()) & 0x7FFF
    finite = (abs_w < INFINITY_BITS) & (abs_v < INFINITY_BITS) & (visible < INFINITY_BITS)
    if mask is not None:
        bits = torch.zeros(mask.numel() * 8, dtype=torch.int64, device=base.device)
        bits[: base.numel()] = (visible > threshold_bits[0]) & finite
        mask.copy_((bits.view(-1, 8) << torch.arange(8, device=base.device)).sum(1))
    counts[COUNT_NUMEL] += base.numel()
    counts[COUNT_NONFINITE] += (~finite).sum()
    counts[COUNT_BIT_EQUAL] += same_bits(base, trained).sum()
    x, y, abs_w, abs_v, visible = x[finite], y[finite], abs_w[finite], abs_v[finite], visible[finite]

    def add_histogram(row: int, magnitude_bits: torch.Tensor) -> None:
        tables[row] += torch.bincount(magnitude_bits, minlength=BINS)

    stored = (y - x).abs()
    add_histogram(HIST_BASE, abs_w)
    add_histogram(HIST_DELTA, visible)
    add_histogram(HIST_TRAINED_CHANGED, abs_v[visible > 0])
    add_histogram(HIST_BASE_CHANGED, abs_w[stored > 0])
    add_histogram(HIST_DELTA_STORED, stored.float().view(torch.int32).to(torch.int64) >> 16)
    for k, threshold in enumerate(threshold_bits):
        add_histogram(HIST_BASE_OVER + k, abs_w[visible > threshold])
    limit = torch.tensor(RTOL, dtype=wide) * torch.maximum(x.abs(), y.abs())
    counts[COUNT_UNCHANGED_RTOL] += (stored <= limit).sum()
    for k, value in enumerate(thresholds):
        counts[COUNT_LT + k] += (stored.double() < value).sum()
        counts[COUNT_LE + k] += (stored.double() <= value).sum()
    ordered_w = torch.where(w[finite].signbit(), -abs_w, abs_w)
    ordered_v = torch.where(v[finite].signbit(), -abs_v, abs_v)
    distance = (ordered_v - ordered_w).clamp(-ULP_REACH - 1, ULP_REACH + 1) + ULP_REACH + 1
    counts[COUNT_ULP:] += torch.bincount(distance, minlength=ULP_BINS)
    for row, values in (
        (SUM_BASE_SQ, x.double().square()),
        (SUM_TRAINED_SQ, y.double().square()),
        (SUM_DELTA_SQ, stored.double().square()),
        (SUM_DELTA_ABS, stored.double()),
    ):
        total = from_limbs(sums[row].tolist()) + exact_total(values)
        sums[row] = torch.tensor(to_limbs(total))
    if stored.numel():
        maximum[0] = torch.maximum(maximum[0], stored.max().double())


def validate(
    base: torch.Tensor,
    trained: torch.Tensor,
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    device, n = base.device, base.numel()
    validate_input("base", base, DTYPES, device)
    validate_input("trained", trained, DTYPES, device, n)
    validate_threshold_bits(threshold_bits)
    validate_thresholds(thresholds)
    validate_tensor("tables", tables, torch.int64, (HIST_BASE_OVER + len(threshold_bits), BINS), device)
    validate_tensor("counts", counts, torch.int64, (NUM_COUNTS,), device)
    validate_tensor("sums", sums, torch.int64, (NUM_SUMS, SUM_LIMBS), device)
    validate_tensor("maximum", maximum, torch.float64, (1,), device)
    written = [tables, counts, sums, maximum]
    if mask is not None:
        validate_tensor("mask", mask, torch.uint8, ((n + 7) // 8,), device)
        written.append(mask)
    validate_memory(written, [base, trained])


register("delta", SCHEMA, reference, fake, validate=validate)


@dataclass
class Tally:
    """The counts of `delta`. All are integers but the maximum, so `merge` is exact, associative and commutative.

    Attributes:
        threshold_bits: Increasing bf16 bits of the thresholds of visible |delta|.
        tables: Histograms over bf16 magnitudes, int64 [5 + len(threshold_bits), 32768]; the `hist_*` properties are
            its rows.
        counts: int64 [49]; the properties name its elements.
        sums: Exact sums of the stored view as limbs, int64 [4, 44]; the `sum_*` properties join them.
        maximum: Largest stored |delta|, float64 [1].
    """

    threshold_bits: tuple[int, ...]
    tables: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    maximum: np.ndarray

    @classmethod
    def empty(cls, threshold_bits: Sequence[int] = DEFAULT_THRESHOLD_BITS) -> Tally:
        """A tally of no coordinates: the neutral element of `merge`."""
        return cls(
            tuple(threshold_bits),
            np.zeros((HIST_BASE_OVER + len(threshold_bits), BINS), np.int64),
            np.zeros(NUM_COUNTS, np.int64),
            np.zeros((NUM_SUMS, SUM_LIMBS), np.int64),
            np.zeros(1),
        )

    numel = property(lambda self: int(self.counts[COUNT_NUMEL]), doc="Coordinates, non-finite ones included.")
    nonfinite = property(
        lambda self: int(self.counts[COUNT_NONFINITE]), doc="Coordinates excluded from every histogram and sum."
    )
    finite = property(lambda self: self.numel - self.nonfinite, doc="Coordinates that the histograms count.")
    bit_equal = property(
        lambda self: int(self.counts[COUNT_BIT_EQUAL]), doc="Equal bits: a NaN equals itself, +0 does not equal -0."
    )
    unchanged_rtol = property(
        lambda self: int(self.counts[COUNT_UNCHANGED_RTOL]),
        doc="Stored |W' - W| <= 1e-3 max(|W|, |W'|) (Zhu et al., arXiv 2511.08567).",
    )
    lt = property(lambda self: self.counts[COUNT_LT:COUNT_LE], doc="int64 [5]: stored |delta| < 1e-8 .. 1e-4.")
    le = property(lambda self: self.counts[COUNT_LE:COUNT_ULP], doc="int64 [5]: stored |delta| <= 1e-8 .. 1e-4.")
    ulp = property(
        lambda self: self.counts[COUNT_ULP:],
        doc="int64 [35]: signed distance in bf16 ULP: '< -16', -16 .. 16, '> 16'.",
    )
    hist_base = property(lambda self: self.tables[HIST_BASE], doc="Histogram of |W|, rounded to bf16.")
    hist_delta = property(
        lambda self: self.tables[HIST_DELTA], doc="Histogram of visible |delta|; bin 0 counts unchanged coordinates."
    )
    hist_trained_changed = property(
        lambda self: self.tables[HIST_TRAINED_CHANGED], doc="Histogram of |W'| where the visible delta is not 0."
    )
    hist_base_changed = property(
        lambda self: self.tables[HIST_BASE_CHANGED], doc="Histogram of |W| where the stored delta is not 0."
    )
    hist_delta_stored = property(
        lambda self: self.tables[HIST_DELTA_STORED],
        doc="Histogram of stored |delta| by the top 16 bits of its fp32 value.",
    )
    hist_base_over = property(
        lambda self: self.tables[HIST_BASE_OVER:],
        doc="[len(threshold_bits), 32768]: histogram of |W| where visible |delta| exceeds each threshold.",
    )
    sum_base_sq = property(
        lambda self: from_limbs(self.sums[SUM_BASE_SQ]), doc="Sum of W^2, exact, in units of 2^-1074."
    )
    sum_trained_sq = property(
        lambda self: from_limbs(self.sums[SUM_TRAINED_SQ]), doc="Sum of W'^2, exact, in units of 2^-1074."
    )
    sum_delta_sq = property(
        lambda self: from_limbs(self.sums[SUM_DELTA_SQ]), doc="Sum of stored delta^2, exact, in units of 2^-1074."
    )
    sum_delta_abs = property(
        lambda self: from_limbs(self.sums[SUM_DELTA_ABS]), doc="Sum of stored |delta|, exact, in units of 2^-1074."
    )
    max_delta = property(lambda self: float(self.maximum[0]), doc="Largest stored |delta|.")

    def merge(self, other: Tally) -> Tally:
        """The tally of the coordinates of both; raises ValueError if the thresholds differ."""
        if self.threshold_bits != other.threshold_bits:
            raise ValueError(
                f"tallies with different thresholds do not merge: {self.threshold_bits} and {other.threshold_bits}"
            )
        sums = np.array(
            [to_limbs(from_limbs(a) + from_limbs(b)) for a, b in zip(self.sums, other.sums, strict=True)], np.int64
        )
        return Tally(
            self.threshold_bits,
            self.tables + other.tables,
            self.counts + other.counts,
            sums,
            np.maximum(self.maximum, other.maximum),
        )

    def reset(self) -> None:
        """Set every count to zero."""
        for array in (self.tables, self.counts, self.sums, self.maximum):
            array.fill(0)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tally)
            and self.threshold_bits == other.threshold_bits
            and all(
                np.array_equal(a, b)
                for a, b in zip(
                    (self.tables, self.counts, self.sums, self.maximum),
                    (other.tables, other.counts, other.sums, other.maximum),
                    strict=True,
                )
            )
        )


def exact_float(total: int) -> float:
    """The double nearest to an exact sum.

    >>> exact_float(3 << 1073)
    1.5
    """
    return total / (1 << SUM_SHIFT)


def exact_floats(sums: np.ndarray) -> np.ndarray:
    """`exact_float` of many sums.

    Args:
        sums: Limbs of each sum, int64 [..., SUM_LIMBS].

    Returns:
        float64 [...].
    """
    limbs = np.pad(sums.reshape(-1, SUM_LIMBS), ((0, 0), (2, 0)))  # two below the lowest one
    rows, used = np.arange(len(limbs)), limbs != 0
    top = np.maximum(limbs.shape[1] - 1 - np.argmax(used[:, ::-1], axis=1), 2)
    high, middle, low = (limbs[rows, top - i].astype(np.uint64) for i in range(3))
    # The leading 64 bits, the last of which is also set if any bit below them is: rounding to 53 looks no further.
    shift = 32 - np.frexp(high.astype(float))[1]
    left, right = shift.astype(np.uint64), (32 - shift).astype(np.uint64)
    leading = ((high << np.uint64(32) | middle) << left) | low >> right
    below = (low & ((np.uint64(1) << right) - np.uint64(1)) > 0) | used.any(1) & (np.argmax(used, axis=1) < top - 2)
    exponent = 32 * (top - 4) + 32 - shift - SUM_SHIFT
    values = np.ldexp((leading | below).astype(float), exponent)
    # Carries are not propagated, the sum is negative, or the double is subnormal and would be rounded twice.
    for i in np.flatnonzero((limbs >> 32 != 0).any(1) | (exponent < -1080) & used.any(1)):
        values[i] = exact_float(from_limbs(limbs[i, 2:].tolist()))
    return values.reshape(sums.shape[:-1])


def validate_pair(base: torch.Tensor, trained: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless both tensors have supported dtypes, one shape and one device."""
    for name, tensor in (("base", base), ("trained", trained)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; delta takes bfloat16, float16, float32 and float64")
    if base.shape != trained.shape:
        raise ValueError(f"shapes differ: base {tuple(base.shape)}, trained {tuple(trained.shape)}")
    if base.device != trained.device:
        raise ValueError(f"base is on {base.device}, trained on {trained.device}; move one of them")


def validate_threshold_bits(threshold_bits: Sequence[int]) -> None:
    """Raise ValueError unless there are 1 to 4 increasing bits of finite bf16 magnitudes."""
    bits = list(threshold_bits)
    increasing = bits == sorted(set(bits))
    if not 1 <= len(bits) <= MAX_VISIBLE_THRESHOLDS or not increasing or bits[0] < 0 or bits[-1] >= INFINITY_BITS:
        raise ValueError(
            f"threshold_bits must be 1 to {MAX_VISIBLE_THRESHOLDS} increasing bf16 magnitudes below 0x7F80, "
            f"not {tuple(bits)}"
        )


def validate_thresholds(thresholds: Sequence[float]) -> None:
    """Raise ValueError unless there are as many as THRESHOLDS."""
    if len(thresholds) != len(THRESHOLDS):
        raise ValueError(f"thresholds must be {len(THRESHOLDS)}, not {len(thresholds)}")


def delta(
    base: torch.Tensor,
    trained: torch.Tensor,
    *,
    threshold_bits: Sequence[int] = DEFAULT_THRESHOLD_BITS,
    out: Tally | None = None,
    mask: torch.Tensor | None = None,
) -> Tally:
    """Count every per-coordinate metric of a pair of tensors in one pass over both.

    Args:
        base: W: bf16, fp16, fp32 or fp64, any shape. Copied only if not contiguous; of a DTensor, the local shard.
        trained: W': same shape and device as `base`; the dtype may differ.
        threshold_bits: 1 to 4 increasing bf16 magnitudes, as bits (0x3728 is 1.00136e-5); `Tally.hist_base_over[k]`
            counts |W| where visible |delta| exceeds `threshold_bits[k]`.
        out: A tally with the same `threshold_bits` that is added to in place and returned.
        mask: uint8 [ceil(n / 8)], overwritten: one bit per coordinate, least significant first, set where visible
            |delta| exceeds `threshold_bits[0]`.

    Returns:
        The tally of the pair.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes or devices differ, or `threshold_bits`, `out` or `mask` do not fit.

    Examples:
        >>> tally = delta(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
        >>> tally.bit_equal, tally.max_delta, exact_float(tally.sum_delta_sq)
        (1, 0.5, 0.25)
    """
    base, trained = to_local(base), to_local(trained)
    validate_pair(base, trained)
    threshold_bits = tuple(int(bits) for bits in threshold_bits)
    validate_threshold_bits(threshold_bits)
    if out is not None and out.threshold_bits != threshold_bits:
        raise ValueError(f"out has threshold_bits {out.threshold_bits}, not {threshold_bits}")
    tally = Tally.empty(threshold_bits) if out is None else out
    arrays = [torch.from_numpy(a) for a in (tally.tables, tally.counts, tally.sums, tally.maximum)]
    outputs = [a.to(base.device) for a in arrays]
    torch.ops.opdkernels.delta_(base, trained, threshold_bits, THRESHOLDS, *outputs, mask)
    if base.device.type != "cpu":
        for array, output in zip(arrays, outputs, strict=True):
            array.copy_(output)
    return tally


from opdkernels.ops.delta import many as many  # noqa: E402  (registers its operator)
