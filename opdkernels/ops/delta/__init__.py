r"""`delta`: every coordinate-wise figure of a pair of tensors from one pass.

For W (source) and W' (trained), per coordinate:

    stored view    delta = W' - W in fp32 (fp64 where either side is fp64)
    visible view   delta = bf16(bf16(W') - bf16(W)): what a bf16 deployment sees

A bf16 magnitude has 2^15 values, so integer tables of |W|, |delta| and |W| of the changed hold every figure at any
threshold chosen later, without sorting. Sums are exact integers, so the result, the *tally*, is a commutative monoid:
threads, slices, machines and resumed runs merge to the same bits. A coordinate is left out, and counted as non-finite,
where W, W' or their visible delta is not finite.

Source: arXiv 2606.13657 (the metrics); the tables are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.ops import localise, register

BINS = 1 << 15
SUM_LIMBS, SUM_SHIFT = 44, 1074  # exact sums: signed int64 limbs of radix 2^32, in units of 2^-1074
THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
DEFAULT_CUTS = (0, 0x3727, 0x3728)  # |delta| > 0, > 1e-5, > bf16(1e-5) = 1.00136e-5
MAX_CUTS = 4
ULP_REACH = 16
ULP_BINS = 2 * ULP_REACH + 3
NUMEL, NONFINITE, BIT_EQUAL, ETA, LT, LE, ULP = 0, 1, 2, 3, 4, 9, 14
COUNTS = ULP + ULP_BINS
SOURCE, DELTA, TRAINED, MOVED, STORED, CHANGED = range(6)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

with np.errstate(invalid="ignore"):  # the last bins are NaN patterns
    magnitudes: np.ndarray = (np.arange(BINS, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)

SCHEMA = (
    "delta_(Tensor source, Tensor trained, int[] cuts, float[] thresholds, Tensor(a!) tables, Tensor(b!) counts, "
    "Tensor(c!) sums, Tensor(d!) maximum, Tensor(e!)? mask) -> ()"
)


def fake(source, trained, cuts, thresholds, tables, counts, sums, maximum, mask) -> None:
    torch._check(source.numel() == trained.numel(), lambda: f"sizes differ: {source.shape} and {trained.shape}")


def pattern(x: torch.Tensor) -> torch.Tensor:
    """Bits of a bf16 tensor as int64."""
    return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def same_bits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equal patterns. Of two dtypes: after widening, where a NaN keeps no payload to compare and so equals nothing."""
    if x.dtype != y.dtype:
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return same_bits(x.to(wide), y.to(wide)) & ~x.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.view(integers) == y.view(integers)


def exact_total(values: torch.Tensor) -> int:
    """Sum of fp64 values as an integer in units of 2^-1074."""
    mantissa, exponent = torch.frexp(values)
    integer, shift = (mantissa * 2.0**53).to(torch.int64), exponent.to(torch.int64) + SUM_SHIFT - 53
    integer = integer >> (-shift).clamp(min=0)  # subnormals carry their zeros in front
    total = 0
    for s in shift.clamp(min=0).unique().tolist():
        chosen = integer[shift.clamp(min=0) == s]
        total += (int((chosen >> 26).sum()) << (26 + s)) + (int((chosen & 0x3FFFFFF).sum()) << s)
    return total


def to_limbs(total: int) -> list[int]:
    return [total >> 32 * i & 0xFFFFFFFF for i in range(SUM_LIMBS - 1)] + [total >> 32 * (SUM_LIMBS - 1)]


def from_limbs(limbs: Sequence[int]) -> int:
    return sum(int(limb) << 32 * i for i, limb in enumerate(limbs) if limb)


