"""What tests/optim/test_distributed.py starts under torchrun: a small model sharded by FSDP2 on the CPU, trained, saved
and loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

from opdkernels.distillation.world import shutdown
from opdkernels.optim import MaskedAdamW, MaskedSGD, gather_active_grads


def model_of(dtype: torch.dtype) -> torch.nn.Sequential:
    """Of 7, 5 and 1 rows: shards are uneven, and some empty."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)
    ).to(dtype)


def masks_for(model: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in model.named_parameters()}


def batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(model, optimizer, steps, dtype, *, clip=True) -> None:
    """The same batch on every rank, so that the mean over ranks is the gradient of one process."""
    for step in steps:
        model(batch(step, dtype)).float().square().mean().backward()
        if clip:
            optimizer.clip_grad_norm_(0.05)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model, masks, precision) -> MaskedAdamW:
    return MaskedAdamW(model.named_parameters(), masks=masks, lr=1e-2, precision=precision, seed=5)


def whole(model) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def sharded_model(dtype: torch.dtype) -> torch.nn.Sequential:
    model = model_of(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*(m for m in model if isinstance(m, torch.nn.Linear)), model):
        fully_shard(layer, mesh=mesh)
    return model


def replicated_with_partial_gradient() -> list[torch.Tensor]:
    """Each rank's copy of a weight after a step of SGD at a rate of 1: its gradient is rank + 1 here, still to be
    summed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate()]))
    weight.grad = DTensor.from_local(torch.full((4,), dist.get_rank() + 1.0), mesh, [Partial()])
    MaskedSGD([weight], masks=[torch.ones(4, dtype=torch.bool)], lr=1.0).step()
    copies = [torch.empty(4) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, weight.to_local().detach())
    return copies


def main(folder: Path, jobs: Sequence[str]) -> None:
    """Runs jobs JOB:DTYPE:PRECISION one after the other."""
    dist.init_process_group("gloo")
    for job in jobs:
        result = result_of(*job.split(":"), folder)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{job}-{dist.get_world_size()}.pt")
        dist.barrier()
    shutdown(0)


def result_of(job: str, dtype_name: str, precision: str, folder: Path) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    model = sharded_model(dtype)
    masks = masks_for(model_of(dtype))
    optimizer = optimizer_of(model, masks, precision)
    if job == "train":
        train(model, optimizer, range(6), dtype)
        other = sharded_model(dtype)
        gathering = optimizer_of(other, masks, precision)
        gather_active_grads(other, gathering)
        train(other, gathering, range(6), dtype)
        active = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        return {
            "weights": whole(model),
            "gathered": whole(other),
            "active": active,
            "summed": replicated_with_partial_gradient(),
        }
    if job == "save":
        train(model, optimizer, range(3), dtype)
        optimizer.set_masks(masks_for(model_of(dtype), seed=2))
        train(model, optimizer, range(3, 6), dtype)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
        train(model, optimizer, range(6, 9), dtype)
        return {"weights": whole(model)}
    if job == "load":
        optimizer = optimizer_of(model, masks_for(model_of(dtype), seed=2), precision)
        weights, state = get_state_dict(model, optimizer)
        held = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        train(model, optimizer, range(6, 9), dtype)
        return {"weights": whole(model)}
    raise ValueError(f"there is no job {job}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2:])
