"""The result of `analyze`: tables, summary and tallies, in memory or from the folder of a run."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from opdkernels.analysis.frames import format_path, to_pandas
from opdkernels.analysis.summary import read_summary
from opdkernels.analysis.wandb_log import log_analysis
from opdkernels.errors import InputError, printable
from opdkernels.formatting import percent
from opdkernels.metrics import geometry as geometry_of
from opdkernels.metrics import groups as tables
from opdkernels.metrics.groups import read_table
from opdkernels.metrics.spectra import FINAL, SpectrumRecord, open_spectra
from opdkernels.metrics.tallies import TallyRecord, open_tallies
from opdkernels.metrics.verdict import matrix_comparisons, pair_verdict
from opdkernels.ops.delta import Tally
from opdkernels.runs.run_dir import REMEDY, load_finished

if TYPE_CHECKING:
    import pandas as pd


SPECTRA = ("spectra", "geometry")  # tables that a run has unless its spectra are off


@dataclass(repr=False)
class Analysis:
    """What changed between two checkpoints.

    Attributes:
        tensors: One row per tensor and view; columns in docs/outputs.md.
        groups: One row per group and view.
        summary: The whole model; its form is `opdkernels.analysis.summary.Summary`.
        run: The content of run.json: when, where and with which options.
        records: The tally of each tensor.
        path: The run directory, or None.
        spectra: One row per matrix and view; None if spectra are off.
        geometry: One row per matrix and view; None if spectra are off.
        spectrum_records: The spectra of each matrix.
    """

    tensors: pa.Table
    groups: pa.Table
    summary: dict[str, Any]
    run: dict[str, Any]
    records: list[TallyRecord]
    path: Path | None = None
    spectra: pa.Table | None = None
    geometry: pa.Table | None = None
    spectrum_records: list[SpectrumRecord] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0, or 3 if the comparison is not of the whole models.

        That is, if nothing or less than 90 % of a side was compared, if both sides have unmatched tensors, if tensors
        were excluded, failed or contain non-finite coordinates, or if a matrix has no spectra.
        """
        summary = self.summary
        incomplete = summary["excluded"] or summary["failed"] or summary["nonfinite"] or self.uncomputed
        comparable = summary["coverage"]["sufficient"] and summary["verdict"]["kind"] != "not comparable"
        return 3 if incomplete or not comparable else 0

    @property
    def uncomputed(self) -> list[SpectrumRecord]:
        """Matrices without spectra because of too little memory or an error."""
        return [record for record in self.spectrum_records if record.reason and not record.reason.startswith(FINAL)]

    def to_pandas(self, table: Literal["tensors", "groups", "spectra", "geometry"] = "tensors") -> pd.DataFrame:
        """One of the tables as a DataFrame.

        Raises:
            ImportError: pandas is not installed.
            ValueError: The run has no such table.
        """
        if (content := getattr(self, table)) is None:
            raise ValueError(f"this analysis has no table {table!r}; run it with spectra='exact' or 'topk'")
        return to_pandas(content)

    def to_wandb(self, run: Any = None, *, prefix: str = "opdkernels/") -> None:
        """Logs the analysis to a run of Weights & Biases.

        The metrics of the whole model and the verdict go to the run's summary. One call of `run.log` has the tables
        (wandb shows their first 10,000 rows), the changed fraction by module and by layer and the distances in bf16
        steps as charts, and, if the analysis was written to a folder, its report.

        Args:
            run: A run, as `wandb.init` returns it; None: the active one.
            prefix: Beginning of the logged names.

        Raises:
            ImportError: wandb is not installed.
            UsageError: `run` is None, and no run is active.

        Examples:
            wandb.init(project="opd")
            opdkernels.analyze("base", "trained", "out").to_wandb()
        """
        log_analysis(self, run, prefix)

    def __repr__(self) -> str:
        summary = self.summary
        unchanged = {view: metrics["frac_zero"] for view, metrics in summary["views"].items()}
        changed = [f"{view} {percent(None if x is None else 1 - x)}" for view, x in unchanged.items()]
        return (
            f"Analysis(base={summary['base']!r}, trained={summary['trained']!r}, "
            f"tensors={summary['matched']['tensors']}, parameters={summary['matched']['parameters']:,}, "
            f"changed: {', '.join(changed) or 'no tensors'}, path={format_path(self.path)})"
        )

    def add_spectra(self, records: list[SpectrumRecord]) -> None:
        """Adds the tables and the summary of the spectra."""
        self.spectrum_records = sorted(records, key=lambda record: record.key)
        spectra, geometry = geometry_of.tables(
            self.spectrum_records, {record.index: record.name for record in self.records}
        )
        self.spectra, self.geometry = tables.rows_to_arrow(spectra), tables.rows_to_arrow(geometry)
        self.summary["spectra"] = geometry_of.summarise(spectra, geometry)
        matrices = matrix_comparisons([a | b for a, b in zip(spectra, geometry, strict=True)])
        self.summary["verdict"] = pair_verdict(self.summary, matrices)

    def tally(self, name: str) -> Tally:
        """The tally of one tensor, by its name in the base. Raises KeyError if there is none."""
        for record in self.records:
            if record.name == name and record.tally is not None:
                return record.tally.dense()
        raise KeyError(f"no tally of {printable(name)}")

    def _repr_html_(self) -> str:
        views = self.summary["views"]
        labels = {
            "frac_zero": "unchanged",
            "frac_le_1e-5": "|Δ| ≤ 1e-5",
            "relative_norm": "relative norm",
            "near_zero_coverage_10pct": "near-zero coverage at 10 %",
            "changed_over_null": "changed over null",
            "near_zero_coverage_10pct_over_null": "near-zero coverage over null",
        }

        def cell(value: float | None) -> str:
            return "–" if value is None else f"{value:.5g}"

        rows = "".join(
            f"<tr><td>{html.escape(label)}</td>"
            + "".join(f"<td>{cell(views[v].get(key))}</td>" for v in views)
            + "</tr>"
            for key, label in labels.items()
        )
        head = "".join(f"<th>{html.escape(v)}</th>" for v in views)
        title = self.summary["verdict"]["text"]
        return f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{rows}</table>"


def load(path: str | Path) -> Analysis:
    """Loads the finished `analyze` run in a folder.

    Args:
        path: The run directory.

    Raises:
        InputError: The folder contains no finished `analyze` run, or is damaged.
    """
    folder = Path(path)
    run = load_finished(folder)
    if run["command"] != "analyze":
        raise InputError(f"{printable(str(folder))} holds a run of {run['command']}; give the folder of an analyze run")
    tallies, spectra = open_tallies(folder / "tallies").records, open_spectra(folder / "spectra").records
    summary, groups = read_summary(folder), read_table(folder, run, "groups")
    tables = {name: read_table(folder, run, name) if f"{name}.parquet" in run["outputs"] else None for name in SPECTRA}
    has_spectra = any(table is not None for table in tables.values())
    if bool(summary["views"]) != bool(len(groups)) or (summary.get("spectra") is not None) != has_spectra:
        raise InputError(f"{printable(str(folder))} has a summary.json of other tables; {REMEDY}")
    return Analysis(
        read_table(folder, run, "tensors"),
        groups,
        summary,
        run,
        [tallies[index] for index in sorted(tallies)],
        folder,
        **tables,
        spectrum_records=[spectra[key] for key in sorted(spectra)],
    )
