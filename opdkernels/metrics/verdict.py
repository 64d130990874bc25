"""What a pair of checkpoints is, in words: one rule for the terminal, pages and summary.json.

A metric is compared with what rounding alone gives: its ratio to the expectation has a 95 % interval from the
deviation of the null. It is "as rounding alone" if the interval reaches within TOLERANCE of 1, and otherwise "more
than" or "less than rounding alone": differences that only many coordinates make significant are no finding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdkernels.checkpoint.coverage import MIN_FRACTION, coverage_sentence
from opdkernels.errors import printable
from opdkernels.formatting import percent, times

TOLERANCE = 0.1  # a ratio within a tenth of 1 is as rounding alone, whatever its interval
NORMAL_95 = 1.96  # deviations on either side of a 95 % interval
MEDIAN_DEVIATION = math.sqrt(math.pi / 2)  # of the median over that of the mean, for normal values
DENSE = 0.5  # fraction of visibly changed coordinates from which rounding hides too little to explain anything
UNRELATED = 0.5  # |W' - W| / |W| from which two checkpoints do not look like the start and the end of one run
MAX_DISTANT = 1 - MIN_FRACTION  # fraction of such matrices up to which the others describe the models
CONCENTRATED = 2.0  # energy of the top 16 directions over that of a random update
AS, MORE, LESS = "as rounding alone", "more than rounding alone", "less than rounding alone"

TENSOR_COMPARISONS = {
    "changed": "changed coordinates",
    "near_zero_coverage_10pct": "near-zero coverage at 10 %",
    "top_energy_1pct": "energy of the top 1 %",
}
COVERAGE_COMPARISONS = {
    "principal_coverage_10pct": "principal coverage at 10 %",
    "principal_not_low_coverage_10pct": "principal, not near-zero coverage at 10 %",
}
MATRIX_COMPARISONS = {
    "projection_10pct": "energy in the top 10 % directions of W",
    "projection_left_10pct": "energy in the top 10 % left directions of W",
    "projection_right_10pct": "energy in the top 10 % right directions of W",
    "rotation_left_10pct": "rotation of the top 10 % left directions of W",
    "rotation_right_10pct": "rotation of the top 10 % right directions of W",
    "drift": "drift of the singular values of W",
    "stable_rank": "stable rank",
    "energy_16": "energy of the 16 top directions",
}
SPARSITY = ("changed", "near_zero_coverage_10pct", *COVERAGE_COMPARISONS)  # what rounding alone may explain
Comparison = dict[str, Any]


def words(ratio: float, deviation: float = 0.0) -> str:
    """How a ratio of observed to expected is called.

    Args:
        ratio: Observed over expected.
        deviation: Standard deviation of the ratio under the null.

    >>> words(1.34, 0.01), words(1.32, 0.01), words(1.34, 0.2), words(0.5)
    ('more than rounding alone', 'more than rounding alone', 'as rounding alone', 'less than rounding alone')
    """
    low, high = interval(ratio, deviation)
    return MORE if low > 1 + TOLERANCE else LESS if high < 1 / (1 + TOLERANCE) else AS


def interval(ratio: float, deviation: float) -> tuple[float, float]:
    """The 95 % interval of a ratio."""
    return max(0.0, ratio - NORMAL_95 * deviation), ratio + NORMAL_95 * deviation


def comparison(metric: str, label: str, observed: float, expected: float, ratio: float, deviation: float) -> Comparison:
    """One metric against what rounding alone gives, as in summary.json."""
    low, high = interval(ratio, deviation)
    return {
        "metric": metric,
        "label": label,
        "observed": observed,
        "expected": expected,
        "ratio": ratio,
        "low": low,
        "high": high,
        "words": words(ratio, deviation),
    }


def tensor_comparisons(visible: Mapping[str, Any]) -> list[Comparison]:
    """Comparisons of the whole model from the metrics of its coordinates in the visible view."""
    comparisons = []
    finite = max(1, (visible.get("numel") or 0) - (visible.get("nonfinite") or 0))
    for metric, label in TENSOR_COMPARISONS.items():
        observed, expected = visible.get(metric), visible.get(f"{metric}_null")
        ratio, deviation = visible.get(f"{metric}_over_null"), visible.get(f"{metric}_null_sd")
        if observed is None or not expected or ratio is None:
            continue
        unit = finite if metric == "changed" else 1  # a fraction instead of a count
        relative = (deviation or 0.0) / expected
        comparisons.append(comparison(metric, label, observed / unit, expected / unit, ratio, relative))
    return comparisons


def matrix_comparisons(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Comparisons over matrices, each the median; its deviation is that of a median of independent matrices.

    Args:
        rows: Joined rows of spectra.parquet and geometry.parquet, of both views. The coverages of masks are those of
            the visible view, where a matrix has rows of both; everything else is of the stored view.
    """
    both_views = {(row["name"], row["part"]) for row in rows if row["view"] == "visible"}
    stored = [row for row in rows if row["view"] == "stored"]
    masks = [row for row in rows if row["view"] == "visible" or (row["name"], row["part"]) not in both_views]
    comparisons = []
    for selected, labels in ((masks, COVERAGE_COMPARISONS), (stored, MATRIX_COMPARISONS)):
        for metric, label in labels.items():
            names = (metric, f"{metric}_null", f"{metric}_over_null", f"{metric}_null_sd")
            values = [[row.get(name) for name in names] for row in selected]
            known = np.array([value for value in values if None not in value], float)
            if not len(known):
                continue
            observed, expected, ratio = (float(value) for value in np.median(known[:, :3], axis=0))
            relative = known[:, 3] / known[:, 1]
            deviation = math.sqrt(float((relative**2).mean()) / len(known))
            deviation *= MEDIAN_DEVIATION if len(known) > 2 else 1
            comparisons.append(comparison(metric, label, observed, expected, ratio, deviation))
    return comparisons


