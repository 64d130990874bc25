"""The rows of `trajectory`: the groups of each checkpoint's analysis, with the metrics that need several
checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from opdkernels.analysis.checkpoint_steps import CheckpointStep
from opdkernels.analysis.result import Analysis
from opdkernels.analysis.trajectory_counts import TensorTrajectory
from opdkernels.checkpoint.names import TensorRole, parse_tensor_name
from opdkernels.metrics.geometry import TRAJECTORY_METRICS
from opdkernels.metrics.groups import GROUPINGS, Row, ratio
from opdkernels.metrics.similarity import TOP, Similarity
from opdkernels.metrics.trajectory import CHANCE, SIMILARITY


def step_rows(
    step: int,
    point: CheckpointStep,
    analysis: Analysis,
    trajectories: Sequence[TensorTrajectory],
    similarities: Sequence[tuple[str, Similarity]],
) -> list[Row]:
    """The rows of one checkpoint: its groups, the metrics across checkpoints, and the means over its matrices.

    Args:
        step: Index of the checkpoint.
        point: Its training step and label.
        analysis: Its analysis.
        trajectories: Every common tensor along the run.
        similarities: Tensor name and similarity of every matrix that all checkpoints have.
    """
    tensors_of: dict[tuple, list[TensorTrajectory]] = {}
    for tensor in trajectories:
        for key in group_keys(parse_tensor_name(tensor.match.name)):
            tensors_of.setdefault(key, []).append(tensor)
    matrices_of: dict[tuple, list[Row]] = {}
    for matrix in matrix_rows(step, analysis, similarities):
        for key in group_keys(parse_tensor_name(matrix["name"])):
            matrices_of.setdefault(key, []).append(matrix)
    rows = []
    for group in analysis.groups.to_pylist():
        key = (group["by"], *(group[name] for name in GROUPINGS[group["by"]]))
        row = {
            "step": point.step,
            "label": point.label,
            **group,
            **trajectory_metrics(tensors_of.get(key, []), step, group["view"]),
        }
        if group["view"] == "stored":
            matrices = matrices_of.get(key, [])
            row |= {
                name: mean([matrix[name] for matrix in matrices])
                for name in (*TRAJECTORY_METRICS, *SIMILARITY, *CHANCE)
            }
        rows.append(row)
    return rows


def trajectory_metrics(tensors: Sequence[TensorTrajectory], step: int, view: str) -> Row:
    """Metrics of a group of tensors at one checkpoint; None where the denominator is 0.

    visible: `recall_vs_final` |S_t & S_T| / |S_T|, `precision_vs_final` |S_t & S_T| / |S_t|, with S the coordinates
    with
    visible |delta| > atol; `shared_over_magnitude` |S_t & S_T| over its expectation if changes were independent
    within each |W| of each
    tensor; `frac_changed_since_previous`. stored: `cosine_final` of the update with the last one,
    `relative_norm_since_previous` the norm of the difference to the previous checkpoint over ||W||.
    """
    total = {
        name: float(sum(getattr(tensor, name)[step] for tensor in tensors))
        for name in ("changed", "shared", "expected", "changed_since", "energy", "dot", "step_energy")
    }
    if view == "visible":
        return {
            "recall_vs_final": ratio(total["shared"], float(sum(tensor.changed[-1] for tensor in tensors))),
            "precision_vs_final": ratio(total["shared"], total["changed"]),
            "shared_over_magnitude": ratio(total["shared"], total["expected"]),  # None at the last checkpoint
            "frac_changed_since_previous": ratio(total["changed_since"], sum(tensor.finite for tensor in tensors)),
        }
    norms = math.sqrt(total["energy"] * float(sum(tensor.energy[-1] for tensor in tensors)))
    base_energy = sum(tensor.base_energy for tensor in tensors)
    return {
        "cosine_final": max(-1.0, min(1.0, total["dot"] / norms)) if norms else None,
        "relative_norm_since_previous": math.sqrt(total["step_energy"] / base_energy) if base_energy else None,
    }


def group_keys(role: TensorRole) -> Iterator[tuple]:
    """The groups that a tensor belongs to."""
    for grouping, names in GROUPINGS.items():
        yield (grouping, *(getattr(role, name) for name in names))


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the finite values; None if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def matrix_rows(step: int, analysis: Analysis, similarities: Sequence[tuple[str, Similarity]]) -> Iterator[Row]:
    """Metrics of the matrices of one checkpoint in the stored view: Sim_K with its chance level K over the side, then
    the spectra; a metric that a row lacks is None."""
    for name, similarity in similarities:
        yield {
            "name": name,
            **dict.fromkeys(TRAJECTORY_METRICS),
            **dict(zip(SIMILARITY, (float(similarity.left[step]), float(similarity.right[step])), strict=True)),
            **dict(zip(CHANCE, (TOP / similarity.m, TOP / similarity.n), strict=True)),
        }
    if analysis.spectra is None or analysis.geometry is None:
        return
    for spectrum, geometry in zip(analysis.spectra.to_pylist(), analysis.geometry.to_pylist(), strict=True):
        if spectrum["view"] == "stored" and spectrum["method"]:
            yield {
                "name": spectrum["name"],
                **{name: (spectrum | geometry)[name] for name in TRAJECTORY_METRICS},
                **dict.fromkeys((*SIMILARITY, *CHANCE)),
            }


def model_metrics(rows: Sequence[Row]) -> dict[str, Row]:
    """The metrics of the whole model at one checkpoint, by view."""
    labels = ("step", "label", "by", "view", *(name for names in GROUPINGS.values() for name in names))
    return {
        row["view"]: {name: value for name, value in row.items() if name not in labels}
        for row in rows
        if row["by"] == "model"
    }
