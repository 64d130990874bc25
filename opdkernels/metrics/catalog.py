"""All metrics, by name."""

from __future__ import annotations

from opdkernels.metrics import coordinates, geometry, groups, null_metrics, overlap, trajectory
from opdkernels.metrics.registry import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metrics in (
        coordinates.METRICS,
        null_metrics.METRICS,
        groups.GROUP_METRICS,
        geometry.METRICS,
        overlap.METRICS,
        trajectory.METRICS,
    )
    for metric in metrics
}


def metrics_of(table: str) -> list[Metric]:
    """The metrics of a table, in the order of registration.

    Args:
        table: tensors, groups, spectra, geometry, overlap or trajectory; group_only: those of groups that tensors lack.
    """
    if table == "group_only":
        return [metric for metric in METRICS.values() if metric.tables == ("groups",)]
    return [metric for metric in METRICS.values() if table in metric.tables]


def metrics_on_page(page: str) -> list[Metric]:
    """The metrics that a table of report pages shows (overview, groups, tensors, trajectory, overlap)."""
    return [metric for metric in METRICS.values() if page in metric.pages]
