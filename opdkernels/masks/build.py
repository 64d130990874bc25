"""Ways to build masks: from what a run changed, from the weights, at random.

Weights are a checkpoint (a path or a Hub id) or tensors by name, such as a state_dict. A density d selects ceil(d * n)
of the n coordinates of each tensor, of all tensors of a module type, or of the model. Ties at the threshold (common in
bf16) are broken by a seeded draw. Tied tensors (embeddings) are used once. Source: arXiv 2606.13657 (near-zero,
principal and safe masks).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from opdkernels.checkpoint.base import DTYPES
from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.correspondence import match_tensors
from opdkernels.checkpoint.coverage import coverage_sentence
from opdkernels.checkpoint.match import Match, Pair, open_pair
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.tied import copies
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks.mask import Mask
from opdkernels.masks.mask_set import MaskSet
from opdkernels.metrics.distance import warn_if_unrelated
from opdkernels.ops.delta import base_and_delta, delta
from opdkernels.ops.gram import gram, symmetric
from opdkernels.spectral import principal as selection
from opdkernels.spectral.exact import GRAM_LIMIT, factorise, factorise_matrix, top_ranks

Weights = str | os.PathLike[str] | Mapping[str, torch.Tensor]
SCOPES = ("tensor", "module", "model")
VIEWS = ("visible", "stored")
STEP = 1 << 24  # coordinates read at a time
HALF = 1 << 16
NOT_FINITE = "holds NaN or Inf, so that it has no"
OTHER_MODEL = "make the masks from this model"


@dataclass(frozen=True)
class Weight:
    """One tensor: its shape and a function that reads a range of its elements, 1-D."""

    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def chunks(self) -> Iterator[torch.Tensor]:
        """The elements, STEP at a time."""
        for first in range(0, self.numel, STEP):
            yield self.read(first, min(first + STEP, self.numel))


@contextlib.contextmanager
def open_weights(weights: Weights) -> Iterator[dict[str, Weight]]:
    """The floating-point parameters of a checkpoint or a mapping, in their order; tied ones once, and no buffers."""
    if isinstance(weights, Mapping):
        result, seen = {}, set()
        for name, tensor in weights.items():
            flat = tensor.detach().cpu().contiguous().view(-1)
            storage = (tensor.data_ptr(), tensor.numel())
            if is_buffer(name, tensor.shape):
                continue
            if tensor.is_floating_point() and (storage not in seen or not tensor.numel()):
                seen.add(storage)
                result[name] = Weight(tuple(tensor.shape), lambda a, b, flat=flat: flat[a:b])  # type: ignore[misc]
        yield result
        return
    with contextlib.closing(open_checkpoint(weights)) as checkpoint:
        repeated = copies(checkpoint)
        readers = {
            name: Weight(info.shape, lambda a, b, name=name: checkpoint.read(name, a, b))  # type: ignore[misc]
            for name, info in checkpoint.tensors.items()
            if info.dtype in DTYPES and name not in repeated and not is_buffer(name, info.shape)
        }
        if not readers:  # a file of masks, for instance
            raise InputError(
                f"{printable(checkpoint.path)} has no floating-point weights to select from;"
                " give a checkpoint of a model"
            )
        yield readers
        checkpoint.check()


def validate_density(density: float, scope: str) -> None:
    """Raise UsageError for a density or a scope that is not valid."""
    if not 0 < density <= 1:
        raise UsageError(f"density must be above 0 and at most 1, not {density}")
    if scope not in SCOPES:
        raise UsageError(f"scope must be one of {', '.join(SCOPES)}, not {scope}")


def changed(
    base: str | os.PathLike[str], trained: str | os.PathLike[str], *, atol: float = 0.0, view: str = "visible"
) -> MaskSet:
    """The coordinates where |delta| > atol between two checkpoints.

    Args:
        base: Checkpoint before training.
        trained: Checkpoint after training.
        atol: Threshold of |delta|, in 0 .. 1e30; rounded to bf16 in the visible view (default: 0).
        view: "visible", both checkpoints rounded to bf16, or "stored" (default: "visible").

    Returns:
        One mask per tensor that both have, with `MaskSet.coverage`. A coordinate that is NaN or Inf on either side is
        not active; `MaskSet.nonfinite` is their number. Where training added rows to a vocabulary, the mask has the
        trained shape and those rows are active.

    Warns:
        UserWarning: The checkpoints do not look like the start and the end of one run, too little was compared, see
            `opdkernels.checkpoint.coverage.Coverage.sufficient`, or coordinates are NaN or Inf.

    Raises:
        InputError: A checkpoint cannot be read.
        UsageError: Another view, or `atol` is out of range.

    Examples:
        masks = changed("Qwen2.5-0.5B", "my-run/step-200")
    """
    if view not in VIEWS:
        raise UsageError(f"view must be one of {', '.join(VIEWS)}, not {view}")
    if not 0 <= atol <= 1e30:
        raise UsageError(f"atol must be in 0 .. 1e30, not {atol}")
    threshold_bits = (int(torch.tensor([atol]).bfloat16().view(torch.int16)),)
    masks, nonfinite = {}, 0
    with contextlib.closing(open_pair(base, trained)) as pair:
        warn_if_unrelated(pair)
        for match in pair.matches:
            bitmap = np.zeros((match.numel + 7) // 8, np.uint8)
            for first in range(0, match.numel, STEP):
                w, v = pair.read(match, first, min(first + STEP, match.numel))
                chunk = torch.zeros((len(w) + 7) // 8, dtype=torch.uint8)
                if view == "visible":
                    nonfinite += delta(w, v, threshold_bits=threshold_bits, mask=chunk).nonfinite
                else:
                    size = base_and_delta(w, v, False)[1].abs()
                    nonfinite += int((~size.isfinite()).sum())
                    chunk = torch.from_numpy(np.packbits(((size > atol) & size.isfinite()).numpy(), bitorder="little"))
                bitmap[first // 8 : first // 8 + len(chunk)] = chunk.numpy()
            masks[match.name] = with_added_rows(Mask.from_bitmap(torch.from_numpy(bitmap), match.shape), match)
        pair.check()
        result = with_coverage(MaskSet(masks), pair)
        result.nonfinite = nonfinite
        if nonfinite:
            warnings.warn(nonfinite_sentence(nonfinite), stacklevel=2)
        return result


def nonfinite_sentence(count: int) -> str:
    """What became of coordinates that are NaN or Inf."""
    return f"{count:,} coordinates are NaN or Inf in one of the checkpoints, or their change is: they are not active."


def top_changed(
    base: str | os.PathLike[str], trained: str | os.PathLike[str], density: float, *, scope: str = "model"
) -> MaskSet:
    """The top fraction of coordinates by |delta| between two checkpoints as stored. Reads both three times, in chunks.

    Args:
        base: Checkpoint before training.
        trained: Checkpoint after training.
        density: Fraction of the coordinates, above 0 and at most 1. Unchanged coordinates are never active, so that
            fewer may be.
        scope: What the fraction is taken of: each "tensor", all tensors of a "module" type, or the "model".

    Returns:
        One mask per tensor that both have, with `MaskSet.coverage`. Rows that training added to a vocabulary count as
        changed from 0, and the mask has the trained shape.

    Warns:
        UserWarning: The checkpoints do not look like the start and the end of one run, or too little was compared, see
            `opdkernels.checkpoint.coverage.Coverage.sufficient`.

    Raises:
        InputError: A checkpoint cannot be read, or a difference is NaN or Inf.
        UsageError: `density` or `scope` is not valid.

    Examples:
        masks = top_changed("Qwen2.5-0.5B", "my-run/step-200", 0.2)
    """
    validate_density(density, scope)
    with contextlib.closing(open_pair(base, trained)) as pair:
        warn_if_unrelated(pair)

        def reader(match: Match) -> Callable[[int, int], torch.Tensor]:
            def read(first: int, stop: int) -> torch.Tensor:
                common = min(stop, match.numel)
                w, v = pair.read(match, min(first, common), common)
                change = base_and_delta(w, v, False)[1].abs()
                if not bool(change.isfinite().all()):
                    raise InputError(f"{printable(match.name)} {NOT_FINITE} largest changes; use `mask changed`")
                if stop <= match.numel:
                    return change
                added = pair.trained.read(match.trained.name, max(first, match.numel), stop)
                return torch.cat([change, added.to(change.dtype).abs()])

            return read

        weights = {match.name: Weight(trained_shape(match), reader(match)) for match in pair.matches}
        masks = extremes(weights, density, scope, largest=True, zeros=False)
        pair.check()
        return with_coverage(masks, pair)


def trained_shape(match: Match) -> tuple[int, ...]:
    """The shape of a match's elements, with the rows that training added to a vocabulary."""
    grown = match.match_kind == "common rows" and match.trained.numel > match.numel
    return match.trained.shape if grown else match.shape


