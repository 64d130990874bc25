"""What the Triton and the CUDA launchers of `quantile` share: selection by radix digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

DIGIT_BITS, DIGITS = 16, 1 << 16
INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80,
    torch.float64: 0x7FF0,
}  # its first digit


def from_key(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The magnitudes of keys, fp64."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return keys.to(integers).view(dtype).double()


def next_digit(
    table: torch.Tensor, rank: torch.Tensor, largest: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The digit at which counts from the wanted end reach each rank [K], and how many lie before and at it [K, 2].

    table: [K, 2, 2^16], outside and inside the mask.
    """
    ordered = table.flip(2) if largest else table
    reached = ordered.cumsum(2)
    place = torch.searchsorted(reached.sum(1), rank.unsqueeze(1)).clamp(max=DIGITS - 1)
    here = place.unsqueeze(1).expand(-1, 2, -1)
    at = ordered.gather(2, here).squeeze(2)
    digit = (DIGITS - 1 - place if largest else place).squeeze(1)
    return digit, reached.gather(2, here).squeeze(2) - at, at


def cut_by_digits(
    digit_table: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, int], torch.Tensor],
    values: torch.Tensor,
    k: Sequence[int],
    largest: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator `quantile`, from digits of magnitudes, sixteen bits a pass, most significant first.

    digit_table(values, mask, prefixes, shift) counts the digit at `shift` of the values whose upper digits are a prefix, int64
    [prefixes, 2, 2^16]. Nothing comes back to the host in between.
    """
    device, dtype, values = values.device, values.dtype, values.view(-1)
    if not k:
        return torch.empty(0, dtype=torch.float64, device=device), torch.empty(0, 5, dtype=torch.int64, device=device)
    first = 8 * dtype.itemsize - DIGIT_BITS
    keys = torch.zeros(1, dtype=torch.int64, device=device)
    before = torch.zeros(len(k), 2, dtype=torch.int64, device=device)
    for shift in range(first, -1, -DIGIT_BITS):
        table = digit_table(values, mask, keys, shift)
        if shift == first:  # one table for all ranks
            beyond = INFINITY[dtype] + 1
            not_numbers = table.narrow(2, beyond, DIGITS - beyond)
            n_nan = not_numbers.sum()
            not_numbers.zero_()
            rank = torch.tensor(k, dtype=torch.int64, device=device).clamp(
                max=table.sum()
            )  # more than there are: all of them
            table = table.expand(len(k), -1, -1)
        digit, passed, at = next_digit(table, rank, largest)
        keys, before, rank = keys << DIGIT_BITS | digit, before + passed, rank - passed.sum(1)
    tied = at.sum(1)
    counts = torch.stack([before.sum(1), tied, before.select(1, 1), at.select(1, 1), n_nan.expand(len(k))], 1)
    return torch.where(tied > 0, from_key(keys, dtype), float("nan")), counts
