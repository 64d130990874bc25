"""PyTorch files: read bit for bit without loading them, and without executing code from them."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from opdkernels.checkpoint import torch_pickle
from opdkernels.checkpoint.open import open_checkpoint
from tests.checkpoint.conftest import open_error

pytestmark = pytest.mark.usefixtures("no_guard")

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
LEGACY = {"_use_new_zipfile_serialization": False}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_slices_are_bit_identical_to_torch_load(path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (10_001 * dtype.itemsize,), dtype=torch.uint8, generator=random)
    long = raw.view(dtype)
    matrix = torch.randn(31, 33, generator=random).to(dtype)
    saved = {
        "long": long,
        "transposed": matrix.t(),
        "cut out": matrix[3:9, 1::2],
        "strided": long[::3],
        "permuted": torch.randn(3, 4, 5, generator=random).to(dtype).permute(2, 0, 1),
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.empty(0, 5, dtype=dtype),
        "parameter": torch.nn.Parameter(matrix.clone()),
    }
    torch.save(saved, path, **options)
    opened = open_checkpoint(path)
    expected = torch.load(path, weights_only=True)
    assert opened.kind == "torch"
    assert set(opened.tensors) == set(expected)
    for name, tensor in expected.items():
        info, tensor = opened.tensors[name], tensor.detach()
        assert (info.shape, info.numel, info.nbytes) == (tuple(tensor.shape), tensor.numel(), tensor.nbytes)
        cuts = torch.randint(0, info.numel + 1, (20, 2), generator=random).sort(dim=1).values.tolist()
        for start, stop in [[0, info.numel], [info.numel, info.numel], *cuts]:
            part = opened.read(name, start, stop)
            assert part.dtype == dtype
            assert part.dim() == 1
            assert part.stride(0) == 1 or not part.numel()
            assert bits(part) == bits(tensor.reshape(-1)[start:stop])
    opened.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count the bytes a process reads")
def test_opening_reads_no_storage(path: Path) -> None:
    torch.save({"w": torch.ones(5_000_000)}, path)
    open_checkpoint(path).close()  # imports read files too

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    open_checkpoint(path).close()
    assert bytes_read() - before < 3 * torch_pickle.EDGE_BYTES


def test_tensors_of_one_storage_are_aliases_of_the_first(path: Path) -> None:
    embedding = torch.randn(7, 4)
    torch.save({"wte.weight": embedding, "x": torch.ones(4), "lm_head.weight": embedding, "part": embedding[1:]}, path)
    assert open_checkpoint(path).aliases == {"lm_head.weight": "wte.weight"}
    torch.save({"wte.weight": embedding, "lm_head.weight": embedding}, path, **LEGACY)
    assert open_checkpoint(path).aliases == {"lm_head.weight": "wte.weight"}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_code_is_never_executed(path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {mark}",)

    for content in ({"w": Bomb()}, {"w": torch.ones(2), "args": argparse.Namespace(lr=1)}, torch.nn.Linear(2, 2)):
        torch.save(content, path, **options)
        assert "runs code" in open_error(path)
    assert not mark.exists()


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(), "optimizer's state"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "optimizer's state"),
        ({"model": {"state": {}, "param_groups": []}}, "optimizer's state"),
        ({"layers.0.exp_avg": torch.ones(2)}, "optimizer's state"),
        ({"state_dict": {"w": torch.ones(2)}, "model": {"w": torch.ones(2)}}, "more than one state dict"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "holds no tensors"),
        ({"step": 3, "\x1b[31m": 4}, "its keys are step, \\x1b[31m"),
        ({3: torch.ones(2)}, "names must be strings"),
        ({"w": torch.ones(2).to_sparse()}, "tensor w is sparse"),
        ({"w": torch.ones(2), "v": numpy.ones(2)}, "v is a NumPy array"),
        ({"w": torch.ones(1).expand(1000)}, "tensor w is an expanded view"),
        ({"w": torch.ones(4).to(torch.float8_e4m3fn)}, "tensor w in pytorch_model.bin (f8_e4m3)"),
        ({"layer.lora_A.weight": torch.ones(2)}, "LoRA adapter"),
    ],
)
def test_files_without_a_model_are_rejected(path: Path, content: Any, says: str) -> None:
    torch.save(content, path)
    assert says in open_error(path)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_rejected(path: Path) -> None:
    torch.save({"w": quantised()}, path)
    assert "quantised" in open_error(path)


@pytest.mark.parametrize("nest", [("state_dict",), ("model",), ("module",), ("model_state_dict",), ("model", "module")])
def test_a_nested_state_dict_is_found(path: Path, nest: tuple[str, ...]) -> None:
    content: Any = {"w": torch.arange(3.0), "step": 1}
    for key in reversed(nest):
        content = {key: content, "optimizer": {"state": {}}, "rng": torch.get_rng_state(), "epoch": 2}
    torch.save(content, path)
    opened = open_checkpoint(path)
    assert list(opened.tensors) == ["w"]
    assert opened.read("w", 1, 3).tolist() == [1.0, 2.0]


def test_shapes_with_a_product_beyond_64_bits_stay_exact(path: Path) -> None:
    torch.save({"w": torch.empty(2**62, 0), "v": torch.ones(1)}, path)
    info = open_checkpoint(path).tensors["w"]
    assert (info.shape, info.numel, info.nbytes) == ((2**62, 0), 0, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_rejected(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in open_error(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04garbage", "not a complete zip archive"),
        (b"\x80\x02garbage", "not a PyTorch checkpoint"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "runs code (os.system)"),
        (b"hello, world", "not a PyTorch checkpoint"),
    ],
)
def test_garbage_is_rejected(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    assert says in open_error(path)


def rewrite(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None], **options: Any) -> None:
    """Rewrites the archive at `path`, each record by `change`."""
    copy = path.with_suffix(".copy")
    path.rename(copy)
    with zipfile.ZipFile(copy) as old, zipfile.ZipFile(path, "w", **options) as new:
        for entry in old.infolist():
            change(new, entry, old.read(entry))


def test_archives_not_written_by_torch_are_rejected(path: Path) -> None:
    torch.save({"w": torch.ones(100), "v": torch.zeros(3)}, path)
    rewrite(path, lambda new, e, data: new.writestr(e.filename, data), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in open_error(path)

    torch.save({"w": torch.ones(100), "v": torch.zeros(3)}, path)
    rewrite(
        path,
        lambda new, e, data: new.writestr(e.filename, data[:40])
        if "/data/" in e.filename
        else new.writestr(e.filename, data),
    )
    open_error(path)

    torch.save({"w": torch.ones(100)}, path)
    rewrite(path, lambda new, e, data: new.writestr(e.filename, b"big" if "byteorder" in e.filename else data))
    assert "big-endian" in open_error(path)

    with open(path, "wb") as file:
        numpy.savez(file, a=numpy.ones(2))
    assert "no PyTorch file" in open_error(path)


def test_a_legacy_file_is_read_in_ranges(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{i}.{'long' * 50}.weight" for i in range(40)]
    torch.save({name: torch.full((3, 5), float(i)) for i, name in enumerate(names)}, path, **LEGACY)
    monkeypatch.setattr(torch_pickle, "EDGE_BYTES", 64)  # the pickle is longer than the first pieces of it
    opened = open_checkpoint(path)
    assert sorted(opened.tensors) == sorted(names)
    for i, name in enumerate(names):
        assert opened.read(name, 2, 9).tolist() == [float(i)] * 7


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_every_truncated_file_is_rejected(path: Path, options: dict[str, Any]) -> None:
    torch.save({"w": torch.ones(50), "v": torch.zeros(3)}, path, **options)
    content = path.read_bytes()
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        open_error(path)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["archive", "legacy"])
def test_tensors_without_values_are_rejected(path: Path, options: dict[str, Any]) -> None:
    torch.save({"w": torch.ones(2), "v": torch.empty(3, device="meta")}, path, **options)
    assert "tensor v is on the meta device" in open_error(path)


def test_shards_of_distributed_tensors_are_rejected_by_name(path: Path) -> None:
    def pickled(reference: str) -> bytes:
        return f"c{reference.rpartition('.')[0]}\n{reference.rpartition('.')[2]}\n".encode()

    wrapper = pickled("torch._utils._rebuild_wrapper_subclass") + b"(" + pickled("torch.distributed.tensor.DTensor")
    content = b"\x80\x02}X\x01\x00\x00\x00w" + wrapper + b"tRs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    assert "model_merger" in open_error(path)


def test_names_that_are_no_unicode_text_are_rejected(path: Path) -> None:
    torch.save({"a\ud800": torch.ones(2)}, path)
    assert "unpaired surrogate" in open_error(path)


def zip_records(path: Path, records: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records:
            archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_overlapping_and_repeated_records_are_rejected(path: Path) -> None:
    torch.save({"w": torch.ones(100)}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    zip_records(path, records)
    open_checkpoint(path).close()
    zip_records(path, [*records, records[0]])
    assert "is there twice" in open_error(path)

    zip_records(path, records)
    content = bytearray(path.read_bytes())
    first, second = (i.start() for i in list(re.finditer(b"PK\x01\x02", content))[:2])
    content[second + 42 : second + 46] = content[first + 42 : first + 46]  # both records at one position
    path.write_bytes(content)
    assert "overlaps" in open_error(path)


def test_a_list_of_records_of_implausible_size_is_rejected(path: Path) -> None:
    torch.save({"w": torch.ones(100)}, path)
    content = bytearray(path.read_bytes())
    content[-10:-6] = (2**31).to_bytes(4, "little")
    if content[-42:-38] == b"PK\x06\x07":
        content[-58:-50] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)
    assert "more than the limits" in open_error(path)


def test_a_mapped_archive_is_viewed_in_place(path: Path, fake_guard: object) -> None:
    values = torch.arange(300, dtype=torch.float32)
    torch.save({"w": values, "t": values.reshape(20, 15).t()}, path)
    opened = open_checkpoint(path, io="mmap")
    ((address, nbytes),) = fake_guard.live.values()
    view = opened.read("w", 7, 90)
    assert address <= view.data_ptr() < address + nbytes
    assert torch.equal(view, values[7:90])
    assert torch.equal(opened.read("t", 3, 77), values.reshape(20, 15).t().reshape(-1)[3:77])
    opened.close()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_bits_of_any_dtype_and_stride(tmp_path: Path, options: dict[str, Any]) -> None:
    """A complex number of 16 bytes is two items; rows of a transposed matrix are gathered."""
    tensors = {
        "c": torch.arange(12.0).to(torch.complex128).mul(1 + 2j),
        "t": torch.arange(12.0).view(3, 4).T,
        "s": torch.arange(6.0).to(torch.complex128).view(2, 3).T,
        "b": torch.tensor([True, False, True]),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin", **options)
    source = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        info = source.tensors[name]
        assert info.items * info.item_bytes == tensor.numel() * tensor.element_size()
        for start in (0, 1, info.items // 2):
            for stop in (start, info.items - 1, info.items):
                if stop >= start:
                    assert (
                        bits(source.read_bits(name, start, stop))
                        == bits(tensor)[start * info.item_bytes : stop * info.item_bytes]
                    )
    assert source.headers() == {"pytorch_model.bin": None}
    source.close()
