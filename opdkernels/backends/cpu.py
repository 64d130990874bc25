"""The compiled CPU kernels: raw pointers in, counts out. The operators check their arguments before they come here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_C: Any = None
WHY_NOT = ""
try:
    from opdkernels import _C  # type: ignore[no-redef, attr-defined]
except ImportError as error:  # no compiler at install, or a build for another Python
    WHY_NOT = "none was built at install" if "cannot import name" in str(error) else str(error)

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def wanted() -> bool:
    """Whether OPDKERNELS_BACKEND lets the compiled kernels serve."""
    return os.environ.get("OPDKERNELS_BACKEND", "cpu") != "reference"


def serves(name: str) -> bool:
    """Whether the operator has a compiled kernel here; says so once where it could have had one."""
    if _C is None and wanted():
        warnings.warn(
            f"opdkernels runs on its plain PyTorch reference, tens of times slower: no compiled kernels ({WHY_NOT}). "
            "Install g++ and reinstall opdkernels; `opdkernels doctor` explains.",
            RuntimeWarning,
            stacklevel=2,
        )
        warnings.filterwarnings("ignore", message="opdkernels runs on its plain PyTorch reference")
    return _C is not None and wanted() and name in KERNELS


def kernel(name: str) -> Callable:
    return KERNELS[name]


def delta_(
    source: torch.Tensor,
    trained: torch.Tensor,
    cuts: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    _C.delta(
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        trained.data_ptr(),
        DTYPE_CODES[trained.dtype],
        source.numel(),
        list(cuts),
        list(thresholds),
        torch.get_num_threads(),
        tables.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
        maximum.data_ptr(),
        0 if mask is None else mask.data_ptr(),
    )


def overlap_(
    source: torch.Tensor,
    trained: Sequence[torch.Tensor],
    cut: int,
    source_table: torch.Tensor,
    changed: torch.Tensor,
    both: torch.Tensor,
    runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    _C.overlap(
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        [tensor.data_ptr() for tensor in trained],
        [DTYPE_CODES[tensor.dtype] for tensor in trained],
        source.numel(),
        cut,
        torch.get_num_threads(),
        source_table.data_ptr(),
        changed.data_ptr(),
        both.data_ptr(),
        runs.data_ptr(),
        counts.data_ptr(),
    )


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    cuts, counts = torch.empty(len(k), dtype=torch.float64), torch.empty(len(k), 5, dtype=torch.int64)
    _C.quantile(
        values.data_ptr(),
        DTYPE_CODES[values.dtype],
        values.numel(),
        list(k),
        largest,
        0 if mask is None else mask.data_ptr(),
        torch.get_num_threads(),
        cuts.data_ptr(),
        counts.data_ptr(),
    )
    return cuts, counts


def gram_(
    source: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, into: torch.Tensor
) -> None:
    _C.gram(
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        *source.stride(),
        trained.data_ptr(),
        DTYPE_CODES[trained.dtype],
        *trained.stride(),
        *source.shape,
        parts,
        visible,
        block,
        torch.get_num_threads(),
        into.data_ptr(),
    )


def address(tensor: torch.Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else 0


ADAMW, SGD, TAKE, ADD, PUT = range(5)  # StepKind in csrc/cpu/kernels.h


def masked_adamw_(
    params,
    grads,
    masks,
    offsets,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    precision,
    seed,
) -> None:
    table = step_table(
        params,
        grads,
        masks,
        offsets,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        extras,
        inits,
        cohorts,
        rows,
        starts,
        ordinals,
    )
    masked_step(table, scalars, grad_scale, clip, found_inf, maximize, ADAMW, False, precision, seed)


def masked_sgd_(
    params,
    grads,
    masks,
    offsets,
    momentum_buffers,
    extras,
    inits,
    cohorts,
    scalars,
    rows,
    starts,
    ordinals,
    grad_scale,
    clip,
    found_inf,
    maximize,
    nesterov,
    precision,
    seed,
) -> None:
    table = step_table(
        params, grads, masks, offsets, momentum_buffers, (), (), extras, inits, cohorts, rows, starts, ordinals
    )
    masked_step(table, scalars, grad_scale, clip, found_inf, maximize, SGD, nesterov, precision, seed)


def masked_take_(
    values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, into: torch.Tensor, add: bool
) -> None:
    table = step_table([values], [values], [mask], [offsets], [into], (), (), (), (), (), [0], [0], [0])
    masked_step(table, into, None, None, None, False, ADD if add else TAKE, False, 0, 0)


def masked_put_(values: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, compact: torch.Tensor) -> None:
    table = step_table([values], [values], [mask], [offsets], [compact], (), (), (), (), (), [0], [0], [0])
    masked_step(table, compact, None, None, None, False, PUT, False, 0, 0)


def step_table(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    most: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    inits: Sequence[torch.Tensor],
    cohorts: Sequence[torch.Tensor],
    rows: Sequence[int],
    starts: Sequence[int],
    ordinals: Sequence[int],
) -> torch.Tensor:
    """int64 [tensors, 20]: what csrc/bindings.cpp reads of each tensor."""
    table = []
    for i, (param, grad, mask, offset) in enumerate(zip(params, grads, masks, offsets, strict=True)):
        at, bits = mask.data_ptr(), mask.dtype == torch.uint8
        active = int(offset[-1]) if bits else mask.numel()
        compact = grad.numel() == active != param.numel()
        table.append(
            (
                param.data_ptr(),
                grad.data_ptr(),
                at if bits else 0,
                offset.data_ptr(),
                0 if bits else at,
                *(address(one[i] if one else None) for one in (first, second, most, extras, inits, cohorts)),
                param.numel(),
                active,
                starts[i],
                DTYPE_CODES[param.dtype],
                DTYPE_CODES[grad.dtype],
                mask.dtype == torch.int64,
                compact,
                rows[i],
                ordinals[i],
            )
        )
    return torch.tensor(table, dtype=torch.int64)


def masked_step(
    table: torch.Tensor,
    scalars: torch.Tensor,
    grad_scale: torch.Tensor | None,
    clip: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    maximize: bool,
    kind: int,
    nesterov: bool,
    precision: int,
    seed: int,
) -> None:
    if found_inf is not None and bool(found_inf):
        return
    scalars = scalars.contiguous()
    _C.masked_step(
        table.data_ptr(),
        len(table),
        scalars.data_ptr(),
        address(grad_scale),
        address(clip),
        maximize,
        kind,
        nesterov,
        precision,
        seed,
        torch.get_num_threads(),
    )


def patch_gather_(
    source: torch.Tensor,
    trained: torch.Tensor,
    difference: bool,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    digests: torch.Tensor,
) -> None:
    _C.patch_gather(
        source.data_ptr(),
        trained.data_ptr(),
        source.element_size(),
        source.numel(),
        difference,
        torch.get_num_threads(),
        counts.data_ptr(),
        positions.data_ptr(),
        values.data_ptr(),
        digests.data_ptr(),
    )


def patch_scatter_(
    source: torch.Tensor,
    counts: torch.Tensor,
    positions: torch.Tensor,
    values: torch.Tensor,
    difference: bool,
    out: torch.Tensor,
    digests: torch.Tensor,
) -> torch.Tensor:
    status = _C.patch_scatter(
        source.data_ptr(),
        source.element_size(),
        source.numel(),
        difference,
        counts.data_ptr(),
        positions.data_ptr(),
        positions.numel(),
        values.data_ptr(),
        values.numel(),
        torch.get_num_threads(),
        out.data_ptr(),
        digests.data_ptr(),
    )
    return torch.tensor([status])


def patch_check(counts: torch.Tensor, positions: torch.Tensor, numel: int, stored: int) -> torch.Tensor:
    status = _C.patch_check(
        counts.data_ptr(), positions.data_ptr(), positions.numel(), numel, stored, torch.get_num_threads()
    )
    return torch.tensor([status])


def patch_digest(values: torch.Tensor) -> torch.Tensor:
    digests = torch.empty((-(-values.numel() // _C.patch_block), 2), dtype=torch.int64)
    _C.patch_digest(
        values.data_ptr(), values.element_size(), values.numel(), torch.get_num_threads(), digests.data_ptr()
    )
    return digests


KERNELS: dict[str, Callable] = {
    "delta_": delta_,
    "overlap_": overlap_,
    "quantile": quantile,
    "gram_": gram_,
    "masked_adamw_": masked_adamw_,
    "masked_sgd_": masked_sgd_,
    "masked_take_": masked_take_,
    "masked_put_": masked_put_,
    "patch_gather_": patch_gather_,
    "patch_scatter_": patch_scatter_,
    "patch_check": patch_check,
    "patch_digest": patch_digest,
}
