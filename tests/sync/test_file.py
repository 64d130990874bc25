"""Files of sync patches: what is saved is opened again; damaged and other files are rejected with one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from opdkernels import InputError, UsageError
from opdkernels.sync import ChangeTracker, Patch
from tests.patch.conftest import digest, join, some, split
from tests.sync.conftest import RUN, change, copied, make_model, numbered, oracle_digest, rejection, rewrite, same


def test_opened_patch_equals_the_saved_one(tmp_path):
    model = make_model()
    replica, tracker = copied(model), ChangeTracker(model)
    digests = tracker.digests
    model["tied"] = model["transposed"]
    tracker = ChangeTracker(model)
    change({name: tensor for name, tensor in model.items() if name != "tied"}, 5)
    patch = numbered(tracker.take())
    patch.save(tmp_path / "patch")
    opened = Patch.open(tmp_path / "patch")
    assert (opened.run, opened.base_version, opened.version) == (RUN, 0, 1)
    assert (opened.base_digest, opened.digest) == (patch.base_digest, patch.digest)
    for a, b in zip(patch.tensors, opened.tensors, strict=True):
        for field in ("name", "dtype", "shape", "aliases", "mode", "base_digest", "digest"):
            assert getattr(a, field) == getattr(b, field)
        for field in ("counts", "positions", "values"):
            assert torch.equal(getattr(a.changes, field), getattr(b.changes, field))
    assert opened.apply_(replica, digests) == tracker.digests
    assert same(replica, {name: model[name] for name in replica})
    opened.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "patch").read_bytes()


def test_file_is_read_by_another_reader(saved):
    """As docs/reference/sync.md describes it, with safetensors and NumPy alone."""
    base, path = saved
    patched = copied(base)
    Patch.open(path).apply_(patched)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("opdkernels.sync", "1")
    assert metadata["manifest_digest"] == digest(metadata["manifest"].encode())
    manifest, entries = json.loads(metadata["manifest"]), load_file(path)
    assert [tensor["mode"] for tensor in manifest["tensors"]] == ["sparse", "sparse", "whole", "whole"]
    for tensor in manifest["tensors"]:
        trained = base[tensor["name"]].clone()
        width = trained.itemsize
        integers = trained.flatten().view(torch.uint8).numpy().reshape(-1, width)
        values = entries["values"][slice(*tensor["values"])].reshape(-1, width)
        assert tensor["values"][0] % 8 == 0
        assert len(values) == tensor["changed"]
        if tensor["mode"] == "whole":
            integers[:] = values
        else:
            coded, changed = entries["positions"][slice(*tensor["positions"])], []
            for block, count in enumerate(entries["counts"][slice(*tensor["blocks"])].tolist()):
                size = min(65_536, len(integers) - block * 65_536)
                if 2 * count < (size + 7) // 8:
                    offsets, coded = coded[: 2 * count].copy().view(np.uint16), coded[2 * count :]
                else:
                    mask, coded = coded[: (size + 7) // 8], coded[(size + 7) // 8 :]
                    offsets = np.unpackbits(mask, bitorder="little").nonzero()[0]
                changed.append(offsets.astype(np.int64) + block * 65_536)
            assert len(coded) == 0
            integers[np.concatenate(changed)] = values
        assert tensor["base_digest"] == f"{oracle_digest(base[tensor['name']]):016x}"
        assert tensor["digest"] == f"{oracle_digest(trained):016x}"
        assert same({"": trained}, {"": patched[tensor["name"]]})
    pairs = sorted([tensor["name"], tensor["digest"]] for tensor in manifest["tensors"])
    assert manifest["digest"] == digest(json.dumps(pairs, separators=(",", ":")).encode())


def test_empty_patches_and_empty_tensors_are_saved(tmp_path):
    tracker = ChangeTracker({"w": torch.zeros(0), "v": torch.zeros(5000)})
    numbered(tracker.take()).save(tmp_path / "empty")
    assert Patch.open(tmp_path / "empty").tensors == ()
    rewrite(tmp_path / "empty", lambda manifest: manifest.update(digest="0" * 32))
    rejection(tmp_path / "empty", "changes the digest of the model and no tensor")
    tracker.touch("w")
    numbered(tracker.take()).save(tmp_path / "touched")
    (tensor,) = Patch.open(tmp_path / "touched").tensors
    assert (tensor.name, tensor.mode, tensor.changed) == ("w", "whole", 0)


def test_save_needs_numbers_and_replaces_only_sync_patches(tmp_path):
    patch = ChangeTracker({"w": torch.zeros(3)}).take()
    with pytest.raises(UsageError, match=r"save patch.numbered\(...\)"):
        patch.save(tmp_path / "patch")
    numbered(patch).save(tmp_path / "patch")
    with pytest.raises(InputError, match="exists"):
        numbered(patch).save(tmp_path / "patch")
    numbered(patch, 7).save(tmp_path / "patch", overwrite=True)
    assert Patch.open(tmp_path / "patch").version == 7
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="exists and is not a sync patch"):
        numbered(patch).save(tmp_path / "notes", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "patch"]


def test_every_region_is_protected(saved):
    """Flips a bit of the length, of bytes all over the header, and of bytes of each entry, paddings included."""
    _, path = saved
    content = path.read_bytes()
    header, _ = split(path)
    start = 8 + int.from_bytes(content[:8], "little")
    text_end = len(content[:start].rstrip())
    at = {*range(8), *range(8, text_end, 11), len(content) - 1}
    for name in ("values", "counts", "positions"):
        begin, end = header[name]["data_offsets"]
        assert end > begin
        at |= {*range(start + begin, start + end, max(1, (end - begin) // 60)), start + end - 1}
    for byte in sorted(at):
        damaged = bytearray(content)
        damaged[byte] ^= 1 << byte % 7
        path.write_bytes(damaged)
        rejection(path)
    path.write_bytes(content)
    Patch.open(path)


def test_truncated_and_extended_files_are_rejected(saved):
    _, path = saved
    content = path.read_bytes()
    for size in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        rejection(path)
    path.write_bytes(content + b"\0")
    rejection(path)


def test_other_files_are_rejected(saved, tmp_path):
    _, path = saved
    rejection(tmp_path / "nowhere", "does not exist; give a file that sync.Patch.save wrote")
    rejection(tmp_path, "is not a regular file")
    header, data = split(path)
    header["__metadata__"]["version"] = "2"
    join(path, header, data)
    rejection(path, "is a sync patch of version 2; this version of opdkernels reads version 1: update opdkernels")
    header["__metadata__"]["format"] = "opdkernels.patch"
    join(path, header, data)
    rejection(path, "is a safetensors file but not a sync patch; give a file")
    header["__metadata__"] |= {"format": "opdkernels.sync", "version": "1", "more": "x"}
    join(path, header, data)
    rejection(path, "has metadata that are not those of a sync patch")


def test_names_are_printed_safely(tmp_path):
    model = {"a\x1b[31m\n": some((9000,), torch.float32, 0)}
    tracker = ChangeTracker(model)
    model["a\x1b[31m\n"][0] = 1.5
    numbered(tracker.take()).save(tmp_path / "patch")
    patch = Patch.open(tmp_path / "patch")
    with pytest.raises(InputError) as error:
        patch.apply_({})
    assert "\\x1b" in str(error.value)
    assert str(error.value).isprintable()
