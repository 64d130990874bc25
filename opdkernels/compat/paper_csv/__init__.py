"""`--paper-csv`: the files of the paper's reference script, for programs that read them.

Columns and metrics are those of `analyze_opd_delta.py --dtype bf16` (SydCS/OPD-Param-Analysis, arXiv 2606.13657),
computed from the tallies: the visible view, fractions of all coordinates, the script's matching, and its names of
layers, modules and blocks, which it finds as substrings (`qkv_proj` counts as `v_proj`). Differences:

- Sums are exact and rounded once; the script sums in fp32. Energies and norms agree to about 1e-6, fractions exactly.
- Near-zero masks: where equal |W| straddle the threshold, the script's top-k takes arbitrary ones; here it is the
expected
  value.
- Spectra are exact for every matrix (spectra.py); with `--spectra off` the files and columns that need them are
omitted.
  `mask_overlap_mode` is always `exact`, also for the large matrices that the script skips.
- Tensors with non-finite coordinates: tallies leave these out, so the script's sums have no counterpart. Norms,
energies and
  what depends on them are NaN (an empty cell); fractions below fixed thresholds are still the script's. Such a matrix
  has no near-zero rows and is listed in `failed_tensors.csv`, as it is when the script's SVD fails on it.
- The script's `summary.json` is `paper_summary.json` here, without `run_metadata` (run.json has it) and spectral keys.
- Text that a spreadsheet would run as a formula has an apostrophe in front.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opdkernels.checkpoint.base import DTYPES
from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.match import Pair
from opdkernels.compat.paper_csv.spectra import (
    BASE_COLUMNS,
    PRINCIPAL_COLUMNS,
    SVD_COLUMNS,
    base_row,
    principal_columns,
    svd_row,
)
from opdkernels.files import write_json
from opdkernels.metrics.batch import EPSILON, TallyBatch, ratio_label, threshold_label, to_bf16_bits
from opdkernels.metrics.coordinates import RELATIVE, TOP_FRACTIONS, near_zero, tensor_metrics
from opdkernels.metrics.groups import Row, write_csv
from opdkernels.metrics.spectra import SpectrumRecord
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS
from opdkernels.ops.delta.layout import HIST_BASE_OVER
from opdkernels.ops.delta.many import SparseTally
from opdkernels.spectral.exact import RATIOS

if TYPE_CHECKING:
    from opdkernels.analysis.result import Analysis

SUMMARIES = {
    "layer_summary": ("layer_id",),
    "module_summary": ("module_type",),
    "block_summary": ("block_type",),
    "layer_module_summary": ("layer_id", "module_type"),
}
LARGEST_SHOWN = 100  # rows of top_delta_tensors.csv
# The script compares |delta| in fp32 with the unrounded threshold: 1e-5 is between 0x3727 and 0x3728.
UPDATE_ATOLS = {0.0: DEFAULT_THRESHOLD_BITS.index(0), 1e-5: DEFAULT_THRESHOLD_BITS.index(0x3727)}

BELOW = tuple(f"frac_abs_delta_lt_{threshold_label(t)}" for t in THRESHOLDS)
CLOSE = tuple(f"frac_isclose_zero_atol_{threshold_label(t)}" for t in THRESHOLDS)
BELOW_RMS = tuple(f"frac_abs_delta_lt_{threshold_label(t)}_src_rms" for t in RELATIVE)
TOP = tuple(f"coord_top_{ratio_label(p).replace('.', 'p')}_energy_ratio" for p in TOP_FRACTIONS)
PLACE = ("layer_id", "module_type", "block_type")
TENSOR_COLUMNS = (
    "name",
    "shape",
    "ndim",
    "numel",
    "analysis_dtype",
    *PLACE,
    "src_fro_norm",
    "opd_fro_norm",
    "delta_fro_norm",
    "relative_delta_fro",
    "delta_l2_norm",
    "delta_linf_norm",
    "delta_mean_abs",
    "delta_rms",
    "src_rms",
    "opd_rms",
    "has_nan_or_inf",
    "src_energy",
    "opd_energy",
    "delta_energy",
    "frac_delta_eq_0",
    *(column for pair in zip(BELOW, CLOSE, strict=True) for column in pair),
    *BELOW_RMS,
    *TOP,
)
LOW = {r: f"low_magnitude_{ratio_label(r)}" for r in RATIOS}
LOW_METRICS = ("density", "update_overlap_ratio", "covered_by_update_ratio", "enrichment_vs_random")
MASK_COLUMNS = (
    "name",
    "shape",
    *PLACE,
    "mask_overlap_mode",
    "update_mask_atol",
    "numel",
    "update_count",
    "update_density",
    *(f"{low}_{metric}" for low in LOW.values() for metric in LOW_METRICS),
)
BY_NUMEL = (*BELOW, *BELOW_RMS, "frac_delta_eq_0", *CLOSE)  # averaged over coordinates; TOP over delta's energy
GROUP_COLUMNS = (
    "num_tensors",
    "total_numel",
    "total_delta_energy",
    "delta_energy_share",
    "total_src_energy",
    "group_relative_delta",
    *BY_NUMEL,
    *TOP,
)
FAILED_COLUMNS = ("name", "stage", "error_message", "traceback_short")

# The script's names: the first layer container that occurs in a name, and the first module token.
LAYERS = tuple(
    re.compile(rf"(?:^|\.){re.escape(container)}\.(\d{{1,18}})(?:\.|$)")
    for container in (
        "model.language_model.layers",
        "language_model.layers",
        "model.layers",
        "layers",
        "transformer.h",
        "blocks",
    )
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MODULE_TOKENS = {token: token for token in (*ATTENTION, *MLP, "embed_tokens", "lm_head", "norm")} | {"ln_": "norm"}
MLP_TOKENS = ("fc1", "fc2", "w1", "w2", "w3")
BLOCKS = {
    **dict.fromkeys(ATTENTION, "attention"),
    **dict.fromkeys((*MLP, *MLP_TOKENS), "mlp"),
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
    "norm": "norm",
}
# Wrapper prefixes and their replacement: two names match if the results are equal.
ALIASES = (("model.language_model.", "model."), ("language_model.", "model."), ("model.visual.", "visual."))


def write(folder: Path, pair: Pair, result: Analysis) -> None:
    """Writes PAPER_CSV_FILES to `folder`, from the tallies of a finished run."""
    matched, report = match_names(pair.base.tensors, pair.trained.tensors)
    spectra = {r.index: r for r in result.spectrum_records if r.view == "visible" and r.part < 0}
    tensors, svds, bases, masks, failed = tabulate(pair, result.records, matched, report, spectra)
    groups = {name: group(tensors, keys) for name, keys in SUMMARIES.items()}
    largest = by_energy_share(tensors)
    tables: dict[str, tuple[list[Row], tuple[str, ...]]] = {
        "tensor_metrics": (tensors, TENSOR_COLUMNS),
        "mask_overlap_metrics": (masks, MASK_COLUMNS + (PRINCIPAL_COLUMNS if spectra else ())),
        **{name: (groups[name], (*keys, *GROUP_COLUMNS)) for name, keys in SUMMARIES.items()},
        "top_delta_tensors": (largest, (*TENSOR_COLUMNS, "delta_energy_share")),
        "failed_tensors": (failed, FAILED_COLUMNS),
    }
    if result.spectra is not None:
        tables |= {
            "svd_metrics": (svds, ("name", "shape", *PLACE, *SVD_COLUMNS)),
            "base_geometry_metrics": (bases, ("name", "shape", *PLACE, *BASE_COLUMNS)),
        }
    for name, (rows, columns) in tables.items():
        write_csv(folder / f"{name}.csv", map(blank, rows), columns)
    write_json(folder / "mismatch_report.json", report)
    write_json(folder / "paper_summary.json", blank(summarise(tensors, masks, groups, largest, report, failed)))


def blank(content: Any) -> Any:
    """Replaces NaN by None: an empty cell of a table, null in JSON."""
    if isinstance(content, dict):
        return {key: blank(value) for key, value in content.items()}
    if isinstance(content, list):
        return [blank(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def match_names(base: Collection[str], trained: Collection[str]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Pairs of matching names, sorted by the base's, and mismatch_report.json as far as names determine it."""
    exact = [(name, name) for name in base if name in trained]
    unmatched = [sorted(set(side) - {name for name, _ in exact}) for side in (base, trained)]
    by_key: list[dict[str, list[str]]] = [{}, {}]
    for names, keys in zip(unmatched, by_key, strict=True):
        for name in names:
            keys.setdefault(without_wrapper(name), []).append(name)
    common = [(key, by_key[0][key], by_key[1][key]) for key in sorted(by_key[0]) if key in by_key[1]]
    aliased = [(a[0], b[0]) for _, a, b in common if len(a) == len(b) == 1]
    matched = sorted(exact + aliased)
    report = {
        "exact_matches": len(exact),
        "alias_matches": len(aliased),
        "alias_examples": [{"src": a, "opd": b} for a, b in aliased[:20]],
        "ambiguous_alias_matches": [
            {"canonical_key": key, "src_keys": a, "opd_keys": b} for key, a, b in common if len(a) > 1 or len(b) > 1
        ],
        "missing_in_src": sorted(set(trained) - {b for _, b in matched}),
        "missing_in_opd": sorted(set(base) - {a for a, _ in matched}),
        "shape_mismatched": [],
        "skipped_non_floating": 0,
    }
    return matched, report


