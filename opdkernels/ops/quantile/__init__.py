r"""`quantile`: the exact threshold of the top or bottom k magnitudes of an array, and their overlap with a mask.

The threshold is the k-th largest (smallest) |x|, found without sorting; `above` values are strictly beyond it and
`tied` equal it, so above < k <= above + tied. Which of the tied values belong to the top k is arbitrary: their overlap
with a mask is given by bounds and by its expectation under random tie-breaking.

NaN has no magnitude: it is excluded and counted. Infinity is the largest magnitude. -0 and +0 are tied.

Source: arXiv 2606.13657 (near-zero and principal masks); Blum et al. 1973 and Floyd and Rivest 1975 (selection by
sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdkernels.ops import register, to_local
from opdkernels.ops.arguments import validate_input, validate_memory, validate_tensor
from opdkernels.ops.delta import DTYPES
from opdkernels.ops.quantile.layout import COUNT_NAN, NUM_COUNTS

SCHEMA = "quantile(Tensor values, int[] k, bool largest, Tensor? mask) -> (Tensor thresholds, Tensor counts)"


def fake(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return values.new_empty(len(k), dtype=torch.float64), values.new_empty((len(k), NUM_COUNTS), dtype=torch.int64)


def unpack(mask: torch.Tensor, n: int) -> torch.Tensor:
    """The first n bits of a packed mask, least significant bit first, as bool [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask[:, None] >> shifts & 1).flatten()[:n].bool()


def reference(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch.

    Args:
        values: [n], any shape; flattened.
        k: Ranks, from 1. A rank beyond the number of values that are not NaN means all of them.
        largest: Whether ranks count from the largest magnitude.
        mask: uint8 [ceil(n / 8)], one bit per value, or None.

    Returns:
        thresholds, fp64 [K], NaN where no value is a number; counts, int64 [K, NUM_COUNTS]: values above the threshold,
        tied with it, both again within the mask, and NaN.
    """
    thresholds, counts = fake(values, k, largest, mask)
    magnitudes = values.flatten().abs()
    is_number = ~magnitudes.isnan()
    ordered = magnitudes[is_number].sort(descending=largest).values
    bits = torch.zeros_like(is_number) if mask is None else unpack(mask, len(magnitudes))
    thresholds.fill_(float("nan"))
    counts.zero_()
    counts[:, COUNT_NAN] = (~is_number).sum()
    for j, rank in enumerate(k):
        if not len(ordered):
            continue
        threshold = ordered[min(rank, len(ordered)) - 1]
        above, tied = magnitudes > threshold if largest else magnitudes < threshold, magnitudes == threshold
        thresholds[j] = threshold.double()
        counts[j, :COUNT_NAN] = torch.stack([above.sum(), tied.sum(), (above & bits).sum(), (tied & bits).sum()])
    return thresholds, counts


def validate(values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    n = values.numel()
    validate_input("values", values, DTYPES, values.device)
    if any(rank < 1 for rank in k):
        raise ValueError(f"ranks begin at 1, not {min(k)}")
    if mask is not None:
        validate_tensor("mask", mask, torch.uint8, ((n + 7) // 8,), values.device)
    validate_memory([], [values] if mask is None else [values, mask])


register("quantile", SCHEMA, reference, fake, validate=validate)


@dataclass(frozen=True)
class Quantile:
    """The k largest or smallest magnitudes of an array.

    Attributes:
        k: The rank.
        threshold: The k-th magnitude.
        above: Values strictly beyond the threshold: larger, or smaller for the smallest magnitudes.
        tied: Values equal to the threshold.
        nan: Values that are NaN, and excluded.
        above_masked: Values of `above` whose mask bit is set; None without a mask.
        tied_masked: Values of `tied` whose mask bit is set; None without a mask.
    """

    k: int
    threshold: float
    above: int
    tied: int
    nan: int
    above_masked: int | None = None
    tied_masked: int | None = None

    @property
    def ties_taken(self) -> int:
        """How many of the tied values belong to the top k."""
        return self.k - self.above

    @property
    def masked(self) -> tuple[int, int]:
        """`above_masked` and `tied_masked`; raises ValueError without a mask."""
        if self.above_masked is None or self.tied_masked is None:
            raise ValueError("this quantile was computed without a mask")
        return self.above_masked, self.tied_masked

    @property
    def lower(self) -> int:
        """Least count of the top k in the mask: ties are taken outside it first."""
        above, tied = self.masked
        return above + max(0, self.ties_taken - (self.tied - tied))

    @property
    def upper(self) -> int:
        """Greatest count of the top k in the mask: ties are taken inside it first."""
        above, tied = self.masked
        return above + min(self.ties_taken, tied)

    @property
    def expected(self) -> float:
        """Expected count of the top k in the mask under random tie-breaking."""
        above, tied = self.masked
        return above + self.ties_taken * tied / self.tied


def quantiles(
    values: torch.Tensor, k: Sequence[int], *, largest: bool = True, mask: torch.Tensor | None = None
) -> list[Quantile]:
    """As `quantile`, for several ranks from one pass.

    Args:
        values: As `quantile`.
        k: Ranks, each from 1 to the number of values that are not NaN.
        largest: As `quantile`.
        mask: As `quantile`.

    Returns:
        One `Quantile` per rank, in order.

    Raises:
        TypeError: As `quantile`.
        ValueError: As `quantile`.
    """
    values = to_local(values)
    n, ranks = values.numel(), [int(rank) for rank in k]
    for rank in ranks:
        if not 1 <= rank <= n:
            raise ValueError(f"k must be in 1 .. {n}, the number of values, not {rank}")
    thresholds, counts = torch.ops.opdkernels.quantile(values, ranks, largest, mask)
    results = []
    for rank, threshold, (above, tied, above_masked, tied_masked, nan) in zip(
        ranks, thresholds.tolist(), counts.tolist(), strict=True
    ):
        if rank > n - nan:
            raise ValueError(f"k is {rank}, but of {n} values {nan} are NaN")
        masked = (above_masked, tied_masked) if mask is not None else (None, None)
        results.append(Quantile(rank, threshold, above, tied, nan, *masked))
    return results


def quantile(values: torch.Tensor, k: int, *, largest: bool = True, mask: torch.Tensor | None = None) -> Quantile:
    """Find the exact k-th largest or smallest magnitude, and count the values beyond it and tied with it.

    Args:
        values: bf16, fp16, fp32 or fp64, any shape. Copied only if not contiguous; of a DTensor, the local shard.
        k: Rank, from 1 to the number of values that are not NaN.
        largest: Whether the rank counts from the largest magnitude.
        mask: uint8 [ceil(n / 8)], one bit per value, least significant first, as `delta` writes it; bits from n on are
            ignored. Counts are then also taken within it.

    Returns:
        The threshold and the counts.

    Raises:
        TypeError: Another dtype.
        ValueError: `k` or `mask` does not fit.

    Examples:
        >>> top = quantile(torch.tensor([3.0, -1, 2, -2]), 2, mask=torch.tensor([0b0101], dtype=torch.uint8))
        >>> top.threshold, top.above, top.tied, top.lower, top.upper, top.expected
        (2.0, 1, 2, 1, 2, 1.5)
    """
    return quantiles(values, [k], largest=largest, mask=mask)[0]
