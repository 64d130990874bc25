"""The state of one parameter: its dense form, its step groups, and errors about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opdkernels.errors import InputError, printable
from opdkernels.ops.step import active_indices
from opdkernels.ops.step.layout import MAX_STEP_GROUPS
from opdkernels.optim.binding import Binding, is_dtensor, local_part


def to_dense(value: torch.Tensor, param: torch.Tensor, binding: Binding) -> torch.Tensor:
    """[num_active] state as a tensor or DTensor of the parameter's shape."""
    (local, _), local_mask = local_part(param), binding.local_mask(param)
    dense = torch.zeros(local.shape, dtype=value.dtype, device=value.device)
    dense.view(-1)[active_indices(local_mask.payload, dense.numel())] = value
    if not is_dtensor(param):
        return dense
    from torch.distributed.tensor import DTensor

    like: Any = param
    return DTensor.from_local(
        dense, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def sharded_dims(param: torch.Tensor) -> tuple[tuple[Any, int], ...]:
    """(device mesh, mesh dimension) for each dimension that a DTensor is sharded over; empty for a plain tensor."""
    if not is_dtensor(param):
        return ()
    placements = enumerate(param.placements)  # type: ignore[attr-defined]
    return tuple((param.device_mesh, i) for i, p in placements if not p.is_replicate())  # type: ignore[attr-defined]


def step_groups_of(steps: torch.Tensor, param_steps: torch.Tensor, binding: Binding) -> dict[str, torch.Tensor]:
    """The step groups of coordinates with these step counts, fp32 [num_active]; {} where all equal that of the
    parameter."""
    if bool((steps == param_steps.to(steps.device)).all()):
        return {}
    group_steps, step_group = torch.unique(steps, return_inverse=True)
    if len(group_steps) > MAX_STEP_GROUPS:
        raise ValueError(
            f"the masks of {binding.display_name} have changed too often: {len(group_steps)} step counts, "
            f"of {MAX_STEP_GROUPS} at most; create the optimizer again"
        )
    return {"step_group": step_group.to(torch.uint8), "group_steps": group_steps.cpu()}


def validate_step(state: Mapping[str, Any], binding: Binding) -> None:
    """Raise InputError unless `step` is a tensor of one element."""
    step = state.get("step")
    if not isinstance(step, torch.Tensor) or step.numel() != 1:
        raise state_error(binding, f"has {short_repr(step)} as step, not a tensor of one element")


def validate_step_counts(state: Mapping[str, Any], binding: Binding) -> None:
    """Raise InputError unless the step counts of a loaded state are finite and not negative."""
    validate_step(state, binding)
    for name in ("step", "group_steps", "steps"):
        counts = state.get(name)
        if counts is not None and counts.numel() and not bool(((counts >= 0) & counts.isfinite()).all()):
            raise state_error(binding, f"has a step count in {name} that is no finite number from 0")


def saved_digest(value: Any, binding: Binding) -> int:
    """The digest of a mask in a saved state. Raises InputError for a value that is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise state_error(binding, f"has {short_repr(value)} as mask, not a digest") from None


def short_repr(value: Any) -> str:
    """A value for messages."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return printable(repr(value))[:80]


def state_error(binding: Binding, problem: str) -> InputError:
    """An error for the state of one parameter."""
    return InputError(
        f"the optimizer state of {binding.display_name} {problem}; load the state that was saved with these masks, "
        "or start without one"
    )
