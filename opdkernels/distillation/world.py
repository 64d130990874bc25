"""The processes of a run: one, or those of torchrun with the student sharded over them by FSDP2."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def leave(status: int) -> None:
    """Ends this process where torchrun started it and its work is done; does nothing otherwise. At once: a thread of gloo's that
    still holds a tensor of its last collective needs the interpreter to let go of it, and aborts the process if that is being torn
    down (github.com/pytorch/pytorch/pull/179291)."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class Ranks:
    """How many processes there are, and which this is."""

    size: int = 1
    rank: int = 0

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Those that torchrun started, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def total(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Sums over all processes, by name; every process has the same names."""
        if self.size == 1:
            return dict(values)
        return dict(
            zip(
                values,
                self.sum(torch.tensor(list(values.values()), dtype=torch.float64, device=device)).tolist(),
                strict=True,
            )
        )

    def all(self, held: Any) -> list[Any]:
        """What each process holds, in order."""
        if self.size == 1:
            return [held]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, held)
        return found

    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds, on every one; what it raises is raised on every one, so that none waits for it."""
        found: Any = None
        error: Exception | None = None
        if self.first:
            try:
                found = find()
            except Exception as raised:
                error = raised
        found, error = self.all((found, error))[0]
        if error is not None:
            raise error
        return found

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def bind(model: Any, ranks: Ranks, functions: dict[str, Callable[..., Any]]) -> Any:
    """Gives a model of transformers methods that compute with its weights; of several processes, shards it over them: its layers
    one by one, the rest together, gathered for these methods and for `generate`. Returns the model."""
    for name, function in functions.items():
        setattr(model, name, MethodType(function, model))
    if ranks.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.size,))
    for module in list(model.modules()):
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module)
            and type(module[0]).__name__.endswith(("Layer", "Block"))
        ):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(
        model, mesh=mesh, reshard_after_forward=True
    )  # else a teacher that swaps weights would score with those gathered before
    for name in ("generate", *functions):
        register_fsdp_forward_method(model, name)
    return model


def full_state(model: Any, ranks: Ranks) -> dict[str, Any] | None:
    """Of several processes, the whole state dict on the first; None where the model has it all itself."""
    if ranks.size == 1:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
