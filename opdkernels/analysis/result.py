"""The result of `analyze`: tables, summary and tallies, in memory or from the folder of a run."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opdkernels.errors import InputError, printable
from opdkernels.metrics import geometry as geometry_of
from opdkernels.metrics import groups as tables
from opdkernels.metrics.spectra import FINAL, SpectrumRecord, open_spectra
from opdkernels.metrics.tallies import TallyRecord, open_tallies
from opdkernels.ops.delta import Tally
from opdkernels.runs.run_dir import as_input_error, load_finished


@dataclass
class Analysis:
    """What changed between two checkpoints.

    `tensors`: one row a tensor and view; `groups`: one a group and view; `summary`: the whole model; `run`: when, where,
    with what; `spectra` and `geometry`: one a matrix and view, None where they are off. Columns and keys: docs/outputs.md.
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
        """0, or 3 where tensors were excluded, failed or hold non-finite coordinates."""
        summary = self.summary
        return 3 if summary["excluded"] or summary["failed"] or summary["nonfinite"] or self.uncomputed else 0

    @property
    def uncomputed(self) -> list[SpectrumRecord]:
        """Matrices whose spectra could not be had, for want of memory or after an error."""
        return [r for r in self.spectrum_records if r.reason and not r.reason.startswith(FINAL)]

    def add_spectra(self, records: list[SpectrumRecord]) -> None:
        """Completes tables and summary with the spectra of the matrices."""
        self.spectrum_records = sorted(records, key=lambda r: r.key)
        spectra, geometry = geometry_of.tables(self.spectrum_records, {r.index: r.name for r in self.records})
        self.spectra, self.geometry = tables.rows_to_arrow(spectra), tables.rows_to_arrow(geometry)
        self.summary["spectra"] = geometry_of.summarise(spectra, geometry)

    def tally(self, name: str) -> Tally:
        """The tally of one tensor, by its name in the source. Raises KeyError where there is none."""
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
        title = f"{self.summary['matched']['tensors']} tensors, {self.summary['matched']['parameters']:,} parameters"
        return f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{rows}</table>"


def load(path: str | Path) -> Analysis:
    """The finished `analyze` run in a folder. Raises InputError where there is none."""
    folder = Path(path)
    run = load_finished(folder)
    if run["command"] != "analyze":
        raise InputError(f"{printable(str(folder))} holds a run of {run['command']}; give the folder of an analyze run")
    records, spectra = open_tallies(folder / "tallies"), open_spectra(folder / "spectra")
    with as_input_error(folder):
        of_matrices = (
            pq.read_table(path) if (path := folder / f"{name}.parquet").exists() else None
            for name in ("spectra", "geometry")
        )
        return Analysis(
            pq.read_table(folder / "tensors.parquet"),
            pq.read_table(folder / "groups.parquet"),
            json.loads((folder / "summary.json").read_text()),
            run,
            [records.records[i] for i in sorted(records.records)],
            folder,
            next(of_matrices),
            next(of_matrices),
            [spectra.records[key] for key in sorted(spectra.records)],
        )
