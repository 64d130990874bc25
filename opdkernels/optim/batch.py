"""The parameters of a group that one launch steps, and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdkernels.ops.arguments import beyond_storage, memory_span, overlap_written
from opdkernels.ops.step.layout import STEP
from opdkernels.optim.binding import Binding, LocalMask
from opdkernels.optim.distinct import validate_memory

RESIDUALS = {"split_master": "remainder", "kahan": "compensation"}  # state of a bf16 parameter next to its moments


@dataclass
class PendingStep:
    """A parameter that is about to be stepped."""

    param: torch.Tensor
    local: torch.Tensor  # the shard of `param` on this rank
    grad: torch.Tensor  # of the shape of `local`, or fp32 [num_active]
    local_mask: LocalMask
    binding: Binding


def validate_usable(named: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raise ValueError, naming it, where a tensor with elements has no memory, is not aligned to its elements or ends
    after its storage."""
    for name, tensor in named:
        address = tensor.data_ptr()
        if not address or address % tensor.element_size():
            problem = "is not aligned to its elements" if address else "has no memory: it was freed"
            raise ValueError(f"{name} {problem}; give it memory of its own")
        if missing := beyond_storage(tensor, memory_span(tensor)):
            raise ValueError(f"{name} {missing}; give it memory of its own")


def validate_addresses(pending: Iterable[PendingStep]) -> None:
    """Raise ValueError where the weights or the gradient of a parameter have no usable memory, and, naming both, where
    two parameters share memory, of one group or of several: they were tied after construction."""
    active = [item for item in pending if item.local_mask.num_active]
    validate_usable([(item.binding.display_name, item.local) for item in active])
    validate_usable([(f"the gradient of {item.binding.display_name}", item.grad) for item in active])
    addresses = [item.local.data_ptr() for item in active]
    sizes = [memory_span(item.local) for item in active]
    if overlap_written(addresses, sizes, len(active)):
        try:  # ranges of interleaved views overlap, their elements do not
            validate_memory([(item.binding.display_name, item.local) for item in active])
        except ValueError as error:
            raise ValueError(f"since the optimizer was created, {error}, and create the optimizer again") from None


class StepBatch:
    """The parameters of a group on one device, and the arguments of the launch that steps them."""

    def __init__(self) -> None:
        self.locals: list[torch.Tensor] = []
        self.params: list[torch.Tensor] = []  # `locals`, made contiguous where they are not
        self.grads: list[torch.Tensor] = []
        self.local_masks: list[LocalMask] = []
        self.param_ids: list[int] = []
        self.states: list[dict[str, Any]] = []
        self.scalar_rows: list[int] = []
        self.steps: list[float] = []  # step count per row of scalars, this step included
        self.param_steps: list[float] = []  # steps of the parameter, this one included, per row of scalars
        self.is_first: list[bool] = []  # whether the moments were created for this step, per row of scalars

    def add(self, pending: PendingStep, state: dict[str, Any], is_first: bool) -> None:
        local = pending.local.detach()
        self.locals.append(local)
        self.params.append(local if local.is_contiguous() else local.contiguous())
        self.grads.append(pending.grad)
        self.local_masks.append(pending.local_mask)
        self.param_ids.append(pending.binding.param_id)
        self.states.append(state)
        self.scalar_rows.append(len(self.steps))
        param_step = state["step"].item() + 1.0
        steps = [count + 1.0 for count in state["group_steps"].tolist()] if "group_steps" in state else [param_step]
        self.steps += steps
        self.param_steps += len(steps) * [param_step]
        self.is_first += len(steps) * [is_first]

    def scalars(self, compute: Callable[[list[float]], torch.Tensor]) -> torch.Tensor:
        """fp32 [rows, NUM_SCALARS]: `compute` is called once with the distinct step counts.

        Stochastic rounding is keyed by the steps of the parameter, so the column STEP holds these.
        """
        distinct = sorted(set(self.steps))
        rows = compute(distinct)[torch.tensor([distinct.index(step) for step in self.steps])]
        rows[:, STEP] = torch.tensor(self.param_steps)
        return rows

    def state_tensors(self, name: str) -> list[torch.Tensor]:
        """One tensor of the state per parameter, empty where it has none; an empty list where no parameter has it."""
        if not any(name in state for state in self.states):
            return []
        empty = torch.empty(0, dtype=torch.uint8)
        return [state.get(name, empty.to(param.device)) for state, param in zip(self.states, self.params, strict=True)]

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments that `masked_adamw` and `masked_sgd` share."""
        residual = RESIDUALS.get(group["precision"])
        return {
            "residuals": self.state_tensors(residual) if residual else [],
            "init_values": self.state_tensors("init_value"),
            "step_groups": self.state_tensors("step_group"),
            "scalar_rows": self.scalar_rows,
            "shard_offsets": [local_mask.offset or 0 for local_mask in self.local_masks],
            "param_ids": self.param_ids,
            "maximize": group["maximize"],
            "precision": group["precision"],
            "seed": group["seed"],
        }

    def tensors(self) -> dict[str, Any]:
        """The tensors that `masked_adamw` and `masked_sgd` share, one per parameter."""
        return {
            "params": self.params,
            "grads": self.grads,
            "masks": [local_mask.payload for local_mask in self.local_masks],
            "block_counts": [local_mask.block_counts for local_mask in self.local_masks],
        }
