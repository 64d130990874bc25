"""The processes of a run: one, or those of torchrun with the student sharded over them by FSDP2."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


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
        return cls(dist.get_world_size(), dist.get_rank())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true of one of them."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def device_of(wanted: str) -> torch.device:
    """The device that an option names; of several processes each has its own GPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def shard(model: Any) -> None:
    """Shards a model of transformers over the processes: its layers one by one, the rest together."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and type(module[0]).__name__.endswith(("Layer", "Block")):
            for layer in module:
                fully_shard(layer)
    fully_shard(model)
    for method in ("generate", "objective", "hidden"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
