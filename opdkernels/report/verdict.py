"""The first screen in words: how much changed, and how that compares with bf16 rounding alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opdkernels.metrics.verdict import TOLERANCE, all_bits_equal, equal_in
from opdkernels.ops.null.layout import KINDS
from opdkernels.report.typography import count, name, percent, plural, times

POOR_FIT = 0.25  # distance of the nearest null, as a fraction of the changed coordinates, above which ratios are rough
MIN_CHANGES = 0.005  # fraction of all changes below which a module is not mentioned
MAX_MODULES = 3
RATIO = re.compile(r"(?<=\d)x\b")  # of a ratio in the terminal, such as 0.98x
COVERAGE = "near_zero_coverage_10pct"


@dataclass(frozen=True)
class NullKind:
    """One kind of null over all tensors where it could be fitted, and the observed metrics relative to it."""

    kind: str
    nearest: int
    changed: float | None
    changed_ratio: float | None
    coverage: float | None
    coverage_ratio: float | None


@dataclass(frozen=True)
class Fit:
    """How near the nulls are to what was observed.

    Attributes:
        distance: Of the nearest nulls, over all coordinates; tensors are weighted by size.
        changed_distance: The same, as a fraction of the changed coordinates.
        changed_spread: 10th and 90th percentile over tensors of changed / expected.
        coverage_spread: 10th and 90th percentile over tensors of near-zero coverage / expected.
        kinds: The kinds of null.
    """

    distance: float | None
    changed_distance: float | None
    changed_spread: tuple[float, float] | None
    coverage_spread: tuple[float, float] | None
    kinds: list[NullKind]


@dataclass(frozen=True)
class Summary:
    """The first screen: headline and detail, the verdict of the comparison with rounding, and its interpretation."""

    headline: str
    detail: str
    verdict: str
    interpretation: list[str]


def float_columns(table: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns as float64 [rows], NaN where a value or the column is missing."""
    missing = [np.nan] * len(table)
    return {
        name: np.array(
            [np.nan if value is None else value for value in table[name].to_pylist()]
            if name in table.column_names
            else missing,
            float,
        )
        for name in names
    }


def fit_of(tensors: pa.Table) -> Fit:
    """The fit of the nulls, from the rows of the visible view."""
    names = ["numel", "nonfinite", "changed", "null_distance", "changed_over_null", f"{COVERAGE}_over_null", COVERAGE]
    names += [f"changed_null_{kind}" for kind in KINDS] + [f"{COVERAGE}_null_{kind}" for kind in KINDS]
    c = float_columns(tensors, names)
    nearest = tensors["null_kind"].to_pylist() if "null_kind" in tensors.column_names else []
    n = np.nan_to_num(c["numel"] - c["nonfinite"])
    moved = np.nan_to_num((np.nan_to_num(c["null_distance"]) * n).sum())
    finite, changed = n.sum(), np.nansum(c["changed"])

    def ratio(numerator: float, denominator: float) -> float | None:
        return float(numerator / denominator) if denominator > 0 else None

    def spread(values: np.ndarray) -> tuple[float, float] | None:
        known = values[~np.isnan(values)]
        return (float(np.quantile(known, 0.1)), float(np.quantile(known, 0.9))) if len(known) >= 5 else None

    kinds = []
    for kind in KINDS:
        expected = c[f"changed_null_{kind}"]
        used = ~np.isnan(expected) & (c["changed"] > 0)
        total = expected[used].sum()
        near_zero = np.nansum(expected[used] * c[f"{COVERAGE}_null_{kind}"][used])
        observed = ratio(np.nansum(c["changed"][used] * c[COVERAGE][used]), c["changed"][used].sum())
        coverage = ratio(near_zero, total)
        kinds.append(
            NullKind(
                kind,
                nearest.count(kind),
                ratio(total, n[used].sum()),
                ratio(c["changed"][used].sum(), total),
                coverage,
                ratio(observed, coverage) if observed is not None and coverage else None,
            )
        )
    return Fit(
        ratio(moved, finite) if changed else None,
        ratio(moved, changed),
        spread(c["changed_over_null"]),
        spread(c[f"{COVERAGE}_over_null"]),
        kinds,
    )


