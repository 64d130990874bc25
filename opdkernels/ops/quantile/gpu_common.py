"""What the Triton and the CUDA launchers of `quantile` share: selection by radix digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opdkernels.backends.layout import INFINITY_BITS
from opdkernels.ops.quantile.layout import DIGIT_BITS, DIGITS, NUM_COUNTS

# The first digit of infinity: any larger one belongs to a NaN.
INFINITY_DIGIT = {
    torch.bfloat16: INFINITY_BITS,
    torch.float16: 0x7C00,
    torch.float32: INFINITY_BITS,
    torch.float64: 0x7FF0,
}


def from_key(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The magnitudes whose bits are `keys`, fp64."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return keys.to(integers).view(dtype).double()


def next_digit(
    table: torch.Tensor, rank: torch.Tensor, largest: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The digit at which counts from the chosen end reach each rank.

    Args:
        table: Counts by digit, int64 [K, 2, DIGITS], outside and inside the mask.
        rank: int64 [K].
        largest: Whether ranks count from the largest digit.

    Returns:
        The digit [K], the counts before it [K, 2] and the counts at it [K, 2].
    """
    ordered = table.flip(2) if largest else table
    reached = ordered.cumsum(2)
    position = torch.searchsorted(reached.sum(1), rank.unsqueeze(1)).clamp(max=DIGITS - 1)
    index = position.unsqueeze(1).expand(-1, 2, -1)
    at = ordered.gather(2, index).squeeze(2)
    digit = (DIGITS - 1 - position if largest else position).squeeze(1)
    return digit, reached.gather(2, index).squeeze(2) - at, at


def select_by_digits(
    digit_table: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, int], torch.Tensor],
    values: torch.Tensor,
    k: Sequence[int],
    largest: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `quantile` by radix selection on magnitudes: 16 bits per pass, most significant first.

    Nothing is copied to the host between passes.

    Args:
        digit_table: `digit_table(values, mask, prefixes, shift)` counts the digit at `shift` of the values whose upper
            digits equal a prefix, int64 [len(prefixes), 2, DIGITS].
        values: As the operator.
        k: As the operator.
        largest: As the operator.
        mask: As the operator.

    Returns:
        thresholds and counts of the operator.
    """
    device, dtype, values = values.device, values.dtype, values.view(-1)
    if not k:
        no_counts = torch.empty(0, NUM_COUNTS, dtype=torch.int64, device=device)
        return torch.empty(0, dtype=torch.float64, device=device), no_counts
    first = 8 * dtype.itemsize - DIGIT_BITS
    keys = torch.zeros(1, dtype=torch.int64, device=device)
    before = torch.zeros(len(k), 2, dtype=torch.int64, device=device)
    for shift in range(first, -1, -DIGIT_BITS):
        table = digit_table(values, mask, keys, shift)
        if shift == first:  # one table for all ranks
            first_nan = INFINITY_DIGIT[dtype] + 1
            nan_counts = table.narrow(2, first_nan, DIGITS - first_nan)
            n_nan = nan_counts.sum()
            nan_counts.zero_()
            # A rank beyond the number of values means all of them.
            rank = torch.tensor(k, dtype=torch.int64, device=device).clamp(max=table.sum())
            table = table.expand(len(k), -1, -1)
        digit, passed, at = next_digit(table, rank, largest)
        keys, before, rank = keys << DIGIT_BITS | digit, before + passed, rank - passed.sum(1)
    tied = at.sum(1)
    counts = torch.stack([before.sum(1), tied, before.select(1, 1), at.select(1, 1), n_nan.expand(len(k))], 1)
    return torch.where(tied > 0, from_key(keys, dtype), float("nan")), counts