def pair_verdict(summary: Mapping[str, Any], matrices: Sequence[Comparison]) -> dict[str, Any]:
    """What a pair is, as in summary.json.

    Args:
        summary: summary.json without its verdict.
        matrices: `matrix_comparisons`; empty without spectra.

    Returns:
        kind: identical, same parameters, not comparable, not finite, unrelated, unrelated in part, no visible change,
        dense, sparse as rounding alone, less sparse than rounding alone, sparse beyond rounding, or sparse;
        concentrated: whether few directions carry the update, None without spectra and for small matrices;
        text: the first line; comparisons: the metrics behind it.
    """
    views = summary["views"]
    visible = views.get("visible") or {}

    def verdict(
        kind: str, text: str, comparisons: Sequence[Comparison] = (), concentrated: bool | None = None
    ) -> dict[str, Any]:
        return {"kind": kind, "concentrated": concentrated, "text": text, "comparisons": list(comparisons)}

    if not views or not summary["matched"]["parameters"]:
        return verdict("not comparable", "not comparable: the matched tensors have no coordinates")
    if summary["identical"]:
        return verdict("identical", f"identical: every coordinate has {equal_in(summary)}")
    if not summary["coverage"]["sufficient"]:
        return verdict("not comparable", f"not comparable: {coverage_sentence(summary['coverage'])}")
    if all_bits_equal(summary):
        rest = "buffers differ" if summary["coverage"]["complete"] else "other tensors were not compared"
        same = f"same parameters: every compared coordinate has {equal_in(summary)}; {rest}"
        return verdict("same parameters", same)
    if visible["frac_zero"] is None:
        return verdict("not finite", "not finite: every coordinate, or its change, is NaN or Inf")
    relative_norm = summary["median_relative_norm"]
    if relative_norm is not None and relative_norm >= UNRELATED:
        return verdict("unrelated", unrelated_sentence(relative_norm))
    if summary["distant"]["fraction"] > MAX_DISTANT:
        return verdict("unrelated in part", f"unrelated in part: {distant_sentence(summary['distant'])}")
    comparisons = [*tensor_comparisons(visible), *matrices]
    by_metric = {entry["metric"]: entry for entry in comparisons}
    energy = by_metric.get("energy_16")
    # No update can have more energy than all: where 16 random directions have half of it, the ratio stays below 2.
    is_too_small = energy is not None and energy["expected"] * CONCENTRATED >= 1
    concentrated = None if energy is None or is_too_small else energy["low"] > CONCENTRATED
    ending, few = "", ""
    if energy is not None and is_too_small:
        ending = (
            "; the matrices are too small to say whether few directions carry the update: the 16 top "
            f"directions of a random update hold {percent(energy['expected'])} of its energy"
        )
    if energy is not None and concentrated:
        few = ", concentrated in few directions"
        ending = (
            f"; the 16 top directions hold {percent(energy['observed'])} of the energy of a matrix, "
            f"{times(energy['ratio'])} a random update"
        )
    changed = 1 - visible["frac_zero"]
    share = f"{percent(changed)} of the coordinates changed visibly"
    if not visible["changed"]:
        text = f"no visible change{few}: in bf16 both checkpoints are equal in every finite coordinate{ending}"
        return verdict("no visible change", text, matrices, concentrated)
    if changed >= DENSE:
        text = f"dense{few}: {share}, so what rounding to bf16 hides says nothing about this update{ending}"
        return verdict("dense", text, [c for c in comparisons if c["metric"] not in SPARSITY], concentrated)
    sparsity = [by_metric[metric] for metric in SPARSITY if metric in by_metric]
    count = by_metric.get("changed")
    if count is None:
        return verdict("sparse", f"sparse{few}: {share}, too few to compare with rounding alone{ending}", comparisons)
    kind = (
        "less sparse than rounding alone"
        if count["words"] == MORE
        else "sparse as rounding alone"
        if all(entry["words"] == AS for entry in sparsity)
        else "sparse beyond rounding"
    )
    text = f"{kind}{few}: {share}, {times(count['ratio'])} what rounding alone gives{deviating(sparsity)}{ending}"
    return verdict(kind, text, comparisons, concentrated)