def without_wrapper(name: str) -> str:
    for prefix, plain in ALIASES:
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


def place(name: str) -> dict[str, Any]:
    """Layer, module and block by the rules of the paper's script.

    >>> place("model.layers.3.self_attn.qkv_proj.weight")
    {'layer_id': 3, 'module_type': 'v_proj', 'block_type': 'attention'}
    """
    layer = next((int(layer[1]) for pattern in LAYERS if (layer := pattern.search(name))), -1)
    lower = name.lower()
    modules = itertools.chain(
        (module for token, module in MODULE_TOKENS.items() if token in lower),
        (token for token in lower.split(".") if token in MLP_TOKENS),
        ("embed_tokens" if "wte" in lower else "other",),
    )
    module = next(modules)
    return {"layer_id": layer, "module_type": module, "block_type": BLOCKS.get(module, "other")}


def tabulate(
    pair: Pair,
    records: Sequence[TallyRecord],
    matched: Sequence[tuple[str, str]],
    report: dict[str, Any],
    spectra: dict[int, SpectrumRecord],
) -> tuple[list[Row], list[Row], list[Row], list[Row], list[Row]]:
    """Rows of tensors, spectra of delta, base geometry, masks and failures; completes `report`.

    Args:
        spectra: Records of the visible view, by the index of the match.
    """

    def key(name: str, trained_name: str) -> tuple[str, str]:  # the same for all names of one storage
        return pair.base.aliases.get(name, name), pair.trained.aliases.get(trained_name, trained_name)

    record_of = {key(r.name, r.trained_name): r for r in records if r.how in ("exact", "prefix")}
    tensors: list[Row] = []
    svds: list[Row] = []
    bases: list[Row] = []
    masks: list[Row] = []
    failed: list[Row] = []
    for name, trained_name in matched:
        base, trained = pair.base.tensors[name], pair.trained.tensors[trained_name]
        record = record_of.get(key(name, trained_name))
        if base.shape != trained.shape:
            shapes = {"src_shape": list(base.shape), "opd_shape": list(trained.shape)}
            report["shape_mismatched"].append({"src_name": name, "opd_name": trained_name, **shapes})
        elif base.dtype not in DTYPES or trained.dtype not in DTYPES:
            report["skipped_non_floating"] += 1
        elif record is None:
            why = "is a buffer" if is_buffer(name, base.shape) else "repeats another tensor, with which it is tied"
            failed.append(failure(name, "delta_metrics", f"NotCompared: {why}"))
        elif record.tally is None:
            failed.append(failure(name, "delta_metrics", record.failure))
        else:
            tally = record.tally
            tensors.append(tensor_row(name, base.shape, tally))
            if len(base.shape) == 2 and not tally.nonfinite:
                rows = [mask_row(name, base.shape, tally, atol) for atol in UPDATE_ATOLS]
                spectrum = spectra.get(record.index)
                if spectrum is not None and spectrum.masks.size:
                    rows = [row | principal_columns(spectrum, subset) for subset, row in enumerate(rows, 1)]
                masks += rows
                if spectrum is not None:
                    first = {"name": name, "shape": str(list(base.shape)), **place(name)}
                    bases.append(first | base_row(spectrum))
                    svds += [first | svd_row(spectrum)] if spectrum.method and spectrum.method != "topk" else []
            elif len(base.shape) == 2:
                failed.append(
                    failure(name, "mask_overlap", f"ValueError: {tally.nonfinite} coordinates are not finite")
                )
    return tensors, svds, bases, masks, failed