def with_added_rows(mask: Mask, match: Match) -> Mask:
    """A mask of the common rows of a vocabulary as a mask of the trained tensor, with the added rows active."""
    shape = trained_shape(match)
    if shape == mask.shape:
        return mask
    added = torch.ones((shape[0] - mask.shape[0], *shape[1:]), dtype=torch.bool)
    return Mask.from_bool(torch.cat([mask.to_bool(), added]))


def with_coverage(masks: MaskSet, pair: Pair) -> MaskSet:
    """The masks with the coverage of the pair that they were made from; warns if it is not sufficient."""
    masks.coverage = pair.coverage
    if not masks.coverage.sufficient:
        sentence = coverage_sentence(masks.coverage.to_dict())
        warnings.warn(f"{sentence} The masks do not describe the whole models.", stacklevel=3)
    return masks


def near_zero(base: Weights, density: float, *, scope: str = "tensor") -> MaskSet:
    """The fraction of coordinates with the smallest |W|.

    Args:
        base: A checkpoint or tensors by name.
        density: As for `top_changed`.
        scope: As for `top_changed`.

    Raises:
        InputError: The checkpoint cannot be read, or a weight is NaN.
        UsageError: `density` or `scope` is not valid.

    Examples:
        >>> near_zero({"w": torch.tensor([3.0, -1.0, 2.0, 4.0])}, 0.5)["w"].indices.tolist()
        [1, 2]
    """
    validate_density(density, scope)
    with open_weights(base) as weights:
        return extremes(weights, density, scope, largest=False)


