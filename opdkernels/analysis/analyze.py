"""`analyze`: tallies, spectra, tables and files of one pair of checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opdkernels.analysis.result import Analysis
from opdkernels.analysis.spectra_schedule import RunJob, SpectraConfig, compute_spectra, tally_statuses
from opdkernels.analysis.tables import build_analysis
from opdkernels.analysis.tallying import probe_device, tally_all, torch_threads
from opdkernels.checkpoint.match import Pair, open_pair
from opdkernels.config import AnalyzeOptions
from opdkernels.errors import UsageError
from opdkernels.files import write_json
from opdkernels.metrics import groups
from opdkernels.metrics.spectra import SpectrumRecord, open_spectra
from opdkernels.metrics.tallies import SCHEMA_VERSION, TallyRecord, open_tallies
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import describe_run, open_run_dir
from opdkernels.runs.store import ArrowStore


def run_analyze(
    base: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    options: AnalyzeOptions,
    progress: Progress,
    write_extra: Callable[[Path, Pair, Analysis], None] | None = None,
) -> Analysis:
    """`opdkernels.analyze` without the report.

    Args:
        write_extra: Called with the run directory, the pair and the result, to write further files before the run is
            complete; not called if `out` is None.
    """
    if out is None and (options.csv or options.paper_csv):
        raise UsageError("csv and paper_csv write files; give an output folder")
    device = probe_device(options.device)
    with contextlib.closing(open_pair(base, trained, **options.open_kwargs)) as pair, torch_threads(options.threads):
        run_info = describe_pair(pair, options)
        with open_run_dir(out, run_info, options.overwrite) as folder:
            tallies = open_tallies(folder / "tallies" if folder is not None else None)
            spectra = open_spectra(folder / "spectra" if folder is not None else None)
            run_info["resumed_tensors"] = len(tallies.records)
            try:
                tally_all(pair, tallies, options.memory, progress, device)
                if options.spectra != "off":
                    config = SpectraConfig(options.spectra, options.memory, options.paper_csv, device=device)
                    compute_spectra([RunJob(pair, tally_statuses(tallies), spectra)], config, progress)
                pair.check()
            finally:
                tallies.flush()
                spectra.flush()
            result = finalize(pair, tallies, spectra, run_info, folder, options)
            if folder is not None and write_extra is not None:
                write_extra(folder, pair, result)
            return result


def describe_pair(pair: Pair, options: AnalyzeOptions) -> dict[str, Any]:
    """The initial run.json of the analysis of a pair."""
    inputs = {"base": pair.base, "trained": pair.trained}
    return describe_run("analyze", options.model_dump(mode="json"), inputs, schema_version=SCHEMA_VERSION)


def finalize(
    pair: Pair,
    tallies: ArrowStore[TallyRecord],
    spectra: ArrowStore[SpectrumRecord],
    run_info: dict[str, Any],
    folder: Path | None,
    options: AnalyzeOptions,
) -> Analysis:
    """Computes every metric of a pair whose records are complete, and writes the files if there is a folder."""
    result = build_analysis(pair, [tallies.records[i] for i in range(len(pair.matches))], run_info)
    if options.spectra != "off":
        result.add_spectra(list(spectra.records.values()))
    result.path = folder
    if folder is not None:
        write_analysis(folder, result, options)
    return result


def write_analysis(folder: Path, result: Analysis, options: AnalyzeOptions) -> None:
    """Writes the tables and the summary, and removes those of an earlier run with other options."""
    groups.write_parquet(folder / "tensors.parquet", result.tensors)
    groups.write_parquet(folder / "groups.parquet", result.groups)
    write_json(folder / "summary.json", result.summary)
    for name in ("spectra", "geometry"):
        if (table := getattr(result, name)) is not None:
            groups.write_parquet(folder / f"{name}.parquet", table)
        else:
            (folder / f"{name}.parquet").unlink(missing_ok=True)
    for name in ("tensors", "groups", "spectra", "geometry"):
        table = getattr(result, name)
        if options.csv and table is not None:
            groups.write_csv(folder / f"{name}.csv", table.to_pylist(), table.column_names)
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    if not options.report:
        (folder / "report.html").unlink(missing_ok=True)
