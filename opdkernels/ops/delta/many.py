"""`delta` of many tensors in one call, with only the bins in use: what a call costs besides its coordinates matters in
checkpoints of many small tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opdkernels.backends.layout import SUM_LIMBS
from opdkernels.bits import narrowest_dtype
from opdkernels.ops import register, to_local
from opdkernels.ops.arguments import validate_input, validate_memory, validate_tensor
from opdkernels.ops.delta import (
    DEFAULT_THRESHOLD_BITS,
    DTYPES,
    THRESHOLDS,
    Tally,
    reference,
    validate_pair,
    validate_threshold_bits,
    validate_thresholds,
)
from opdkernels.ops.delta.gpu_common import one_by_one
from opdkernels.ops.delta.layout import (
    COUNT_BIT_EQUAL,
    COUNT_NONFINITE,
    COUNT_NUMEL,
    COUNT_ULP,
    HIST_BASE,
    HIST_BASE_CHANGED,
    HIST_BASE_OVER,
    HIST_DELTA,
    NUM_COUNTS,
    NUM_SUMS,
    ROWS_OF_BINS,
)

CAPACITY = 1 << 18  # bins of a call of the operator, 16 MB of tables: at least BINS, so that any pair fits
SCHEMA = (
    "delta_many_(Tensor[] base, Tensor[] trained, int[] threshold_bits, float[] thresholds, Tensor(a!) num_bins, "
    "Tensor(b!) bin_bits, Tensor(c!) tables, Tensor(d!) counts, Tensor(e!) sums, Tensor(f!) maximum) -> ()"
)


@dataclass(frozen=True)
class SparseTally:
    """A tally with only the bins in use.

    Attributes:
        threshold_bits: bf16 bits of the thresholds that visible |delta| was compared with.
        bin_bits: bf16 bits of the magnitude of each bin, ascending, uint16 [bins].
        tables: Histograms, [5 + len(threshold_bits), bins], rows as in `ops.delta.layout`, in the narrowest of uint16,
            uint32 and int64 that holds them: a checkpoint has many tallies. `table` returns a row as int64.
        counts: int64 [NUM_COUNTS], as in `ops.delta.layout`.
        sums: Exact sums as int64 limbs [NUM_SUMS, SUM_LIMBS].
        max_delta: The largest stored |delta|.
    """

    threshold_bits: tuple[int, ...]
    bin_bits: np.ndarray
    tables: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    max_delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "bin_bits", self.bin_bits.astype(np.uint16))
        object.__setattr__(self, "tables", self.tables.astype(narrowest_dtype(self.tables)))

    @classmethod
    def of(cls, tally: Tally) -> SparseTally:
        """The bins in use of a dense tally."""
        used = used_bins(tally.tables)
        return cls(
            tally.threshold_bits, used, tally.tables[:, used], tally.counts.copy(), tally.sums.copy(), tally.max_delta
        )

    def dense(self) -> Tally:
        """The dense tally."""
        tally = Tally.empty(self.threshold_bits)
        tally.tables[:, self.bin_bits] = self.tables
        tally.counts[:], tally.sums[:], tally.maximum[:] = self.counts, self.sums, self.max_delta
        return tally

    numel = property(lambda self: int(self.counts[COUNT_NUMEL]))
    nonfinite = property(lambda self: int(self.counts[COUNT_NONFINITE]))
    bit_equal = property(lambda self: int(self.counts[COUNT_BIT_EQUAL]))
    finite = property(lambda self: self.numel - self.nonfinite)
    hist_base = property(lambda self: self.table(HIST_BASE))
    hist_delta = property(lambda self: self.table(HIST_DELTA))
    ulp = property(lambda self: self.counts[COUNT_ULP:])

    def table(self, row: int) -> np.ndarray:
        """One histogram, int64 [bins]."""
        return self.tables[row].astype(np.int64)

    def changed(self, view: str) -> np.ndarray:
        """Histogram of |W| over the coordinates whose delta is not 0, int64 [bins]."""
        return self.table(HIST_BASE_CHANGED if view == "stored" else HIST_BASE_OVER)


def used_bins(tables: np.ndarray) -> np.ndarray:
    """The bins in use, ascending, of dense histograms."""
    return np.flatnonzero(np.logical_or.reduce(tables[list(ROWS_OF_BINS)]))


def reference_many(base: Sequence[torch.Tensor], trained: Sequence[torch.Tensor], *arguments: Any) -> None:
    """The definition: `reference` of each pair, and its bins in use after those of the pairs before.

    The outputs are num_bins, int64 [pairs]; bin_bits, int64 [capacity]; tables, int64 [HIST_BASE_OVER +
    len(threshold_bits), capacity]; counts, int64 [pairs, NUM_COUNTS]; sums, int64 [pairs, NUM_SUMS, SUM_LIMBS];
    maximum, fp64 [pairs]. All are overwritten. `num_bins` is -1 from the first pair on whose bins do not fit, and the
    other outputs of those pairs are undefined.
    """
    one_by_one(reference, base, trained, *arguments)


def validate_many(
    base: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    threshold_bits: Sequence[int],
    thresholds: Sequence[float],
    num_bins: torch.Tensor,
    bin_bits: torch.Tensor,
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    device, pairs = num_bins.device, len(base)
    if len(trained) != pairs:
        raise ValueError(f"{pairs} base tensors but {len(trained)} trained ones; give one of each per pair")
    for w, v in zip(base, trained, strict=True):
        validate_input("base", w, DTYPES, device)
        validate_input("trained", v, DTYPES, device, w.numel())
    validate_threshold_bits(threshold_bits)
    validate_thresholds(thresholds)
    validate_tensor("num_bins", num_bins, torch.int64, (pairs,), device)
    validate_tensor("bin_bits", bin_bits, torch.int64, (bin_bits.numel(),), device)
    rows = HIST_BASE_OVER + len(threshold_bits)
    validate_tensor("tables", tables, torch.int64, (rows, bin_bits.numel()), device)
    validate_tensor("counts", counts, torch.int64, (pairs, NUM_COUNTS), device)
    validate_tensor("sums", sums, torch.int64, (pairs, NUM_SUMS, SUM_LIMBS), device)
    validate_tensor("maximum", maximum, torch.float64, (pairs,), device)
    validate_memory([num_bins, bin_bits, tables, counts, sums, maximum], [*base, *trained])


register("delta", SCHEMA, reference_many, validate=validate_many)


def delta_many(
    base: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    *,
    threshold_bits: Sequence[int] = DEFAULT_THRESHOLD_BITS,
) -> list[SparseTally]:
    """`delta` of each pair of tensors, with only the bins in use.

    Args:
        base: W of each pair, as for `delta`; all on one device.
        trained: W' of each pair.
        threshold_bits: As for `delta`.

    Returns:
        One tally per pair.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes or devices differ, or `threshold_bits` do not fit.

    Examples:
        >>> tallies = delta_many([torch.ones(4), torch.zeros(2)], [torch.tensor([1.0, 1, 1, 2]), torch.zeros(2)])
        >>> [(tally.numel, tally.bit_equal) for tally in tallies]
        [(4, 3), (2, 2)]
    """
    if len(base) != len(trained):
        raise ValueError(f"{len(base)} base tensors but {len(trained)} trained ones; give one of each per pair")
    base, trained = [to_local(tensor) for tensor in base], [to_local(tensor) for tensor in trained]
    for pair in zip(base, trained, strict=True):
        validate_pair(*pair)
    threshold_bits = tuple(int(bits) for bits in threshold_bits)
    validate_threshold_bits(threshold_bits)
    tallies: list[SparseTally] = []
    device = base[0].device if base else torch.device("cpu")
    bin_bits = torch.empty(CAPACITY, dtype=torch.int64, device=device)
    tables = torch.empty(HIST_BASE_OVER + len(threshold_bits), CAPACITY, dtype=torch.int64, device=device)
    while len(tallies) < len(base):
        w, v = base[len(tallies) :], trained[len(tallies) :]
        num_bins = torch.empty(len(w), dtype=torch.int64, device=device)
        counts = torch.empty(len(w), NUM_COUNTS, dtype=torch.int64, device=device)
        sums = torch.empty(len(w), NUM_SUMS, SUM_LIMBS, dtype=torch.int64, device=device)
        maximum = torch.empty(len(w), dtype=torch.float64, device=device)
        outputs = num_bins, bin_bits, tables, counts, sums, maximum
        torch.ops.opdkernels.delta_many_(w, v, threshold_bits, THRESHOLDS, *outputs)
        stops = num_bins[num_bins >= 0].cumsum(0).tolist()
        used = stops[-1]  # one pair fits
        bits_used, tables_used = bin_bits[:used].cpu().numpy(), tables[:, :used].cpu().numpy()
        all_counts, all_sums, all_maximum = counts.cpu().numpy(), sums.cpu().numpy(), maximum.tolist()
        for i, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            tallies.append(
                SparseTally(
                    threshold_bits,
                    bits_used[start:stop],
                    tables_used[:, start:stop],
                    all_counts[i].copy(),
                    all_sums[i].copy(),
                    all_maximum[i],
                )
            )
    return tallies
