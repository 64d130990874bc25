"""Statistics of a mask set by block, module and layer, and the overlap of two sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.errors import printable
from opdkernels.formatting import percent, times
from opdkernels.masks.mask_set import MaskSet

GROUPS = ("block", "module", "layer")
MAX_TENSORS_LISTED = 20


def mask_stats(masks: MaskSet) -> dict[str, Any]:
    """Active coordinates and density of the set, of its groups and of every tensor. A set on disk is not read for it.

    Examples:
        >>> import torch
        >>> from opdkernels.masks import Mask
        >>> mask_stats(MaskSet({"w": Mask.from_bool(torch.tensor([True, False]))}))["density"]
        0.5
    """
    counts = masks.counts()
    result: dict[str, Any] = {"digest": masks.digest, "tensors": len(masks), **totals(list(counts.values()))}
    for group in GROUPS:
        members: dict[Any, list[tuple[int, int]]] = {}
        for name, count in counts.items():
            members.setdefault(getattr(parse_tensor_name(name), group), []).append(count)
        result[f"by_{group}"] = [
            {group: key, "tensors": len(group_counts), **totals(group_counts)}
            for key, group_counts in sorted(members.items(), key=lambda item: str(item[0]).rjust(9))
        ]
    result["by_tensor"] = [
        {"name": name, "shape": list(masks.shapes[name]), **totals([count])} for name, count in counts.items()
    ]
    return result


def totals(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Active coordinates, all coordinates and density of tensors with these (active, all) counts."""
    active, numel = (sum(count[i] for count in counts) for i in (0, 1))
    return {"active": active, "numel": numel, "density": active / numel if numel else 0.0}


def compare_masks(a: MaskSet, b: MaskSet) -> dict[str, Any]:
    """How much two mask sets of the same tensors overlap.

    Returns:
        |A & B|, its fractions of A and of B, Jaccard, and its ratios to chance: `over_uniform` from the densities per
        tensor, `over_uniform_global` from those of the model. None where a denominator is 0.

    Raises:
        ValueError: The sets name other tensors, or the same tensors in another order.

    Examples:
        >>> import torch
        >>> from opdkernels.masks import Mask
        >>> masks = MaskSet({"w": Mask.from_bool(torch.tensor([True, False]))})
        >>> compare_masks(masks, masks)["over_uniform"]
        2.0
    """
    both = a & b
    rows, expected_total = [], 0.0
    for name in a:
        expected = a[name].num_active * b[name].density
        expected_total += expected
        rows.append(
            {"name": name, **overlap_metrics(both[name].num_active, a[name].num_active, b[name].num_active, expected)}
        )
    result = overlap_metrics(both.num_active, a.num_active, b.num_active, expected_total)
    result["over_uniform_global"] = ratio(both.num_active, a.num_active * b.density)
    return {**result, "by_tensor": rows}


def overlap_metrics(both: int, a: int, b: int, expected: float) -> dict[str, Any]:
    """Overlap metrics from active counts and the number of common coordinates expected by chance."""
    return {
        "active_a": a,
        "active_b": b,
        "active_both": both,
        "coverage_a": ratio(both, a),
        "coverage_b": ratio(both, b),
        "jaccard": ratio(both, a + b - both),
        "over_uniform": ratio(both, expected),
    }


def ratio(a: float, b: float) -> float | None:
    """a / b; None where b is 0."""
    return a / b if b else None


def format_stats(stats: dict[str, Any]) -> list[str]:
    """The result of `mask_stats` as lines of text."""
    text = [
        f"{stats['tensors']} tensors, {stats['active']:,} of {stats['numel']:,} coordinates active: "
        f"{percent(stats['density'])}; digest {stats['digest']}"
    ]
    for group in GROUPS:
        text.append(f"{group:16}{'tensors':>9}{'active':>15}{'density':>11}")
        for row in stats[f"by_{group}"][: 4 * MAX_TENSORS_LISTED]:
            label = "-" if row[group] in (-1, None) else str(row[group])
            text.append(f"{label:16}{row['tensors']:9}{row['active']:15,}{percent(row['density']):>11}")
    rows = sorted(stats["by_tensor"], key=lambda row: -row["density"])
    text.append("densest and sparsest tensors" if len(rows) > MAX_TENSORS_LISTED else "tensors, densest first")
    if len(rows) > MAX_TENSORS_LISTED:
        rows = rows[: MAX_TENSORS_LISTED // 2] + rows[-MAX_TENSORS_LISTED // 2 :]
    return text + [f"{percent(row['density']):>11}  {printable(row['name'])} {row['shape']}" for row in rows]


def format_comparison(comparison: dict[str, Any]) -> list[str]:
    """The result of `compare_masks` as lines of text."""
    over_chance = ", ".join(
        f"{times(comparison[key])} chance {scope}"
        + (f" ({percent(comparison['coverage_a'] / comparison[key])} of A)" if comparison[key] else "")
        for key, scope in (("over_uniform", "per tensor"), ("over_uniform_global", "over the model"))
        if comparison[key] is not None
    )
    text = [
        f"A: {comparison['active_a']:,} active, B: {comparison['active_b']:,}, both: {comparison['active_both']:,}",
        f"{percent(comparison['coverage_a'])} of A is in B, {percent(comparison['coverage_b'])} of B in A, "
        f"Jaccard {percent(comparison['jaccard'])}" + (f"; {over_chance}" if over_chance else ""),
    ]
    rows = [row for row in comparison["by_tensor"] if row["over_uniform"] is not None]
    rows = sorted(rows, key=lambda row: -row["active_a"])[:MAX_TENSORS_LISTED]
    if rows:
        text.append(f"{'over chance':>11}  {'of A in B':>9}  tensor, those with the most active coordinates of A first")
    for row in rows:
        text.append(f"{times(row['over_uniform']):>11}  {percent(row['coverage_a']):>9}  {printable(row['name'])}")
    return text