def reference(source, trained, cuts, thresholds, tables, counts, sums, maximum, mask) -> None:
    """The definition, in plain PyTorch. Adds to `tables`, `counts`, `sums`, `maximum`; writes `mask`."""
    source, trained = source.flatten(), trained.flatten()
    wide = torch.float64 if torch.float64 in (source.dtype, trained.dtype) else torch.float32
    x, y = source.to(wide), trained.to(wide)
    w, v = x.float().bfloat16(), y.float().bfloat16()
    abs_w, abs_v = pattern(w) & 0x7FFF, pattern(v) & 0x7FFF
    visible = pattern((v.float() - w.float()).bfloat16()) & 0x7FFF
    finite = (abs_w < 0x7F80) & (abs_v < 0x7F80) & (visible < 0x7F80)
    if mask is not None:
        bits = torch.zeros(mask.numel() * 8, dtype=torch.int64, device=source.device)
        bits[: source.numel()] = (visible > cuts[0]) & finite
        mask.copy_((bits.view(-1, 8) << torch.arange(8, device=source.device)).sum(1))
    counts[NUMEL] += source.numel()
    counts[NONFINITE] += (~finite).sum()
    counts[BIT_EQUAL] += same_bits(source, trained).sum()
    x, y, abs_w, abs_v, visible = x[finite], y[finite], abs_w[finite], abs_v[finite], visible[finite]

    def count(row: int, patterns: torch.Tensor) -> None:
        tables[row] += torch.bincount(patterns, minlength=BINS)

    stored = (y - x).abs()
    count(SOURCE, abs_w)
    count(DELTA, visible)
    count(TRAINED, abs_v[visible > 0])
    count(MOVED, abs_w[stored > 0])
    count(STORED, stored.float().view(torch.int32).to(torch.int64) >> 16)
    for k, cut in enumerate(cuts):
        count(CHANGED + k, abs_w[visible > cut])
    counts[ETA] += (stored <= torch.tensor(1e-3, dtype=wide) * torch.maximum(x.abs(), y.abs())).sum()
    for k, threshold in enumerate(thresholds):
        counts[LT + k] += (stored.double() < threshold).sum()
        counts[LE + k] += (stored.double() <= threshold).sum()
    ordered_w = torch.where(w[finite].signbit(), -abs_w, abs_w)
    ordered_v = torch.where(v[finite].signbit(), -abs_v, abs_v)
    distance = (ordered_v - ordered_w).clamp(-ULP_REACH - 1, ULP_REACH + 1) + ULP_REACH + 1
    counts[ULP:] += torch.bincount(distance, minlength=ULP_BINS)
    for row, values in enumerate((x.double().square(), y.double().square(), stored.double().square(), stored.double())):
        total = from_limbs(sums[row].tolist()) + exact_total(values)
        sums[row] = torch.tensor(to_limbs(total))
    if stored.numel():
        maximum[0] = torch.maximum(maximum[0], stored.max().double())


register("delta", SCHEMA, reference, fake)


@dataclass
class Tally:
    """What `delta` counts. All integers but the maximum, so `merge` is exact, associative and commutative.

    `tables` int64 [5 + cuts, 32768] and `counts` int64 [49] are indexed as the properties show, `sums` int64 [4, 44]
    holds the exact sums; sums are in units of the weights squared (|delta|: of the weights), stored view.
    """

    cuts: tuple[int, ...]
    tables: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    maximum: np.ndarray

    @classmethod
    def empty(cls, cuts: Sequence[int] = DEFAULT_CUTS) -> Tally:
        tables = np.zeros((CHANGED + len(cuts), BINS), np.int64)
        return cls(tuple(cuts), tables, np.zeros(COUNTS, np.int64), np.zeros((4, SUM_LIMBS), np.int64), np.zeros(1))

    numel = property(lambda self: int(self.counts[NUMEL]), doc="Coordinates, non-finite ones included.")
    nonfinite = property(lambda self: int(self.counts[NONFINITE]), doc="Coordinates left out of every table and sum.")
    finite = property(lambda self: self.numel - self.nonfinite, doc="Coordinates that the tables count.")
    bit_equal = property(
        lambda self: int(self.counts[BIT_EQUAL]), doc="Equal bit patterns: a NaN equals itself, +0 is not -0."
    )
    eta_unchanged = property(
        lambda self: int(self.counts[ETA]), doc="Stored |w - w'| <= 1e-3 max(|w|, |w'|) (Zhu et al.)."
    )
    lt = property(lambda self: self.counts[LT:LE], doc="int64 [5]: stored |delta| < 1e-8 .. 1e-4.")
    le = property(lambda self: self.counts[LE:ULP], doc="int64 [5]: stored |delta| <= 1e-8 .. 1e-4.")
    ulp = property(
        lambda self: self.counts[ULP:], doc="int64 [35]: signed bf16 ULP distance; '< -16', -16 .. 16, '> 16'."
    )
    source = property(lambda self: self.tables[SOURCE], doc="Counts of |W|, rounded to bf16.")
    delta = property(lambda self: self.tables[DELTA], doc="Counts of visible |delta|; bin 0 holds the unchanged.")
    trained = property(lambda self: self.tables[TRAINED], doc="Counts of |W'| where the visible delta is not 0.")
    moved = property(lambda self: self.tables[MOVED], doc="Counts of |W| where the stored delta is not 0.")
    delta_stored = property(
        lambda self: self.tables[STORED], doc="Counts of stored |delta| by the top 16 bits of its fp32 value."
    )
    changed = property(
        lambda self: self.tables[CHANGED:], doc="[cuts, 32768]: counts of |W| where visible |delta| exceeds each cut."
    )
    sum_source_sq = property(lambda self: from_limbs(self.sums[0]), doc="Sum of W^2, exact, in units of 2^-1074.")
    sum_trained_sq = property(lambda self: from_limbs(self.sums[1]), doc="Sum of W'^2, exact, in units of 2^-1074.")
    sum_delta_sq = property(
        lambda self: from_limbs(self.sums[2]), doc="Sum of stored delta^2, exact, in units of 2^-1074."
    )
    sum_delta_abs = property(
        lambda self: from_limbs(self.sums[3]), doc="Sum of stored |delta|, exact, in units of 2^-1074."
    )
    max_delta = property(lambda self: float(self.maximum[0]), doc="Largest stored |delta|.")

    def merge(self, other: Tally) -> Tally:
        """The tally of both inputs' coordinates together."""
        if self.cuts != other.cuts:
            raise ValueError(f"tallies of different cuts do not merge: {self.cuts} and {other.cuts}")
        sums = np.array(
            [to_limbs(from_limbs(a) + from_limbs(b)) for a, b in zip(self.sums, other.sums, strict=True)], np.int64
        )
        return Tally(
            self.cuts,
            self.tables + other.tables,
            self.counts + other.counts,
            sums,
            np.maximum(self.maximum, other.maximum),
        )

    def clear(self) -> None:
        for array in (self.tables, self.counts, self.sums, self.maximum):
            array.fill(0)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tally)
            and self.cuts == other.cuts
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


