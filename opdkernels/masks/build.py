"""Ways to make masks: from what a run changed, from the weights, from chance.

Weights are a checkpoint (a path or a hub id) or tensors by name, such as a state_dict. A share of a tensor, of the tensors of
a module type or of the model is ceil(density * n) coordinates; of those that tie at the cut, which in bf16 may be many, a draw decides,
the same each time. Tensors that are one (tied embeddings) are taken once. Sources: arXiv 2606.13657 (near-zero, principal, safe masks).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from opdkernels.checkpoint.base import DTYPES
from opdkernels.checkpoint.match import Match, open_pair
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import UsageError, printable
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet
from opdkernels.ops.delta import base_and_delta, delta
from opdkernels.ops.gram import gram, symmetric
from opdkernels.spectral import principal as selection
from opdkernels.spectral.exact import GRAM_LIMIT, factorise, factorise_matrix, top_ranks

Given = str | os.PathLike[str] | Mapping[str, torch.Tensor]
SCOPES = ("tensor", "module", "model")
VIEWS = ("visible", "stored")
STEP = 1 << 24  # coordinates at a time
HALF = 1 << 16


@dataclass(frozen=True)
class Weight:
    """One tensor: its shape and a way to read a range of its elements, 1-D."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def parts(self) -> Iterator[torch.Tensor]:
        for first in range(0, self.numel, STEP):
            yield self.read(first, min(first + STEP, self.numel))


@contextlib.contextmanager
def weights_of(given: Given) -> Iterator[dict[str, Weight]]:
    """The floating tensors of a checkpoint or a mapping, each once, in their order."""
    if isinstance(given, Mapping):
        found, seen = {}, set()
        for name, tensor in given.items():
            flat = tensor.detach().cpu().contiguous().view(-1)
            at = (tensor.data_ptr(), tensor.numel())
            if tensor.is_floating_point() and (at not in seen or not tensor.numel()):
                seen.add(at)
                found[name] = Weight(tuple(tensor.shape), lambda a, b, flat=flat: flat[a:b])  # type: ignore[misc]
        yield found
        return
    with contextlib.closing(open_checkpoint(given)) as source:
        yield {
            name: Weight(info.shape, lambda a, b, name=name: source.read(name, a, b))  # type: ignore[misc]
            for name, info in source.tensors.items()
            if info.dtype in DTYPES and name not in source.aliases
        }
        source.check()


def check(density: float, scope: str) -> None:
    if not 0 < density <= 1:
        raise UsageError(f"the share of active coordinates must lie in 0 .. 1, not {density}")
    if scope not in SCOPES:
        raise UsageError(f"scope must be one of {', '.join(SCOPES)}, not {scope}")


