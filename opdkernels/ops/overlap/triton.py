"""`overlap` in Triton: a tile of the base and of all runs is read once, and one number says which runs changed a coordinate.

Runs are taken in groups of four. A coordinate adds one to the joint table [set, |w|] of a group, where the set has a bit for
each run of the group that changed it: the counts of |w|, and of each run's changed ones, are sums of it. The first group
counts every coordinate, the others those that they changed. Of at most four runs the joint counts are sums of the same table;
of more, a table of 2^runs sets holds them. So a coordinate costs one atomic increment, and where it changed one more for every
four runs beyond the first.

Contention: as in `delta`. Programs count into up to eight copies of the tables in turn, in the L2 cache; zeros that no run
changed, and the non-finite, are counted in registers.

A change is compared before it is rounded (csrc/overlap/overlap.h): rounding is monotone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from opdkernels.backends import gpu
from opdkernels.backends.triton import launch
from opdkernels.backends.triton.numeric import bf16_bits_of, from_bf16_bits, magnitude_bits
from opdkernels.ops.overlap.gpu_common import change_limit, fold_overlap
from opdkernels.ops.overlap.layout import GROUP, GROUP_SETS

TILE, WARPS = 1024, 4  # eight bf16 a thread: 16 bytes of every tensor
REGISTERS = 128  # a thread, for up to four runs: four programs a multiprocessor
WIDEST = 40  # bytes of a coordinate in all tensors; of more, half a tile fits the registers
MAX_COPIES, COORDINATES_A_COPY = 8, 1 << 22
BINS = tl.constexpr(1 << 15)
GROUP, GROUP_SETS = tl.constexpr(GROUP), tl.constexpr(GROUP_SETS)
NONFINITE_FROM = tl.constexpr(
    0x7F7F8000
)  # the midpoint above the largest finite bf16: from there differences round to Inf


@triton.jit
def sets_of(base, trained, i, inside, limit, TAIL: tl.constexpr):
    """|w| of a tile, the set of runs that changed each coordinate, and whether it is finite in all."""
    w = bf16_bits_of(tl.load(base + i, inside, 0.0) if TAIL else tl.load(base + i))
    changed = tl.zeros(w.shape, tl.int32)
    finite = inside
    for run in tl.static_range(len(trained)):
        v = bf16_bits_of(tl.load(trained[run] + i, inside, 0.0) if TAIL else tl.load(trained[run] + i))
        difference = magnitude_bits(from_bf16_bits(v) - from_bf16_bits(w))
        changed |= (difference >= limit).to(tl.int32) << run
        finite &= difference < NONFINITE_FROM
    return w & 0x7FFF, changed, finite


@triton.jit
def count_tile(base, trained, joint, sets, tile_start, n, limit, zeros, lost, TAIL: tl.constexpr, TILE: tl.constexpr):
    """Counts one tile; returns the counts of zeros that no run changed and of the non-finite, which stay in registers."""
    i = tile_start + tl.arange(0, TILE)
    inside = i < n if TAIL else tl.full([TILE], 1, tl.int1)
    magnitude, changed, finite = sets_of(base, trained, i, inside, limit, TAIL)
    cell = (changed & (GROUP_SETS - 1)) * BINS + magnitude
    tl.atomic_add(joint + cell, 1, finite & (cell > 0), sem="relaxed")
    for group in tl.static_range(1, (len(trained) + GROUP - 1) // GROUP):
        part = (changed >> group * GROUP) & (GROUP_SETS - 1)
        tl.atomic_add(joint + (part + group * GROUP_SETS) * BINS + magnitude, 1, finite & (part > 0), sem="relaxed")
    if sets is not None:
        tl.atomic_add(sets + changed, 1, finite & (changed > 0), sem="relaxed")
    zeros += (finite & (cell == 0)).to(tl.int32)
    lost += (inside & (finite == 0)).to(tl.int32)
    return zeros, lost


@triton.jit(do_not_specialize=["n", "copies", "limit"])
def count(base, trained, joint, sets, counts, n, copies, limit, TILE: tl.constexpr):
    """Programs take tiles in turn.

    joint int32 [copies, groups, 16, 32768]; sets int32 [copies, 2^runs] of more than four runs; counts int64 [2], the operator's.
    """
    program = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = (len(trained) + GROUP - 1) // GROUP
    joint += (program % copies) * groups * GROUP_SETS * BINS
    if sets is not None:
        sets += (program % copies) << len(trained)
    zeros = tl.zeros([TILE], tl.int32)
    lost = tl.zeros([TILE], tl.int32)
    whole, step = n.to(tl.int64) // TILE * TILE, tl.num_programs(0).to(tl.int64) * TILE
    for tile_start in range(program * TILE, whole, step):
        zeros, lost = count_tile(base, trained, joint, sets, tile_start, n, limit, zeros, lost, False, TILE)
    if (whole < n) & (whole % step == program * TILE):
        zeros, lost = count_tile(base, trained, joint, sets, whole, n, limit, zeros, lost, True, TILE)
    tl.atomic_add(joint, tl.sum(zeros), sem="relaxed")
    if program == 0:
        tl.atomic_add(counts, n.to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(lost).to(tl.int64), sem="relaxed")


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
    """The operator, for contiguous tensors of one device."""
    device, n_runs = base.device, len(trained)
    groups = triton.cdiv(n_runs, GROUP.value)
    base, trained = base.view(-1), [tensor.view(-1) for tensor in trained]
    tile = TILE if sum(tensor.itemsize for tensor in (base, *trained)) <= WIDEST else TILE // 2
    for start, size in gpu.slices(base.numel()):
        copies = max(1, min(MAX_COPIES, size // COORDINATES_A_COPY))
        joint = torch.zeros(copies, groups, GROUP_SETS.value, BINS.value, dtype=torch.int32, device=device)
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
            num_warps=WARPS,
            maxnreg=REGISTERS if sets is None else None,
            TILE=tile,
        )
        fold_overlap(
            joint.sum(0), None if sets is None else sets.sum(0), (hist_base, hist_changed, both, hist_num_runs)
        )
