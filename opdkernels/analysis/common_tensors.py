"""The tensors that several checkpoints of one base have in common, and slices of them from all checkpoints at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.checkpoint.coverage import Coverage
from opdkernels.checkpoint.match import EXCLUDED_KINDS, ITEM_BYTES, Match, Pair
from opdkernels.errors import InputError

Elements = tuple[str, int, int]


def base_elements(match: Match) -> Elements:
    """Which elements of the base a match compares: tensor name, first element, number of elements."""
    return match.base.name, match.base_start, match.numel


def match_in_all(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[list[list[Match]], list[dict[str, str]]]:
    """Finds the tensors of the base that every checkpoint has.

    Args:
        pairs: The base with each checkpoint.
        names: What the checkpoints are called in reasons.

    Returns:
        One list of matches per common tensor, with one match per checkpoint, in the order of the base; and name and
        reason of each tensor that is excluded.

    Raises:
        InputError: The checkpoints have no tensor in common.
    """
    matches_of = [{base_elements(match): match for match in pair.matches} for pair in pairs]
    names_of = [{match.base.name for match in pair.matches} for pair in pairs]
    order = {name: i for i, name in enumerate(pairs[0].base.tensors)}
    first_match = {base_elements(match): match for pair in reversed(pairs) for match in pair.matches}
    common, excluded = [], []
    for elements, match in sorted(first_match.items(), key=lambda item: (order[item[0][0]], item[0][1:])):
        lacking = [i for i, matches in enumerate(matches_of) if elements not in matches]
        if not lacking:
            common.append([matches[elements] for matches in matches_of])
            continue
        split_differently = all(match.base.name in names_of[i] for i in lacking)
        absent = ", ".join(names[i] for i in lacking)
        reason = f"stored in other parts in {absent}" if split_differently else f"not in {absent} in the same shape"
        excluded.append({"name": match.name, "reason": reason})
    for name, pair in zip(names, pairs, strict=True):
        excluded += [
            {"name": tensor.name, "reason": f"{name}: {tensor.reason}"}
            for tensor in pair.unmatched
            if tensor.kind in EXCLUDED_KINDS
        ]
    if not common:
        raise InputError(
            "no tensor of the base is in every run in the same shape; check that the runs come from this base"
        )
    return common, excluded


def common_coverage(pairs: Sequence[Pair], labels: Sequence[str], common: Sequence[Sequence[Match]]) -> Coverage:
    """How much of the base and of each checkpoint the common tensors cover."""
    compared = sum(matches[0].numel for matches in common)
    coverages = [pair.coverage for pair in pairs]
    parameters = {"base": max(coverage.parameters["base"] for coverage in coverages)}
    parameters |= {label: coverage.parameters["trained"] for label, coverage in zip(labels, coverages, strict=True)}
    uncompared = ["base"] if any("base" in coverage.uncompared for coverage in coverages) else []
    uncompared += [label for label, coverage in zip(labels, coverages, strict=True) if "trained" in coverage.uncompared]
    uncompared += [side for side, count in parameters.items() if count > compared and side not in uncompared]
    return Coverage(compared, parameters, uncompared)


def bytes_per_element(matches: Sequence[Match]) -> int:
    """Bytes of one element in the base and all checkpoints."""
    return ITEM_BYTES[matches[0].base.dtype] + sum(ITEM_BYTES[match.trained.dtype] for match in matches)


def read_slice(pairs: Sequence[Pair], matches: Sequence[Match], begin: int, end: int) -> list[torch.Tensor]:
    """Elements [begin, end) of a tensor: of the base first, then of every checkpoint."""
    first = matches[0]
    tensors = [pairs[0].base.read(first.base.name, first.base_start + begin, first.base_start + end)]
    for pair, match in zip(pairs, matches, strict=True):
        tensors.append(pair.trained.read(match.trained.name, match.trained_start + begin, match.trained_start + end))
    return tensors
