"""Finds the mask of each parameter of an optimizer: by name, as `analyze` matches checkpoints, or by position."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opdkernels.checkpoint.conversions import model_types_of
from opdkernels.checkpoint.names import parse_tensor_name, unwrap_name
from opdkernels.errors import printable
from opdkernels.masks import Mask, MaskSet, map_masks
from opdkernels.masks.mask import validate_dense
from opdkernels.ops.step.validation import DTYPES
from opdkernels.optim.binding import Binding, is_dtensor

Masks = MaskSet | str | os.PathLike[str] | Mapping[str, Mask | torch.Tensor] | Sequence[Mask | torch.Tensor]
UNMASKED = ("error", "freeze", "train")


def bind_masks(
    masks: Masks, groups: Sequence[Mapping[str, Any]], unmasked: str, *, first_id: int = 0
) -> list[list[Binding]]:
    """Bind masks to the parameters of groups.

    Args:
        masks: As for `MaskedAdamW`.
        groups: Groups of parameters, with `param_names` where they have names.
        unmasked: What to do with a parameter without a mask: "error", "freeze" it, or "train" all of it.
        first_id: Number of the first parameter.

    Returns:
        The bindings of each group.

    Raises:
        ValueError: A parameter has no mask or one of another shape, or a mask with active coordinates has no parameter.
        TypeError: A parameter is neither fp32 nor bf16, or the masks are of another type.
    """
    if unmasked not in UNMASKED:
        raise ValueError(f"unmasked must be error, freeze or train, not {unmasked}")
    loaded = load_masks(masks)
    params = [param for group in groups for param in group["params"]]
    names = [name for group in groups for name in group.get("param_names") or [""] * len(group["params"])]
    display_names = [printable(name) or f"parameter {first_id + i}" for i, name in enumerate(names)]
    param_masks: Sequence[Mask | None]
    if not isinstance(loaded, list) and names and all(names):
        param_masks = masks_by_name(loaded, params, names, unmasked)
    else:
        param_masks = masks_by_position(loaded, len(params), display_names[0], len(groups))
    bindings = iter(
        [
            Binding(mask_of(param, mask, display_name, unmasked), name, first_id + i)
            for i, (param, mask, display_name, name) in enumerate(
                zip(params, param_masks, display_names, names, strict=True)
            )
        ]
    )
    return [[next(bindings) for _ in group["params"]] for group in groups]


def load_masks(masks: Masks) -> Mapping[str, Mask] | list[Mask]:
    """Masks by name, or a list in the order of the parameters. Raises TypeError for anything else."""
    if isinstance(masks, (str, os.PathLike)):
        return MaskSet.load(masks)
    if isinstance(masks, MaskSet):
        return masks
    if isinstance(masks, Mapping):
        return {name: as_mask(mask, f"the mask of {printable(name)}") for name, mask in masks.items()}
    if isinstance(masks, Sequence):
        return [as_mask(mask, f"mask {i}") for i, mask in enumerate(masks)]
    raise TypeError(
        f"masks are {type(masks).__name__}; "
        "give a MaskSet, its path, a mapping of names to masks or bool tensors, or a list of them"
    )


def as_mask(value: object, name: str) -> Mask:
    """A Mask, or one from a bool tensor. Raises TypeError for anything else; `name` is for the message."""
    if isinstance(value, Mask):
        return value
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} is {getattr(value, 'dtype', type(value).__name__)}; give a Mask or a bool tensor")
    validate_dense(value, name)
    return Mask.from_bool(value)


def mask_of(param: torch.Tensor, mask: Mask | None, display_name: str, unmasked: str) -> Mask:
    """The mask of a parameter, or the one that `unmasked` means, validated."""
    if mask is None:
        if unmasked == "error":
            raise ValueError(
                f'{display_name} has no mask; give one, leave the parameter out, or pass unmasked="freeze" or "train"'
            )
        empty = Mask.from_indices(torch.zeros(0, dtype=torch.int64), param.shape)
        mask = ~empty if unmasked == "train" else empty
    if mask.shape != tuple(param.shape):
        raise ValueError(
            f"{display_name} is {list(param.shape)}, its mask {list(mask.shape)}: these are another model's masks"
        )
    if mask.num_active and param.dtype not in DTYPES:
        raise TypeError(f"{display_name} is {param.dtype}; masked optimizers step float32 and bfloat16")
    if mask.num_active and is_traceable_wrapper_subclass(param) and not is_dtensor(param):
        raise TypeError(
            f"{display_name} is a {type(param).__name__}, which stores other values than its dtype says; "
            "masked optimizers step plain weights: freeze it or load it without quantization"
        )
    return mask


def masks_by_name(
    masks: Mapping[str, Mask], params: Sequence[torch.Tensor], names: Sequence[str], unmasked: str
) -> Sequence[Mask | None]:
    """The mask of each parameter by its name. Raises ValueError for names and masks that do not fit."""
    if not masks:
        return [None] * len(params)
    shapes = {str(name): tuple(param.shape) for name, param in zip(names, params, strict=True)}
    if len(shapes) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(
            f"two parameters are named {printable(twice)}, so that one mask would be of both; "
            "give each model's names a prefix of its own"
        )
    mapped = map_masks(masks, shapes)
    if not mapped.masks:
        raise ValueError(
            f"no mask has the name of a parameter: the first of {len(masks)} masks is {printable(next(iter(masks)))}, "
            f"the first parameter {printable(names[0])}; use the same names"
        )
    param_masks = [mapped.masks.get(name) for name in shapes]
    lacking = [(name, shape) for (name, shape), mask in zip(shapes.items(), param_masks, strict=True) if mask is None]
    if lacking and unmasked == "error" and mapped.unbound:
        name, reason = next(iter(mapped.unbound.items()))
        raise ValueError(
            f"{printable(lacking[0][0])} has no mask, and the mask of {printable(name)} has no parameter "
            f"({printable(reason)}); name them alike"
        )
    for name, reason in mapped.unbound.items():
        if masks[name].num_active and not is_tied(name, masks[name], param_masks, {shape for _, shape in lacking}):
            raise ValueError(
                f"the mask of {printable(name)} has {masks[name].num_active} active coordinates and no parameter here "
                f"({printable(reason)}); give its parameter, which may be frozen (requires_grad=False) or tied to one "
                "with another mask, or leave the mask out"
            )
    return param_masks


def is_tied(name: str, mask: Mask, bound: Sequence[Mask | None], lacking: set[tuple[int, ...]]) -> bool:
    """Whether a mask without a parameter is clearly that of a tied weight under its second name.

    It is equal to a bound mask, every parameter of its shape has a mask, and the mask is not simply all coordinates,
    unless its name is one of a head or an embedding.
    """
    if mask.shape in lacking or not any(other is not None and mask == other for other in bound):
        return False
    return mask.num_active < mask.numel or parse_tensor_name(name).module in ("lm_head", "embed_tokens")


def masks_by_position(
    masks: Mapping[str, Mask] | list[Mask], num_params: int, first_name: str, num_groups: int
) -> Sequence[Mask | None]:
    """The masks of parameters in their order, one for each."""
    if isinstance(masks, list):
        if len(masks) != num_params:
            raise ValueError(
                f"the list has {len(masks)} masks and the optimizer {num_params} parameters; give one mask per "
                "parameter, in their order, or masks by name and named parameters"
            )
        return masks
    if not masks:
        return [None] * num_params
    if not getattr(masks, "in_model_order", False):
        raise ValueError(
            f"{first_name} has no name, and masks in a checkpoint's order would go to the wrong ones; "
            "give model.named_parameters(), for a Trainer optimizer_cls_and_kwargs(model, masks), "
            "or masks of opdkernels.optim.in_model_order(masks, model)"
        )
    if len(masks) != num_params or num_groups > 1:
        params = f"{num_params} parameters without names" + (f" in {num_groups} groups" if num_groups > 1 else "")
        raise ValueError(
            f"{params} and {len(masks)} masks in a model's order; give all of model.parameters() in one group, or names"
        )
    return list(masks.values())


def masks_of_model(masks: Masks, model: torch.nn.Module) -> MaskSet:
    """Masks by the names of a model's parameters; those of no parameter keep their names.

    Knows more than the names that an optimizer gets: what the model is, and all names of tied weights.

    Args:
        masks: As for `MaskedAdamW`; a list is in the order of `model.parameters()`.
        model: The model.

    Raises:
        ValueError: A tied weight has two masks that differ, or a list has another length.
    """
    loaded, params = load_masks(masks), dict(model.named_parameters())
    if isinstance(loaded, list):
        return MaskSet(dict(zip(params, masks_by_position(loaded, len(params), "", 1), strict=True)))  # type: ignore[arg-type]
    named = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(param.shape) for name, param in named.items()}
    mapped = map_masks(loaded, shapes, model_types=model_types(model))
    aliases: defaultdict[int, list[str]] = defaultdict(list)
    for name in mapped.masks:
        aliases[id(named[name])].append(name)
    result: dict[str, Mask] = {}
    for name, param in params.items():
        for alias in aliases[id(param)]:
            mask = result.setdefault(name, mapped.masks[alias])
            if mask != mapped.masks[alias]:
                first = aliases[id(param)][0]
                raise ValueError(
                    f"{printable(first)} and {printable(alias)} are one tied weight and their masks differ; "
                    "give one of them, or equal masks"
                )
    return MaskSet({**result, **{name: loaded[name] for name in mapped.unbound if name not in result}})


def model_types(model: torch.nn.Module) -> list[str]:
    """What the configuration of a transformers model says that it is; [] for other models."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next((config for config in configs if hasattr(config, "to_dict")), None)
    return model_types_of(config.to_dict()) if config is not None else []


