"""The first screen in words: how much changed, and how that compares with what rounding alone would show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opdkernels.metrics.rounding_null import KINDS
from opdkernels.report.typography import count, name, percent, plural, times

WITHIN = 0.1  # a ratio to the null within a tenth of 1 counts as explained by rounding
POOR_FIT = 0.25  # nearest null off by this share of the changed coordinates: its ratios are rough
NOTABLE = 0.005  # share of all changes that makes a module worth a word
MOST_NAMED = 3
COVERAGE = "near_zero_coverage_10pct"


@dataclass(frozen=True)
class NullKind:
    """One kind of null over all tensors where it could be fitted, against what was observed in the same tensors."""

    kind: str
    nearest: int
    changed: float | None
    changed_ratio: float | None
    coverage: float | None
    coverage_ratio: float | None


@dataclass(frozen=True)
class Fit:
    """How near the nulls are: `distance` over all coordinates, tensors weighted by size; `of_changed` the same as a
    share of the changed coordinates; 10th and 90th percentile over tensors of both ratios."""

    distance: float | None
    of_changed: float | None
    changed_spread: tuple[float, float] | None
    coverage_spread: tuple[float, float] | None
    kinds: list[NullKind]


@dataclass(frozen=True)
class Answer:
    headline: str
    detail: str
    verdict: str
    reading: list[str]


def columns(table: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns as float arrays, NaN where there is nothing."""
    return {
        n: np.array(
            [np.nan if v is None else v for v in table[n].to_pylist()]
            if n in table.column_names
            else [np.nan] * len(table),
            float,
        )
        for n in names
    }


def fit(tensors: pa.Table) -> Fit:
    """From the rows of the visible view."""
    own = ["numel", "nonfinite", "changed", "null_distance", "changed_over_null", f"{COVERAGE}_over_null", COVERAGE]
    own += [f"changed_null_{k}" for k in KINDS] + [f"{COVERAGE}_null_{k}" for k in KINDS]
    c = columns(tensors, own)
    nearest = tensors["null_kind"].to_pylist() if "null_kind" in tensors.column_names else []
    n = np.nan_to_num(c["numel"] - c["nonfinite"])
    moved = np.nan_to_num((np.nan_to_num(c["null_distance"]) * n).sum())
    finite, changed = n.sum(), np.nansum(c["changed"])

    def over(a: float, b: float) -> float | None:
        return float(a / b) if b > 0 else None

    def spread(values: np.ndarray) -> tuple[float, float] | None:
        used = values[~np.isnan(values)]
        return (float(np.quantile(used, 0.1)), float(np.quantile(used, 0.9))) if len(used) >= 5 else None

    kinds = []
    for kind in KINDS:
        expected = c[f"changed_null_{kind}"]
        used = ~np.isnan(expected) & (c["changed"] > 0)
        total = expected[used].sum()
        near = np.nansum(expected[used] * c[f"{COVERAGE}_null_{kind}"][used])
        seen = over(np.nansum(c["changed"][used] * c[COVERAGE][used]), c["changed"][used].sum())
        coverage = over(near, total)
        kinds.append(
            NullKind(
                kind,
                nearest.count(kind),
                over(total, n[used].sum()),
                over(c["changed"][used].sum(), total),
                coverage,
                over(seen, coverage) if seen is not None and coverage else None,
            )
        )
    return Fit(
        over(moved, finite) if changed else None,
        over(moved, changed),
        spread(c["changed_over_null"]),
        spread(c[f"{COVERAGE}_over_null"]),
        kinds,
    )


def answer(summary: dict[str, Any], fitted: Fit, modules: Sequence[dict[str, Any]] = ()) -> Answer:
    """Headline, verdict and how to take it. `modules`: the groups by module in the visible view."""
    views, matched = summary["views"], summary["matched"]
    compared = f"{count(matched['parameters'])} coordinates in {plural(matched['tensors'], 'tensor')}"
    if not views or not matched["parameters"]:
        return Answer("Nothing to compare", f"The matched tensors hold no coordinates ({compared}).", "", [])
    stored, visible = views["stored"], views["visible"]
    others = " that could be compared" if summary["excluded"] or summary["unmatched"] else ""
    if summary["identical"]:
        return Answer(
            "Identical",
            f"Every one of {compared}{others} has the same bits in both checkpoints.",
            "",
            [],
        )
    if visible["frac_zero"] is None:
        return Answer(
            "No finite coordinates",
            f"All of {compared} are NaN or Inf on one side or the other.",
            "",
            [],
        )
    share, share_stored = 1 - visible["frac_zero"], 1 - stored["frac_zero"]
    still = f"Bit-identical: {count(stored['bit_equal_tensors'])} of {plural(stored['tensors'], 'tensor')}."
    if visible["changed"] == stored["changed"]:
        headline = f"{percent(share)} of the coordinates changed"
        detail = f"{count(visible['changed'])} of {compared}, the same in both views. {still}"
    else:
        headline = f"{percent(share_stored)} of the coordinates changed; {percent(share)} visibly in bf16"
        detail = (
            f"{count(stored['changed'])} as stored and {count(visible['changed'])} after rounding to bf16, of "
            f"{compared}. {still}"
        )
    if not visible["changed"]:
        verdict = "No change is visible in bf16" if stored["changed"] else "No finite coordinate changed"
        return Answer(
            headline,
            detail,
            verdict,
            [
                "The bf16 copies of both checkpoints are equal in every finite coordinate, so there is no "
                "visible update to compare with rounding."
            ],
        )
    return Answer(headline, detail, *judge(visible, fitted, modules))


