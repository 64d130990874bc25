"""Damaged, truncated and malicious patches are rejected with one line, and no tensor is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opdkernels import InputError
from opdkernels.patch import apply, apply_to, create, info
from opdkernels.patch.apply import Application
from opdkernels.patch.manifest import Patch
from tests.patch.conftest import changed, digest, join, rewrite, save, some, split


@pytest.fixture
def small(tmp_path, zstd) -> tuple[str, Path]:
    """A base of three tensors and a patch for it, one of them stored whole."""
    base = {"w": some((70_001,), torch.bfloat16, 0), "b": some((7,), torch.float32, 1)}
    trained = {name: changed(tensor, 0.2, 2) for name, tensor in base.items()} | {"n": some((3,), torch.uint8, 3)}
    a = save(tmp_path / "a", base)
    create(a, save(tmp_path / "b", trained, config__json=b"{}"), tmp_path / "p", zstd=zstd)
    return a, tmp_path / "p"


def rejection(base: str, patch: Path, match: str | None = None) -> str:
    """Returns the one-line error of `apply`; asserts that `apply_to` fails too and that nothing is written."""
    folder = patch.parent
    there = sorted(folder.iterdir())
    with pytest.raises(InputError, match=match) as error:
        apply(base, patch, folder / "out")
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == there
    model = {
        "w": some((70_001,), torch.bfloat16, 0),
        "b": some((7,), torch.float32, 1),
        "n": torch.zeros(3, dtype=torch.uint8),
    }
    untouched = {name: tensor.clone() for name, tensor in model.items()}
    with pytest.raises(InputError):
        apply_to(model, patch)
    assert all(torch.equal(model[name].view(torch.uint8), untouched[name].view(torch.uint8)) for name in model)
    return str(error.value)


def test_truncation_is_rejected(small):
    base, patch = small
    content = patch.read_bytes()
    for size in {0, 7, 8, 100, len(content) // 2, len(content) - 1}:
        patch.write_bytes(content[:size])
        rejection(base, patch)
    patch.write_bytes(content + b"\0")
    rejection(base, patch)


def test_flipped_bits_are_rejected(small):
    """Tests a sample of the bytes of the data and of the header. The padding of the header is not verified."""
    base, patch = small
    content = patch.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(start, len(content), 97 if len(content) < 60_000 else 997), *range(start, start + 80)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        patch.write_bytes(damaged)
        with pytest.raises(InputError) as error:
            apply(base, patch, patch.parent / "out")
        assert "\n" not in str(error.value)
        assert not (patch.parent / "out").exists()
    header = content[8:start].rstrip()
    for at in range(8, 8 + len(header), 13):
        damaged = bytearray(content)
        damaged[at] ^= 2
        patch.write_bytes(damaged)
        rejection(base, patch)


def test_files_of_other_formats_are_rejected(small, tmp_path):
    base, _ = small
    rejection(
        base,
        Path(base) / "model.safetensors",
        "is a safetensors file but not a patch; give a file that patch create wrote",
    )
    with pytest.raises(InputError, match="does not exist; give a file that patch create wrote"):
        info(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a regular file"):
        info(tmp_path)


def test_later_version_is_rejected_with_its_number(small):
    base, patch = small
    header, data = split(patch)
    header["__metadata__"]["version"] = "2"
    join(patch, header, data)
    rejection(base, patch, "is a patch of version 2; this version of opdkernels reads version 1: update opdkernels")


NAMES = [
    "../model.safetensors",
    "/tmp/model.safetensors",
    "..\\model.safetensors",
    "a/b.safetensors",
    ".model.safetensors",
    "c:model.safetensors",
    "model\n.safetensors",
    "model\0.safetensors",
    "é" * 150 + ".safetensors",
    "model.bin",
    "run.py",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_weight_file_names_are_validated(small, name):
    base, patch = small
    header, data = split(patch)
    header[f"header:{name}"] = header.pop("header:model.safetensors")
    join(patch, header, data)
    rewrite(patch, lambda manifest: manifest.update(headers={name: manifest["headers"]["model.safetensors"]}))
    text = rejection(base, patch, "is not a plain file name|whose name does not end with .safetensors")
    assert text.isprintable()


@pytest.mark.parametrize(
    "name", ["../x.json", "x.py", "x.safetensors", "MODEL.safetensors", ".hidden.json", "model.bin"]
)
def test_extra_file_names_are_validated(small, name):
    base, patch = small
    rewrite(patch, lambda manifest: manifest["extra_files"].update({name: {"stored": False, "digest": "0" * 32}}))
    rejection(base, patch, "is not a plain file name|is none of .json")


def test_duplicate_file_names_are_rejected(small):
    base, patch = small
    rewrite(
        patch, lambda manifest: manifest["extra_files"].update({"CONFIG.json": {"stored": False, "digest": "0" * 32}})
    )
    rejection(base, patch, "gives two files of one name")


def deceive(manifest, tensor, **values):
    manifest["tensors"][tensor].update(values)


DECEPTIONS = {
    "no base digest": (lambda m: deceive(m, "w", base_digest=None), "neither in full nor as changes"),
    "no base": (lambda m: deceive(m, "w", base=None, base_digest=None), "neither in full nor as changes"),
    "another's data": (lambda m: deceive(m, "b", data="changes:w"), "has an entry that its manifest does not list"),
    "another's data next to its own": (
        lambda m: m["tensors"].update(
            b={**m["tensors"]["b"], "data": "changes:w"}, w={**m["tensors"]["w"], "data": "changes:b"}
        ),
        "holds damaged changes",
    ),
    "no such data": (lambda m: deceive(m, "b", data="changes:x"), "lacks changes:x"),
    "whole of another shape": (
        lambda m: deceive(m, "b", base=None, base_digest=None, data="whole:n"),
        "neither in full nor as changes",
    ),
    "another base": (lambda m: deceive(m, "b", base="w"), "has a tensor of BF16"),
    "no such base": (lambda m: deceive(m, "b", base="q"), "lacks a tensor"),
    "another digest": (lambda m: deceive(m, "w", digest="0" * 32), "gives a tensor w with a wrong digest"),
    "whole with a wrong digest": (lambda m: deceive(m, "n", digest="0" * 32), "holds a tensor n with a wrong digest"),
    "another base digest": (lambda m: deceive(m, "w", base_digest="0" * 32), "is a patch for another base"),
    "a tensor more": (
        lambda m: m["tensors"].update(x=m["tensors"]["w"]),
        "gives other tensors than its manifest lists",
    ),
    "a tensor fewer": (lambda m: m["tensors"].pop("n"), "gives other tensors than its manifest lists"),
    "a file more": (lambda m: m["headers"].update({"x.safetensors": "0" * 32}), "lacks header:x.safetensors"),
    "no file": (lambda m: m["headers"].clear(), "gives no file of weights"),
    "no such values": (lambda m: m.update(values="xor"), "manifest is not valid: values"),
    "a digest that is none": (lambda m: deceive(m, "w", digest="g" * 32), r"not valid: tensors\.w\.digest"),
    "a digest and a line": (lambda m: deceive(m, "w", digest="0" * 32 + "\n"), r"not valid: tensors\.w\.digest"),
    "a negative count": (lambda m: deceive(m, "w", changed=-1), r"not valid: tensors\.w\.changed"),
    "something else": (lambda m: m.update(run="rm"), "manifest is not valid: run"),
}


@pytest.mark.parametrize("name", DECEPTIONS)
def test_inconsistent_manifests_are_rejected(small, name):
    change, message = DECEPTIONS[name]
    base, patch = small
    rewrite(patch, change)
    rejection(base, patch, message)


def replace_header(patch: Path, change) -> None:
    """Replaces the header of the file that the patch restores, and its digest."""
    header, data = split(patch)
    at = header["header:model.safetensors"]["data_offsets"]
    table = json.loads(data[at[0] + 8 : at[1]])
    text = json.dumps(change(table)).encode()
    if len(text) > at[1] - at[0] - 8:
        pytest.fail("does not fit")
    content = (at[1] - at[0] - 8).to_bytes(8, "little") + text.ljust(at[1] - at[0] - 8)
    join(patch, header, data[: at[0]] + content + data[at[1] :])
    rewrite(patch, lambda manifest: manifest["headers"].update({"model.safetensors": digest(content)}))


def shape_of(table, tensor, **values):
    table.pop("__metadata__", None)
    table[tensor] |= values
    return table


HEADERS = {
    "no object": lambda table: 3,
    "an entry that is none": lambda table: {"w": 1},
    "a gap": lambda table: shape_of(table, "w", data_offsets=[2, 140_004]),
    "backwards": lambda table: shape_of(table, "n", data_offsets=[9, 2]),
    "negative": lambda table: shape_of(table, "n", shape=[-3]),
    "a shape of words": lambda table: shape_of(table, "n", shape=["3"]),
    "truth for a number": lambda table: shape_of(table, "n", shape=[True]),
    "another shape": lambda table: shape_of(table, "w", shape=[70_002]),
    "another dtype": lambda table: shape_of(table, "w", dtype="F16"),
    "no dtype": lambda table: shape_of(table, "w", dtype=None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_inconsistent_file_headers_are_rejected(small, name):
    base, patch = small
    replace_header(patch, HEADERS[name])
    rejection(base, patch)


def test_hostile_names_are_escaped(tmp_path):
    name = "w\x1b[2Jx\u202e"
    a = save(tmp_path / "a", {name: torch.ones(3)})
    create(a, save(tmp_path / "b", {name: torch.zeros(3)}), tmp_path / "p")
    rewrite(tmp_path / "p", lambda manifest: deceive(manifest, name, base_digest="0" * 32))
    with pytest.raises(InputError) as error:
        apply(a, tmp_path / "p", tmp_path / "out")
    assert str(error.value).isprintable()


def test_change_of_the_patch_during_reading_is_detected(small, monkeypatch):
    """The change comes after the patch was opened: its bytes are compared with their digest as they are read."""
    base, path = small
    content = path.read_bytes()
    compare_headers = Application.compare_headers

    def compare_then_damage(self):
        compare_headers(self)
        with open(path, "r+b") as file:
            file.seek(len(content) - 9)
            file.write(b"\xff" * 9)

    monkeypatch.setattr(Application, "compare_headers", compare_then_damage)
    there = sorted(path.parent.iterdir())
    with pytest.raises(InputError, match="damaged"):
        apply(base, path, path.parent / "out")
    assert sorted(path.parent.iterdir()) == there


def test_open_patch_lists_its_files(small):
    patch = Patch(small[1])
    assert [tensor.name for tensor in patch.files["model.safetensors"]] == ["b", "w", "n"]
    patch.close()
