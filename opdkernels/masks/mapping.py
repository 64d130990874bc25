"""Masks by the names of a checkpoint's tensors as masks by the names of a model's parameters, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.checkpoint.correspondence import Correspondence, match_tensors
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet


@dataclass(frozen=True)
class MappedMasks:
    """What `map_masks` returns.

    Attributes:
        masks: The masks by the names of the parameters, in the order of the parameters. A mask whose parameter has
            another shape is here too, with its own shape.
        sources: Names of the masks that each mask was made of: one, or several that are split in the file.
        unbound: Masks of no parameter, and why.
    """

    masks: MaskSet
    sources: dict[str, list[str]]
    unbound: dict[str, str]


def map_masks(
    masks: Mapping[str, Mask], parameters: Mapping[str, Sequence[int]], *, model_types: Iterable[str] = ()
) -> MappedMasks:
    """Finds the mask of each parameter, whatever program named and stored the tensors that the masks were made from.

    Names are matched as `analyze` matches two checkpoints, see `checkpoint.correspondence.match_tensors`: without the
    prefixes of torch.compile, DDP, FSDP, PEFT, value heads and multimodal models, by transformers' conversion registry,
    and fused against split, such as the experts of a file in the layout of transformers 4 and of a model in the
    layout of transformers 5.

    Args:
        masks: Masks by name, such as a MaskSet of a checkpoint.
        parameters: Shape of each parameter by name, of all parameters of the model at once: which name is meant can
            depend on the others. For a DTensor the global shape.
        model_types: The model's architecture and model types, see `checkpoint.conversions.model_types_of`; they select
            the renamings of transformers and the layout of fused experts.

    Returns:
        The masks by parameter, and those of no parameter with the reason. Parameters without a mask are absent. Several
        masks of one parameter, or one mask of several parameters, are joined or cut as the tensors are.

    Examples:
        >>> mask = Mask.from_bool(torch.tensor([[True, False]]))
        >>> mapped = map_masks({"model.up_proj.weight": mask}, {"_orig_mod.model.up_proj.base_layer.weight": (1, 2)})
        >>> list(mapped.masks), mapped.unbound
        (['_orig_mod.model.up_proj.base_layer.weight'], {})
    """
    shapes = masks.shapes if isinstance(masks, MaskSet) else {name: mask.shape for name, mask in masks.items()}
    result = match_tensors(shapes, parameters, model_types=model_types)
    mapped: dict[str, Mask] = {other: masks[name] for name, other, _ in result.pairs}
    sources: dict[str, list[str]] = {other: [name] for name, other, _ in result.pairs}
    for part in result.parts:
        sources.setdefault(part.other, []).append(part.name)
        if part.other_start or part.numel < math.prod(parameters[part.other]):
            continue
        mapped[part.other] = _reshaped(masks[part.name].flat(part.start, part.start + part.numel), part.shape)
    for parameter in {part.other for part in result.parts} - mapped.keys():
        pieces = sorted((part for part in result.parts if part.other == parameter), key=lambda part: part.other_start)
        mapped[parameter] = _joined([masks[part.name] for part in pieces], tuple(parameters[parameter]))
    bound = {name for names in sources.values() for name in names}
    unbound = {name: _reason(name, result) for name in masks if name not in bound}
    order = [name for name in parameters if name in mapped]
    return MappedMasks(
        MaskSet({name: mapped[name] for name in order}), {name: sources[name] for name in order}, unbound
    )


def _reason(name: str, result: Correspondence) -> str:
    """Why a mask has no parameter, for messages."""
    for canonical, names, parameters in result.ambiguous:
        if name in names:
            return f"{canonical} is ambiguous: {', '.join(names)} may each be {' or '.join(parameters)}"
    return result.reasons.get(name, "no parameter has this name")


def _reshaped(mask: Mask, shape: tuple[int, ...]) -> Mask:
    return Mask(shape, mask.payload, None) if mask.layout == "bitmap" else Mask(shape, None, mask.payload)


def _joined(masks: list[Mask], shape: tuple[int, ...]) -> Mask:
    """The mask of a tensor whose flat elements are those of several tensors, one after the other."""
    if all(mask.layout == "indices" for mask in masks):
        starts = np.cumsum([0, *(mask.numel for mask in masks)])
        indices = [mask.indices.to(torch.int64) + int(start) for mask, start in zip(masks, starts, strict=False)]
        return Mask.from_indices(torch.cat(indices), shape)
    flags = np.concatenate([mask.to_bool().view(-1).numpy() for mask in masks])
    return Mask.from_bool(torch.from_numpy(flags).view(shape))