def delta(
    source: torch.Tensor,
    trained: torch.Tensor,
    *,
    cuts: Sequence[int] = DEFAULT_CUTS,
    into: Tally | None = None,
    mask: torch.Tensor | None = None,
) -> Tally:
    """Tally of a pair of tensors, from one pass over both.

    source, trained: bf16, fp16, fp32 or fp64 (they may differ), same shape, same device; copied only if not contiguous.
    cuts: up to 4 increasing bf16 magnitude patterns; `changed[k]` counts |W| where visible |delta| exceeds `cuts[k]`.
    into: a tally of the same cuts, added to in place and returned.
    mask: uint8 [ceil(n / 8)], receives one bit a coordinate (little-endian), set where visible |delta| exceeds `cuts[0]`.

    Raises TypeError for other dtypes, ValueError for shapes, devices, cuts or masks that do not fit.

    >>> tally = delta(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
    >>> tally.bit_equal, tally.max_delta, exact_float(tally.sum_delta_sq)
    (1, 0.5, 0.25)
    """
    source, trained = localise(source), localise(trained)
    for side, tensor in (("source", source), ("trained", trained)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{side} is {tensor.dtype}; delta takes bfloat16, float16, float32 and float64")
    if source.shape != trained.shape:
        raise ValueError(f"shapes differ: source {tuple(source.shape)}, trained {tuple(trained.shape)}")
    if source.device != trained.device:
        raise ValueError(f"source is on {source.device}, trained on {trained.device}; move one of them")
    cuts = tuple(int(c) for c in cuts)
    if not 1 <= len(cuts) <= MAX_CUTS or list(cuts) != sorted(set(cuts)) or cuts[0] < 0 or cuts[-1] >= 0x7F80:
        raise ValueError(f"cuts must be 1 to {MAX_CUTS} increasing bf16 magnitude patterns below 0x7F80, not {cuts}")
    if into is not None and into.cuts != cuts:
        raise ValueError(f"the tally to add to has cuts {into.cuts}, not {cuts}")
    if mask is not None and (
        mask.dtype != torch.uint8 or mask.shape != ((source.numel() + 7) // 8,) or not mask.is_contiguous()
    ):
        raise ValueError(f"mask must be a contiguous uint8 tensor of {(source.numel() + 7) // 8} elements")
    tally = Tally.empty(cuts) if into is None else into
    arrays = [torch.from_numpy(a) for a in (tally.tables, tally.counts, tally.sums, tally.maximum)]
    outputs = [a.to(source.device) for a in arrays]
    torch.ops.opdkernels.delta_(source, trained, cuts, THRESHOLDS, *outputs, mask)
    if source.device.type != "cpu":
        for array, output in zip(arrays, outputs, strict=True):
            array.copy_(output)
    return tally
