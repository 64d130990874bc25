"""Compares `--paper-csv` with the output of the paper's reference script, column by column, on pairs of checkpoints.

    python benchmarks/paper_csv_parity.py CHECKOUT PYTHON FOLDER [SOURCE TRAINED ...]

FOLDER receives two synthetic pairs (bf16 with the shapes of Qwen2.5-0.5B, two layers; small fp32) and every output;
more pairs may follow. Prints, for each file and column of each pair, the largest relative difference, and exits with
1 where a column exceeds its limit: equal for fractions of coordinates, 1e-5 for the rest. Overlaps of masks must be
within the bounds of tie-breaking, except for coordinates whose scores the script's fp32 SVD moves across the
threshold. If base geometry differs by more, both are compared with an fp64 SVD, and ours must be closer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import data
from opdkernels import load
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.compat.paper_csv.spectra import LABELS
from opdkernels.metrics.spectra import SpectrumRecord
from opdkernels.spectral.exact import RATIOS
from opdkernels.spectral.principal import COUNTS, THRESHOLDS

FILES = ("tensor_metrics", "svd_metrics", "base_geometry_metrics", "mask_overlap_metrics")
LIMIT = 1e-5
MASK_LIMIT = 1e-4  # of a mask's coordinates, or one: those that fp32 rounding may move across its threshold
LARGEST_SVD = 1 << 23  # coordinates of a matrix that is compared with fp64


def write_pairs(folder: Path) -> list[tuple[Path, Path]]:
    data.write(folder / "bf16", layers=2, vocabulary=4000)
    generator = torch.Generator().manual_seed(3)
    source = {
        "embed_tokens.weight": torch.randn(700, 96, generator=generator),
        "layers.0.q_proj.weight": torch.randn(96, 96, generator=generator) * 0.02,
        "layers.0.up_proj.weight": torch.randn(256, 96, generator=generator) * 0.02,
        "layers.0.down_proj.weight": torch.randn(96, 256, generator=generator) * 0.02,
        "layers.0.norm.weight": torch.ones(96),
    }
    moved = {name: w + 1e-4 * torch.randn(w.shape, generator=generator) for name, w in source.items()}
    for name, tensors in (("source", source), ("trained", moved)):
        (folder / "fp32" / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "fp32" / name / "model.safetensors")
    return [
        (folder / "bf16" / "source", folder / "bf16" / "run_a"),
        (folder / "fp32" / "source", folder / "fp32" / "trained"),
    ]


def rows(path: Path) -> dict[tuple, dict]:
    table = pyarrow.csv.read_csv(path).to_pylist() if path.exists() and path.stat().st_size > 1 else []
    return {(row["name"], row.get("update_mask_atol")): row for row in table}


def exact(column: str) -> bool:
    return column.startswith(("frac_", "rank_tol")) or column.endswith(("_count", "numel", "ndim", "has_nan_or_inf"))


def difference(ours: object, theirs: object) -> float:
    if ours in (None, "") and theirs in (None, ""):
        return 0.0
    if isinstance(ours, str | bool) or isinstance(theirs, str | bool) or ours is None or theirs is None:
        return 0.0 if ours == theirs else np.inf
    if ours == theirs or (np.isnan(ours) and np.isnan(theirs)):  # type: ignore[call-overload]
        return 0.0
    return abs(ours - theirs) / max(abs(ours), abs(theirs))  # type: ignore[operator, arg-type, type-var]


def tie_bounds(record: SpectrumRecord, ratio: int, subset: int) -> dict[str, tuple[float, float]]:
    """Least and greatest count of each mask within a subset, over all ways to break ties at the thresholds."""
    count = dict(zip(COUNTS, record.masks[ratio, subset].tolist(), strict=True))
    every = dict(zip(COUNTS, record.masks[ratio, 0].tolist(), strict=True))
    _, taken, low_taken = record.mask_sizes[ratio].tolist()

    def one(sure: str, tied: str, taken: int) -> tuple[int, int]:
        return count[sure] + max(0, taken - (every[tied] - count[tied])), count[sure] + min(taken, count[tied])

    apart = count["principal"] - count["both"] - count["principal_and_low_tied"]
    least = apart + max(0, count["principal_and_low_tied"] - low_taken)
    most = (
        apart
        + min(count["principal_and_low_tied"], every["low_tied"] - low_taken)
        + min(taken, count["principal_tied"] - count["principal_tied_and_low"])
    )
    return {
        "principal": one("principal", "principal_tied", taken),
        "low_magnitude": one("low", "low_tied", low_taken),
        "principal_not_low": (least, most),
        "nonprincipal_or_low": (count["total"] - most, count["total"] - least),
    }


def compare_masks(name: str, ours: Path, theirs: Path) -> int:
    """How many of their overlaps lie between the bounds, and by what share of the mask the others lie outside."""
    result = load(ours)
    index = {record.name: record.index for record in result.records}
    records = {
        record.index: record for record in result.spectrum_records if record.view == "visible" and record.masks.size
    }
    inside, outside, worst, wrong = 0, 0, 0.0, 0
    for (tensor, atol), row in rows(theirs / "mask_overlap_metrics.csv").items():
        record = records.get(index[tensor])
        if record is None or not row.get("principal_1pct_density"):
            continue
        for i, label in enumerate(LABELS):
            for mask, (least, most) in tie_bounds(record, i, 1 + THRESHOLDS.index(float(atol))).items():
                overlap = row[f"{mask}_{label}_update_overlap_ratio"]
                if overlap in (None, "") or np.isnan(overlap):
                    continue
                shared = round(overlap * row["update_count"])
                size, beyond = record.mask_sizes[i, 0], max(least - shared, shared - most, 0)
                inside, outside, worst = inside + (beyond == 0), outside + (beyond > 0), max(worst, beyond / size)
                wrong += beyond > max(1, MASK_LIMIT * size)
    print(
        f"{name} overlaps of masks: {inside} within the bounds of ties, {outside} outside by at most {worst:.1g} "
        "of the mask (fp32 SVD of the script)"
    )
    return wrong


def truth(source: torch.Tensor, trained: torch.Tensor) -> dict[str, float]:
    """Base geometry of the visible view by SVDs in fp64, as their script defines it."""
    w = source.bfloat16().double()
    d = (trained.bfloat16().float() - source.bfloat16().float()).bfloat16().double()
    (u, s, vh), (u2, s2, _) = (torch.linalg.svd(x, full_matrices=False) for x in (w, w + d))
    energy, metrics = d.square().sum(), {}
    for ratio, label in zip(RATIOS, LABELS, strict=True):
        k = max(1, int(ratio * min(w.shape)))
        a, b = u[:, :k], vh[:k].T
        metrics[f"principal_projection_energy_ratio_{label}"] = (a.T @ d @ b).square().sum() / energy
        metrics[f"left_principal_projection_energy_ratio_{label}"] = (a.T @ d).square().sum() / energy
        metrics[f"right_principal_projection_energy_ratio_{label}"] = (d @ b).square().sum() / energy
        sines = torch.linalg.svdvals(u2[:, :k] - a @ (a.T @ u2[:, :k]))
        metrics[f"top_subspace_rotation_{label}"] = sines.mean()
    metrics["spectral_drift_l2_ratio"] = (s2 - s).norm() / s.norm()
    metrics["spectral_drift_to_delta_fro_ratio"] = (s2 - s).norm() / d.norm()
    return {column: float(value) for column, value in metrics.items()}


def compare_geometry(name: str, source: Path, trained: Path, our_rows: dict, their_rows: dict) -> int:
    """Columns of base geometry that differ: who is nearer to fp64, over matrices small enough for it."""
    sides = [open_checkpoint(path) for path in (source, trained)]
    off: dict[str, list[tuple[float, float]]] = {}
    for key in our_rows.keys() & their_rows.keys():
        info = sides[0].tensors.get(key[0])
        if info is None or info.numel > LARGEST_SVD or not our_rows[key].get("spectral_drift_l2_ratio"):
            continue
        exact = truth(*(side.read(key[0], 0, info.numel).view(info.shape) for side in sides))
        for column, value in exact.items():
            off.setdefault(column, []).append(
                (difference(our_rows[key][column], value), difference(their_rows[key][column], value))
            )
    wrong = 0
    for column, pairs in off.items():
        ours, theirs = (max(values) for values in zip(*pairs, strict=True))
        wrong += (bad := ours > LIMIT and ours > theirs)
        print(
            f"{name} base_geometry_metrics.{column}: error against fp64 {ours:.1g}, of the script {theirs:.1g}"
            f"{'  beyond the limit' if bad else ''}"
        )
    return wrong


def compare(name: str, ours: Path, theirs: Path, source: Path, trained: Path) -> int:
    wrong = compare_masks(name, ours, theirs)
    for file in FILES:
        our_rows, their_rows = rows(ours / f"{file}.csv"), rows(theirs / f"{file}.csv")
        if our_rows.keys() != their_rows.keys():
            print(
                f"{name} {file}: rows differ, {len(our_rows)} and {len(their_rows)}; "
                f"only one has {sorted(our_rows.keys() ^ their_rows.keys(), key=str)[:3]}"
            )
            wrong += not file.startswith(("svd", "base"))
        if file.startswith("base"):
            wrong += compare_geometry(name, source, trained, our_rows, their_rows)
            continue
        shared = our_rows.keys() & their_rows.keys()
        columns = list(next(iter(their_rows.values()), {}))
        missing = [c for c in columns if c not in next(iter(our_rows.values()), {})]
        if missing:
            print(f"{name} {file}: we lack {len(missing)} columns: {missing[0]}, …")
        for column in columns:
            if column in missing:
                continue
            worst = max((difference(our_rows[key][column], their_rows[key][column]) for key in shared), default=0.0)
            ties = file.startswith("mask") and column not in ("update_density", "update_count")
            bad = worst > (0 if exact(column) else LIMIT) and not ties
            wrong += bad
            if worst > 0 and not ties:
                print(f"{name} {file}.{column}: {worst:.2g}{'  beyond the limit' if bad else ''}")
    return wrong


def main() -> int:
    checkout, python, folder, *given = sys.argv[1:]
    pairs = write_pairs(Path(folder)) + [(Path(a), Path(b)) for a, b in zip(given[::2], given[1::2], strict=True)]
    wrong = 0
    for i, (source, trained) in enumerate(pairs):
        ours, theirs = Path(folder) / f"ours{i}", Path(folder) / f"theirs{i}"
        script = [
            python,
            f"{checkout}/scripts/analyze_opd_delta.py",
            "--src_model",
            source,
            "--opd_model",
            trained,
            "--out_dir",
            theirs,
        ]
        subprocess.run(
            [*map(str, script), "--device", "cpu"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        command = [
            sys.executable,
            "-m",
            "opdkernels",
            "analyze",
            source,
            trained,
            "-o",
            ours,
            "--paper-csv",
            "--overwrite",
            "-q",
            "--no-report",
            "--memory",
            "8GB",
        ]
        subprocess.run(list(map(str, command)), check=True)
        wrong += compare(f"{source.parent.name}:", ours, theirs, source, trained)
    print("beyond the limit:", wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
