"""`overlap` in Triton: a tile of the base and all runs is read once; one number tells which runs changed a coordinate.

Runs are taken in groups of four. A coordinate adds one to the joint table [set, |w|] of a group, where the set has one
bit for each run of the group that changed it: the histograms of |w|, and of each run's changed coordinates, are sums of
it. The first group counts every coordinate, the others those that they changed. For at most four runs the joint counts
are sums of the same table; for more, a table of 2^runs sets holds them. A program counts most coordinates that no run
changed in registers (opdkernels/backends/triton/tables.py), also zeros among them and non-finite coordinates. Any other
costs one atomic increment in one of several copies of the tables and, if it changed, one more for every four runs
beyond the first four.

A change is compared before it is rounded (csrc/overlap/overlap.h): rounding is monotone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends import layout as common_layout
from opdkernels.backends.triton import launch, tables
from opdkernels.backends.triton.numeric import bf16_bits_of, from_bf16_bits, magnitude_bits
from opdkernels.backends.triton.tables import WINDOW, add_to_tables, column_sums, flush_window, striped, window_around
from opdkernels.ops.overlap import layout

TILE, NUM_WARPS = 1024, 4  # eight bf16 per thread: 16 bytes of every tensor
MAXNREG = 128  # for up to four runs: four programs per multiprocessor
MAX_BYTES = 40  # per coordinate in all tensors; with twice as many only half a tile fits the registers
BINS = tl.constexpr(common_layout.BINS)
GROUP, GROUP_SETS = tl.constexpr(layout.GROUP), tl.constexpr(layout.GROUP_SETS)
COUNT_NUMEL, COUNT_NONFINITE = tl.constexpr(layout.COUNT_NUMEL), tl.constexpr(layout.COUNT_NONFINITE)
# The midpoint above the largest finite bf16: from it on, differences round to Inf.
NONFINITE_FROM = tl.constexpr(0x7F7F8000)


@triton.jit
def changed_sets(base_ptr, trained_ptrs, i, inside, limit, TAIL: tl.constexpr):
    """Bits of |w| of a tile, the set of runs that changed each coordinate, and whether it is finite in all tensors."""
    w = bf16_bits_of(tl.load(base_ptr + i, inside, 0.0) if TAIL else tl.load(base_ptr + i))
    changed = tl.zeros(w.shape, tl.int32)
    finite = inside
    for run in tl.static_range(len(trained_ptrs)):
        trained_ptr = trained_ptrs[run]
        v = bf16_bits_of(tl.load(trained_ptr + i, inside, 0.0) if TAIL else tl.load(trained_ptr + i))
        difference = magnitude_bits(from_bf16_bits(v) - from_bf16_bits(w))
        changed |= (difference >= limit).to(tl.int32) << run
        finite &= difference < NONFINITE_FROM
    return w & 0x7FFF, changed, finite


@triton.jit
def count_tile(
    base_ptr,
    trained_ptrs,
    joint_ptr,
    sets_ptr,
    tile_start,
    n,
    limit,
    window_start,
    zeros,
    nonfinite,
    window,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts one tile; returns the counts of zeros that no run changed, of non-finite coordinates and of the window."""
    ROWS: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
    i = tile_start + tl.arange(0, TILE)
    inside = i < n if TAIL else tl.full([TILE], 1, tl.int1)
    magnitude, changed, finite = changed_sets(base_ptr, trained_ptrs, i, inside, limit, TAIL)
    nonfinite += column_sums(striped(inside & (finite == 0), ROWS), ROWS)
    magnitude, changed, finite = striped(magnitude, ROWS), striped(changed, ROWS), striped(finite, ROWS)
    first_set = changed & (GROUP_SETS - 1)
    cell = first_set * BINS + magnitude
    zeros += column_sums(finite & (cell == 0), ROWS)
    counted = finite & (cell > 0)
    window = add_to_tables(window, window_start, joint_ptr + cell, magnitude, counted, first_set == 0, TAIL)
    for group in tl.static_range(1, (len(trained_ptrs) + GROUP - 1) // GROUP):
        group_set = (changed >> group * GROUP) & (GROUP_SETS - 1)
        tl.atomic_add(
            joint_ptr + (group_set + group * GROUP_SETS) * BINS + magnitude, 1, finite & (group_set > 0), sem="relaxed"
        )
    if sets_ptr is not None:
        tl.atomic_add(sets_ptr + changed, 1, finite & (changed > 0), sem="relaxed")
    return zeros, nonfinite, window


@triton.jit(do_not_specialize=["n", "copies", "limit"])
def count(
    base_ptr,  # [n]
    trained_ptrs,  # a tuple of [n], one per run
    joint_ptr,  # int32 [copies, SETS, BINS], GROUP_SETS for each group
    sets_ptr,  # int32 [copies, 2^runs], or None for at most four runs
    counts_ptr,  # int64 [2]
    n,
    copies,
    limit,
    SETS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Counts a base and its runs; programs take tiles in turn. Adds to every output."""
    program = tl.program_id(0).to(tl.int64)
    joint_ptr += (program % copies) * SETS * BINS
    if sets_ptr is not None:
        sets_ptr += (program % copies) << len(trained_ptrs)
    ROWS: tl.constexpr = 128 // base_ptr.dtype.element_ty.primitive_bitwidth
    zeros = tl.zeros([TILE // ROWS], tl.int32)
    nonfinite = tl.zeros([TILE // ROWS], tl.int32)
    window = tl.zeros([WINDOW], tl.int32)
    i = program * TILE + tl.arange(0, TILE)
    window_start = window_around(bf16_bits_of(tl.load(base_ptr + i, i < n, 0.0)) & 0x7FFF, BINS)
    full, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, full, step):
        zeros, nonfinite, window = count_tile(
            base_ptr,
            trained_ptrs,
            joint_ptr,
            sets_ptr,
            tile_start,
            n,
            limit,
            window_start,
            zeros,
            nonfinite,
            window,
            False,
            TILE,
        )
    if (full < n) & (full % step == program * TILE):
        zeros, nonfinite, window = count_tile(
            base_ptr,
            trained_ptrs,
            joint_ptr,
            sets_ptr,
            full,
            n,
            limit,
            window_start,
            zeros,
            nonfinite,
            window,
            True,
            TILE,
        )
    flush_window(window, window_start, joint_ptr)
    tl.atomic_add(joint_ptr, tl.sum(zeros), sem="relaxed")
    if program == 0:
        tl.atomic_add(counts_ptr + COUNT_NUMEL, n.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + COUNT_NONFINITE, tl.sum(nonfinite).to(tl.int64), sem="relaxed")


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
    group_members = set_members(layout.GROUP, joint.device)
    per_run = torch.matmul(group_members.T, joint.double()).long()  # [groups, GROUP, BINS]
    hist_changed += per_run.flatten(0, 1).narrow(0, 0, n_runs)
    members = set_members(n_runs, joint.device)
    if sets is None:
        sets = joint.sum((0, 2)).narrow(0, 0, len(members))
    else:
        sets.narrow(0, 0, 1).add_(joint.select(0, 0).sum() - sets.sum())  # coordinates that no run changed
    both += torch.matmul(members.T, members * sets.double().unsqueeze(1)).long()
    hist_num_runs.index_add_(0, members.sum(1).long(), sets)


def overlap_(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,
    hist_changed: torch.Tensor,
    both: torch.Tensor,
    hist_num_runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """The operator, for contiguous tensors on one device."""
    device, n_runs = base.device, len(trained)
    groups = triton.cdiv(n_runs, layout.GROUP)
    n_sets = groups * layout.GROUP_SETS if groups > 1 else 1 << n_runs
    base, trained = base.view(-1), [tensor.view(-1) for tensor in trained]
    coordinate_bytes = sum(tensor.itemsize for tensor in (base, *trained))
    tile = TILE // triton.next_power_of_2(triton.cdiv(coordinate_bytes, MAX_BYTES))
    for start, size in gpu.slices(base.numel()):
        copies = tables.num_copies(size, 4 * (n_sets * common_layout.BINS + (1 << n_runs)))
        joint = torch.zeros(copies, n_sets, common_layout.BINS, dtype=torch.int32, device=device)
        sets = torch.zeros(copies, 1 << n_runs, dtype=torch.int32, device=device) if groups > 1 else None
        launch.run(
            count,
            (launch.num_programs(device, triton.cdiv(size, tile)),),
            base.narrow(0, start, size),
            tuple(tensor.narrow(0, start, size) for tensor in trained),
            joint,
            sets,
            counts,
            size,
            copies,
            change_limit(threshold_bits),
            num_warps=NUM_WARPS,
            maxnreg=MAXNREG if sets is None else None,
            SETS=n_sets,
            TILE=tile,
        )
        total = torch.nn.functional.pad(joint.sum(0), (0, 0, 0, groups * layout.GROUP_SETS - n_sets))
        fold_overlap(
            total.view(groups, layout.GROUP_SETS, common_layout.BINS),
            None if sets is None else sets.sum(0),
            (hist_base, hist_changed, both, hist_num_runs),
        )
