"""`step` in CUDA C++: one launch of csrc/step/cuda.cu for all tensors of a group, of any dtypes and masks."""

from __future__ import annotations

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import WARP
from opdkernels.ops.step.args import StepArgs, adamw_operator, sgd_operator
from opdkernels.ops.step.layout import BLOCK, STEP_ROW
from opdkernels.ops.step.rows import compact_args, step_rows, with_tiles

THREADS = 256  # per block
COLUMNS = STEP_ROW.itemsize // 8


def run(name: str, args: StepArgs, *arguments: torch.Tensor | int | None) -> None:
    """Launch a kernel on the tensors that have coordinates or indices, if any; where one has bits for changes, the
    variant that sets them."""
    rows = with_tiles(step_rows(args), BLOCK)
    if not len(rows):
        return
    device, end_tiles, changed = args.params[0].device, rows["end_tile"], rows["changed"].any()
    values = np.concatenate([rows.view(np.int64), end_tiles])  # one copy to the device
    table = gpu.on_device(values.tolist(), device)
    launch.run(
        f"{name}_changed" if changed else name,
        launch.num_queue_blocks(device, int(end_tiles[-1]), THREADS),
        THREADS,
        launch.queue_bytes(THREADS) + (THREADS // WARP * BLOCK // 8 if changed else 0),
        device,
        table,
        table.narrow(0, COLUMNS * len(rows), len(rows)),
        len(rows),
        *arguments,
    )


def common(args: StepArgs) -> tuple[torch.Tensor | int | None, ...]:
    """The arguments that the two optimizers share: scalars, grad_scale, clip, found_inf, maximize, precision, seed."""
    scalars = args.scalars.to(args.params[0].device, non_blocking=True).contiguous()
    return scalars, args.grad_scale, args.clip, args.found_inf, args.maximize, args.precision, args.seed


@adamw_operator
def masked_adamw_(args: StepArgs) -> None:
    if args.params:
        run("step_adamw", args, *common(args))


@sgd_operator
def masked_sgd_(args: StepArgs) -> None:
    if args.params:
        run("step_sgd", args, *common(args), args.nesterov)


def masked_gather_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, out: torch.Tensor, add: bool
) -> None:
    run("step_gather", compact_args(values, mask, block_counts, out), add)


def masked_scatter_(
    values: torch.Tensor, mask: torch.Tensor, block_counts: torch.Tensor, compact: torch.Tensor
) -> None:
    run("step_scatter", compact_args(values, mask, block_counts, compact))