def largest(values: Mapping[str, torch.Tensor], density: float, *, scope: str = "tensor") -> MaskSet:
    """The fraction of coordinates with the largest magnitude of any tensors: updates, gradients, second moments.

    Args:
        values: Tensors by name.
        density: As for `top_changed`.
        scope: As for `top_changed`.

    Raises:
        InputError: A value is NaN.
        UsageError: `density` or `scope` is not valid.

    Examples:
        >>> largest({"w": torch.tensor([3.0, -1.0, 2.0, 4.0])}, 0.5)["w"].indices.tolist()
        [0, 3]
    """
    validate_density(density, scope)
    with open_weights(values) as weights:
        return extremes(weights, density, scope, largest=True)


def random_subset(base: Weights, density: float, *, scope: str = "tensor", seed: int = 0) -> MaskSet:
    """A random fraction of the coordinates.

    Args:
        base: A checkpoint or tensors by name.
        density: As for `top_changed`.
        scope: As for `top_changed`.
        seed: Seed. The draw of a tensor depends on the seed and its name, not on other tensors (default: 0).

    Raises:
        InputError: The checkpoint cannot be read.
        UsageError: `density` or `scope` is not valid.

    Examples:
        >>> random_subset({"w": torch.zeros(8)}, 0.25)["w"].num_active
        2
    """
    validate_density(density, scope)

    def keys(name: str) -> Callable[[int, int], torch.Tensor]:
        def read(first: int, stop: int) -> torch.Tensor:
            return torch.rand(stop - first, generator=generator(seed, name, first // STEP))

        return read

    with open_weights(base) as weights:
        random_keys = {name: Weight(weight.shape, keys(name)) for name, weight in weights.items()}
        return extremes(random_keys, density, scope, largest=True)


def magnitude_matched(masks: MaskSet, base: Weights, *, seed: int = 0) -> MaskSet:
    """A random control: per tensor as many coordinates as its mask has, with the same |W| in bf16.

    It shows what magnitudes alone explain. Takes 10 bytes per coordinate of the largest tensor.

    Args:
        masks: The masks to match.
        base: A checkpoint or tensors by name, with every masked tensor.
        seed: Seed (default: 0).

    Raises:
        InputError: The checkpoint cannot be read, or a masked tensor is missing or has another shape.

    Examples:
        >>> weights = {"w": torch.tensor([1.0, 1.0, 2.0])}
        >>> masks = MaskSet({"w": Mask.from_indices(torch.tensor([2]), (3,))})
        >>> magnitude_matched(masks, weights)["w"].indices.tolist()
        [2]
    """
    result = {}
    with open_weights(base) as weights:
        matched = match_tensors(masks.shapes, {name: weight.shape for name, weight in weights.items()})
        weight_names = {name: other for name, other, _ in matched.pairs}
        for name, mask in masks.items():
            weight = matching_weight(weights, weight_names.get(name, name), mask)
            chunks = [magnitude_bits(chunk.bfloat16()) >> 16 for chunk in weight.chunks()]
            bf16_bits = np.concatenate(chunks or [np.zeros(0, np.int32)]).astype(np.uint16)
            counts = np.bincount(bf16_bits[mask.to_bool().view(-1).numpy()], minlength=1 << 15)
            order = np.argsort(bf16_bits, kind="stable")  # a radix sort
            ends = np.cumsum(np.bincount(bf16_bits, minlength=1 << 15))
            rng = np.random.default_rng(int.from_bytes(seed_bytes(seed, name, 0), "little"))
            chosen = []
            for b in np.flatnonzero(counts):
                candidates = order[ends[b - 1] if b else 0 : ends[b]]
                chosen.append(candidates[rng.choice(len(candidates), counts[b], replace=False)])
            indices = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
            result[name] = Mask.from_indices(torch.from_numpy(indices.astype(np.int64)), mask.shape)
    return MaskSet(result)


def principal(base: Weights, density: float) -> MaskSet:
    """Per matrix, the fraction of coordinates with the largest |U_k S_k V_k^T|, k = max(1, int(density * min(m, n))).

    That is where the top singular vectors of W concentrate. Tensors of other dimensions have no active coordinate.

    Args:
        base: A checkpoint or tensors by name.
        density: Fraction of each matrix, above 0 and at most 1.

    Raises:
        InputError: The checkpoint cannot be read, or a matrix holds NaN or Inf.
        UsageError: `density` is not valid.

    Examples:
        >>> principal({"w": torch.diag(torch.tensor([3.0, 1.0]))}, 0.25)["w"].indices.tolist()
        [0]
    """
    validate_density(density, "tensor")
    with open_weights(base) as weights:
        return MaskSet({name: principal_mask(name, weight, density) for name, weight in weights.items()})


def safe(base: Weights, density: float) -> MaskSet:
    """The coordinates that are not principal, or near zero: where, after arXiv 2606.13657, updates do the least harm.

    Args:
        base: A checkpoint or tensors by name.
        density: That of the principal and of the near-zero masks.

    Raises:
        InputError: The checkpoint cannot be read, or a tensor holds NaN or a matrix Inf.
        UsageError: `density` is not valid.

    Examples:
        >>> safe({"w": torch.diag(torch.tensor([3.0, 1.0]))}, 0.25)["w"].num_active
        3
    """
    with open_weights(base) as weights:
        principal_masks = MaskSet({name: principal_mask(name, weight, density) for name, weight in weights.items()})
        return ~principal_masks | extremes(weights, density, "tensor", largest=False)


def principal_mask(name: str, weight: Weight, density: float) -> Mask:
    """The principal mask of one tensor."""
    if len(weight.shape) != 2 or not weight.numel:
        return Mask.from_indices(torch.zeros(0, dtype=torch.int64), weight.shape)
    w = weight.read(0, weight.numel).view(weight.shape)
    if not bool(torch.isfinite(w).all()):
        raise InputError(f"{printable(name)} {NOT_FINITE} principal weights; give a checkpoint with finite weights")
    tall = w.shape[0] >= w.shape[1]
    long = w if tall else w.T
    ranks = top_ranks(long.shape[1], (density,))
    factor = factorise(symmetric(gram(long))[0], ranks[-1])
    if float(factor.sigma[ranks[-1] - 1]) <= GRAM_LIMIT * float(factor.sigma[0]):
        factor = factorise_matrix(w, ranks[-1])
    projected = selection.project(long, factor.vectors, visible=False)
    (selected,) = selection.masks(long, factor.vectors, projected, ranks, visible=False, ratios=(density,))
    flags = np.unpackbits(selected.sure, count=weight.numel, bitorder="little").astype(bool)
    flags[selected.above] = True
    flags[selected.tied[: selected.taken]] = True
    active = torch.from_numpy(flags).view(long.shape)
    return Mask.from_bool(active if tall else active.T.contiguous())


def matching_weight(weights: Mapping[str, Weight], name: str, mask: Mask) -> Weight:
    """The weight of a mask. Raises InputError where it is missing or has another shape."""
    if name not in weights:
        raise InputError(f"there is a mask for {printable(name)}, which the base does not have; {OTHER_MODEL}")
    if weights[name].shape != mask.shape:
        raise InputError(
            f"the mask of {printable(name)} has shape {list(mask.shape)} and the tensor {list(weights[name].shape)};"
            f" {OTHER_MODEL}"
        )
    return weights[name]


def extremes(weights: Mapping[str, Weight], density: float, scope: str, largest: bool, zeros: bool = True) -> MaskSet:
    """The fraction of the largest or smallest magnitudes of each group of tensors; exact for values that fp32 holds.

    Where `zeros` is False, a value of 0 is never active.
    """
    groups: dict[str, list[str]] = {}
    for name in weights:
        group = name if scope == "tensor" else parse_tensor_name(name).module if scope == "module" else ""
        groups.setdefault(group, []).append(name)
    result = {}
    for names in groups.values():
        sizes = {name: weights[name].numel for name in names}
        k = math.ceil(density * sum(sizes.values()))
        threshold, num_ties, tied = kth_magnitude({name: weights[name] for name in names}, k, largest)
        if threshold == 0 and not zeros:
            num_ties = 0
        seen = 0  # ties so far
        for name in names:
            flags = np.empty(sizes[name], bool)
            first = 0
            for chunk in weights[name].chunks():
                bits = magnitude_bits(chunk)
                flags[first : first + len(chunk)] = bits > threshold if largest else bits < threshold
                ties = np.flatnonzero(bits == threshold)
                # Each chunk gets a proportional part of the ties, rounded.
                take = (seen + len(ties)) * num_ties // max(tied, 1) - seen * num_ties // max(tied, 1)
                if take:
                    rng = np.random.default_rng(int.from_bytes(seed_bytes(0, f"ties\0{name}", first), "little"))
                    chosen = ties if take == len(ties) else rng.choice(ties, take, replace=False, shuffle=False)
                    flags[first + chosen] = True
                seen += len(ties)
                first += len(chunk)
            result[name] = Mask.from_bool(torch.from_numpy(flags).view(weights[name].shape))
    return MaskSet({name: result[name] for name in weights})


def kth_magnitude(weights: Mapping[str, Weight], k: int, largest: bool) -> tuple[int, int, int]:
    """The k-th largest or smallest magnitude of several tensors together, by two histograms of 16 bits in two passes.

    Returns its fp32 bit pattern, how many of the coordinates with that magnitude are among the k, and how many have it.
    """
    upper = np.zeros(1 << 15, np.int64)
    for name, weight in weights.items():
        for chunk in weight.chunks():
            bits = magnitude_bits(chunk)
            if len(bits) and bits.max() > 0x7F800000:
                raise InputError(
                    f"{printable(name)} holds NaN, so that it has no largest or smallest values; give finite weights"
                )
            upper += np.bincount(bits >> 16, minlength=1 << 15)
    upper_bin, remaining = rank_in(upper, k, largest)
    lower = np.zeros(HALF, np.int64)
    for weight in weights.values():
        for chunk in weight.chunks():
            bits = magnitude_bits(chunk)
            lower += np.bincount(bits[bits >> 16 == upper_bin] & (HALF - 1), minlength=HALF)
    lower_bin, num_ties = rank_in(lower, remaining, largest)
    return upper_bin << 16 | lower_bin, num_ties, int(lower[lower_bin])


def rank_in(counts: np.ndarray, k: int, largest: bool) -> tuple[int, int]:
    """The bin that holds the k-th element from one end, and how many of the k are in it. (end bin, 0)
    for k = 0."""
    if k == 0:
        return (len(counts) - 1 if largest else 0), 0
    cumulative = np.cumsum(counts[::-1] if largest else counts)
    at = int(np.searchsorted(cumulative, k))
    before = int(cumulative[at - 1]) if at else 0
    return (len(counts) - 1 - at if largest else at), k - before


def magnitude_bits(values: torch.Tensor) -> np.ndarray:
    """The fp32 bit patterns of magnitudes, int32, which are ordered as the magnitudes are."""
    return values.float().view(torch.int32).numpy() & 0x7FFFFFFF


def seed_bytes(seed: int, name: str, chunk: int) -> bytes:
    """Eight bytes that depend on a seed, the name of a tensor and a chunk of it."""
    return blake2b(f"{seed}\0{name}\0{chunk}".encode(), digest_size=8).digest()


def generator(seed: int, name: str, chunk: int) -> torch.Generator:
    """A torch generator seeded by `seed_bytes`."""
    return torch.Generator().manual_seed(int.from_bytes(seed_bytes(seed, name, chunk), "little") >> 1)
