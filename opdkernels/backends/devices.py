"""The device that a name means, and why it cannot be had."""

from __future__ import annotations

import os

import torch

from opdkernels.errors import InputError, printable

WITHOUT = "or leave --device out"


def device_of(name: str) -> torch.device:
    """cpu, cuda or cuda:N; `cuda` alone is the GPU of LOCAL_RANK, which launchers set, else the first. Raises InputError where
    there is none."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if torch.version.cuda is None and torch.version.hip is None:
        raise InputError(
            f"--device {name}: torch {torch.__version__} is built without CUDA; install a build of torch for this machine's GPU, {WITHOUT}"
        )
    if not torch.cuda.is_available():
        raise InputError(f"--device {name}: {why_none()}; see what nvidia-smi says, {WITHOUT}")
    count = torch.cuda.device_count()
    index = local_rank() % count if device.index is None else device.index
    if index >= count:
        raise InputError(f"--device {name}: this machine shows {count} GPUs; give cuda:{count - 1} or less, {WITHOUT}")
    return torch.device("cuda", index)


def why_none() -> str:
    """What torch says of a GPU that it cannot use, such as a driver older than its CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:
        return printable(str(error).splitlines()[0].split(". ")[0].rstrip("."))
    return "no GPU is visible"


def local_rank() -> int:
    rank = os.environ.get("LOCAL_RANK", "0")
    return int(rank) if rank.isdecimal() else 0
