"""What is collected of a group's parameters for one launch of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from opdkernels.ops.step import STEP
from opdkernels.optim.binding import Binding, Shard

EXTRAS = {
    "split_master": "remainder",
    "kahan": "compensation",
}  # what the state of a bf16 weight holds beside its moments


@dataclass
class Ready:
    """What one parameter's step takes: the parameter, what of it lives here, its gradient and its mask."""

    param: torch.Tensor
    local: torch.Tensor
    grad: torch.Tensor
    shard: Shard
    binding: Binding


class Call:
    """The arguments of one launch: the tensors of a group on one device."""

    def __init__(self) -> None:
        self.locals: list[torch.Tensor] = []
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor] = []
        self.shards: list[Shard] = []
        self.ordinals: list[int] = []
        self.states: list[dict[str, Any]] = []
        self.rows: list[int] = []
        self.steps: list[float] = []
        self.taken: list[float] = []
        self.fresh: list[bool] = []

    def add(self, one: Ready, state: dict[str, Any], fresh: bool) -> None:
        local = one.local.detach()
        self.locals.append(local)
        self.params.append(local if local.is_contiguous() else local.contiguous())
        self.grads.append(one.grad)
        self.shards.append(one.shard)
        self.ordinals.append(one.binding.ordinal)
        self.states.append(state)
        self.rows.append(len(self.steps))
        steps = state["group_steps"].tolist() if "group_steps" in state else [float(state["step"])]
        self.steps += steps
        self.taken += len(steps) * [float(state["step"])]
        self.fresh += len(steps) * [fresh]

    def scalars(self, of: Callable[[list[float]], torch.Tensor]) -> torch.Tensor:
        """A row for each step count, worked out once where counts are equal. Random numbers go by what the parameter took."""
        distinct = sorted(set(self.steps))
        rows = of(distinct)[torch.tensor([distinct.index(step) for step in self.steps])]
        rows[:, STEP] = torch.tensor(self.taken)
        return rows

    def of_each(self, name: str) -> list[torch.Tensor]:
        """One of the state's tensors of every parameter, empty where it has none; no list where none has one."""
        if not any(name in state for state in self.states):
            return []
        empty = torch.empty(0, dtype=torch.uint8)
        return [state.get(name, empty) for state in self.states]

    def common(self, group: dict[str, Any]) -> dict[str, Any]:
        extra = EXTRAS.get(group["precision"])
        return {
            "extras": self.of_each(extra) if extra else [],
            "inits": self.of_each("init_value"),
            "cohorts": self.of_each("step_group"),
            "rows": self.rows,
            "starts": [shard.start or 0 for shard in self.shards],
            "ordinals": self.ordinals,
        }
