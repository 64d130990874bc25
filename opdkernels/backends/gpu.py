"""What the backends for GPUs share outside their kernels: slices, thresholds as integers, cuts by digits, joint counts added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

SLICE = 1 << 30  # elements a launch: 32-bit counters of one cannot overflow

# `delta`
MAX_CUTS, MAX_THRESHOLDS = 4, 5
NEVER = 0x7FFF  # no finite magnitude exceeds this pattern
LT, LE = 4, 9  # places among the operator's counts

# `quantile`
DIGIT_BITS, DIGITS = 16, 1 << 16
INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F80,
    torch.float64: 0x7FF0,
}  # its first digit

# `patch`
PATCH_BLOCK = 1 << 16
VALID = 1 << 62  # the first bad block where there is none

# `overlap`
GROUP, GROUP_SETS = 4, 16  # runs that share a joint table, and the sets of them


def slices(n: int) -> Iterator[tuple[int, int]]:
    """Start and size of the ranges of n elements that are launched one by one."""
    return ((start, min(SLICE, n - start)) for start in range(0, n, SLICE))


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """int64 on a device, on its current stream; the host does not wait for what is there."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def address(argument: torch.Tensor | int | None) -> int:
    """What a kernel takes of an argument: a tensor's address, a number, zero for what is not there."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return 0 if argument is None else int(argument)


def mask_from(mask: torch.Tensor | None, start: int) -> torch.Tensor | None:
    """The bits of a slice, where there is a mask: eight to a byte."""
    return None if mask is None else mask.narrow(0, start // 8, mask.numel() - start // 8)


def limits(threshold: float, kind: type[np.floating]) -> tuple[int, int]:
    """The patterns from which a magnitude is not below a threshold, and from which it is beyond it.

    >>> [hex(limit) for limit in limits(0.5, np.float32)]
    ['0x3f000000', '0x3f000001']
    """
    if not threshold > 0:
        return 0, int(threshold == 0)
    with np.errstate(over="ignore"):
        nearest = kind(threshold)
    pattern = int(nearest.view(np.int64 if kind is np.float64 else np.int32))
    return pattern + int(float(nearest) < threshold), pattern + int(float(nearest) <= threshold)


def rules_of(cuts: Sequence[int], thresholds: Sequence[float], kind: type[np.floating]) -> list[int]:
    """What a kernel compares with, as data: four cuts, ten limits in order, the count that each limit belongs to."""
    bounds = [(0, LT)] * 2 * (MAX_THRESHOLDS - len(thresholds))  # nothing is below zero
    for k, threshold in enumerate(thresholds):
        below, beyond = limits(threshold, kind)
        bounds += [(below, LT + k), (beyond, LE + k)]
    bounds.sort()
    return [*cuts, *[NEVER] * (MAX_CUTS - len(cuts)), *(limit for limit, _ in bounds), *(slot for _, slot in bounds)]


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


def change_limit(cut: int) -> int:
    """The least difference, as fp32 bits, whose rounding exceeds a cut: midpoints go to the even neighbour.

    >>> hex(change_limit(0)), hex(change_limit(1))
    ('0x8001', '0x18000')
    """
    return (cut << 16) + 0x8001 - (cut & 1)


def members(runs: int, device: torch.device) -> torch.Tensor:
    """Which runs each of the 2^runs sets holds, fp64 [2^runs, runs]: counts below 2^53 add up exactly in it."""
    places = torch.arange(runs, device=device)
    return ((torch.arange(1 << runs, device=device).unsqueeze(1) >> places) & 1).double()


def fold_overlap(joint: torch.Tensor, sets: torch.Tensor | None, outputs: Sequence[torch.Tensor]) -> None:
    """Adds joint counts int64 [groups, 16, 32768] to the operator's outputs.

    sets: int64 [2^runs], counts of whole sets other than the empty one; None of one group, whose table holds them.
    """
    source_table, changed, both, runs = outputs
    source_table += joint.select(0, 0).sum(0)
    of_group = members(GROUP, joint.device)
    changed += torch.matmul(of_group.T, joint.double()).long().flatten(0, 1).narrow(0, 0, len(changed))
    of_set = members(len(changed), joint.device)
    if sets is None:
        sets = joint.sum((0, 2)).narrow(0, 0, len(of_set))
    else:
        sets.narrow(0, 0, 1).add_(joint.select(0, 0).sum() - sets.sum())  # those that no run changed
    both += torch.matmul(of_set.T, of_set * sets.double().unsqueeze(1)).long()
    runs.index_add_(0, of_set.sum(1).long(), sets)


class StepKind(NamedTuple):
    """What tensors of one kind have in common: how their masks, parameters and gradients are held, and what goes with them."""

    masks: torch.dtype  # uint8 of bits, else of places
    param_bf16: bool
    grad_bf16: bool
    compact: bool
    inits: bool
    cohorts: bool


def at(tensors: Sequence[torch.Tensor], i: int) -> torch.Tensor | None:
    """The i-th of a list that may be empty, unless it has no elements."""
    return tensors[i] if tensors and tensors[i].numel() else None


def step_size(values: torch.Tensor, mask: torch.Tensor) -> int:
    """How many coordinates a mask has bits for, or how many places it holds."""
    return values.numel() if mask.dtype == torch.uint8 else mask.numel()


def step_rows(
    params, grads, masks, offsets, moments, extras, inits, cohorts, rows, starts, ordinals
) -> Iterator[tuple[StepKind, list[int]]]:
    """The kind of each tensor that has coordinates or places, and the first fourteen columns of its row in a table: addresses of the
    parameter, gradient, mask, offsets, three moments, extra, init and cohort, then row, start, ordinal and size."""
    for i, (param, grad, mask) in enumerate(zip(params, grads, masks, strict=True)):
        size = step_size(param, mask)
        if not size:
            continue
        held = [at(one, i) for one in (*moments, *[()] * (3 - len(moments)), extras, inits, cohorts)]
        *_, init, cohort = held
        bf16, grad_bf16 = (one.dtype == torch.bfloat16 for one in (param, grad))
        kind = StepKind(
            mask.dtype, bf16, grad_bf16, grad.numel() != param.numel(), init is not None, cohort is not None
        )
        yield (
            kind,
            [
                *(address(tensor) for tensor in (param, grad, mask, offsets[i], *held)),
                rows[i],
                starts[i],
                ordinals[i],
                size,
            ],
        )


def blocks_of(numel: int) -> int:
    return -(-numel // PATCH_BLOCK)


def starts_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where each begins and the last ends, int64 [one more]."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=starts.narrow(0, 1, len(lengths)))
    return starts


def block_sizes(numel: int, device: torch.device) -> torch.Tensor:
    return (numel - torch.arange(blocks_of(numel), device=device) * PATCH_BLOCK).clamp(max=PATCH_BLOCK)


def position_bytes(counts: torch.Tensor, numel: int) -> torch.Tensor:
    """Bytes of the positions of every block, int64."""
    return torch.minimum(2 * counts.long(), (block_sizes(numel, counts.device) + 7) // 8)


def first_unfit(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    """The first block that counts what it cannot have, or their number where lengths do not fit, or VALID, int64 [1]."""
    blocks, device = blocks_of(numel), counts.device
    impossible = torch.where(
        (counts < 0) | (counts > block_sizes(numel, device)), torch.arange(blocks, device=device), VALID
    )
    unfit = (position_bytes(counts, numel).sum() != positions.numel()) | (counts.sum() != stored)
    return torch.cat([impossible, torch.where(unfit, blocks, VALID).view(1)]).amin(0, keepdim=True)


def status_of(bad: torch.Tensor) -> torch.Tensor:
    """What the operators of `patch` return."""
    return torch.where(bad == VALID, -1, bad)
