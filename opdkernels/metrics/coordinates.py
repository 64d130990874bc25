"""Metrics per coordinate of tensors, computed from their tallies alone.

Source: arXiv 2606.13657 and its script, if a metric names no other. Each metric is computed in two views: `stored`
compares the weights as saved, `visible` compares them after rounding to bf16. A metric is a column, float64
[num_tensors], computed for many tensors at once, since a model may have twenty thousand experts; NaN if the tally does
not determine it. Fractions are of the finite coordinates; norms and maxima are in the units of the weights.

`@formula(*metrics)` registers a function of a batch and a view that returns these columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opdkernels.backends.layout import INFINITY_BITS
from opdkernels.metrics.aggregation import (
    MEAN_BY_CHANGED,
    MEAN_BY_COORDINATES,
    MEAN_BY_ENERGY,
    NOT_AGGREGATED,
    SUM,
    Aggregation,
    recomputed,
)
from opdkernels.metrics.batch import (
    EPSILON,
    RATIO_LABELS,
    RATIO_SYMBOL,
    Columns,
    TallyBatch,
    prefix_sums,
    ratio_label,
    threshold_label,
    to_bf16_bits,
)
from opdkernels.metrics.registry import COUNT, NON_NEGATIVE, PAPER, VIEWS, WEIGHT_UNITS, Metric, family, interleave
from opdkernels.ops.delta import THRESHOLDS, magnitudes
from opdkernels.ops.delta.layout import (
    COUNT_LT,
    COUNT_ULP,
    COUNT_UNCHANGED_RTOL,
    HIST_BASE,
    HIST_DELTA,
    HIST_DELTA_STORED,
)
from opdkernels.ops.delta.many import SparseTally
from opdkernels.spectral.exact import RATIOS

RELATIVE = (1e-4, 1e-3, 1e-2)
TOP_FRACTIONS = (0.001, 0.01, 0.05)
FP32_ROUNDING, FP32_SUBNORMAL_ROUNDING = 2.0**-24, 2.0**-150  # largest relative and absolute error of rounding to fp32
THRESHOLD_LABELS = [threshold_label(t) for t in THRESHOLDS]
VISIBLE_EDGES = np.array([to_bf16_bits(t) + side for side in (0, 1) for t in THRESHOLDS])  # below them: <, then <=
RELATIVE_LABELS = [f"frac_lt_rel_{threshold_label(tau)}" for tau in RELATIVE]
TOP_LABELS = [ratio_label(p) for p in TOP_FRACTIONS]
TOP_SYMBOL = "0.1, 1 or 5 %"  # in docs/outputs.md
TOP_ENERGY = [f"top_energy_{label}" for label in TOP_LABELS]

ALL_TABLES = ("tensors", "groups")


@dataclass(frozen=True)
class Formula:
    """A function that computes `metrics` of a batch of tensors in one view."""

    compute: Callable[[TallyBatch, str], Columns]
    metrics: tuple[Metric, ...]


FORMULAS: list[Formula] = []


def formula(*metrics: Metric) -> Callable:
    """Registers a function (batch, view) -> columns of `metrics`, in their order."""

    def register(compute: Callable[[TallyBatch, str], Columns]) -> Callable[[TallyBatch, str], Columns]:
        FORMULAS.append(Formula(compute, metrics))
        return compute

    return register


def float_bits(values: np.ndarray) -> np.ndarray:
    """Bits of values rounded to fp32, as int64."""
    return values.astype(np.float32).view(np.uint32).astype(np.int64)


def bounded_family(
    pattern: Metric,
    values: Sequence[str],
    symbol: str,
    bounds: Aggregation | None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Metric]:
    """A family with guaranteed bounds `_lower` and `_upper`; `bounds` aggregates them, None: groups have no bounds."""
    sides = [
        family(
            replace(
                pattern,
                name=f"{pattern.name}_{side}",
                label=f"{pattern.label}, {side} bound",
                definition=f"guaranteed {side} bound of the fraction",
                aggregation=bounds or NOT_AGGREGATED,
                tables=pattern.tables if bounds else ("tensors",),
            ),
            values,
            symbol,
        )
        for side in ("lower", "upper")
    ]
    return interleave(family(pattern, values, symbol, overrides), *sides)


@formula(
    Metric(
        name="numel",
        label="parameters",
        definition="coordinates compared",
        range=COUNT,
        format="count",
        aggregation=SUM,
        tables=(*ALL_TABLES, "overlap"),
        pages={"groups": ("",), "tensors": ("",)},
    ),
    Metric(
        name="nonfinite",
        label="NaN or Inf",
        definition="coordinates where W, W′ or the visible Δ is not finite; they are left out of every other metric",
        range=COUNT,
        format="count",
        aggregation=SUM,
        tables=(*ALL_TABLES, "overlap"),
    ),
    Metric(
        name="bit_equal",
        label="bit-identical",
        definition="coordinates whose stored bits are equal; +0 and −0 differ, a NaN equals itself",
        range=COUNT,
        format="count",
        aggregation=SUM,
        tables=ALL_TABLES,
    ),
    Metric(
        name="changed",
        label="changed",
        definition="finite coordinates with Δ ≠ 0",
        range=COUNT,
        format="count",
        aggregation=SUM,
        source=PAPER,
        tables=ALL_TABLES,
        pages={"overview": VIEWS},
    ),
)
def counts(batch: TallyBatch, view: str) -> Columns:
    """Coordinates of each kind, int64."""
    return {
        "numel": batch.numel,
        "nonfinite": batch.nonfinite,
        "bit_equal": batch.bit_equal,
        "changed": batch.sums(batch.changed(view), batch.start, batch.stop),
    }


@formula(
    Metric(
        name="frac_zero",
        label="unchanged",
        definition="fraction of the finite coordinates with Δ = 0, the sparsity at ε = 0",
        aggregation=MEAN_BY_COORDINATES,
        source=PAPER,
        tables=ALL_TABLES,
        pages={"groups": VIEWS, "tensors": VIEWS, "trajectory": VIEWS},
    ),
    *interleave(
        family(
            Metric(
                name="frac_lt_{}",
                label="|Δ| < {}",
                definition="fraction of the finite coordinates with |Δ| < {}; in the visible view the threshold is "
                "rounded to bf16",
                aggregation=MEAN_BY_COORDINATES,
                source=PAPER,
                tables=ALL_TABLES,
            ),
            THRESHOLD_LABELS,
            "ε",
        ),
        family(
            Metric(
                name="frac_le_{}",
                label="|Δ| ≤ {}",
                definition="fraction of the finite coordinates with |Δ| ≤ {}, the paper's sparsity; in the visible "
                "view the threshold is rounded to bf16 (1e-5 becomes 1.00136e-5)",
                aggregation=MEAN_BY_COORDINATES,
                source=PAPER,
                tables=ALL_TABLES,
            ),
            THRESHOLD_LABELS,
            "ε",
            {"1e-5": {"pages": {"overview": VIEWS, "groups": VIEWS, "tensors": ("visible",)}}},
        ),
    ),
    *bounded_family(
        Metric(
            name="frac_lt_rel_{}",
            label="|Δ| < {} rms(W)",
            definition="fraction of the finite coordinates with |Δ| < {} · rms(W); in the stored view the tally holds "
            "|Δ| by its top 16 bits, and this is the middle of `_lower` and `_upper`",
            aggregation=MEAN_BY_COORDINATES,
            source=PAPER,
            tables=ALL_TABLES,
        ),
        [threshold_label(tau) for tau in RELATIVE],
        "τ",
        MEAN_BY_COORDINATES,
    ),
    Metric(
        name="unchanged_rtol_1e-3",
        label="unchanged within rtol",
        definition="fraction of the finite coordinates with |w − w′| ≤ 1e-3 · max(|w|, |w′|), which for bf16 is "
        "equality of bits",
        aggregation=MEAN_BY_COORDINATES,
        source="Zhu et al., arXiv 2511.08567",
        tables=ALL_TABLES,
        pages={"overview": VIEWS},
    ),
)
def sparsity(batch: TallyBatch, view: str) -> Columns:
    """Fractions of coordinates below thresholds.

    Visible thresholds are rounded to bf16 (1e-5 becomes 1.00136e-5). A relative threshold in the stored view is an
    interval, since the tally holds |delta| by its top 16 bits.
    """
    n = batch.n
    changed = batch.sums(batch.changed(view), batch.start, batch.stop)
    columns = {"frac_zero": (batch.finite - changed) / n}
    rms = np.sqrt(batch.energies(view)[0] / n)
    limits = float_bits(np.maximum(np.nan_to_num(rms), EPSILON)[:, None] * np.array(RELATIVE))  # [tensors, RELATIVE]
    before = prefix_sums(batch.table(HIST_DELTA if view == "visible" else HIST_DELTA_STORED))
    if view == "visible":
        rounded = (limits + 0x7FFF + (limits >> 16 & 1)) >> 16
        edges = np.concatenate([np.broadcast_to(VISIBLE_EDGES, (len(n), len(VISIBLE_EDGES))), rounded], 1)
        counts = before[batch.find(edges)] - before[batch.start][:, None]
        counts, below = counts[:, : 2 * len(THRESHOLDS)], counts[:, 2 * len(THRESHOLDS) :]
    else:
        counts = batch.counts[:, COUNT_LT:COUNT_ULP]
        below = before[batch.find(limits >> 16)] - before[batch.start][:, None]
        up_to = before[batch.find((limits >> 16) + 1)] - before[batch.start][:, None]
    for k, label in enumerate(THRESHOLD_LABELS):
        columns[f"frac_lt_{label}"] = counts[:, k] / n
        columns[f"frac_le_{label}"] = counts[:, k + len(THRESHOLDS)] / n
    for k, label in enumerate(RELATIVE_LABELS):
        if view == "visible":
            columns[label] = below[:, k] / n
            columns[f"{label}_lower"] = columns[f"{label}_upper"] = np.full(len(n), np.nan)
        else:
            lower, upper = below[:, k] / n, up_to[:, k] / n
            columns[label], columns[f"{label}_lower"], columns[f"{label}_upper"] = (lower + upper) / 2, lower, upper
    columns["unchanged_rtol_1e-3"] = (
        batch.counts[:, COUNT_UNCHANGED_RTOL] / n if view == "stored" else columns["frac_zero"]
    )
    return columns


@formula(
    Metric(
        name="relative_norm",
        label="relative norm",
        definition="‖Δ‖ / ‖W‖, Frobenius norms",
        range=NON_NEGATIVE,
        aggregation=recomputed(
            "from the sums of both energies",
            lambda members: np.sqrt(members.sum("delta_energy") / members.sum("base_energy")),
        ),
        source=PAPER,
        tables=ALL_TABLES,
        pages={"overview": VIEWS, "groups": VIEWS, "tensors": VIEWS, "trajectory": ("stored",)},
    ),
    Metric(name="rms_base", label="rms W", definition="root mean square of W", range=WEIGHT_UNITS, format="measure"),
    Metric(
        name="rms_trained", label="rms W′", definition="root mean square of W′", range=WEIGHT_UNITS, format="measure"
    ),
    Metric(name="rms_delta", label="rms Δ", definition="root mean square of Δ", range=WEIGHT_UNITS, format="measure"),
    Metric(name="mean_abs", label="mean |Δ|", definition="mean |Δ|", range=WEIGHT_UNITS, format="measure"),
    Metric(
        name="max_abs",
        label="largest |Δ|",
        definition="the largest |Δ|",
        range=WEIGHT_UNITS,
        format="measure",
        source=PAPER,
        pages={"tensors": ("stored",)},
    ),
    Metric(
        name="base_energy",
        label="energy of W",
        definition="‖W‖²",
        range=f"{WEIGHT_UNITS}, squared",
        format="measure",
        aggregation=SUM,
        tables=ALL_TABLES,
    ),
    Metric(
        name="delta_energy",
        label="energy of Δ",
        definition="‖Δ‖²",
        range=f"{WEIGHT_UNITS}, squared",
        format="measure",
        aggregation=SUM,
        tables=(*ALL_TABLES, "spectra"),
    ),
)
def norms(batch: TallyBatch, view: str) -> Columns:
    """Norms of W, W' and delta, in the units of the weights."""
    n = batch.n
    base_sq, trained_sq, delta_sq, delta_abs = batch.energies(view)
    if view == "visible":
        before = prefix_sums(batch.table(HIST_DELTA))
        last = np.searchsorted(before, before[batch.stop]) - 1  # the last bin in use
        largest = np.where(batch.finite > 0, np.append(batch.values, 0)[last], np.nan)
    else:
        largest = np.where(batch.finite > 0, [t.max_delta for t in batch.tallies], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(base_sq > 0, np.sqrt(delta_sq) / np.sqrt(base_sq), np.nan)
    return {
        "relative_norm": relative,
        "rms_base": np.sqrt(base_sq / n),
        "rms_trained": np.sqrt(trained_sq / n),
        "rms_delta": np.sqrt(delta_sq / n),
        "mean_abs": delta_abs / n,
        "max_abs": largest,
        "base_energy": base_sq,
        "delta_energy": delta_sq,
    }


@formula(
    *bounded_family(
        Metric(
            name="top_energy_{}",
            label="top {} energy",
            definition="fraction of the update energy ‖Δ‖² in the ⌈p·n⌉ coordinates with the largest |Δ|, p = {}, "
            "chosen in each tensor; null where nothing changed. In the stored view estimated at the middle of the "
            "tally's bins",
            aggregation=MEAN_BY_ENERGY,
            source=PAPER,
            tables=ALL_TABLES,
        ),
        TOP_LABELS,
        TOP_SYMBOL,
        None,
        {"1pct": {"pages": {"overview": VIEWS, "tensors": ("visible",)}}},
    )
)
def top_energy(batch: TallyBatch, view: str) -> Columns:
    """Fraction of the energy of delta in its ceil(p n) largest |delta|, p = 0.1, 1, 5 %. NaN where nothing changed.

    Exact in the visible view. In the stored view the tally holds |delta| by its top 16 bits: the fraction is estimated
    at the middle of each bin, with guaranteed bounds.
    """
    energy = batch.energies(view)[2]
    energy = np.where(energy > 0, energy, np.nan)
    counts = batch.table(HIST_DELTA if view == "visible" else HIST_DELTA_STORED)
    before = prefix_sums(counts)
    low, high = (batch.values**2,) * 2 if view == "visible" else squares_of_stored_bins(batch)
    middle = (low + high) / 2
    energy_at_middle = batch.sums(counts * middle, batch.start, batch.stop)
    columns = {}
    for p, label in zip(TOP_FRACTIONS, TOP_ENERGY, strict=True):
        size = np.maximum(np.ceil(p * batch.finite), 1).astype(np.int64)
        # The bin of which a part is taken: those above it hold fewer than `size` coordinates.
        split = np.searchsorted(before[1:], before[batch.stop] - np.minimum(size, batch.finite), side="right")
        from_split = size - (before[batch.stop] - np.append(before[1:], 0)[split])

        def top_sum(values: np.ndarray, split: np.ndarray = split, from_split: np.ndarray = from_split) -> np.ndarray:
            return (
                batch.sums(counts * values, np.minimum(split + 1, batch.stop), batch.stop)
                + from_split * np.append(values, 0)[split]
            )

        if view == "visible":
            columns[label] = top_sum(low) / energy
            columns[f"{label}_lower"] = columns[f"{label}_upper"] = np.full(len(energy), np.nan)
        else:
            lower, upper = np.minimum(top_sum(low) / energy, 1), np.minimum(top_sum(high) / energy, 1)
            with np.errstate(invalid="ignore", divide="ignore"):
                estimate = np.where(energy > 0, top_sum(middle) / energy_at_middle, np.nan)
            columns[label] = np.clip(estimate, lower, upper)
            columns[f"{label}_lower"], columns[f"{label}_upper"] = lower, upper
    return columns


def squares_of_stored_bins(batch: TallyBatch) -> tuple[np.ndarray, np.ndarray]:
    """Squares of the least and of the largest stored |delta| that each bin may hold [bins].

    A bin holds the fp32 values between two bf16 magnitudes, and fp64 values that fp32 rounds to them. The last one ends
    at 2^128, where bf16 has no finite magnitude. No value exceeds the largest |delta| of its tensor.
    """
    edge = np.ldexp(1.0, 128)
    below = np.where(batch.bin_bits < INFINITY_BITS, batch.values, edge)
    above = np.where(batch.bin_bits < INFINITY_BITS - 1, magnitudes[np.minimum(batch.bin_bits + 1, 0x7F7F)], edge)
    largest = np.repeat([tally.max_delta for tally in batch.tallies], batch.stop - batch.start)
    low = np.maximum(below * (1 - FP32_ROUNDING) - FP32_SUBNORMAL_ROUNDING, 0)
    high = np.minimum(above * (1 + FP32_ROUNDING) + FP32_SUBNORMAL_ROUNDING, largest)
    return np.minimum(low, high) ** 2, high**2


@dataclass(frozen=True)
class NearZero:
    """The `size` coordinates with the smallest |W| of each tensor, and how many of them changed [tensors, ratios].

    Ties at the threshold are counted in expectation (`expected`) and as bounds. All are 0 where a tensor is empty.
    """

    size: np.ndarray
    expected: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def near_zero(batch: TallyBatch, changed: np.ndarray, ratios: Sequence[float] = RATIOS) -> NearZero:
    """Changed coordinates among the ceil(ratio n) smallest |W|; `changed` is a histogram of |W| of the batch [bins]."""
    hist_base = batch.table(HIST_BASE)
    before, changed_before = prefix_sums(hist_base), prefix_sums(changed)
    # ratio * n in floating point, as the paper's masks compute it: ceil(0.07 * 100) is 8.
    size = np.maximum(np.ceil(np.array(ratios) * batch.finite[:, None]), 1).astype(np.int64)
    size = np.minimum(size, batch.finite[:, None])
    threshold = np.searchsorted(before[1:], before[batch.start][:, None] + size)
    empty = size == 0
    threshold = np.where(empty, len(hist_base), threshold)
    need = size - (before[threshold] - before[batch.start][:, None])
    inside = changed_before[threshold] - changed_before[batch.start][:, None]
    tied, tied_changed = np.append(hist_base, 1)[threshold], np.append(changed, 0)[threshold]
    expected = inside + tied_changed * (need / tied)
    lower = inside + np.maximum(0, need - (tied - tied_changed))
    upper = inside + np.minimum(need, tied_changed)
    return NearZero(size, *(np.where(empty, 0, x) for x in (expected, lower, upper)))


@formula(
    *interleave(
        family(
            Metric(
                name="near_zero_coverage_{}",
                label="near-zero coverage at {}",
                definition="fraction of the changed coordinates that are in the near-zero mask, the ⌈r·n⌉ smallest |W| "
                "of each tensor, r = {}. Rounding shows updates of small weights: compare with `_null`, not with r. "
                "Ties at the threshold count in expectation",
                aggregation=MEAN_BY_CHANGED,
                source=PAPER,
                tables=ALL_TABLES,
            ),
            RATIO_LABELS,
            RATIO_SYMBOL,
            {
                "10pct": {
                    "pages": {
                        "overview": VIEWS,
                        "groups": VIEWS,
                        "tensors": ("visible",),
                        "trajectory": ("visible",),
                    }
                }
            },
        ),
        family(
            Metric(
                name="near_zero_coverage_{}_lower",
                label="near-zero coverage at {}, lower bound",
                definition="lower bound of the near-zero coverage over all ways to break ties",
                aggregation=MEAN_BY_CHANGED,
                tables=ALL_TABLES,
            ),
            RATIO_LABELS,
            RATIO_SYMBOL,
        ),
        family(
            Metric(
                name="near_zero_coverage_{}_upper",
                label="near-zero coverage at {}, upper bound",
                definition="upper bound of the near-zero coverage over all ways to break ties",
                aggregation=MEAN_BY_CHANGED,
                tables=ALL_TABLES,
            ),
            RATIO_LABELS,
            RATIO_SYMBOL,
        ),
        family(
            Metric(
                name="near_zero_coverage_{}_enrichment",
                label="near-zero enrichment at {}",
                definition="near-zero coverage over the density of the mask",
                range=NON_NEGATIVE,
                format="times",
                source=PAPER,
            ),
            RATIO_LABELS,
            RATIO_SYMBOL,
        ),
        family(
            Metric(
                name="near_zero_mask_changed_{}",
                label="near-zero mask changed at {}",
                definition="fraction of the near-zero mask that changed, |mask ∩ changed| / |mask|, r = {}",
                source=PAPER,
            ),
            RATIO_LABELS,
            RATIO_SYMBOL,
        ),
    )
)
def near_zero_coverage(batch: TallyBatch, view: str) -> Columns:
    """|mask & changed| / |changed| for the near-zero mask at 1, 5, 10, 20 %, and |mask & changed| / |mask|.

    In the stored view |W| is resolved to bf16, so more coordinates tie.
    """
    changed = batch.changed(view)
    total = batch.sums(changed, batch.start, batch.stop)
    total = np.where(total > 0, total, np.nan)
    columns, mask = {}, near_zero(batch, changed)
    for k, label in enumerate(RATIO_LABELS):
        size = np.where(mask.size[:, k] > 0, mask.size[:, k], np.nan)
        columns[f"near_zero_coverage_{label}"] = mask.expected[:, k] / total
        columns[f"near_zero_coverage_{label}_lower"] = mask.lower[:, k] / total
        columns[f"near_zero_coverage_{label}_upper"] = mask.upper[:, k] / total
        columns[f"near_zero_coverage_{label}_enrichment"] = mask.expected[:, k] * batch.finite / (total * size)
        columns[f"near_zero_mask_changed_{label}"] = mask.expected[:, k] / size
    return columns


METRICS = tuple(metric for entry in FORMULAS for metric in entry.metrics)
BATCH = 128  # tensors at a time: bounds the memory


def compute_metrics(tallies: Sequence[SparseTally], view: str) -> Columns:
    """All registered metrics per coordinate of the tensors.

    Args:
        tallies: One per tensor.
        view: "stored" or "visible".

    Returns:
        Metric name -> [tensors], int64 for counts and float64 otherwise, NaN where a tensor lacks the metric.

    >>> import torch
    >>> from opdkernels.ops.delta import delta
    >>> tally = SparseTally.of(delta(torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0])))
    >>> compute_metrics([tally], "visible")["frac_zero"].tolist()
    [0.75]
    """
    parts: list[Columns] = []
    for first in range(0, len(tallies), BATCH):
        batch = TallyBatch(tallies[first : first + BATCH])
        parts.append({name: column for entry in FORMULAS for name, column in entry.compute(batch, view).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def tensor_metrics(tally: SparseTally, view: str) -> dict[str, float | int | None]:
    """The metrics of one tensor; None for those it lacks."""
    return {name: none_for_nan(column[0]) for name, column in compute_metrics([tally], view).items()}


def none_for_nan(value: Any) -> float | int | None:
    """A NumPy scalar as a Python number; None for NaN."""
    return int(value) if isinstance(value, np.integer) else None if math.isnan(value) else float(value)
