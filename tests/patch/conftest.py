"""Checkpoints before and after training, of every kind of tensor, and patches written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opdkernels.patch import segments

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
)


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaN with payloads among them."""
    n = 1
    for size in shape:
        n *= size
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(
        0, 2 if dtype == torch.bool else 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=generator
    )
    return data.view(dtype).view(shape)


def changed(tensor: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """The tensor with about this share of its elements replaced."""
    generator = torch.Generator().manual_seed(seed)
    flat, other = tensor.flatten().clone(), some((tensor.numel(),), tensor.dtype, seed + 1)
    where = torch.rand(tensor.numel(), generator=generator) < share
    as_bytes = flat.view(torch.uint8).view(-1, tensor.element_size())
    as_bytes[where] = other.view(torch.uint8).view(-1, tensor.element_size())[where]
    return as_bytes.flatten().view(tensor.dtype).view(tensor.shape)


def before() -> dict[str, torch.Tensor]:
    tensors = {f"of {dtype}": some((67, 31), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {f"size {n}": some((n,), torch.bfloat16, n) for n in (0, 1, 31, 1023, 1025, 70_001)}
    tensors |= {
        "scalar": some((), torch.float32, 1),
        "only before": some((5,), torch.float32, 2),
        "equal": some((300, 7), torch.bfloat16, 3),
    }
    tensors |= {"reshaped": some((6, 4), torch.bfloat16, 4), "recast": some((9,), torch.bfloat16, 5)}
    return tensors


def after(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Most tensors changed at 0.5 to 100 %; one equal, one new, one of another shape, one of another dtype."""
    tensors = {
        name: changed(tensor, (0.005, 0.17, 1.0)[seed % 3], seed)
        for seed, (name, tensor) in enumerate(base.items())
        if name != "only before"
    }
    tensors["equal"] = base["equal"].clone()
    tensors["new"] = some((3, 3), torch.float32, 7)
    tensors["reshaped"] = some((4, 6), torch.bfloat16, 8)
    tensors["recast"] = some((9,), torch.float32, 9)
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **extra: bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "step": "7"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weights = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    for name, content in extra.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return str(folder)


def hashes(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def pair(tmp_path) -> tuple[str, str]:
    base = before()
    trained = save(tmp_path / "trained", after(base), config__json=b'{"a": 1}', tokenizer__json=b"[]")
    return save(tmp_path / "base", base, config__json=b'{"a": 1}', tokenizer__json=b"[0]"), trained


@pytest.fixture(params=[False, True], ids=["plain", "zstd"])
def zstd(request) -> bool:
    return request.param


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a hundred thousand coordinates take several segments."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1 << 19)


def split(path: str | Path) -> tuple[dict[str, Any], bytes]:
    content = Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path: str | Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def rewrite(path: str | Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A patch whose manifest was changed by someone who knows the format: every digest over it is right again."""
    header, data = split(path)
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(manifest)

    def digest_all(table):
        return digest(json.dumps(sorted(table.items()), separators=(",", ":")).encode())

    tensors = manifest["tensors"]
    manifest["digest"] = digest_all({name: tensor["digest"] for name, tensor in tensors.items()})
    manifest["base_digest"] = digest_all(
        {t["base"]: t["base_digest"] for t in tensors.values() if t["base"] is not None}
    )
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    header["__metadata__"] |= {
        "manifest": text,
        "manifest_digest": digest(text.encode()),
        "trained_digest": manifest["digest"],
        "base_digest": manifest["base_digest"],
    }
    join(path, header, data)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
