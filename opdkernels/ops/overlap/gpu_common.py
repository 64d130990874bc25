"""What the Triton and the CUDA launchers of `overlap` share: joint counts of sets of runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

GROUP, GROUP_SETS = 4, 16  # runs that share a joint table, and the sets of them


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
