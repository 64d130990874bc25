"""The processes of a run: one, or those that torchrun started, with the student sharded over them by FSDP2."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def shutdown(status: int) -> None:
    """Ends this process with an exit status if torchrun started it; does nothing otherwise.

    `os._exit` skips the teardown of the interpreter: a gloo thread that still holds a tensor of its last collective
    needs the interpreter to release it, and aborts the process during teardown
    (github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass(frozen=True)
class World:
    """Number of processes, and the rank of this one."""

    size: int = 1
    rank: int = 0

    @classmethod
    def join(cls, device: torch.device) -> World:
        """The processes that torchrun started, or this one alone."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Sums over all processes, by name; every process passes the same names."""
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def all_gather(self, value: Any) -> list[Any]:
        """The value of each process, in order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_main(self, fn: Callable[[], T]) -> T:
        """Runs `fn` on rank 0 and broadcasts its result; raises its exception on every rank, so that none deadlocks."""
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = fn()
            except Exception as raised:
                error = raised
        result, error = self.all_gather((result, error))[0]
        if error is not None:
            raise error
        return result

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


class Student(torch.nn.Module):
    """The trained model as the root module of FSDP2.

    `student(fn, *args)` is `fn(student.model, *args)`, called as the forward pass of the root module: FSDP2's hooks
    gather the sharded parameters for the duration of `fn`, and again for the backward pass of what it returns. On one
    process it only calls `fn`. The names of the parameters are those of `student.model`.
    """

    def __init__(self, model: Any, world: World):
        super().__init__()
        self.model = model
        if world.size > 1:
            shard(self, world)

    def forward(self, fn: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return fn(self.model, *args, **kwargs)


def shard(student: Student, world: World) -> None:
    """Shards each transformer layer as its own FSDP2 group, and all other parameters as the group of the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(student.parameters()).device.type, (world.size,))
    for module in list(student.modules()):
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module)
            and type(module[0]).__name__.endswith(("Layer", "Block"))
        ):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    # Without reshard_after_forward a teacher that swaps weights would score with parameters gathered before the swap.
    fully_shard(student, mesh=mesh, reshard_after_forward=True)


def full_state(model: Any, world: World) -> dict[str, Any] | None:
    """The unsharded state dict on rank 0 (empty on the others); None on one process, where the model holds it."""
    if world.size == 1:
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
