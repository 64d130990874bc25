"""Which mask a parameter gets: by any name that it has in practice, and never another one's in silence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from opdkernels.masks import Mask, MaskSet
from opdkernels.optim import MaskedAdamW, MaskedParameters, MaskedSGD, in_model_order, optimizer_cls_and_kwargs

NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


def every(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def params_of(names, *shape: int) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, torch.nn.Parameter(torch.zeros(shape or (4, 4)))) for name in names]


def moved(params) -> list[torch.Tensor]:
    return [param.detach() != 0 for _, param in params]


def step(optimizer, params) -> None:
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


class Tied(torch.nn.Module):
    """A module with an embedding and a head that are one weight."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.emb.weight
        self.norm = torch.nn.LayerNorm(4, bias=False)


RENAMINGS = {
    "as they are": lambda name: name,
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "PEFT": lambda name: f"base_model.model.{name.replace('up_proj.', 'up_proj.base_layer.')}",
    "FSDP1": lambda name: name.replace("mlp.", "_fsdp_wrapped_module.mlp."),
    "checkpointed": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
    "value head": lambda name: f"pretrained_model.{name}",
    "multimodal": lambda name: name.replace("model.", "model.language_model.", 1),
    "only the body": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("renaming", RENAMINGS)
@pytest.mark.parametrize("unmasked", ["error", "freeze", "train"])
def test_names_of_wrapped_models_find_their_masks(renaming, unmasked):
    masks = {name: some(4, 4, seed=i) for i, name in enumerate(NAMES)}
    params = params_of([RENAMINGS[renaming](name) for name in reversed(NAMES)])
    optimizer = MaskedSGD(params, masks=masks, lr=1.0, unmasked=unmasked)
    step(optimizer, params)
    for got, wanted in zip(moved(params), reversed(masks.values()), strict=True):
        assert torch.equal(got, wanted)


def test_names_are_matched_over_all_groups():
    """A prefix that only one of two names has must not bind the other one's mask, in whichever group it comes first."""
    names = ["norm.weight", "model.norm.weight"]
    masks = {"norm.weight": some(6, seed=1), "model.norm.weight": some(6, seed=2)}
    for order in (names, names[::-1]):
        params = params_of(order, 6)
        optimizer = MaskedSGD([{"params": [item]} for item in params], masks=masks, lr=1.0)
        step(optimizer, params)
        assert all(torch.equal(got, masks[name]) for got, name in zip(moved(params), order, strict=True))


def test_experts_of_a_file_bind_to_the_fused_weight_of_a_model():
    """transformers 4 saves each expert, transformers 5 has them in one parameter."""
    experts, width, hidden = 3, 4, 6
    prefix = "model.layers.0.mlp.experts"
    masks, seed = {}, 0
    for expert in range(experts):
        for name, shape in (
            ("gate_proj", (width, hidden)),
            ("up_proj", (width, hidden)),
            ("down_proj", (hidden, width)),
        ):
            seed += 1
            masks[f"{prefix}.{expert}.{name}.weight"] = some(*shape, seed=seed)
    params = [
        (f"{prefix}.gate_up_proj", torch.nn.Parameter(torch.zeros(experts, 2 * width, hidden))),
        (f"{prefix}.down_proj", torch.nn.Parameter(torch.zeros(experts, hidden, width))),
    ]
    optimizer = MaskedSGD(params, masks=masks, lr=1.0)
    step(optimizer, params)
    gate_up, down = moved(params)
    for expert in range(experts):
        assert torch.equal(gate_up[expert, :width], masks[f"{prefix}.{expert}.gate_proj.weight"])
        assert torch.equal(gate_up[expert, width:], masks[f"{prefix}.{expert}.up_proj.weight"])
        assert torch.equal(down[expert], masks[f"{prefix}.{expert}.down_proj.weight"])


@pytest.mark.parametrize("unmasked", ["error", "freeze", "train"])
def test_mask_without_parameter_raises_and_is_named(unmasked):
    masks = {NAMES[0]: every(4, 4), "model.layers.1.mlp.upproj.weight": every(4, 4)}
    with pytest.raises(ValueError, match=r"mask of model\.layers\.1\.mlp\.upproj\.weight has .*no parameter"):
        MaskedAdamW(params_of(NAMES), masks=masks, unmasked=unmasked)
    idle = {**masks, "model.layers.1.mlp.upproj.weight": ~every(4, 4)}
    if unmasked == "error":
        with pytest.raises(ValueError, match=r"up_proj\.weight has no mask, and the mask of .*upproj\.weight has no"):
            MaskedAdamW(params_of(NAMES), masks=idle, unmasked=unmasked)
    else:
        optimizer = MaskedAdamW(params_of(NAMES), masks=idle, unmasked=unmasked)
        with pytest.raises(ValueError, match=r"upproj\.weight has 16 active coordinates and no parameter"):
            optimizer.set_masks(masks)
    with pytest.raises(ValueError, match="no mask has the name of a parameter: the first of 1 masks is other"):
        MaskedAdamW(params_of(NAMES), masks={"other": ~every(4, 4)}, unmasked=unmasked)
    with pytest.raises(ValueError, match="two parameters are named w"):
        MaskedAdamW(params_of(["w", "w"]), masks={"w": every(4, 4)}, unmasked=unmasked)


@pytest.mark.parametrize("unmasked", ["error", "freeze", "train"])
@pytest.mark.parametrize("kind", [MaskedAdamW, MaskedSGD])
def test_list_of_another_length_raises(kind, unmasked):
    """One optimizer per parameter, or a part of them on each rank, would step by another parameter's mask."""
    params, masks = [param for _, param in params_of("abc")], [every(4, 4), ~every(4, 4), some(4, 4)]
    for part in (params[:1], params[1:], [params[2]]):
        with pytest.raises(ValueError, match=f"the list has 3 masks and the optimizer {len(part)} parameters"):
            kind(part, masks=masks, unmasked=unmasked)
    with pytest.raises(ValueError, match="the list has 2 masks and the optimizer 3 parameters"):
        kind(params, masks=masks[:2], unmasked=unmasked)
    with pytest.raises(ValueError, match="the list has 2 masks and the optimizer 3 parameters"):
        kind([{"params": params[:1]}, {"params": params[1:]}], masks=masks[:2], unmasked=unmasked)
    optimizer = kind(params, masks=masks, unmasked=unmasked)
    with pytest.raises(ValueError, match="the list has 1 masks"):
        optimizer.set_masks(masks[:1])


def test_zero_redundancy_optimizer_is_refused():
    """It gives each rank's optimizer a part of the parameters, without names, but all masks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)  # no sockets, no host names
    try:
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (4, 6)]  # it sorts them by size
        for masks in ([every(4), every(6)], {"a": every(4), "b": every(6)}):
            with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer.* is not supported"):
                ZeroRedundancyOptimizer(params, optimizer_class=MaskedAdamW, masks=masks)
    finally:
        torch.distributed.destroy_process_group()


def test_tied_weight_is_bound_once_by_any_of_its_names():
    """Equal masks of both names are one mask; masks that differ are refused with both names."""
    norm = {"norm.weight": every(4)}
    for masks in (
        {"emb.weight": some(8, 4)},
        {"head.weight": some(8, 4)},
        {"emb.weight": some(8, 4), "head.weight": some(8, 4)},
    ):
        model = Tied()
        cls, options = optimizer_cls_and_kwargs(model, {**masks, **norm}, lr=0.1)
        start = model.emb.weight.detach().clone()
        optimizer = cls(**options)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
        model.emb.weight.grad = torch.ones(8, 4)
        optimizer.step()
        assert torch.equal(model.head.weight != start, some(8, 4))
        assert torch.equal(in_model_order({**masks, **norm}, model)["emb.weight"].to_bool(), some(8, 4))
        assert MaskedParameters(model, {**masks, **norm}).names == ["emb.weight", "norm.weight"]
    both = {"emb.weight": some(8, 4), "head.weight": some(8, 4), **norm}
    MaskedAdamW(Tied().named_parameters(), masks=both)
    full = {"model.embed_tokens.weight": every(4, 4), "lm_head.weight": every(4, 4)}
    MaskedAdamW(params_of(["model.embed_tokens.weight"]), masks=full)
    differ = {"emb.weight": some(8, 4), "head.weight": some(8, 4, seed=1), **norm}
    for make in (optimizer_cls_and_kwargs, MaskedParameters):
        with pytest.raises(
            ValueError, match=r"emb\.weight and head\.weight are one tied weight and their masks differ"
        ):
            make(Tied(), differ)
    with pytest.raises(ValueError, match=r"mask of head\.weight has .* tied to one with another mask"):
        MaskedAdamW(Tied().named_parameters(), masks=differ)
    with pytest.raises(ValueError, match=r"emb\.weight and head\.weight are the same parameter"):
        MaskedAdamW(list(Tied().named_parameters(remove_duplicate=False)), masks=both)


def test_equal_mask_does_not_hide_a_misspelled_name():
    """With masks of all coordinates every mask of one shape is equal."""
    masks = {NAMES[0]: every(4, 4), NAMES[1].replace("up_proj", "upproj"): every(4, 4)}
    with pytest.raises(ValueError, match=r"upproj\.weight has 16 active coordinates and no parameter"):
        MaskedAdamW(params_of(NAMES), masks=masks, unmasked="freeze")


def test_trainer_classes_are_directed_to_the_adapter():
    """Trainer's own groups have no names."""
    groups = [{"params": [param for _, param in params_of("ab")]}, {"params": [torch.nn.Parameter(torch.zeros(3))]}]
    masks = MaskSet({name: Mask.from_bool(every(4, 4)) for name in "ab"})
    with pytest.raises(ValueError, match=r"parameter 0 has no name.*optimizer_cls_and_kwargs\(model, masks\)"):
        MaskedAdamW(groups, masks=masks)


def test_masks_in_a_models_order_need_one_group():
    """Groups with and without weight decay are in another order than the model."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(4, bias=False), torch.nn.Linear(4, 1, bias=False))
    masks = in_model_order({"0.weight": every(4), "1.weight": some(1, 4)}, model)
    with pytest.raises(ValueError, match="2 parameters without names in 2 groups and 2 masks in a model's order"):
        MaskedAdamW([{"params": [model[1].weight]}, {"params": [model[0].weight]}], masks=masks)


def test_list_of_masks_follows_the_model_in_the_adapter():
    """The adapter's groups, with and without weight decay, are in another order than the model."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 1), torch.nn.LayerNorm(4))
    masks = [some(*p.shape, seed=i) for i, p in enumerate(model.parameters())]
    cls, options = optimizer_cls_and_kwargs(model, masks, cls=MaskedSGD, lr=1.0)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = cls(**options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, old, mask in zip(model.parameters(), start, masks, strict=True):
        assert torch.equal(param != old, mask)
    with pytest.raises(ValueError, match="the list has 2 masks"):
        optimizer_cls_and_kwargs(model, masks[:2])


def test_adapter_names_masks_of_frozen_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    args = SimpleNamespace(learning_rate=0.1, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8)
    cls, options = optimizer_cls_and_kwargs(model, {"0.weight": every(2, 2), "1.weight": every(2, 2)}, args)
    with pytest.raises(ValueError, match=r"mask of 0\.weight has 4 active .*requires_grad=False"):
        cls(**options)


def test_groups_with_masks_in_the_constructor_raise():
    (first, second) = params_of("ab")
    with pytest.raises(ValueError, match="a group has masks"):
        MaskedAdamW([{"params": [first], "masks": {"a": every(4, 4)}}, {"params": [second]}], masks={})


def test_quantized_weights_raise():
    """A tensor that stores other values than its dtype says has no memory that a kernel could step."""
    from torch.testing._internal.two_tensor import TwoTensor

    weight = torch.nn.Parameter(TwoTensor(torch.zeros(4), torch.zeros(4)))
    with pytest.raises(TypeError, match="w is a TwoTensor"):
        MaskedAdamW([("w", weight)], masks={"w": every(4)})
    MaskedAdamW([("w", weight)], masks={"w": ~every(4)})
