"""Models of every kind of tensor, their changes, and an additive digest written with Python integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkernels import InputError
from opdkernels.sync import ChangeTracker, Patch
from tests.patch.conftest import digest, join, some, split

RUN = "0123456789abcdef" * 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)
WORD = (1 << 64) - 1


def splitmix64(word: int) -> int:
    """The finaliser of splitmix64, as published, on unsigned integers."""
    z = (word + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def oracle_digest(tensor: torch.Tensor, start: int = 0) -> int:
    """The additive digest, one coordinate after the other, from the bytes in little-endian order."""
    width = tensor.element_size()
    data = tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
    total = 0
    for i in range(tensor.numel()):
        value = int.from_bytes(data[i * width : (i + 1) * width], "little")
        position = start + i
        total += splitmix64(splitmix64(position) ^ value if width == 8 else position << 8 * width | value)
    return total & WORD


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same bits."""
    return a.keys() == b.keys() and all(as_bytes(a[name]) == as_bytes(b[name]) for name in a)


def make_model() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, of the sizes 0, 1 and several blocks; random bits, NaN with payloads among them."""
    tensors = {f"{dtype} {n}": some((n,), dtype, n) for dtype in DTYPES for n in (0, 1, 1025, 70_001)}
    tensors |= {"scalar": some((), torch.float32, 1), "bool": some((5000,), torch.bool, 2)}
    tensors["transposed"] = some((300, 70), torch.bfloat16, 3).t()
    tensors["strided"] = some((6000, 2), torch.float32, 4)[:, 0]
    return tensors


def change(tensors: Mapping[str, torch.Tensor], seed: int, fraction: float = 0.02) -> None:
    """Changes about a fraction of the coordinates of each tensor in place, and the first one, to random bits."""
    for index, tensor in enumerate(tensors.values()):
        changed = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed + index)) < fraction
        new = some(tuple(tensor.shape), tensor.dtype, seed + index)
        tensor.copy_(torch.where(changed, new, tensor))
        if tensor.numel():
            tensor[(0,) * tensor.ndim] = new[(0,) * tensor.ndim]


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy with the same strides."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def numbered(patch: Patch, version: int = 1) -> Patch:
    return patch.numbered(run=RUN, base_version=version - 1, version=version)


def consecutive(model: dict[str, torch.Tensor], count: int, fraction: float = 0.02) -> list[Patch]:
    """Patches of consecutive changes of a model, which has them all afterwards."""
    tracker = ChangeTracker(model)
    patches = []
    for version in range(1, count + 1):
        change(model, 100 * version, fraction)
        patches.append(numbered(tracker.take(), version))
    return patches


@pytest.fixture
def saved(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """A base, and a file with a patch for it: two sparse tensors and two whole ones."""
    base = {
        "w": some((300, 300), torch.bfloat16, 0),
        "v": some((70_001,), torch.float32, 1),
        "b": some((7,), torch.float64, 2),
        "flags": torch.zeros(100, dtype=torch.bool),
    }
    trained = copied(base)
    tracker = ChangeTracker(trained)
    change({name: trained[name] for name in ("w", "v", "b")}, 5)
    trained["flags"][3] = True
    numbered(tracker.take()).save(tmp_path / "patch")
    return base, tmp_path / "patch"


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest of a file as someone who knows the format: its digest is right again."""
    header, data = split(path)
    manifest = json.loads(header["__metadata__"]["manifest"])
    edit(manifest)
    text = json.dumps(manifest)
    header["__metadata__"] |= {"manifest": text, "manifest_digest": digest(text.encode())}
    join(path, header, data)


def rejection(path: Path, match: str | None = None) -> str:
    """Returns the one-line error of opening a file."""
    with pytest.raises(InputError, match=match) as error:
        Patch.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)
