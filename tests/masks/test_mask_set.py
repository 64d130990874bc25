"""Sets of masks on disk: read lazily, distinguished by digest, rejected if damaged or of another format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from opdkernels.errors import InputError
from opdkernels.masks import Mask, MaskSet
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
    with pytest.raises(ValueError, match="have different tensors"):
        a & MaskSet({"b.weight": b["b.weight"]})
    with pytest.raises(ValueError, match="in different orders"):
        a & MaskSet({name: b[name] for name in reversed(list(b))})


def test_loading_other_files_raises_in_one_line(tmp_path):
    path = tmp_path / "m.safetensors"
    for content, message in (
        (lambda: save_file({"w": torch.ones(2)}, path), "holds no masks"),
        (lambda: path.write_bytes(b"junk"), "cannot be read as masks"),
        (lambda: path.write_bytes(b""), "cannot be read as masks"),
        (lambda: save_file({}, path, {"format": "opdkernels masks", "version": "9"}), "version 9"),
        (
            lambda: save_file({}, path, {"format": "opdkernels masks", "version": "1", "digest": "0", "masks": "[{}]"}),
            "cannot be read as masks",
        ),
        (
            lambda: save_file({}, path, {"format": "opdkernels masks", "version": "1", "digest": "0", "masks": "[]"}),
            "digest",
        ),
    ):
        content()
        with pytest.raises(InputError, match=message) as caught:
            MaskSet.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        MaskSet.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot write"):
        sample().save(tmp_path / "no" / "m.safetensors")


def test_damaged_payload_raises_when_read(tmp_path):
    path = tmp_path / "m.safetensors"
    sample().save(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    result = MaskSet.load(path)
    with pytest.raises(InputError, match="is damaged"):
        [result[name] for name in result]


def test_missing_payload_raises_when_read(tmp_path):
    masks = sample()
    fact = [
        {"name": name, "shape": list(m.shape), "numel": m.numel, "num_active": m.num_active, "digest": m.digest}
        for name, m in masks.items()
    ]
    save_file(
        {},
        tmp_path / "m.safetensors",
        {"format": "opdkernels masks", "version": "1", "digest": masks.digest, "masks": json.dumps(fact)},
    )
    result = MaskSet.load(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"the mask of b\.weight in .* is damaged"):
        result["b.weight"]
