"""`analyze`: which tensors are read, in what slices, what is kept of them, and what is written when all are done."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.analysis.compute import Facts, Job, Rules, compute_all
from opdkernels.analysis.outputs import OUTPUTS
from opdkernels.analysis.result import Analysis
from opdkernels.backends.devices import resolve_device
from opdkernels.checkpoint import streaming as feed
from opdkernels.checkpoint.match import Pair, open_pair
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.config import AnalyzeOptions
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import write_json
from opdkernels.metrics import groups as tables
from opdkernels.metrics import rounding_null as null
from opdkernels.metrics.coordinates import (
    RATIOS,
    VIEWS,
    SparseTally,
    compute_metrics,
    to_bf16_bits,
)
from opdkernels.metrics.null_metrics import null_metrics
from opdkernels.metrics.spectra import SpectrumRecord, open_spectra
from opdkernels.metrics.tallies import SCHEMA_VERSION, TallyRecord, open_tallies
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, Tally, delta
from opdkernels.ops.delta.layout import HIST_DELTA_STORED, ULP_REACH
from opdkernels.progress import Progress
from opdkernels.runs.run_dir import describe_run, open_run_dir
from opdkernels.runs.store import ArrowStore

CPU = torch.device("cpu")
CURVE = [float(f"{10 ** (k / 10):.4g}") for k in range(-90, -9)]  # 1e-9 .. 1e-1


def analyze(
    source: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    chosen: AnalyzeOptions,
    progress: Progress,
    write_more: Callable[[Path, Pair, Analysis], None] | None = None,
) -> Analysis:
    """`opdkernels.analyze` without the page."""
    if out is None and (chosen.csv or chosen.paper_csv):
        raise UsageError("csv and paper_csv write files; give an output folder")
    device = ready(chosen.device)
    with contextlib.closing(open_pair(source, trained, **chosen.open_kwargs)) as pair, threads(chosen.threads):
        about = describe_pair(pair, chosen)
        with open_run_dir(out, about, chosen.overwrite, OUTPUTS) as folder:
            records = open_tallies(folder / "tallies" if folder is not None else None)
            spectra = open_spectra(folder / "spectra" if folder is not None else None)
            about["resumed_tensors"] = len(records.records)
            try:
                count_all(pair, records, chosen.memory, progress, device)
                if chosen.spectra != "off":
                    rules = Rules(chosen.spectra, chosen.memory, chosen.paper_csv, device=device)
                    compute_all([Job(pair, facts(records), spectra)], rules, progress)
                pair.check()
            finally:
                records.flush()
                spectra.flush()
            result = conclude(pair, records, spectra, about, folder, chosen)
            if folder is not None and write_more is not None:
                write_more(folder, pair, result)
            return result


def describe_pair(pair: Pair, options: AnalyzeOptions) -> dict[str, Any]:
    """The initial run.json of the analysis of a pair."""
    inputs = {"source": pair.base, "trained": pair.trained}
    return describe_run("analyze", options.model_dump(mode="json"), inputs, schema_version=SCHEMA_VERSION)


def ready(name: str) -> torch.device:
    """The device of a name, once it has counted: a driver that is too old for the kernels is bad input, not the failure of every
    tensor."""
    device = resolve_device(name)
    try:
        delta(*(torch.zeros(1, dtype=torch.bfloat16, device=device) for _ in range(2)))
    except (RuntimeError, ImportError, OSError) as error:
        reason = printable(str(error).splitlines()[0])
        raise InputError(
            f"--device {name}: {reason}; `opdkernels doctor` says which kernels serve, or leave --device out"
        ) from error
    return device


def facts(records: ArrowStore[TallyRecord]) -> dict[int, Facts]:
    return {index: Facts.of(record) for index, record in records.records.items()}


def conclude(
    pair: Pair,
    records: ArrowStore[TallyRecord],
    spectra: ArrowStore[SpectrumRecord],
    about: dict[str, Any],
    folder: Path | None,
    chosen: AnalyzeOptions,
) -> Analysis:
    """Every metric of a pair whose records are complete, and its files."""
    result = assemble(pair, [records.records[i] for i in range(len(pair.matches))], about)
    if chosen.spectra != "off":
        result.add_spectra(list(spectra.records.values()))
    result.path = folder
    if folder is not None:
        write(folder, result, chosen)
    return result


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slices(numel: int, bytes_each: int, memory: int) -> Iterator[tuple[int, int]]:
    """Slices of a tensor that keep both sides' buffers in half the memory."""
    step = max(1 << 16, min(feed.LARGEST_SLICE, memory // 2 // bytes_each))
    for begin in range(0, numel, step):
        yield begin, min(numel, begin + step)


def count_all(
    pair: Pair, records: ArrowStore[TallyRecord], memory: int, progress: Progress, device: torch.device = CPU
) -> None:
    """Tallies every match that has no record yet; a tensor that fails is recorded and the rest goes on. Out of a device's memory,
    it goes on from that tensor in smaller slices, and only then does the tensor fail."""
    tally, done, total = Tally.empty(DEFAULT_THRESHOLD_BITS), 0, pair.nbytes
    wanted = []
    for index, match in enumerate(pair.matches):
        known = records.records.get(index)
        if known is None or known.failure:
            wanted.append((index, match))
        else:
            done += match.numel * feed.pair_bytes(match)
            progress(done, total, match.name)
    limit = feed.slice_limit(memory, device)
    while wanted:
        with contextlib.closing(feed.feed(pair, tuple(wanted), limit, device)) as flow:  # type: ignore[type-var]
            for index, parts in itertools.groupby(flow, key=lambda part: part[0].index):
                match = wanted[0][1]
                tally.reset()
                failure = ""
                try:
                    for one, sides in parts:
                        delta(*sides(), out=tally)
                        progress(done + one.end * feed.pair_bytes(match), total, match.name)
                except (MemoryError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError) and limit > feed.LEAST_SLOT:
                        break
                    failure = f"{type(error).__name__}: {error}".splitlines()[0]
                counted = None if failure else SparseTally.of(tally)
                records.add(
                    TallyRecord(
                        index,
                        match.name,
                        match.trained_name,
                        match.shape,
                        match.base.dtype,
                        match.trained.dtype,
                        match.match_kind,
                        counted,
                        failure,
                    )
                )
                done += match.numel * feed.pair_bytes(match)
                progress(done, total, match.name)
                wanted.pop(0)
        if wanted:
            limit = max(limit // 4, feed.LEAST_SLOT)
            torch.cuda.empty_cache()


def assemble(pair: Pair, records: list[TallyRecord], run: dict[str, Any]) -> Analysis:
    """Every metric, from the records alone."""
    counted = [r for r in records if r.tally is not None]
    tallies = [r.tally for r in records if r.tally is not None]
    nulls = fit_nulls(counted)
    views = {view: compute_metrics(tallies, view) for view in VIEWS}
    if counted:
        views["visible"] |= null_metrics(views["visible"], nulls)
    places = [parse_tensor_name(r.name) for r in counted]
    about: dict[str, list] = {
        "name": [r.name for r in counted],
        "trained_name": [r.trained_name for r in counted],
        "shape": [json.dumps(list(r.shape)) for r in counted],
        "dtype_source": [r.dtype_source for r in counted],
        "dtype_trained": [r.dtype_trained for r in counted],
        **{key: [getattr(where, key) for where in places] for key in ("layer", "module", "block", "tower")},
    }
    groups = tables.group_rows(about, views)
    summary = summarise(pair, records, groups, nulls)
    return Analysis(tables.interleave(about, views), tables.rows_to_arrow(groups), summary, run, records)


def fit_nulls(records: list[TallyRecord]) -> list[dict[str, null.Null]]:
    """Of each counted record its nulls; of a tensor that did not visibly change the one that expects nothing."""

    def used(tally: SparseTally, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tally.patterns[table > 0], table[table > 0]

    nothing = dict.fromkeys(RATIOS, 0.0)
    fitted: list[dict[str, null.Null]] = [
        {"chosen": null.Null("sign", 0.0, 0.0, 0.0, nothing, float(r.tally.finite) if r.tally else 0.0, 0, np.zeros(0))}
        for r in records
    ]
    moved = [(i, r.tally) for i, r in enumerate(records) if r.tally is not None and r.tally.changed("visible").any()]
    nulls = null.fit_many(
        [used(t, t.source) for _, t in moved],
        [used(t, t.delta) for _, t in moved],
        RATIOS,
        ["grid" if records[i].dtype_source == "bf16" else "uniform" for i, _ in moved],
    )
    for (i, _), found in zip(moved, nulls, strict=True):
        fitted[i] = found
    return fitted


def curve(records: list[TallyRecord], nulls: list[dict[str, null.Null]]) -> dict[str, list[float | None]]:
    """Share of coordinates with |delta| <= epsilon: visible, stored (bounds) and expected of the null."""
    visible, stored, expected = np.zeros(1 << 15), np.zeros(1 << 15), np.zeros(1 << 15)
    for record, fitted in zip(records, nulls, strict=True):
        tally = record.tally
        assert tally is not None
        visible[tally.patterns] += tally.delta
        stored[tally.patterns] += tally.tables[HIST_DELTA_STORED]
        chosen = fitted["chosen"]
        expected[chosen.first : chosen.first + len(chosen.values)] += chosen.values
        expected[0] += chosen.unchanged
    n = visible.sum()
    # In 32-bit steps: |delta| <= eps covers every truncated bin below that of eps, and some of that bin itself.
    at = np.array([to_bf16_bits(e) for e in CURVE])
    floor = np.array([int(np.float32(e).view(np.uint32)) >> 16 for e in CURVE])

    def upto(table: np.ndarray, patterns: np.ndarray) -> list[float | None]:
        return [None if not n else float(x) for x in np.cumsum(table)[patterns] / max(n, 1)]

    return {
        "eps": list(CURVE),
        "visible": upto(visible, at),
        "stored_lower": upto(stored, np.maximum(floor - 1, 0)),
        "stored_upper": upto(stored, floor),
        "null": upto(expected, at),
    }


def summarise(pair: Pair, records: list[TallyRecord], groups: list[dict], nulls: list[dict]) -> dict[str, Any]:
    counted = [r for r in records if r.tally is not None]
    views = {
        view: {k: v for k, v in g.items() if k not in ("by", "view", "tower", "block", "module", "layer")}
        for view in VIEWS
        for g in groups
        if g["by"] == "model" and g["view"] == view
    }
    ulp = sum((r.tally.ulp for r in counted if r.tally), np.zeros(2 * ULP_REACH + 3, np.int64))
    return {
        "schema_version": tables.TABLE_VERSION,
        "source": pair.base.path,
        "trained": pair.trained.path,
        "matched": {
            "tensors": len(records),
            "parameters": sum(r.tally.numel for r in counted if r.tally),
            "how": dict(Counter(r.how for r in records)),
            "dtypes": dict(Counter(f"{r.dtype_source} → {r.dtype_trained}" for r in records)),
        },
        "identical": all(r.tally is not None and r.tally.bit_equal == r.tally.numel for r in records),
        "views": views,
        "null_kinds": dict(
            Counter(
                n["chosen"].kind
                for r, n in zip(counted, nulls, strict=True)
                if r.tally and r.tally.changed("visible").any()
            )
        ),
        "curve": curve(counted, nulls),
        "ulp": {
            "distance": [f"< -{ULP_REACH}", *(str(d) for d in range(-ULP_REACH, ULP_REACH + 1)), f"> {ULP_REACH}"],
            "count": ulp.tolist(),
        },
        "excluded": [vars(u) | {"shape": list(u.shape)} for u in pair.unmatched if u.kind in EXCLUDED],
        "unmatched": [vars(u) | {"shape": list(u.shape)} for u in pair.unmatched if u.kind not in EXCLUDED],
        "tied": pair.tied,
        "notes": pair.notes,
        "failed": [{"name": r.name, "reason": r.failure} for r in records if r.failure],
        "nonfinite": [
            {"name": r.name, "coordinates": r.tally.nonfinite} for r in counted if r.tally and r.tally.nonfinite
        ],
    }


EXCLUDED = ("shape", "shard")  # in both checkpoints, and yet not compared: the run ends with status 3


def write(folder: Path, result: Analysis, options: AnalyzeOptions) -> None:
    tables.write_parquet(folder / "tensors.parquet", result.tensors)
    tables.write_parquet(folder / "groups.parquet", result.groups)
    write_json(folder / "summary.json", result.summary)
    for name in ("spectra", "geometry"):
        if (table := getattr(result, name)) is not None:
            tables.write_parquet(folder / f"{name}.parquet", table)
        else:  # of an earlier run with other options
            (folder / f"{name}.parquet").unlink(missing_ok=True)
    for name in ("tensors", "groups", "spectra", "geometry"):
        table = getattr(result, name)
        if options.csv and table is not None:
            tables.write_csv(folder / f"{name}.csv", table.to_pylist(), table.column_names)
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    if not options.report:
        (folder / "report.html").unlink(missing_ok=True)
