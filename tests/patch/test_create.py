"""Patches have the format of docs/patch.md: an independent NumPy reader with the safetensors library reads them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from opdkernels import InputError
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.ops.patch.layout import HASH_SECRET
from opdkernels.patch import create
from opdkernels.patch.create import weights_name
from tests.ops.patch.test_patch import MASK, Xxh3
from tests.patch.conftest import digest, hashes, save, some

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}


class Reader:
    """Makes the files of a patch, from its documentation."""

    def __init__(self, patch: str | Path, base: str | Path):
        self.patch = safe_open(patch, framework="pt")
        self.metadata = self.patch.metadata()
        self.manifest = json.loads(self.metadata["manifest"])
        self.base, self.hasher = Path(base), Xxh3(HASH_SECRET)
        assert digest(self.metadata["manifest"].encode()) == self.metadata["manifest_digest"]

    def entry(self, key: str) -> bytes:
        return self.patch.get_tensor(key).flatten().view(torch.uint8).numpy().tobytes()

    def block_digests(self, data: bytes, width: int) -> bytes:
        digests = b""
        for at in range(0, len(data), 65536 * width):
            block = data[at : at + 65536 * width]
            digests += struct.pack("<QQ", *(word & MASK for word in self.hasher(block + bytes(-len(block) % 1024))))
        return digests

    def tensor_digest(self, data: bytes, dtype: str, shape: list[int]) -> str:
        return digest(f"{dtype} {'x'.join(map(str, shape))}\n".encode() + self.block_digests(data, WIDTHS[dtype]))

    def changed(self, key: str, old: bytes, width: int) -> bytes:
        content, at, new = self.entry(key), 0, b""
        for start in range(0, len(old), 1 << 23):
            items = np.frombuffer(old[start : start + (1 << 23)], f"<u{width}").copy()
            length, stored = struct.unpack_from("<QQ", content, at)
            segment = content[at + 32 : at + 32 + stored]
            if stored < length:
                expected = self.block_digests(segment, 1)
                segment = pa.Codec("zstd").decompress(segment, length, asbytes=True)
            counts, positions, values = self.split(segment, items, width)
            if stored == length:
                expected = b"".join(self.block_digests(piece, 1) for piece in (counts, positions, values))
            assert hashlib.blake2b(expected, digest_size=16).digest() == content[at + 16 : at + 32]
            where = self.where(counts, positions, len(items))
            items[where] = self.values(values, items[where], width)
            new += items.tobytes()
            at += 32 + stored
        assert at == len(content)
        return new

    def split(self, segment: bytes, items: np.ndarray, width: int) -> list[bytes]:
        n_blocks = -(-len(items) // 65536)
        counts = np.frombuffer(segment, "<u4", n_blocks)
        sizes = [min(65536, len(items) - 65536 * block) for block in range(n_blocks)]
        lengths = [
            4 * n_blocks,
            sum(min(2 * int(c), -(-n // 8)) for c, n in zip(counts, sizes, strict=True)),
            int(counts.sum()) * width,
        ]
        sections = []
        for length in lengths:
            padded = length + -length % 8
            assert not any(segment[length:padded])
            sections.append(segment[:padded])
            segment = segment[padded:]
        assert segment == b""
        return sections

    def where(self, counts: bytes, positions: bytes, n_items: int) -> np.ndarray:
        indices, at = [np.zeros(0, np.int64)], 0
        for block, first in enumerate(range(0, n_items, 65536)):
            count, n = struct.unpack_from("<I", counts, 4 * block)[0], min(65536, n_items - first)
            if 2 * count < -(-n // 8):
                indices.append(first + np.frombuffer(positions, "<u2", count, at).astype(np.int64))
                at += 2 * count
            else:
                mask = np.frombuffer(positions, np.uint8, -(-n // 8), at)
                indices.append(first + np.flatnonzero(np.unpackbits(mask, bitorder="little")))
                at += len(mask)
        return np.concatenate(indices)

    def values(self, values: bytes, old: np.ndarray, width: int) -> np.ndarray:
        size = len(old) * width
        if self.manifest["values"] == "new":
            return np.frombuffer(values[:size], old.dtype)
        zigzag = np.frombuffer(values[:size], np.uint8).reshape(width, -1).T.copy().view(old.dtype).ravel()
        return old + ((zigzag >> 1) ^ (0 - (zigzag & 1)).astype(old.dtype))

    def file(self, name: str) -> bytes:
        header = self.entry(f"header:{name}")
        assert digest(header) == self.manifest["headers"][name]
        table = json.loads(header[8:])
        table.pop("__metadata__", None)
        content = header
        for tensor, described in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            what = self.manifest["tensors"][tensor]
            data = self.entry(what["data"]) if what["base"] is None else None
            if data is None:
                old = self.old(what["base"])
                assert self.tensor_digest(old, described["dtype"], described["shape"]) == what["base_digest"]
                data = self.changed(what["data"], old, WIDTHS[described["dtype"]])
            assert self.tensor_digest(data, described["dtype"], described["shape"]) == what["digest"]
            content += data
        return content

    def old(self, name: str) -> bytes:
        content = (self.base / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
        return content[8 + length + begin : 8 + length + end]


def test_independent_reader_rebuilds_the_same_file(pair, tmp_path, zstd):
    create(*pair, tmp_path / "p", zstd=zstd)
    reader = Reader(tmp_path / "p", pair[0])
    rebuilt = reader.file("model.safetensors")
    assert hashlib.sha256(rebuilt).hexdigest() == hashes(pair[1])["model.safetensors"]
    manifest = reader.manifest
    digests = {name: tensor["digest"] for name, tensor in manifest["tensors"].items()}
    assert (
        digest(json.dumps(sorted(digests.items()), separators=(",", ":")).encode())
        == reader.metadata["trained_digest"]
        == manifest["digest"]
    )
    base_tensors = {t["base"]: t["base_digest"] for t in manifest["tensors"].values() if t["base"] is not None}
    assert (
        digest(json.dumps(sorted(base_tensors.items()), separators=(",", ":")).encode())
        == reader.metadata["base_digest"]
    )
    assert (reader.metadata["format"], reader.metadata["version"]) == ("opdkernels.patch", "1")


def test_patch_depends_only_on_its_inputs(pair, tmp_path, zstd):
    create(*pair, tmp_path / "p", zstd=zstd)
    create(*pair, tmp_path / "elsewhere" / "q", zstd=zstd)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "elsewhere" / "q").read_bytes()


def test_entries_are_aligned_for_memory_mapping(pair, tmp_path):
    create(*pair, tmp_path / "p")
    opened = SafetensorsFile(str(tmp_path / "p"), "read")
    assert all(info.nbytes % 8 == 0 for name, info in opened.tensors.items() if name.startswith("changes:"))
    opened.close()


def test_tensors_missing_from_the_base_are_stored_in_full(tmp_path):
    a = save(tmp_path / "a", {"x": some((9,), torch.float32, 0)})
    b = save(tmp_path / "b", {"y": some((9,), torch.float32, 0)})
    assert create(a, b, tmp_path / "p")["tensors_whole"] == ["y"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00002-of-00003.bin", "model-00002-of-00003.safetensors"),
        ("weights.pt", "weights.safetensors"),
    ],
)
def test_names_of_written_files(name, expected):
    assert weights_name(name) == expected


def test_complex128_is_rejected(tmp_path):
    (tmp_path / "b").mkdir()
    torch.save({"x": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(InputError, match="tensor x is complex128, which safetensors does not support"):
        create(tmp_path / "b", tmp_path / "b", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_file_name_that_is_not_utf_8_is_rejected(tmp_path):
    """The header of a patch is JSON: a patch with such a name could be written and not read."""
    folder = Path(save(tmp_path / "b", {"x": some((9,), torch.float32, 0)}))
    try:
        next(folder.glob("*.safetensors")).rename(folder / os.fsdecode(b"w\xff.safetensors"))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(InputError, match=r"w\\udcff\.safetensors is not UTF-8; rename the file"):
        create(folder, folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()