def failure(name: str, stage: str, error: str) -> Row:
    return {"name": name, "stage": stage, "error_message": error.split(": ", 1)[-1], "traceback_short": error}


def tensor_row(name: str, shape: tuple[int, ...], tally: SparseTally) -> Row:
    n = max(tally.numel, 1)
    base, trained, delta, absolute = TallyBatch([tally]).energies("visible")[:, 0].tolist()
    metrics = tensor_metrics(tally, "visible")
    largest = metrics["max_abs"] or 0.0
    if tally.nonfinite:
        base = trained = delta = absolute = largest = math.nan
    base_norm, delta_norm, base_rms = math.sqrt(base), math.sqrt(delta), math.sqrt(base / n)
    row: Row = {
        "name": name,
        "shape": str(list(shape)),
        "ndim": len(shape),
        "numel": tally.numel,
        "analysis_dtype": "bfloat16",
        **place(name),
        "src_fro_norm": base_norm,
        "opd_fro_norm": math.sqrt(trained),
        "delta_fro_norm": delta_norm,
        "relative_delta_fro": delta_norm / (base_norm + EPSILON),
        "delta_l2_norm": delta_norm,
        "delta_linf_norm": largest,
        "delta_mean_abs": absolute / n,
        "delta_rms": math.sqrt(delta / n),
        "src_rms": base_rms,
        "opd_rms": math.sqrt(trained / n),
        "has_nan_or_inf": tally.nonfinite > 0,
        "src_energy": base,
        "opd_energy": trained,
        "delta_energy": delta,
        "frac_delta_eq_0": below(tally, 1) / n,
    }
    for threshold, lt, close in zip(THRESHOLDS, BELOW, CLOSE, strict=True):
        pattern = to_bf16_bits(threshold)
        row[lt], row[close] = below(tally, pattern) / n, below(tally, pattern + 1) / n
    for tau, lt in zip(RELATIVE, BELOW_RMS, strict=True):
        row[lt] = math.nan if tally.nonfinite else below(tally, to_bf16_bits(tau * max(base_rms, EPSILON))) / n
    for p, top in zip(TOP_FRACTIONS, TOP, strict=True):
        share = metrics[f"top_energy_{ratio_label(p)}"]
        row[top] = math.nan if share is None or tally.nonfinite else share
    return row