def equal_in(summary: Mapping[str, Any]) -> str:
    """What equal coordinates have in common: their bits, or their values where the sides have different dtypes."""
    dtypes = [dtype.split(" → ") for dtype in summary["matched"]["dtypes"]]
    return "the same bits" if all(a == b for a, b in dtypes) else "the same value, stored in other dtypes"


def unrelated_sentence(relative_norm: float) -> str:
    """What a relative norm of at least UNRELATED in the median matrix means, in one sentence."""
    return (
        f"unrelated: the relative norm of the update is {percent(relative_norm)} in the median matrix, so these do "
        "not look like the start and the end of one run; `opdkernels lineage` finds the base among candidates"
    )


def distant_sentence(distant: Mapping[str, Any]) -> str:
    """What `opdkernels.analysis.summary.Distant` means, in one sentence."""
    count, example = distant["matrices"], printable(distant["largest"])
    matrices = f"{count} matrices, such as {example}, with" if count > 1 else f"{example}, with"
    return (
        f"{matrices} {percent(distant['fraction'])} of the coordinates of all matrices, changed by at least half of the"
        " norm: they may be stored in another layout, initialised anew or of another run"
    )


def all_bits_equal(summary: Mapping[str, Any]) -> bool:
    """Whether every compared coordinate has the same bits; `identical` also needs that everything was compared."""
    views, failed = summary["views"], summary["failed"]
    return bool(views) and not failed and views["stored"]["bit_equal"] == summary["matched"]["parameters"]


def deviating(comparisons: Sequence[Comparison]) -> str:
    """The metrics, other than the number of changes, that are not as rounding alone."""
    others = [entry for entry in comparisons if entry["words"] != AS and entry["metric"] != "changed"]
    return "".join(f"; {entry['label']} {times(entry['ratio'])}" for entry in others)
