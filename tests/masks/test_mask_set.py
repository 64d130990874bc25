"""Sets of masks on disk: read lazily, distinguished by digest, rejected if damaged or of another format."""

from __future__ import annotations

import gc
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from opdkernels.errors import InputError
from opdkernels.masks import Mask, MaskSet, mask
from opdkernels.masks.mask_set import from_bools


def sample(seed=0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (40, 30), "a.weight": (7,), "empty": (0, 3), "ünï\n../x": (100,)}
    return from_bools(
        {
            name: torch.rand(shape, generator=generator) < d
            for (name, shape), d in zip(shapes.items(), (0.01, 0.5, 0.5, 1.0), strict=True)
        }
    )


def test_save_and_load_round_trip(tmp_path):
    masks = sample()
    masks.save(tmp_path / "m.safetensors")
    result = MaskSet.load(tmp_path / "m.safetensors")
    assert result == masks
    assert list(result) == list(masks)
    assert result.shapes == masks.shapes
    assert (result.num_active, result.numel, result.density) == (masks.num_active, masks.numel, masks.density)
    for name in masks:
        assert result[name] == masks[name]
        assert result[name].layout == masks[name].layout
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_counts_do_not_read_masks(tmp_path, monkeypatch):
    sample().save(tmp_path / "m.safetensors")
    result = MaskSet.load(tmp_path / "m.safetensors")
    monkeypatch.setattr(MaskSet, "_read", None)
    assert result.num_active == sample().num_active
    assert result.digest == sample().digest


def test_digest_covers_names_order_shapes_and_coordinates():
    masks = sample()
    others = [
        MaskSet({name: masks[name] for name in reversed(list(masks))}),
        MaskSet({name + "x": masks[name] for name in masks}),
        MaskSet({**masks, "a.weight": ~masks["a.weight"]}),
        MaskSet({**masks, "a.weight": Mask.from_bool(masks["a.weight"].to_bool().view(7, 1))}),
    ]
    assert len({one.digest for one in (masks, *others)}) == 5


def test_sets_combine_mask_by_mask():
    a, b = sample(0), sample(1)
    for result, how in ((a & b, torch.logical_and), (a | b, torch.logical_or), (a ^ b, torch.logical_xor)):
        for name in a:
            assert torch.equal(result[name].to_bool(), how(a[name].to_bool(), b[name].to_bool()))
    assert (a - b) == (a & ~b)
    with pytest.raises(ValueError, match=r"different tensors: a.weight is not in the second one; give masks"):
        a & MaskSet({"b.weight": b["b.weight"]})
    with pytest.raises(ValueError, match=r"different tensors: a.weight is not in the first one; give masks"):
        MaskSet({name: b[name] for name in b if name != "a.weight"}) & a
    reshaped = MaskSet({**b, "a.weight": Mask.from_bool(b["a.weight"].to_bool().view(7, 1))})
    with pytest.raises(ValueError, match=r"the masks of a.weight have shapes \[.*\] and \[.*\]; give masks"):
        a & reshaped
    with pytest.raises(ValueError, match="in different orders"):
        a & MaskSet({name: b[name] for name in reversed(list(b))})


def test_loading_other_files_raises_in_one_line(tmp_path):
    path = tmp_path / "m.safetensors"
    for content, message in (
        (lambda: save_file({"w": torch.ones(2)}, path), "holds no masks"),
        (lambda: path.write_bytes(b"junk"), "is not a safetensors file"),
        (lambda: path.write_bytes(b""), "is not a safetensors file"),
        (lambda: save_file({}, path, {"format": "opdkernels masks", "version": "9"}), "version 9"),
    ):
        content()
        with pytest.raises(InputError, match=message) as caught:
            MaskSet.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        MaskSet.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot write"):
        sample().save(tmp_path / "m.safetensors" / "m.safetensors")


def test_damaged_payload_raises_when_read(tmp_path):
    path = tmp_path / "m.safetensors"
    sample().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    result = MaskSet.load(path)
    with pytest.raises(InputError, match="is damaged"):
        [result[name] for name in result]


def describe(masks: MaskSet) -> list[dict]:
    return [
        {"name": name, "shape": list(m.shape), "numel": m.numel, "num_active": m.num_active, "digest": m.digest}
        for name, m in masks.items()
    ]


def digest_of(entries: list) -> str:
    """The digest of a set, as its definition says, from the entries of its metadata."""
    parts = [[entry["name"], entry["digest"]] for entry in entries]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def reshaped(entries: list[dict], change) -> list[dict]:
    """The entries, the first with another shape."""
    return [{**entries[0], "shape": change(entries[0]["shape"])}, *entries[1:]]