def summarize(summary: dict[str, Any], fit: Fit, modules: Sequence[dict[str, Any]] = ()) -> Summary:
    """The first screen: the verdict of summary.json, with the counts and what they mean.

    Args:
        summary: Content of summary.json.
        fit: The fit of the nulls.
        modules: The groups by module in the visible view.
    """
    views, matched, verdict = summary["views"], summary["matched"], summary["verdict"]
    compared = f"{count(matched['parameters'])} coordinates in {plural(matched['tensors'], 'tensor')}"
    title, _, numbers = verdict["text"].partition(": ")
    numbers = RATIO.sub("×", numbers)
    headline, kind = sentence(title), verdict["kind"]
    if kind in ("identical", "same parameters", "not comparable", "not finite"):
        is_equal = all_bits_equal(summary) and matched["parameters"]
        bits = f" All {compared} have {equal_in(summary)}." if is_equal else ""
        return Summary(headline, f"{sentence(numbers)}{bits}", "", [])
    stored, visible = views["stored"], views["visible"]
    bit_equal = f"Bit-identical: {count(stored['bit_equal_tensors'])} of {plural(stored['tensors'], 'tensor')}."
    counts = (
        f"{count(visible['changed'])} of {compared}, the same in both views."
        if visible["changed"] == stored["changed"]
        else f"{count(stored['changed'])} as stored and {count(visible['changed'])} after rounding to bf16, of "
        f"{compared}."
    )
    detail = f"{sentence(numbers)}. {counts} {bit_equal}"
    if kind in ("unrelated", "unrelated in part"):
        return Summary(headline, detail, "", ["The sections below describe the difference of the two checkpoints."])
    meaning = MEANINGS.get(kind, "")
    sentences = [meaning] if meaning else []
    if kind in ("no visible change", "dense"):
        return Summary(headline, detail, "", sentences)
    return Summary(headline, detail, f"Against rounding alone: {kind}", [*sentences, *caveats(visible, fit, modules)])


MEANINGS = {
    "no visible change": "The bf16 copies of both checkpoints are equal in every finite coordinate, so there is no "
    "visible update to compare with rounding.",
    "dense": "Most coordinates changed visibly: rounding hides few of them, and the expectation from rounding alone "
    "says nothing about which ones training selected.",
    "sparse as rounding alone": "A dense update that is independent of the weights, has the same visible energy and is "
    "stored in bf16 changes as many coordinates, in the same places: neither the sparsity nor the coverage of "
    "near-zero or principal weights is evidence that training selected coordinates. In bf16, small weights show small "
    "updates and large weights hide them.",
    "less sparse than rounding alone": "More coordinates changed than under a dense update of this energy: many small "
    "changes rather than few large ones.",
    "sparse beyond rounding": "A dense update that is independent of the weights, has the same visible energy and is "
    "stored in bf16 does not change the same number of coordinates in the same places: part of the sparsity, or of "
    "the preference for some weights, is not rounding.",
}


def sentence(text: str) -> str:
    """Text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def caveats(visible: dict[str, Any], fit: Fit, modules: Sequence[dict[str, Any]]) -> list[str]:
    """How well the null fits, and how much tensors differ."""
    sentences = []
    if fit.changed_distance is not None and fit.changed_distance > POOR_FIT:
        sentences.append(
            f"Caution: even the nearest nulls differ in {percent(fit.changed_distance)} of the changed coordinates, so "
            "these ratios are rough."
        )
    if fit.changed_spread and fit.coverage_spread:
        (changed_low, changed_high), (coverage_low, coverage_high) = fit.changed_spread, fit.coverage_spread
        sentences.append(
            f"Four of five tensors are between {times(changed_low)} and {times(changed_high)} for changes, and between "
            f"{times(coverage_low)} and {times(coverage_high)} for near-zero coverage.{_outliers(visible, modules)}"
        )
    return sentences


def _outliers(visible: dict[str, Any], modules: Sequence[dict[str, Any]]) -> str:
    """The modules with enough changes that rounding explains least, as a sentence."""
    outliers = []
    for row in modules:
        ratios = row["changed_over_null"], row[f"{COVERAGE}_over_null"]
        if all(ratios) and row["changed"] >= MIN_CHANGES * visible["changed"]:
            distance = max(abs(np.log(ratio)) for ratio in ratios)
            if distance > np.log(1 + TOLERANCE):
                text = f"{name(row['module'])} ({times(ratios[0])} the changes, {times(ratios[1])} the coverage)"
                outliers.append((distance, text))
    outliers.sort(key=lambda item: -item[0])
    return f" Furthest from rounding: {', '.join(text for _, text in outliers[:MAX_MODULES])}." if outliers else ""
