"""The tables and the summary of `analyze`, from the records of a pair alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from opdkernels.analysis.result import Analysis
from opdkernels.analysis.summary import CURVE, ULP_LABELS
from opdkernels.backends.layout import BINS
from opdkernels.checkpoint.match import EXCLUDED_KINDS, Pair
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.metrics import groups
from opdkernels.metrics.batch import TallyBatch, to_bf16_bits
from opdkernels.metrics.coordinates import BATCH, compute_metrics
from opdkernels.metrics.null_metrics import fit_tallies, null_metrics
from opdkernels.metrics.registry import VIEWS
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.metrics.verdict import MAX_DISTANT, UNRELATED, distant_sentence, pair_verdict
from opdkernels.ops.delta.layout import HIST_DELTA, HIST_DELTA_STORED, ULP_REACH
from opdkernels.ops.null import Nulls
from opdkernels.ops.null.layout import KINDS

CURVE_BITS = [to_bf16_bits(eps) for eps in CURVE]


def build_analysis(pair: Pair, records: list[TallyRecord], run_info: dict[str, Any]) -> Analysis:
    """Every metric per coordinate, from the records alone; one record per match, in order."""
    counted = [record for record in records if record.tally is not None]
    tallies = [record.tally for record in records if record.tally is not None]
    nulls = fit_nulls(counted)
    views = {view: compute_metrics(tallies, view) for view in VIEWS}
    if counted:
        views["visible"] |= null_metrics(views["visible"], nulls)
    roles = [parse_tensor_name(record.name) for record in counted]
    labels: dict[str, list] = {
        "name": [record.name for record in counted],
        "trained_name": [record.trained_name for record in counted],
        "shape": [json.dumps(list(record.shape)) for record in counted],
        "dtype_base": [record.dtype_base for record in counted],
        "dtype_trained": [record.dtype_trained for record in counted],
        **{key: [getattr(role, key) for role in roles] for key in ("layer", "module", "block", "tower")},
    }
    group_rows = groups.group_rows(labels, views)
    summary = summarize(pair, records, group_rows, nulls)
    sizes = [record.tally.numel if len(record.shape) > 1 and record.tally else 0 for record in counted]
    summary["median_relative_norm"] = weighted_median(views["stored"].get("relative_norm"), sizes)
    names = [record.name for record in counted]
    summary["distant"] = distant_matrices(views["stored"].get("relative_norm"), sizes, names)
    if 0 < summary["distant"]["fraction"] <= MAX_DISTANT:  # otherwise it is the verdict
        summary["notes"] = [*summary["notes"], distant_sentence(summary["distant"])]
    summary["verdict"] = pair_verdict(summary, ())
    tensors = groups.interleave(labels, views)
    return Analysis(tensors, groups.rows_to_arrow(group_rows), summary, run_info, records)


def weighted_median(values: np.ndarray | None, weights: list[int]) -> float | None:
    """The value up to which half of the weight is; None if no value that is not NaN has weight."""
    if values is None:
        return None
    known = ~np.isnan(values) & (np.array(weights) > 0)
    order = np.argsort(values[known])
    ranked, total = values[known][order], np.cumsum(np.array(weights, float)[known][order])
    return float(ranked[np.searchsorted(total, total[-1] / 2)]) if len(ranked) else None


def distant_matrices(norms: np.ndarray | None, sizes: list[int], names: list[str]) -> dict[str, Any]:
    """The matrices that do not look like the start and the end of one run, as `opdkernels.analysis.summary.Distant`.

    Args:
        norms: Relative norm of the update of each tensor, NaN where the base is 0; None without tensors.
        sizes: Coordinates of each matrix, 0 for other tensors.
        names: Name of each tensor.
    """
    weights = np.array(sizes, float)
    far = np.zeros(len(names), bool) if norms is None else (np.nan_to_num(norms) >= UNRELATED) & (weights > 0)
    return {
        "matrices": int(far.sum()),
        "fraction": float(weights[far].sum() / max(1.0, weights.sum())),
        "largest": names[int(np.argmax(weights * far))] if far.any() else None,
    }


def fit_nulls(records: list[TallyRecord]) -> Nulls:
    """The null updates fitted to each counted record."""
    counted = [(record.tally, record.dtype_base) for record in records if record.tally is not None]
    remainders = ["grid" if dtype == "bf16" else "uniform" for _, dtype in counted]
    return fit_tallies([tally for tally, _ in counted], remainders, CURVE_BITS)


def curve(records: list[TallyRecord], nulls: Nulls) -> dict[str, list[float | None]]:
    """Fraction of coordinates with |delta| <= epsilon: visible, stored (bounds) and expected from the null."""
    visible, stored = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    tallies = [record.tally for record in records if record.tally is not None]
    for first in range(0, len(tallies), BATCH):
        batch = TallyBatch(tallies[first : first + BATCH])
        for total, row in ((visible, HIST_DELTA), (stored, HIST_DELTA_STORED)):
            total += np.bincount(batch.bin_bits, batch.table(row), BINS).astype(np.int64)  # exact below 2^53
    n = visible.sum()
    # In 32-bit steps: |delta| <= eps covers every truncated bin below that of eps, and part of that bin itself.
    truncated = np.array([int(np.float32(eps).view(np.uint32)) >> 16 for eps in CURVE])

    def fractions(counts: np.ndarray) -> list[float | None]:
        return [None if not n else float(count) for count in counts / max(n, 1)]

    return {
        "eps": list(CURVE),
        "visible": fractions(np.cumsum(visible)[CURVE_BITS]),
        "stored_lower": fractions(np.cumsum(stored)[np.maximum(truncated - 1, 0)]),
        "stored_upper": fractions(np.cumsum(stored)[truncated]),
        "null": fractions(nulls.below.sum(0)),
    }


def summarize(pair: Pair, records: list[TallyRecord], group_rows: list[dict], nulls: Nulls) -> dict[str, Any]:
    """The content of summary.json; its form is `opdkernels.analysis.summary.Summary`."""
    counted = [record for record in records if record.tally is not None]
    group_labels = ("by", "view", "tower", "block", "module", "layer")
    views = {
        view: {key: value for key, value in row.items() if key not in group_labels}
        for view in VIEWS
        for row in group_rows
        if row["by"] == "model" and row["view"] == view
    }
    ulp = sum((record.tally.ulp for record in counted if record.tally), np.zeros(2 * ULP_REACH + 3, np.int64))
    unmatched = [vars(tensor) | {"shape": list(tensor.shape)} for tensor in pair.unmatched]
    return {
        "schema_version": groups.TABLE_VERSION,
        "base": pair.base.path,
        "trained": pair.trained.path,
        "matched": {
            "tensors": len(records),
            "parameters": sum(record.tally.numel for record in counted if record.tally),
            "how": dict(Counter(record.how for record in records)),
            "dtypes": dict(Counter(f"{record.dtype_base} → {record.dtype_trained}" for record in records)),
        },
        "coverage": pair.coverage.to_dict(),
        "identical": pair.coverage.complete
        and not any(buffer.equal is False for buffer in pair.buffers)
        and all(record.tally is not None and record.tally.bit_equal == record.tally.numel for record in records),
        "views": views,
        "null_kinds": dict(
            Counter(
                KINDS[kind]
                for record, kind in zip(counted, nulls.chosen.tolist(), strict=True)
                if record.tally and record.tally.changed("visible").any()
            )
        ),
        "curve": curve(counted, nulls),
        "ulp": {
            "distance": list(ULP_LABELS),
            "count": ulp.tolist(),
        },
        "excluded": [tensor for tensor in unmatched if tensor["kind"] in EXCLUDED_KINDS],
        "unmatched": [tensor for tensor in unmatched if tensor["kind"] not in EXCLUDED_KINDS],
        "tied": pair.tied,
        "buffers": [vars(buffer) for buffer in pair.buffers],
        "notes": pair.notes,
        "failed": [{"name": record.name, "reason": record.failure} for record in records if record.failure],
        "nonfinite": [
            {"name": record.name, "coordinates": record.tally.nonfinite}
            for record in counted
            if record.tally and record.tally.nonfinite
        ],
    }
