"""Which tensors of two models are the same: by name, by canonical name, under a common prefix, fused against split.

Works on names and shapes alone: on the headers of two checkpoints, on masks and a checkpoint, or on masks and the
parameters of a model in memory.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from opdkernels.checkpoint import conversions, fused
from opdkernels.checkpoint.fused import Shape
from opdkernels.checkpoint.names import canonical_name

MAX_PREFIX_TOKENS = 4


@dataclass(frozen=True)
class Part:
    """Flat elements [start, start + numel) of one tensor are those [other_start, other_start + numel) of another one.

    Attributes:
        name: Name of the tensor in the first set.
        other: Name of the tensor in the second set.
        shape: Shape of the elements, that of the split tensor.
        start: First element in the tensor of the first set.
        other_start: First element in the tensor of the second set.
    """

    name: str
    other: str
    shape: Shape
    start: int
    other_start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class Correspondence:
    """What two sets of tensors have in common; each tensor is in one pair, or in parts, or in neither.

    Attributes:
        pairs: Name in the first set, name in the second, and how they were found: "exact" for equal names, else
            "prefix". Shapes may differ.
        parts: Ranges of tensors that are fused in one set and split in the other.
        reasons: Why tensors of the first set are in neither, where more is known than that no name fits.
        other_reasons: The same for the second set.
        ambiguous: Canonical names that several tensors of a set have, and those tensors in both sets.
    """

    pairs: list[tuple[str, str, str]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    other_reasons: dict[str, str] = field(default_factory=dict)
    ambiguous: list[tuple[str, list[str], list[str]]] = field(default_factory=list)


def match_tensors(
    shapes: Mapping[str, Sequence[int]], other_shapes: Mapping[str, Sequence[int]], *, model_types: Iterable[str] = ()
) -> Correspondence:
    """Finds the tensors that two sets have in common, whatever programs named and stored them.

    In this order, each step for what the steps before have left: equal names; names that are equal without the tokens
    of wrappers, see `names.canonical_name`; names that transformers' conversion registry makes equal, if transformers
    5 is installed; names that differ by one prefix, such as "actor."; tensors that are fused in one set and split in
    the other.

    Args:
        shapes: Shape of each tensor of the first set, by name.
        other_shapes: Shape of each tensor of the second set, by name.
        model_types: What config.json says that the model is, see `conversions.model_types_of`: selects the renamings
            of transformers' registry and the layout of fused experts.

    Returns:
        The pairs and the parts, in the order in which they are found.

    Examples:
        >>> result = match_tensors(
        ...     {"model.norm.weight": (4,), "model.layers.0.self_attn.qkv_proj.weight": (8, 4)},
        ...     {
        ...         "norm.weight": (4,),
        ...         "layers.0.self_attn.q_proj.weight": (4, 4),
        ...         "layers.0.self_attn.k_proj.weight": (2, 4),
        ...         "layers.0.self_attn.v_proj.weight": (2, 4),
        ...     },
        ... )
        >>> result.pairs
        [('model.norm.weight', 'norm.weight', 'prefix')]
        >>> [(part.other, part.start, part.numel) for part in result.parts][1]
        ('layers.0.self_attn.k_proj.weight', 16, 8)
    """
    result, model_types = Correspondence(), list(model_types)
    result.pairs = [(name, name, "exact") for name in shapes if name in other_shapes]
    first = _Names({name: shape for name, shape in shapes.items() if name not in other_shapes})
    second = _Names({name: shape for name, shape in other_shapes.items() if name not in shapes})
    _pair_equal_names(result, first, second)
    if first.canonical and second.canonical and model_types:
        rename = conversions.renamer(model_types)
        first.rename(rename)
        second.rename(rename)
        _pair_equal_names(result, first, second)
    if first.canonical and second.canonical:
        _remove_common_prefix(first, second)
        _pair_equal_names(result, first, second)
    layout = conversions.expert_layout(model_types) if first.canonical and second.canonical else ""
    _split_fused(result, first, second, layout, swapped=False)
    _split_fused(result, second, first, layout, swapped=True)
    result.ambiguous = list(_ambiguous(first, second))
    return result


class _Names:
    """The tensors of one set that have no counterpart yet: canonical names and shapes by name."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in shapes.items()}
        self.canonical = {name: canonical_name(name) for name in self.shapes}

    def groups(self) -> dict[str, list[str]]:
        """The names that have each canonical name."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, canonical in self.canonical.items():
            groups[canonical].append(name)
        return groups

    def rename(self, rename: conversions.Renamer) -> None:
        self.canonical = {name: rename(name) for name in self.canonical}

    def remove_prefix(self, prefix: str) -> None:
        self.canonical = {
            name: canonical_name(canonical.removeprefix(prefix)) for name, canonical in self.canonical.items()
        }


def _pair_equal_names(result: Correspondence, first: _Names, second: _Names) -> None:
    others_of = second.groups()
    for canonical, names in first.groups().items():
        others = others_of.get(canonical, [])
        if len(names) == len(others) == 1:
            del first.canonical[names[0]], second.canonical[others[0]]
            result.pairs.append((names[0], others[0], "prefix"))


def _ambiguous(first: _Names, second: _Names) -> Iterator[tuple[str, list[str], list[str]]]:
    others_of = second.groups()
    for canonical, names in first.groups().items():
        if others := others_of.get(canonical):
            yield canonical, names, others


def _remove_common_prefix(first: _Names, second: _Names) -> None:
    """Removes the prefix that the names of one set have and those of the other set do not."""
    prefix, size = _common_prefix(first, second)
    other_prefix, other_size = _common_prefix(second, first)
    if size > other_size:
        first.remove_prefix(prefix)
    elif other_size > size:
        second.remove_prefix(other_prefix)


def _common_prefix(names: _Names, others: _Names) -> tuple[str, int]:
    """Returns the prefix of `names` without which most of `others` is found in the same shape, and how many elements.

    ("", 0) if there is none. A prefix that is one of several, as with "actor." and "critic." in one file, is no prefix
    of the model.
    """
    wanted = {canonical: others.shapes[group[0]] for canonical, group in others.groups().items() if len(group) == 1}
    sizes: Counter[str] = Counter()
    claimed: Counter[str] = Counter()
    for name, canonical in names.canonical.items():
        tokens = canonical.split(".")
        for length in range(1, min(len(tokens), MAX_PREFIX_TOKENS + 1)):
            rest = canonical_name(".".join(tokens[length:]))
            if wanted.get(rest) == names.shapes[name]:
                sizes[".".join(tokens[:length]) + "."] += math.prod(names.shapes[name])
                claimed[rest] += 1
                break
    if not sizes or max(claimed.values()) > 1:
        return "", 0
    prefix, size = sizes.most_common(1)[0]
    return (prefix, size) if 2 * size >= sum(map(math.prod, wanted.values())) else ("", 0)


def _split_fused(result: Correspondence, names: _Names, others: _Names, layout: str, swapped: bool) -> None:
    """Adds the parts of tensors that are fused in `names` and split in `others`; `swapped` if `names` are second."""
    # A canonical name of two tensors could be either of them and is left out.
    candidates = {
        canonical: (group[0], others.shapes[group[0]])
        for canonical, group in others.groups().items()
        if len(group) == 1
    }
    for name, canonical in list(names.canonical.items()):
        parts = fused.split(canonical, names.shapes[name], candidates, layout)
        if isinstance(parts, str):
            (result.other_reasons if swapped else result.reasons)[name] = parts
        if not isinstance(parts, list):
            continue
        del names.canonical[name]
        for other, shape, start in parts:
            del candidates[others.canonical.pop(other)]
            part = Part(other, name, shape, 0, start) if swapped else Part(name, other, shape, start, 0)
            result.parts.append(part)