def below(tally: SparseTally, pattern: int) -> int:
    """Number of coordinates whose visible |delta| has smaller bf16 bits."""
    return int(tally.hist_delta[: np.searchsorted(tally.bin_bits, pattern)].sum())


def mask_row(name: str, shape: tuple[int, ...], tally: SparseTally, atol: float) -> Row:
    """Overlap of the ceil(r n) smallest |W| with the coordinates with |delta| > atol, for every r."""
    changed = tally.table(HIST_BASE_OVER + UPDATE_ATOLS[atol])
    n, updates = tally.numel, int(changed.sum())
    row: Row = {
        "name": name,
        "shape": str(list(shape)),
        **place(name),
        "mask_overlap_mode": "exact",
        "update_mask_atol": atol,
        "numel": n,
        "update_count": updates,
        "update_density": updates / max(n, 1),
    }
    mask = near_zero(TallyBatch([tally]), changed, list(LOW))
    for low, size, both in zip(LOW.values(), mask.size[0].tolist(), mask.expected[0].tolist(), strict=True):
        density, overlap = size / max(n, 1), both / updates if updates else math.nan
        row[f"{low}_density"] = density
        row[f"{low}_update_overlap_ratio"] = overlap
        row[f"{low}_covered_by_update_ratio"] = both / size if size else math.nan
        row[f"{low}_enrichment_vs_random"] = overlap / (density + EPSILON)
    return row


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Mean over the rows with a value and a weight above 0; NaN if there are none."""
    used = ~np.isnan(values) & (weights > 0)
    return float((values[used] * weights[used]).sum() / weights[used].sum()) if used.any() else math.nan


def averages(rows: Sequence[Row]) -> dict[str, float]:
    numel, energy = column(rows, "numel"), column(rows, "delta_energy")
    by_numel = {name: weighted_mean(column(rows, name), numel) for name in BY_NUMEL}
    return by_numel | {name: weighted_mean(column(rows, name), energy) for name in TOP}


def total(rows: Sequence[Row], name: str) -> float:
    """The sum of the values that are not NaN."""
    return float(np.nansum(column(rows, name)))


def group(tensors: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Groups of tensors, sorted by energy of delta, largest first."""
    members: dict[tuple, list[Row]] = {}
    for row in tensors:
        members.setdefault(tuple(row[k] for k in keys), []).append(row)
    everything, groups = total(tensors, "delta_energy"), []
    for values in sorted(members):
        rows = members[values]
        delta, base = total(rows, "delta_energy"), total(rows, "src_energy")
        metrics = {
            "num_tensors": len(rows),
            "total_numel": sum(row["numel"] for row in rows),
            "total_delta_energy": delta,
            "delta_energy_share": delta / (everything + EPSILON),
            "total_src_energy": base,
            "group_relative_delta": math.sqrt(delta) / (math.sqrt(base) + EPSILON),
        }
        groups.append(dict(zip(keys, values, strict=True)) | metrics | averages(rows))
    return sorted(groups, key=lambda row: -row["total_delta_energy"])


