"""What test_distributed.py starts under torchrun: models that are sharded or replicated in several ways, updated and
measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opdkernels import UpdateTracker
from opdkernels.distillation.world import shutdown
from tests.optim.sharded import masks_for, model_of

KINDS = ("alone", "fsdp2", "hsdp", "columns", "ddp")
UPDATES = 3


def full_update(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    """An update of every parameter, the same for every sharding."""
    generator = torch.Generator().manual_seed(step)
    return {name: 1e-3 * torch.randn(param.shape, generator=generator) for name, param in model.named_parameters()}


def sharded_model(kind: str) -> torch.nn.Module:
    model = model_of(torch.bfloat16)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind in ("fsdp2", "hsdp"):
        shape, names = ((world,), ("shard",)) if kind == "fsdp2" else ((world, 1), ("copy", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (*(m for m in model if isinstance(m, torch.nn.Linear)), model):
            fully_shard(layer, mesh=mesh)
    elif kind == "columns":
        mesh = init_device_mesh("cpu", (world,))
        for module in model:
            for name, param in list(module.named_parameters(recurse=False)):
                placement = Shard(param.ndim - 1)
                setattr(module, name, torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [placement])))
    elif kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    return model


@torch.no_grad()
def add(model: torch.nn.Module, step: int) -> None:
    updates = full_update(model_of(torch.bfloat16), step)
    for name, param in model.named_parameters():
        update = updates[name.removeprefix("module.")].bfloat16()
        if isinstance(param, DTensor):
            update = distribute_tensor(update, param.device_mesh, param.placements)
        param.add_(update)


def measured(kind: str, base: str | None) -> list[dict[str, float]]:
    """The values of each measurement."""
    model = sharded_model(kind)
    if base is not None:
        add(model, 100)  # not what is compared with
    tracker = UpdateTracker(masks=masks_for(model_of(torch.bfloat16)), base=base, prefix="")
    tracker.start(model)
    rows = []
    for step in range(UPDATES):
        add(model, step)
        values = tracker.measure(model)
        values.pop("tracker_seconds", None)
        rows.append(values | {"bytes": tracker.nbytes})
    return rows


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    bases = (None, str(folder / "base.safetensors"))
    rows = {(kind, base is not None): measured(kind, base) for kind in KINDS[1:] for base in bases}
    torch.save(rows, folder / f"rank-{dist.get_rank()}.pt")
    dist.barrier()
    shutdown(0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
