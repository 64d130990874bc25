"""Names of everything that `analyze`, `overlap` and `trajectory` write to the directory of a run."""

from __future__ import annotations

from opdkernels.runs.run_dir import RunOutputs

# Written by opdkernels.compat.paper_csv, listed here so that --overwrite of any command removes them.
PAPER_CSV_FILES = (
    "tensor_metrics.csv",
    "svd_metrics.csv",
    "base_geometry_metrics.csv",
    "mask_overlap_metrics.csv",
    "layer_summary.csv",
    "module_summary.csv",
    "block_summary.csv",
    "layer_module_summary.csv",
    "top_delta_tensors.csv",
    "mismatch_report.json",
    "failed_tensors.csv",
    "paper_summary.json",
)
OUTPUTS = RunOutputs(
    files=(
        "summary.json",
        "tensors.parquet",
        "groups.parquet",
        "tensors.csv",
        "groups.csv",
        "report.html",
        "overlap.parquet",
        "overlap.csv",
        "spectra.parquet",
        "geometry.parquet",
        "spectra.csv",
        "geometry.csv",
        "trajectory.parquet",
        "trajectory.csv",
        *PAPER_CSV_FILES,
    ),
    folders=("tallies", "spectra", "steps", "similarity", "factors"),
)