def changed(
    base: str | os.PathLike[str], tuned: str | os.PathLike[str], *, atol: float = 0.0, view: str = "visible"
) -> MaskSet:
    """Where |delta| > atol between two checkpoints, in a view; in the visible one atol is rounded to bf16. Coordinates that are
    NaN or Inf on either side are not.

    Raises InputError for what cannot be read, UsageError for another view or an atol that makes no sense.
    """
    if view not in VIEWS:
        raise UsageError(f"view must be one of {', '.join(VIEWS)}, not {view}")
    if not 0 <= atol <= 1e30:
        raise UsageError(f"atol must lie in 0 .. 1e30, not {atol}")
    cut = int(torch.tensor([atol]).bfloat16().view(torch.int16))
    masks = {}
    with contextlib.closing(open_pair(base, tuned)) as pair:
        for match in pair.matches:
            bits = np.zeros((match.numel + 7) // 8, np.uint8)
            for first in range(0, match.numel, STEP):
                w, v = pair.read(match, first, min(first + STEP, match.numel))
                part = torch.zeros((len(w) + 7) // 8, dtype=torch.uint8)
                if view == "visible":
                    delta(w, v, threshold_bits=(cut,), mask=part)
                else:
                    moved = base_and_delta(w, v, False)[1].abs()
                    part = torch.from_numpy(np.packbits(((moved > atol) & moved.isfinite()).numpy(), bitorder="little"))
                bits[first // 8 : first // 8 + len(part)] = part.numpy()
            masks[match.name] = Mask.from_bitmap(torch.from_numpy(bits), match.shape)
        pair.check()
    return MaskSet(masks)


def top_changed(
    base: str | os.PathLike[str], tuned: str | os.PathLike[str], density: float, *, scope: str = "tensor"
) -> MaskSet:
    """The share of the largest |delta| between two checkpoints as stored, of each tensor, module type or of the model, and never what
    did not change, however large the share; read in pieces, three times over. Raises InputError for what cannot be read."""
    check(density, scope)
    with contextlib.closing(open_pair(base, tuned)) as pair:

        def reader(match: Match) -> Callable[[int, int], torch.Tensor]:
            def read(first: int, stop: int) -> torch.Tensor:
                w, v = pair.read(match, first, stop)
                return (v.float() - w.float()).abs()

            return read

        found = extremes(
            {match.name: Weight(match.shape, reader(match)) for match in pair.matches},
            density,
            scope,
            largest=True,
            zeros=False,
        )
        pair.check()
    return found


def near_zero(base: Given, density: float, *, scope: str = "tensor") -> MaskSet:
    """The share of the smallest |W| of each tensor, module type or of the model."""
    check(density, scope)
    with weights_of(base) as weights:
        return extremes(weights, density, scope, largest=False)


def largest(values: Mapping[str, torch.Tensor], density: float, *, scope: str = "tensor") -> MaskSet:
    """The share of the largest magnitudes of tensors by name: updates, gradients, or an optimizer's second moments."""
    check(density, scope)
    with weights_of(values) as weights:
        return extremes(weights, density, scope, largest=True)


def random_subset(base: Given, density: float, *, scope: str = "tensor", seed: int = 0) -> MaskSet:
    """A share chosen at random; the same for a seed and a tensor's name, whatever the other tensors."""
    check(density, scope)

    def keys(name: str, numel: int) -> Callable[[int, int], torch.Tensor]:
        def read(first: int, stop: int) -> torch.Tensor:
            return torch.rand(stop - first, generator=generator(seed, name, first // STEP))

        return read

    with weights_of(base) as weights:
        drawn = {name: Weight(one.shape, keys(name, one.numel)) for name, one in weights.items()}
        return extremes(drawn, density, scope, largest=True)


def magnitude_matched(masks: MaskSet, base: Given, *, seed: int = 0) -> MaskSet:
    """As many coordinates of each tensor as its mask has, chosen at random among those of the same |W| in bf16: the control
    for what magnitudes alone explain. Takes 10 bytes a coordinate of the largest tensor."""
    found = {}
    with weights_of(base) as weights:
        for name, mask in masks.items():
            weight = matching(weights, name, mask)
            patterns = np.concatenate(
                [patterns_of(part) >> 16 for part in bf16(weight)] or [np.zeros(0, np.int32)]
            ).astype(np.uint16)
            wanted = np.bincount(patterns[mask.to_bool().view(-1).numpy()], minlength=1 << 15)
            order = np.argsort(patterns, kind="stable")  # a radix sort
            ends = np.cumsum(np.bincount(patterns, minlength=1 << 15))
            draw = np.random.default_rng(int.from_bytes(digest(seed, name, 0), "little"))
            chosen = [
                order[ends[b - 1] if b else 0 : ends[b]][
                    draw.choice(ends[b] - (ends[b - 1] if b else 0), wanted[b], replace=False)
                ]
                for b in np.flatnonzero(wanted)
            ]
            places = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
            found[name] = Mask.from_indices(torch.from_numpy(places.astype(np.int64)), mask.shape)
    return MaskSet(found)


def principal(base: Given, density: float) -> MaskSet:
    """Of each matrix the share of the largest |U_k S_k V_k^T|, k = max(1, int(density * min(m, n))): where the top singular
    vectors of W put its weight. Nothing of other tensors."""
    check(density, "tensor")
    with weights_of(base) as weights:
        return MaskSet({name: principal_mask(name, one, density) for name, one in weights.items()})


def safe(base: Given, density: float) -> MaskSet:
    """What is not principal or near zero at the share: where, after arXiv 2606.13657, updates do the least harm."""
    with weights_of(base) as weights:
        main = MaskSet({name: principal_mask(name, one, density) for name, one in weights.items()})
        return ~main | extremes(weights, density, "tensor", largest=False)


def principal_mask(name: str, weight: Weight, density: float) -> Mask:
    if len(weight.shape) != 2 or not weight.numel:
        return Mask.from_indices(torch.zeros(0, dtype=torch.int64), weight.shape)
    w = weight.read(0, weight.numel).view(weight.shape)
    if not bool(torch.isfinite(w).all()):
        raise UsageError(f"{printable(name)} holds NaN or Inf; it has no principal mask")
    tall = w.shape[0] >= w.shape[1]
    long = w if tall else w.T
    ranks = top_ranks(long.shape[1], (density,))
    factor = factorise(symmetric(gram(long))[0], ranks[-1])
    if float(factor.sigma[ranks[-1] - 1]) <= GRAM_LIMIT * float(factor.sigma[0]):
        factor = factorise_matrix(w, ranks[-1])
    (found,) = selection.masks(long, factor.vectors, ranks, visible=False, ratios=(density,))
    flags = np.unpackbits(found.sure, count=weight.numel, bitorder="little").astype(bool)
    flags[found.above] = True
    flags[found.tied[: found.taken]] = True
    active = torch.from_numpy(flags).view(long.shape)
    return Mask.from_bool(active if tall else active.T.contiguous())


def matching(weights: Mapping[str, Weight], name: str, mask: Mask) -> Weight:
    if name not in weights:
        raise UsageError(f"the checkpoint has no tensor {printable(name)}, of which there is a mask")
    if weights[name].shape != mask.shape:
        raise UsageError(f"{printable(name)} has shape {list(weights[name].shape)}, its mask {list(mask.shape)}")
    return weights[name]


def extremes(weights: Mapping[str, Weight], density: float, scope: str, largest: bool, zeros: bool = True) -> MaskSet:
    """The share of the largest or smallest magnitudes of each group, without `zeros` never 0; exact for values that fp32 holds."""
    groups: dict[str, list[str]] = {}
    for name in weights:
        groups.setdefault(
            name if scope == "tensor" else parse_tensor_name(name).module if scope == "module" else "", []
        ).append(name)
    found = {}
    for names in groups.values():
        sizes = {name: weights[name].numel for name in names}
        cut, wanted, tied = cut_of(
            {name: weights[name] for name in names}, math.ceil(density * sum(sizes.values())), largest
        )
        if cut == 0 and not zeros:
            wanted = 0
        seen = 0  # of those that tie
        for name in names:
            flags = np.empty(sizes[name], bool)
            first = 0
            for part in weights[name].parts():
                patterns = patterns_of(part)
                flags[first : first + len(part)] = patterns > cut if largest else patterns < cut
                ties = np.flatnonzero(patterns == cut)
                take = (seen + len(ties)) * wanted // max(tied, 1) - seen * wanted // max(
                    tied, 1
                )  # as many of each part, nearly
                if take:
                    draw = np.random.default_rng(int.from_bytes(digest(0, f"ties\0{name}", first), "little"))
                    flags[
                        first + (ties if take == len(ties) else draw.choice(ties, take, replace=False, shuffle=False))
                    ] = True
                seen += len(ties)
                first += len(part)
            found[name] = Mask.from_bool(torch.from_numpy(flags).view(weights[name].shape))
    return MaskSet({name: found[name] for name in weights})


def cut_of(weights: Mapping[str, Weight], k: int, largest: bool) -> tuple[int, int, int]:
    """The fp32 pattern of the k-th largest or smallest magnitude of several tensors together, how many of those that have it belong to
    the k, and how many have it: by two histograms of 16 bits, in two passes."""
    counts = np.zeros(1 << 15, np.int64)
    for name, weight in weights.items():
        for part in weight.parts():
            patterns = patterns_of(part)
            if len(patterns) and patterns.max() > 0x7F800000:
                raise UsageError(f"{printable(name)} holds NaN; it has no largest or smallest values")
            counts += np.bincount(patterns >> 16, minlength=1 << 15)
    top, left = rank_in(counts, k, largest)
    low = np.zeros(HALF, np.int64)
    for weight in weights.values():
        for part in weight.parts():
            patterns = patterns_of(part)
            low += np.bincount(patterns[patterns >> 16 == top] & (HALF - 1), minlength=HALF)
    bottom, ties = rank_in(low, left, largest)
    return top << 16 | bottom, ties, int(low[bottom])


def rank_in(counts: np.ndarray, k: int, largest: bool) -> tuple[int, int]:
    """The bin that holds the k-th from one end, and how many of the k are in it. 0 of nothing."""
    if k == 0:
        return (len(counts) - 1 if largest else 0), 0
    upto = np.cumsum(counts[::-1] if largest else counts)
    at = int(np.searchsorted(upto, k))
    before = int(upto[at - 1]) if at else 0
    return (len(counts) - 1 - at if largest else at), k - before


def patterns_of(part: torch.Tensor) -> np.ndarray:
    """int32: magnitudes as fp32 bit patterns, in whose order they are."""
    return part.float().view(torch.int32).numpy() & 0x7FFFFFFF


def bf16(weight: Weight) -> Iterator[torch.Tensor]:
    return (part.bfloat16() for part in weight.parts())


def digest(seed: int, name: str, part: int) -> bytes:
    return blake2b(f"{seed}\0{name}\0{part}".encode(), digest_size=8).digest()


def generator(seed: int, name: str, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, name, part), "little") >> 1)
