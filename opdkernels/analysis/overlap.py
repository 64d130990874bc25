"""`overlap`: which coordinates several runs of one base changed together, and the overlap expected by chance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from opdkernels.analysis.common_tensors import bytes_per_element, common_coverage, match_in_all, read_slice
from opdkernels.analysis.frames import format_path, to_pandas
from opdkernels.analysis.overlap_tables import TensorOverlap, run_names, summarize, tensor_rows
from opdkernels.analysis.run_summaries import OverlapSummary, read_run_summary
from opdkernels.analysis.tallying import slices, torch_threads
from opdkernels.checkpoint.match import Match, Pair, match
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.config import OverlapOptions
from opdkernels.errors import UsageError
from opdkernels.files import write_json
from opdkernels.formatting import percent
from opdkernels.metrics import groups
from opdkernels.metrics.batch import to_bf16_bits
from opdkernels.metrics.distance import unrelated_note
from opdkernels.metrics.tallies import SCHEMA_VERSION
from opdkernels.ops.overlap import MAX_RUNS, Overlap, overlap, strata_chance
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import describe_run, open_run_dir

if TYPE_CHECKING:
    import pandas as pd


@dataclass(repr=False)
class Overlaps:
    """How the runs of one base overlap.

    Attributes:
        tensors: One row per tensor and pair of runs; columns in docs/outputs.md.
        summary: The model, pair by pair, and how many coordinates changed in exactly j runs.
        run: The content of run.json.
        path: The run directory, or None.
    """

    tensors: pa.Table
    summary: dict[str, Any]
    run: dict[str, Any]
    path: Path | None = None

    @property
    def exit_status(self) -> int:
        """0, or 3 if tensors were excluded or contain non-finite coordinates, or if too little was compared, see
        `opdkernels.checkpoint.coverage.Coverage.sufficient`."""
        summary = self.summary
        complete = not summary["excluded"] and not summary["nonfinite"] and summary["coverage"]["sufficient"]
        return 0 if complete else 3

    def to_pandas(self) -> pd.DataFrame:
        """`tensors` as a DataFrame. Raises ImportError if pandas is not installed."""
        return to_pandas(self.tensors)

    def __repr__(self) -> str:
        summary, pairs = self.summary, self.summary["pairs"]
        shown = [f"{pair['run_a']}-{pair['run_b']} {percent(pair['jaccard'])}" for pair in pairs[:3]]
        return (
            f"Overlaps(base={summary['base']!r}, runs={len(summary['runs'])}, tensors={summary['tensors']}, "
            f"Jaccard: {', '.join(shown)}{', ...' if len(pairs) > 3 else ''}, path={format_path(self.path)})"
        )


def load_overlap(folder: Path, run: dict[str, Any]) -> Overlaps:
    """The finished overlap in a folder, whose run.json is `run`."""
    summary = read_run_summary(folder, OverlapSummary)
    return Overlaps(groups.read_table(folder, run, "overlap"), summary, run, folder)


def run_overlap(
    base: str | os.PathLike[str],
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    options: OverlapOptions,
    progress: Progress,
) -> Overlaps:
    """`opdkernels.overlap` without the report."""
    if not 2 <= len(runs) <= MAX_RUNS:
        raise UsageError(f"overlap compares 2 to {MAX_RUNS} runs of one base, not {len(runs)}")
    names = run_names(len(runs))
    with contextlib.ExitStack() as stack:
        checkpoints = [
            stack.enter_context(contextlib.closing(open_checkpoint(path, **options.open_kwargs)))
            for path in (base, *runs)
        ]
        stack.enter_context(torch_threads(options.threads))
        pairs = [match(checkpoints[0], checkpoint) for checkpoint in checkpoints[1:]]
        run_info = describe_run(
            "overlap",
            options.model_dump(mode="json"),
            dict(zip(("base", *names), checkpoints, strict=True)),
            schema_version=SCHEMA_VERSION,
            identity_options=("atol", "strata"),
        )
        with open_run_dir(out, run_info, options.overwrite) as folder:
            common, excluded = match_in_all(pairs, [f"run {name}" for name in names])
            notes = [
                f"run {name}: {note}" for name, pair in zip(names, pairs, strict=True) if (note := unrelated_note(pair))
            ]
            overlaps = count_overlaps(pairs, common, options, progress)
            for checkpoint in checkpoints:
                checkpoint.check()
            rows = [row for tensor in overlaps for row in tensor_rows(tensor)]
            summary = summarize([checkpoint.path for checkpoint in checkpoints], overlaps, rows, excluded, options.atol)
            summary["coverage"] = common_coverage(pairs, [f"run {name}" for name in names], common).to_dict()
            summary["notes"] = notes
            result = Overlaps(groups.rows_to_arrow(rows), summary, run_info, folder)
            if folder is not None:
                groups.write_parquet(folder / "overlap.parquet", result.tensors)
                write_json(folder / "summary.json", summary)
                if options.csv:
                    groups.write_csv(folder / "overlap.csv", rows, result.tensors.column_names)
    return result


def count_overlaps(
    pairs: list[Pair], common: list[list[Match]], options: OverlapOptions, progress: Progress
) -> list[TensorOverlap]:
    """The joint counts of every common tensor."""
    threshold_bits = to_bf16_bits(options.atol)
    total, done = sum(matches[0].numel * bytes_per_element(matches) for matches in common), 0
    overlaps = []
    for matches in common:
        first, size = matches[0], bytes_per_element(matches)
        counts = Overlap.empty(len(pairs), threshold_bits)
        for begin, end in slices(first.numel, size, options.memory):
            w, *trained = read_slice(pairs, matches, begin, end)
            overlap(w, trained, threshold_bits=threshold_bits, out=counts)
            progress(done + end * size, total, first.name)
        strata: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if options.strata and len(first.shape) == 2 and first.numel:
            w, *trained = (tensor.reshape(first.shape) for tensor in read_slice(pairs, matches, 0, first.numel))
            strata = {name: strata_chance(w, trained, name, threshold_bits=threshold_bits) for name in options.strata}
        done += first.numel * size
        overlaps.append(TensorOverlap(first, counts, strata))
    return overlaps
