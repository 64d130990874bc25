"""The first screen in words: how much changed, and how that compares with bf16 rounding alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opdkernels.analysis.result import all_bits_equal
from opdkernels.metrics.rounding_null import KINDS
from opdkernels.report.typography import count, name, percent, plural, times

TOLERANCE = 0.1  # a ratio to the null within a tenth of 1 counts as explained by rounding
POOR_FIT = 0.25  # distance of the nearest null, as a fraction of the changed coordinates, above which ratios are rough
MIN_CHANGES = 0.005  # fraction of all changes below which a module is not mentioned
MAX_MODULES = 3
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
    """The first screen.

    Args:
        summary: Content of summary.json.
        fit: The fit of the nulls.
        modules: The groups by module in the visible view.
    """
    views, matched = summary["views"], summary["matched"]
    compared = f"{count(matched['parameters'])} coordinates in {plural(matched['tensors'], 'tensor')}"
    if not views or not matched["parameters"]:
        return Summary("Nothing to compare", f"The matched tensors have no coordinates ({compared}).", "", [])
    stored, visible = views["stored"], views["visible"]
    restriction = " that could be compared" if summary["excluded"] or summary["unmatched"] else ""
    if summary["identical"]:
        detail = f"All {compared}{restriction} have the same bits in both checkpoints."
        return Summary("Identical", detail, "", [])
    if all_bits_equal(summary):
        rest = "buffers differ" if summary["coverage"]["complete"] else "other tensors were not compared"
        detail = f"All {compared}{restriction} have the same bits in both checkpoints; {rest}."
        return Summary("What was compared is identical", detail, "", [])
    if visible["frac_zero"] is None:
        detail = f"All {compared} are NaN or Inf in one of the checkpoints."
        return Summary("No finite coordinates", detail, "", [])
    changed, changed_stored = 1 - visible["frac_zero"], 1 - stored["frac_zero"]
    bit_equal = f"Bit-identical: {count(stored['bit_equal_tensors'])} of {plural(stored['tensors'], 'tensor')}."
    if visible["changed"] == stored["changed"]:
        headline = f"{percent(changed)} of the coordinates changed"
        detail = f"{count(visible['changed'])} of {compared}, the same in both views. {bit_equal}"
    else:
        headline = f"{percent(changed_stored)} of the coordinates changed; {percent(changed)} visibly in bf16"
        detail = (
            f"{count(stored['changed'])} as stored and {count(visible['changed'])} after rounding to bf16, of "
            f"{compared}. {bit_equal}"
        )
    if not visible["changed"]:
        conclusion = "No change is visible in bf16" if stored["changed"] else "No finite coordinate changed"
        sentence = (
            "The bf16 copies of both checkpoints are equal in every finite coordinate, so there is no visible update "
            "to compare with rounding."
        )
        return Summary(headline, detail, conclusion, [sentence])
    return Summary(headline, detail, *verdict(visible, fit, modules))


def verdict(visible: dict[str, Any], fit: Fit, modules: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """What the ratios to the null say together, why, and with which caveats."""
    changed, coverage = visible["changed_over_null"], visible[f"{COVERAGE}_over_null"]
    if changed is None or coverage is None:
        return "The effect of rounding could not be modelled", ["Too little changed visibly to fit a null."]
    expected_changed = percent(visible["changed_null"] / max(1, visible["numel"] - visible["nonfinite"]))
    expected_coverage = percent(visible[f"{COVERAGE}_null"])
    same_changed, same_coverage = abs(changed - 1) <= TOLERANCE, abs(coverage - 1) <= TOLERANCE
    setting = (
        "A dense update that is independent of the weights, has the same visible energy and is stored in bf16 would "
        f"change {expected_changed} of the coordinates, with {expected_coverage} of its visible changes in the tenth "
        "of the weights nearest to zero."
    )
    if same_changed and same_coverage:
        conclusion = "Over the whole model, bf16 rounding alone explains both metrics"
        reason = (
            "So neither the sparsity nor the near-zero coverage is evidence that training selected these coordinates: "
            "in bf16, small weights show small updates and large weights hide them."
        )
    elif same_coverage:
        conclusion = f"Rounding explains where the weights changed, not how many: {times(changed)} the expected number"
        reason = f"{_number_reason(changed)} Their preference for small weights is what rounding gives."
    elif same_changed:
        conclusion = (
            f"Rounding explains how many weights changed, not where: {times(coverage)} the expected near-zero coverage"
        )
        reason = f"The number of changed coordinates is what rounding gives. {_coverage_reason(coverage)}"
    else:
        conclusion = (
            f"Rounding alone does not explain the changes: {times(changed)} the expected number and {times(coverage)} "
            "the expected near-zero coverage"
        )
        reason = f"{_number_reason(changed)} {_coverage_reason(coverage)}"
    sentences = [setting, reason]
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
    return conclusion, sentences


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


def _number_reason(ratio: float) -> str:
    """What more or fewer changes than expected mean."""
    if ratio < 1:
        return (
            "Fewer coordinates changed than under an even update of this energy: the update is concentrated, and that "
            "part of the sparsity is not rounding."
        )
    return (
        "More coordinates changed than under an even update of this energy: many small changes rather than few large "
        "ones."
    )


def _coverage_reason(ratio: float) -> str:
    """What more or less near-zero coverage than expected means."""
    more_often, direction = ("more", "depends on") if ratio > 1 else ("less", "grows with")
    return (
        f"Near-zero weights changed {more_often} often than rounding gives, so the update {direction} the weights or "
        "something that correlates with their magnitude."
    )