def by_energy_share(tensors: Sequence[Row]) -> list[Row]:
    """The LARGEST_SHOWN tensors with the largest energy share, NaN last."""
    everything = total(tensors, "delta_energy")
    rows = [{**row, "delta_energy_share": row["delta_energy"] / (everything + EPSILON)} for row in tensors]
    return sorted(rows, key=lambda row: 1.0 if math.isnan(s := row["delta_energy_share"]) else -s)[:LARGEST_SHOWN]


def summarise(
    tensors: list[Row], masks: list[Row], groups: dict[str, list[Row]], largest: list[Row], report: dict, failed: list
) -> dict[str, Any]:
    norm = {side: math.sqrt(total(tensors, f"{side}_energy")) for side in ("src", "opd", "delta")}
    summary: dict[str, Any] = {
        "total_tensors_analyzed": len(tensors),
        "total_parameters_analyzed": sum(row["numel"] for row in tensors),
        "analysis_dtype": "bfloat16",
        "total_source_norm": norm["src"],
        "total_opd_norm": norm["opd"],
        "total_delta_norm": norm["delta"],
        "global_relative_delta_norm": norm["delta"] / (norm["src"] + EPSILON),
        "top_10_layers_by_delta_energy_share": groups["layer_summary"][:10],
        "top_10_module_types_by_delta_energy_share": groups["module_summary"][:10],
        "top_20_tensors_by_delta_energy_share": largest[:20],
        "warnings": {
            "mismatched_tensors": len(report["shape_mismatched"]),
            "missing_in_src": len(report["missing_in_src"]),
            "missing_in_opd": len(report["missing_in_opd"]),
            "skipped_tensors": report["skipped_non_floating"],
            "failed_tensors": len(failed),
            "skipped_mask_overlap_tensors": 0,
            "extra": [],
        },
        **{f"global_{name}": value for name, value in averages(tensors).items()},
    }
    centres: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "median": np.median}
    for atol in UPDATE_ATOLS:
        rows = [row for row in masks if row["update_mask_atol"] == atol and row["update_count"]]
        suffix = f"update_atol_{threshold_label(atol) if atol else '0'}"
        for low in LOW.values() if rows else ():
            for metric in ("update_overlap_ratio", "enrichment_vs_random"):
                values = column(rows, f"{low}_{metric}")
                for centre, of in centres.items():
                    summary[f"{centre}_{low}_{metric}_{suffix}"] = float(of(values))
                if metric == "update_overlap_ratio":
                    weighted = weighted_mean(values, column(rows, "update_count"))
                    summary[f"update_weighted_mean_{low}_{metric}_{suffix}"] = weighted
    return summary
