"""What a set of masks holds, by layer and module, and how two of them overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkernels.checkpoint.names import place
from opdkernels.errors import printable
from opdkernels.masks.mask_set import MaskSet

GROUPS = ("block", "module", "layer")
MOST_LISTED = 20


def show(masks: MaskSet) -> dict[str, Any]:
    """Active coordinates and density of the set, of its groups and of every tensor; no mask is read for it."""
    counts = masks.counts()
    found: dict[str, Any] = {"digest": masks.digest, "tensors": len(masks), **share(list(counts.values()))}
    for group in GROUPS:
        members: dict[Any, list[tuple[int, int]]] = {}
        for name, count in counts.items():
            members.setdefault(getattr(place(name), group), []).append(count)
        found[f"by_{group}"] = [
            {group: key, "tensors": len(own), **share(own)}
            for key, own in sorted(members.items(), key=lambda item: str(item[0]).rjust(9))
        ]
    found["by_tensor"] = [
        {"name": name, "shape": list(masks.shapes[name]), **share([count])} for name, count in counts.items()
    ]
    return found


def share(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    active, numel = (sum(count[i] for count in counts) for i in (0, 1))
    return {"active": active, "numel": numel, "density": active / numel if numel else 0.0}


def overlap(a: MaskSet, b: MaskSet) -> dict[str, Any]:
    """How two sets of the same tensors overlap: |A & B|, its share of A and of B, Jaccard, and over chance: `over_uniform` by
    the densities tensor by tensor, `over_uniform_global` by those of the whole set. None where a share has no whole."""
    both = a & b
    rows = [
        {"name": name, **overlap_metrics(both[name].nnz, a[name].nnz, b[name].nnz, a[name].nnz * b[name].density)}
        for name in a
    ]
    expected = sum(a[name].nnz * b[name].density for name in a)
    whole = overlap_metrics(both.nnz, a.nnz, b.nnz, expected)
    whole["over_uniform_global"] = ratio(both.nnz, a.nnz * b.density)
    return {**whole, "by_tensor": rows}


def overlap_metrics(both: int, a: int, b: int, expected: float) -> dict[str, Any]:
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
    return a / b if b else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.4g} %"


def lines(found: dict[str, Any]) -> list[str]:
    """`show` for people."""
    text = [
        f"{found['tensors']} tensors, {found['active']:,} of {found['numel']:,} coordinates active: {percent(found['density'])}; digest {found['digest']}"
    ]
    for group in GROUPS:
        text.append(f"{group:16}{'tensors':>9}{'active':>15}{'density':>11}")
        for row in found[f"by_{group}"][: 4 * MOST_LISTED]:
            label = "-" if row[group] in (-1, None) else str(row[group])
            text.append(f"{label:16}{row['tensors']:9}{row['active']:15,}{percent(row['density']):>11}")
    extreme = sorted(found["by_tensor"], key=lambda row: -row["density"])
    text.append("densest and sparsest tensors" if len(extreme) > MOST_LISTED else "tensors, densest first")
    shown = extreme if len(extreme) <= MOST_LISTED else extreme[: MOST_LISTED // 2] + extreme[-MOST_LISTED // 2 :]
    return text + [f"{percent(row['density']):>11}  {printable(row['name'])} {row['shape']}" for row in shown]


def overlap_lines(found: dict[str, Any]) -> list[str]:
    """`overlap` for people."""
    over = ", ".join(
        f"{found[key]:.4g} times {what}"
        for key, what in (("over_uniform", "chance tensor by tensor"), ("over_uniform_global", "chance over the whole"))
        if found[key] is not None
    )
    text = [
        f"A: {found['active_a']:,} active, B: {found['active_b']:,}, both: {found['active_both']:,}",
        f"{percent(found['coverage_a'])} of A is in B, {percent(found['coverage_b'])} of B in A, Jaccard {percent(found['jaccard'])}"
        + (f"; {over}" if over else ""),
    ]
    known = sorted(
        (row for row in found["by_tensor"] if row["over_uniform"] is not None), key=lambda row: -row["over_uniform"]
    )
    for row in known[:MOST_LISTED]:
        text.append(f"{row['over_uniform']:11.4g}  {percent(row['coverage_a']):>9}  {printable(row['name'])}")
    return text