def judge(visible: dict[str, Any], fitted: Fit, modules: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """What the ratios to the null say together, why, and with what caution."""
    changed, coverage = visible["changed_over_null"], visible[f"{COVERAGE}_over_null"]
    if changed is None or coverage is None:
        return "Rounding alone could not be modelled here", ["Too little moved visibly to fit a null."]
    expected, near = (
        percent(visible["changed_null"] / max(1, visible["numel"] - visible["nonfinite"])),
        percent(visible[f"{COVERAGE}_null"]),
    )
    same, near_same = abs(changed - 1) <= WITHIN, abs(coverage - 1) <= WITHIN
    setting = (
        "A dense update that ignores the weights, of the same visible energy and stored in bf16, would change "
        f"{expected} of the coordinates and put {near} of its visible changes on the tenth of the weights nearest "
        "zero."
    )
    if same and near_same:
        verdict = "Over the whole model, rounding alone explains both figures"
        reading = (
            "So neither the sparsity nor the near-zero coverage is evidence that training picked these "
            "coordinates: in bf16, small weights show small updates and large weights hide them."
        )
    elif near_same:
        verdict = f"Rounding explains where it changed, not how much: {times(changed)} the coordinates it would show"
        reading = _how_many(changed) + " Their preference for small weights is what rounding gives."
    elif same:
        verdict = (
            f"Rounding explains how many changed, not where: {times(coverage)} the near-zero coverage it would show"
        )
        reading = "The number of changed coordinates is what rounding gives. " + _where(coverage)
    else:
        verdict = (
            f"Rounding alone does not explain it: {times(changed)} the changes and {times(coverage)} the near-zero "
            "coverage"
        )
        reading = f"{_how_many(changed)} {_where(coverage)}"
    notes = [setting, reading]
    if fitted.of_changed is not None and fitted.of_changed > POOR_FIT:
        notes.append(
            f"Caution: even the nearest nulls are off by {percent(fitted.of_changed)} of the changed "
            "coordinates, so take these ratios as rough."
        )
    if fitted.changed_spread and fitted.coverage_spread:
        (a, b), (c, d) = fitted.changed_spread, fitted.coverage_spread
        notes.append(
            f"Four tensors in five lie between {times(a)} and {times(b)} for changes, and between {times(c)} "
            f"and {times(d)} for near-zero coverage.{apart(visible, modules)}"
        )
    return verdict, notes


def apart(visible: dict[str, Any], modules: Sequence[dict[str, Any]]) -> str:
    """The modules that hold some of the changes and that rounding does not explain, furthest first."""
    found = []
    for row in modules:
        ratios = row["changed_over_null"], row[f"{COVERAGE}_over_null"]
        if all(ratios) and row["changed"] >= NOTABLE * visible["changed"]:
            off = max(abs(np.log(r)) for r in ratios)
            if off > np.log(1 + WITHIN):
                found.append(
                    (off, f"{name(row['module'])} ({times(ratios[0])} the changes, {times(ratios[1])} the coverage)")
                )
    found.sort(key=lambda item: -item[0])
    return f" Furthest from rounding: {', '.join(text for _, text in found[:MOST_NAMED])}." if found else ""


def _how_many(ratio: float) -> str:
    if ratio < 1:
        return (
            "Fewer coordinates changed than an even update of this energy would show: the update is concentrated, "
            "and that part of the sparsity is not rounding."
        )
    return (
        "More coordinates changed than an even update of this energy would show: many small changes rather than "
        "few large ones."
    )


def _where(ratio: float) -> str:
    if ratio > 1:
        return (
            "Near-zero weights changed more often than rounding gives, so the update depends on the weights or on "
            "what goes with their size."
        )
    return (
        "Near-zero weights changed less often than rounding gives, so the update grows with the weights or with "
        "what goes with their size."
    )
