"""Files written by someone who knows the format are rejected with one line before a tensor is changed."""

from __future__ import annotations

import json

import pytest
import torch

from opdkernels import InputError
from opdkernels.patch.segments import digest_of
from opdkernels.sync import Patch
from tests.patch.conftest import digest, join, split
from tests.sync.conftest import copied, oracle_digest, rejection, rewrite, same


def first(manifest):
    return manifest["tensors"][0]


EDITS = {
    "unknown key": lambda m: m.update(more=1),
    "unknown key of a tensor": lambda m: first(m).update(more=1),
    "missing key": lambda m: m.pop("codec"),
    "version as text": lambda m: m.update(version="1"),
    "version as bool": lambda m: m.update(version=True),
    "version not larger": lambda m: m.update(version=0),
    "negative version": lambda m: m.update(base_version=-1),
    "huge version": lambda m: m.update(version=1 << 64),
    "run": lambda m: m.update(run="x"),
    "part of several": lambda m: m.update(parts=[1, 2]),
    "codec": lambda m: m.update(codec="zstd"),
    "differences": lambda m: m.update(values="difference"),
    "no tensors": lambda m: m.update(tensors=[]),
    "tensors no list": lambda m: m.update(tensors={}),
    "tensor left out": lambda m: m["tensors"].pop(),
    "tensors in another order": lambda m: m["tensors"].reverse(),
    "two of one name": lambda m: m["tensors"][1].update(name=first(m)["name"]),
    "alias of another tensor": lambda m: first(m).update(aliases=[m["tensors"][1]["name"]]),
    "alias of itself": lambda m: first(m).update(aliases=[first(m)["name"]]),
    "dtype": lambda m: first(m).update(dtype="__class__"),
    "wider dtype": lambda m: first(m).update(dtype="F32"),
    "negative size": lambda m: first(m).update(shape=[-300, -300]),
    "larger shape": lambda m: first(m).update(shape=[1 << 40]),
    "shape beyond 2^63": lambda m: first(m).update(shape=[1 << 62, 1 << 62]),
    "shape of other blocks": lambda m: first(m).update(shape=[300, 100]),
    "shape that cuts positions": lambda m: first(m).update(shape=[300, 299]),
    "shape of whole": lambda m: m["tensors"][2].update(shape=[8]),
    "too many dimensions": lambda m: first(m).update(shape=[1] * 65),
    "mode": lambda m: first(m).update(mode="dense"),
    "whole as sparse": lambda m: m["tensors"][2].update(mode="sparse"),
    "sparse as whole": lambda m: first(m).update(mode="whole"),
    "changed": lambda m: first(m).update(changed=first(m)["changed"] + 1),
    "range of three": lambda m: first(m).update(blocks=[0, 1, 2]),
    "range backwards": lambda m: first(m).update(positions=[0, -1]),
    "range beyond": lambda m: m["tensors"][-1]["values"].__setitem__(1, 1 << 40),
    "range that overlaps": lambda m: m["tensors"][1]["values"].__setitem__(0, 0),
    "range of another tensor": lambda m: m["tensors"][2].update(values=[0, 56]),
    "digest": lambda m: first(m).update(digest="0x" + "0" * 14),
    "short digest": lambda m: m.update(digest="0" * 31),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_invalid_manifests_are_rejected(saved, edit):
    _, path = saved
    rewrite(path, edit)
    assert str(path) in rejection(path)


def forged(path, edit) -> None:
    """Changes the entries of a file as someone who knows the format; only the additive digests remain."""
    header, data = split(path)
    entries = {
        name: bytearray(data[slice(*header[name]["data_offsets"])]) for name in ("values", "counts", "positions")
    }
    manifest = json.loads(header["__metadata__"]["manifest"])
    edit(entries, manifest)
    parts = [torch.frombuffer(content, dtype=torch.uint8) for content in entries.values()]
    manifest["content_digest"] = digest_of(*parts).hex()
    text = json.dumps(manifest)
    header["__metadata__"] |= {"manifest": text, "manifest_digest": digest(text.encode())}
    join(path, header, b"".join(entries.values()))


def test_forged_values_are_rejected_before_the_first_write(saved):
    base, path = saved
    last = Patch.open(path).tensors[2].name

    def edit(entries, manifest):
        (tensor,) = (tensor for tensor in manifest["tensors"] if tensor["name"] == last)
        entries["values"][tensor["values"][0]] ^= 1

    forged(path, edit)
    patch, replica = Patch.open(path), copied(base)
    with pytest.raises(InputError, match=f"{last} would get digest .*; load the full weights, or copy the patch again"):
        patch.apply_(replica)
    assert same(replica, base)


def test_patches_with_another_result_are_rejected_by_held_digests(saved):
    base, path = saved
    rewrite(path, lambda manifest: manifest.update(digest="0" * 32))
    replica, digests = copied(base), {name: oracle_digest(tensor) for name, tensor in base.items()}
    with pytest.raises(InputError, match=r"the model has digest .* to 0{32}"):
        Patch.open(path).apply_(replica, digests)
    assert same(replica, base)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda entries, m: entries["positions"].__setitem__(slice(0, 4), b"\5\0\3\0"), "changes that are not valid"),
        (lambda entries, m: entries["counts"].__setitem__(slice(0, 4), b"\xff\xff\xff\xff"), "not valid"),
        (lambda entries, m: entries["counts"].__setitem__(0, entries["counts"][0] ^ 1), "not valid"),
        (lambda entries, m: entries["values"].__setitem__(m["tensors"][3]["values"][0], 2), "bool with values other"),
    ],
)
def test_forged_changes_are_rejected(saved, edit, match):
    _, path = saved
    forged(path, edit)
    rejection(path, match)


def test_other_entries_are_rejected(saved):
    _, path = saved
    header, data = split(path)
    for edit, match in (
        (lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [len(data)] * 2}), "has an entry"),
        (lambda h: h.update(mask=h.pop("positions")), "has no entry positions of U8"),
        (lambda h: h["counts"].update(dtype="I32"), "has no entry counts of U32"),
        (lambda h: h["values"].update(shape=[1, *h["values"]["shape"]]), "has no entry values of U8"),
    ):
        edited = json.loads(json.dumps(header))
        edit(edited)
        join(path, edited, data)
        rejection(path, match)