def in_model_order(masks: Masks, model: torch.nn.Module) -> MaskSet:
    """The masks of a model's parameters in the order of `model.parameters()`, for trainers that pass parameters without
    names.

    Args:
        masks: As for `MaskedAdamW`, by the names of the model.
        model: The model; every parameter needs a mask.

    Returns:
        A set that may be given, itself or as the file that its `save` writes, for unnamed parameters: all of them, in
        that order, in one group.

    Raises:
        ValueError: A parameter has no mask, a mask has no parameter, or a tied weight has two masks that differ.

    Examples:
        >>> layer = torch.nn.Linear(2, 1)
        >>> masks = {"bias": torch.tensor([True]), "weight": torch.tensor([[True, False]])}
        >>> list(in_model_order(masks, layer))
        ['weight', 'bias']
    """
    ordered = MaskSet({unwrap_name(binding.name): binding.mask for binding in bind_model(masks, model, "error")})
    ordered.in_model_order = True
    return ordered


def bind_model(masks: Masks, model: torch.nn.Module, unmasked: str) -> list[Binding]:
    """The bindings of `model.named_parameters()`, in their order."""
    names, params = zip(*model.named_parameters(), strict=True) if any(True for _ in model.parameters()) else ((), ())
    (bindings,) = bind_masks(masks_of_model(masks, model), [{"params": params, "param_names": names}], unmasked)
    return bindings