DAMAGES = {
    "no digest": lambda entries: ({"digest": None}, entries),
    "a digest of another length": lambda entries: ({"digest": "0"}, entries),
    "another digest": lambda entries: ({"digest": "0" * 16}, entries),
    "another order": lambda entries: ({"order": "file"}, entries),
    "an unknown key": lambda entries: ({"author": "x"}, entries),
    "no JSON": lambda entries: ({"masks": "[{"}, entries),
    "deep JSON": lambda entries: ({"masks": "[" * 100_000}, entries),
    "an object": lambda entries: ({"masks": "{}"}, entries),
    "NaN": lambda entries: ({}, [{**entries[0], "numel": float("nan")}]),
    "a key twice": lambda entries: ({"masks": '[{"name": "a", "name": "b"}]'}, entries),
    "empty entries": lambda entries: ({}, [{"name": "w", "digest": "0" * 16}]),
    "a name that is a number": lambda entries: ({}, [{**entries[0], "name": 3}]),
    "a name that is no text": lambda entries: ({}, [{**entries[0], "name": "a\ud800"}]),
    "a name twice": lambda entries: ({}, [entries[0], entries[0]]),
    "a shape of text": lambda entries: ({}, [{**entries[0], "shape": "44"}]),
    # Shapes of the right product, so that nothing else of the file refuses them.
    "a shape of texts": lambda entries: ({}, reshaped(entries, lambda shape: list(map(str, shape)))),
    "a shape with a fraction": lambda entries: ({}, reshaped(entries, lambda shape: list(map(float, shape)))),
    "a negative shape": lambda entries: ({}, reshaped(entries, lambda shape: [-size for size in shape])),
    "true as a size": lambda entries: ({}, reshaped(entries, lambda shape: [True, *shape])),
    "400,000 dimensions": lambda entries: ({}, reshaped(entries, lambda shape: [*shape, *[1] * 400_000])),
    "a shape beyond 64 bits": lambda entries: ({}, [{**entries[0], "shape": [2**70], "numel": 2**70}]),
    "a product beyond the limit": lambda entries: ({}, [{**entries[0], "shape": [2**30, 2**30], "numel": 2**60}]),
    "more active than coordinates": lambda entries: ({}, [{**entries[0], "num_active": 10**9}]),
    "another shape": lambda entries: ({}, [{**entries[0], "shape": [3, 3], "numel": 9}, *entries[1:]]),
    "fewer masks": lambda entries: ({}, entries[:1]),
    "no masks": lambda entries: ({}, []),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_crafted_metadata_is_refused_when_the_file_is_opened(tmp_path, name):
    masks, path = sample(), tmp_path / "m.safetensors"
    changes, entries = DAMAGES[name](describe(masks))
    metadata = {
        "format": "opdkernels masks",
        "version": "1",
        "digest": digest_of(entries),
        "masks": json.dumps(entries),
        **changes,
    }
    tensors = {f"{i}.{mask.layout}": mask.payload for i, mask in enumerate(masks.values())}
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(InputError, match=r"m\.safetensors") as caught:
        MaskSet.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_missing_and_other_payloads_are_refused(tmp_path):
    masks, path = sample(), tmp_path / "m.safetensors"
    payloads = {f"{i}.{mask.layout}": mask.payload for i, mask in enumerate(masks.values())}
    entries = describe(masks)
    metadata = {"format": "opdkernels masks", "version": "1", "digest": masks.digest, "masks": json.dumps(entries)}
    save_file(payloads, path, metadata)
    assert MaskSet.load(path) == masks
    first = next(iter(payloads))
    for tensors in (
        {},
        {**payloads, "extra": torch.zeros(1)},
        {**payloads, first: payloads[first][:-1].clone()},
        {**payloads, first: payloads[first].to(torch.float32)},
        {**payloads, first: payloads[first].view(1, -1)},
    ):
        save_file(tensors, path, metadata)
        with pytest.raises(InputError, match="holds other masks than it lists"):
            MaskSet.load(path)


def test_a_file_truncated_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    large = MaskSet({"w": Mask.from_bool(torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) < 0.5)})
    large.save(path)
    result = MaskSet.load(path)
    os.truncate(path, 4096)
    with pytest.raises(InputError, match=r"m\.safetensors was truncated"):
        result["w"]


def test_the_digest_of_a_sparse_mask_is_that_of_its_bitmap(monkeypatch):
    indices = torch.tensor([3, 900, 70_001])
    sparse = Mask.from_indices(indices, (80_003,))
    assert sparse.layout == "indices"
    monkeypatch.setattr(mask, "DIGEST_STEP", 64)
    assert sparse.digest == Mask((80_003,), sparse.bitmap, None).digest


def test_a_loaded_set_closes_its_file(tmp_path):
    sample().save(tmp_path / "m.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    result = MaskSet.load(tmp_path / "m.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del result
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
