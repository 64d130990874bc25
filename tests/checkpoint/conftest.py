"""Files written byte by byte, a fake of the compiled mapping guard, and checkpoints that have headers only."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkernels.checkpoint.base import FileFingerprint, TensorInfo
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import InputError


def error_message(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the InputError that a call raises: one printable line with a remedy."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert ";" in message, message
    return message


def open_error(path: Path) -> str:
    """The message for a checkpoint that cannot be opened; it names the file or folder."""
    message = error_message(open_checkpoint, path)
    assert path.name in message, message
    return message


def encode(header: dict[str, Any] | bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, so that tests can write hostile ones."""
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.fixture
def write_raw(tmp_path: Path) -> Callable[..., Path]:
    def write(header: dict[str, Any] | bytes | str, data: bytes = b"", length: int | None = None) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(encode(header, data, length))
        return path

    return write


class FakeGuard(types.ModuleType):
    """A mapping guard that reports `faults`; `live` holds the guarded handles."""

    def __init__(self) -> None:
        super().__init__("opdkernels.native")
        self.live: dict[int, tuple[int, int]] = {}
        self.faults = 0
        self._next = 0

    def guard_mapping(self, address: int, nbytes: int) -> int:
        self._next += 1
        self.live[self._next] = (address, nbytes)
        return self._next

    def mapping_faults(self, handle: int) -> int:
        assert handle in self.live
        return self.faults

    def unguard_mapping(self, handle: int) -> None:
        del self.live[handle]


@pytest.fixture
def fake_guard(monkeypatch: pytest.MonkeyPatch) -> FakeGuard:
    module = FakeGuard()
    monkeypatch.setitem(sys.modules, "opdkernels.native", module)
    return module


@pytest.fixture
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opdkernels.native", None)


class FakeCheckpoint:
    """Headers without files, for matching. All elements of a tensor have the value in `bits`, else 0."""

    kind = "fake"

    def __init__(
        self,
        tensors: dict[str, tuple[int, ...]],
        *,
        dtypes: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        aliases: dict[str, str] | None = None,
        missing: dict[str, str] | None = None,
        bits: dict[str, int] | None = None,
        path: str = "fake",
    ) -> None:
        self.path, self.config = path, config or {}
        self.aliases, self.missing = aliases or {}, missing or {}
        self.bits = bits or {}
        self.files: list[FileFingerprint] = []
        self.tensors = {}
        for name, shape in tensors.items():
            dtype = (dtypes or {}).get(name, "bf16")
            numel = math.prod(shape)
            self.tensors[name] = TensorInfo(name, dtype, tuple(shape), numel, "model.safetensors", 2 * numel)

    def read(self, name: str, start: int, stop: int) -> Any:
        raise AssertionError("matching reads bits only")

    def read_bits(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), self.bits.get(name, 0))

    def check(self) -> None: ...

    def close(self) -> None: ...
