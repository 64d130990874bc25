"""What the Triton launcher of `overlap` computes in torch: the compared threshold, the sums of joint counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.ops.overlap.layout import GROUP


def change_limit(threshold_bits: int) -> int:
    """The least difference, as fp32 bits, whose bf16 rounding exceeds a threshold: midpoints round to even.

    >>> hex(change_limit(0)), hex(change_limit(1))
    ('0x8001', '0x18000')
    """
    return (threshold_bits << 16) + 0x8001 - (threshold_bits & 1)


def set_members(n_runs: int, device: torch.device) -> torch.Tensor:
    """Which runs each of the 2^n_runs sets holds, fp64 [2^n_runs, n_runs]: exact for sums of counts below 2^53."""
    runs = torch.arange(n_runs, device=device)
    return ((torch.arange(1 << n_runs, device=device).unsqueeze(1) >> runs) & 1).double()


def fold_overlap(joint: torch.Tensor, sets: torch.Tensor | None, outputs: Sequence[torch.Tensor]) -> None:
    """Add joint counts to the operator's outputs.

    Args:
        joint: Counts by set of runs and |W|, int64 [groups, GROUP_SETS, BINS].
        sets: Counts by set of all runs, int64 [2^R], its element 0 unset; None for one group, whose table has them.
        outputs: hist_base, hist_changed, both and hist_num_runs of the operator, added to.
    """
    hist_base, hist_changed, both, hist_num_runs = outputs
    n_runs = len(hist_changed)
    hist_base += joint.select(0, 0).sum(0)
    group_members = set_members(GROUP, joint.device)
    per_run = torch.matmul(group_members.T, joint.double()).long()  # [groups, GROUP, BINS]
    hist_changed += per_run.flatten(0, 1).narrow(0, 0, n_runs)
    members = set_members(n_runs, joint.device)
    if sets is None:
        sets = joint.sum((0, 2)).narrow(0, 0, len(members))
    else:
        sets.narrow(0, 0, 1).add_(joint.select(0, 0).sum() - sets.sum())  # coordinates that no run changed
    both += torch.matmul(members.T, members * sets.double().unsqueeze(1)).long()
    hist_num_runs.index_add_(0, members.sum(1).long(), sets)
