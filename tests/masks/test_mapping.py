"""Masks of a checkpoint's tensors are bound to parameters that other programs named, wrapped, fused or split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from opdkernels.masks import Mask, MaskSet, map_masks

UP = "model.layers.0.mlp.up_proj.weight"
WRAPPED: dict[str, Callable[[str], str]] = {
    "compile": lambda n: "_orig_mod." + n,
    "ddp": lambda n: "module." + n,
    "fsdp inside": lambda n: n.replace("mlp.", "_fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
    "fabric": lambda n: "_forward_module." + n,
    "peft": lambda n: "base_model.model." + n,
    "peft base layer": lambda n: "base_model.model." + n.replace("up_proj.", "up_proj.base_layer."),
    "peft modules to save": lambda n: n.replace("up_proj.", "up_proj.modules_to_save.default."),
    "value head": lambda n: "pretrained_model." + n,
    "multimodal, transformers 5": lambda n: n.replace("model.", "model.language_model.", 1),
    "multimodal, transformers 4": lambda n: "language_model." + n,
    "body alone": lambda n: n.removeprefix("model."),
    "name of a project": lambda n: "actor.policy." + n,
}


def random_mask(*shape: int, density: float = 0.4) -> Mask:
    return Mask.from_bool(torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])) < density)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_mask_is_bound_to_the_wrapped_parameter(wrap: Callable[[str], str]) -> None:
    masks = {UP.replace(".0.", f".{i}."): random_mask(3 + i, 4) for i in range(2)}
    mapped = map_masks(masks, {wrap(name): mask.shape for name, mask in masks.items()})
    assert mapped.unbound == {}
    assert dict(mapped.masks) == {wrap(name): mask for name, mask in masks.items()}
    assert mapped.sources == {wrap(name): [name] for name in masks}


@pytest.mark.parametrize("density", [0.001, 0.5])
def test_masks_of_single_experts_become_the_mask_of_the_fused_parameter(density: float) -> None:
    experts, hidden, inner = 3, 8, 5
    stem, generator = "model.layers.0.mlp.experts", torch.Generator().manual_seed(0)
    gate_up = torch.rand(experts, 2 * inner, hidden, generator=generator) < density
    down = torch.rand(experts, hidden, inner, generator=generator) < density
    masks = {}
    for e in range(experts):
        masks[f"{stem}.{e}.gate_proj.weight"] = Mask.from_bool(gate_up[e, :inner])
        masks[f"{stem}.{e}.up_proj.weight"] = Mask.from_bool(gate_up[e, inner:])
        masks[f"{stem}.{e}.down_proj.weight"] = Mask.from_bool(down[e])
    fused = {f"{stem}.gate_up_proj": Mask.from_bool(gate_up), f"{stem}.down_proj": Mask.from_bool(down)}
    joined = map_masks(masks, {name: mask.shape for name, mask in fused.items()})
    assert (dict(joined.masks), joined.unbound) == (fused, {})
    cut = map_masks(fused, {name: mask.shape for name, mask in masks.items()})
    assert (dict(cut.masks), cut.unbound) == (masks, {})


def test_square_experts_need_a_model_type_that_stores_rows() -> None:
    masks = {f"mlp.experts.{e}.down_proj.weight": random_mask(4, 4) for e in range(2)}
    shapes = {"mlp.experts.down_proj": (2, 4, 4)}
    assert list(map_masks(masks, shapes, model_types=["qwen3_moe"]).masks) == list(shapes)
    for model_types in ([], ["gpt_oss"], ["llama4"], ["gpt_oss", "qwen3_moe"]):
        mapped = map_masks(masks, shapes, model_types=model_types)
        assert (list(mapped.masks), list(mapped.unbound)) == ([], list(masks))


def test_masks_without_a_parameter_are_listed_and_shapes_are_left_to_the_caller() -> None:
    masks = MaskSet({"model.a": random_mask(2, 2), "lm_head.weight": random_mask(3, 2), "c": random_mask(2)})
    mapped = map_masks(masks, {"a": (5, 2), "head.weight": (3, 2), "module.c": (2,), "model.c": (2,)})
    assert {name: mask.shape for name, mask in mapped.masks.items()} == {"a": (2, 2)}
    assert set(mapped.unbound) == {"lm_head.weight", "c"}
    assert "ambiguous" in mapped.unbound["c"]


def test_one_of_two_models_in_one_file_is_not_chosen() -> None:
    shapes = {f"{model}.{UP}": (3, 4) for model in ("actor", "critic")}
    mapped = map_masks({UP: random_mask(3, 4)}, shapes)
    assert (list(mapped.masks), list(mapped.unbound)) == ([], [UP])
