r"""`quantile`: the exact cut at the top or bottom k magnitudes of an array, and its overlap with a mask, without sorting.

The cut is the k-th largest (smallest) |x|; `above` values lie strictly beyond it and `tied` at it, so
above < k <= above + tied. Which of the tied belong to the k chosen is arbitrary: what a mask shares with them is given by
bounds and by its expectation under random tie-breaking.

NaN is no magnitude: it is left out and counted. Infinity is the largest one. -0 and +0 are tied.

Source: arXiv 2606.13657 (near-zero and principal masks); Blum et al. 1973 and Floyd and Rivest 1975 (selection by sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opdkernels.ops import localise, register
from opdkernels.ops.delta import DTYPES

SCHEMA = "quantile(Tensor values, int[] k, bool largest, Tensor? mask) -> (Tensor cuts, Tensor counts)"


def fake(values, k, largest, mask) -> tuple[torch.Tensor, torch.Tensor]:
    return values.new_empty(len(k), dtype=torch.float64), values.new_empty((len(k), 5), dtype=torch.int64)


def unpack(mask: torch.Tensor, n: int) -> torch.Tensor:
    """The first n bits of a packed mask, least significant bit first, as bool [n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask[:, None] >> shifts & 1).flatten()[:n].bool()


def reference(values, k, largest, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch. cuts fp64 [K]; counts int64 [K, 5]: above, tied, the same within the mask, NaN."""
    cuts, counts = fake(values, k, largest, mask)
    size = values.flatten().abs()
    number = ~size.isnan()
    ordered = size[number].sort(descending=largest).values
    bits = torch.zeros_like(number) if mask is None else unpack(mask, len(size))
    cuts.fill_(float("nan"))
    counts.zero_()
    counts[:, 4] = (~number).sum()
    for j, rank in enumerate(k):
        if not len(ordered):
            continue
        cut = ordered[min(rank, len(ordered)) - 1]  # more than there are: all of them
        above, tied = size > cut if largest else size < cut, size == cut
        cuts[j] = cut.double()
        counts[j, :4] = torch.stack([above.sum(), tied.sum(), (above & bits).sum(), (tied & bits).sum()])
    return cuts, counts


register("quantile", SCHEMA, reference, fake)


@dataclass(frozen=True)
class Quantile:
    """The k largest or smallest magnitudes of an array: their cut, and how many lie beyond and at it.

    `nan` values were left out. `above_masked` and `tied_masked` are those of `above` and `tied` whose mask bit is set,
    None without a mask.
    """

    k: int
    cut: float
    above: int
    tied: int
    nan: int
    above_masked: int | None = None
    tied_masked: int | None = None

    @property
    def taken(self) -> int:
        """How many of the tied belong to the k chosen."""
        return self.k - self.above

    @property
    def masked(self) -> tuple[int, int]:
        if self.above_masked is None or self.tied_masked is None:
            raise ValueError("this quantile was taken without a mask")
        return self.above_masked, self.tied_masked

    @property
    def lower(self) -> int:
        """Least count of the chosen in the mask: tied ones outside it are taken first."""
        above, tied = self.masked
        return above + max(0, self.taken - (self.tied - tied))

    @property
    def upper(self) -> int:
        """Greatest count of the chosen in the mask: tied ones inside it are taken first."""
        above, tied = self.masked
        return above + min(self.taken, tied)

    @property
    def expected(self) -> float:
        """Expected count of the chosen in the mask under random tie-breaking."""
        above, tied = self.masked
        return above + self.taken * tied / self.tied


def quantiles(
    values: torch.Tensor, k: Sequence[int], *, largest: bool = True, mask: torch.Tensor | None = None
) -> list[Quantile]:
    """The cut for each k, from one pass: as `quantile`, for several k."""
    values = localise(values)
    n, wanted = values.numel(), [int(rank) for rank in k]
    if values.dtype not in DTYPES:
        raise TypeError(f"values are {values.dtype}; quantile takes bfloat16, float16, float32 and float64")
    for rank in wanted:
        if not 1 <= rank <= n:
            raise ValueError(f"k must lie in 1 .. {n}, the number of values, not {rank}")
    if mask is not None and (mask.dtype != torch.uint8 or mask.shape != ((n + 7) // 8,) or not mask.is_contiguous()):
        raise ValueError(f"mask must be a contiguous uint8 tensor of {(n + 7) // 8} elements")
    if mask is not None and mask.device != values.device:
        raise ValueError(f"values are on {values.device}, mask on {mask.device}; move one of them")
    cuts, counts = torch.ops.opdkernels.quantile(values, wanted, largest, mask)
    found = []
    for rank, cut, (above, tied, above_masked, tied_masked, nan) in zip(
        wanted, cuts.tolist(), counts.tolist(), strict=True
    ):
        if rank > n - nan:
            raise ValueError(f"k is {rank}, but of {n} values {nan} are NaN")
        inside = (above_masked, tied_masked) if mask is not None else (None, None)
        found.append(Quantile(rank, cut, above, tied, nan, *inside))
    return found


def quantile(values: torch.Tensor, k: int, *, largest: bool = True, mask: torch.Tensor | None = None) -> Quantile:
    """The exact k-th largest (or smallest) magnitude, and what lies beyond and at it, in the mask too.

    values: bf16, fp16, fp32 or fp64, any shape; copied only if not contiguous. k: 1 .. the number of values that are not NaN.
    mask: uint8 [ceil(n / 8)], one bit a value (little-endian), as `delta` writes it; what lies beyond bit n is ignored.

    Raises TypeError for other dtypes, ValueError for a k or a mask that does not fit.

    >>> found = quantile(torch.tensor([3.0, -1, 2, -2]), 2, mask=torch.tensor([0b0101], dtype=torch.uint8))
    >>> found.cut, found.above, found.tied, found.lower, found.upper, found.expected
    (2.0, 1, 2, 1, 2, 1.5)
    """
    return quantiles(values, [k], largest=largest, mask=mask)[0]
