"""Compares `--authors-csv` with the output of the authors' own script, column by column, on pairs of checkpoints.

    python benchmarks/authors_parity.py CHECKOUT PYTHON FOLDER [SOURCE TRAINED ...]

FOLDER receives two synthetic pairs (bf16 with the shapes of Qwen2.5-0.5B, two layers; small fp32) and every output; more
pairs may follow. Prints, for each file and column of each pair, the largest relative difference, and exits with 1 where
a column is beyond its limit: equal for fractions of coordinates, 1e-5 for the rest; masks differ by how ties are broken, and
base geometry by the rounding of their fp32 SVDs where the update is small.
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

FILES = ("tensor_metrics", "svd_metrics", "base_geometry_metrics", "mask_overlap_metrics")
LIMIT = 1e-5
NOISY = 1e-2  # drift of the spectrum below which their fp32 SVDs are rounding noise (fp64 SVD: theirs are off by 1e-3, ours by 1e-7)


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
    return [(folder / "bf16" / "source", folder / "bf16" / "run_a"), (folder / "fp32" / "source", folder / "fp32" / "trained")]


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


def compare(name: str, ours: Path, theirs: Path) -> int:
    wrong = 0
    for file in FILES:
        mine, yours = rows(ours / f"{file}.csv"), rows(theirs / f"{file}.csv")
        if mine.keys() != yours.keys():
            print(f"{name} {file}: other rows, {len(mine)} and {len(yours)}; only one has {sorted(mine.keys() ^ yours.keys(), key=str)[:3]}")
            wrong += not file.startswith(("svd", "base"))
        shared = mine.keys() & yours.keys()
        columns = list(next(iter(yours.values()), {}))
        missing = [c for c in columns if c not in next(iter(mine.values()), {})]
        if missing:
            print(f"{name} {file}: we lack {len(missing)} columns: {missing[0]}, …")
        for column in columns:
            if column in missing:
                continue
            worst = max((difference(mine[key][column], yours[key][column]) for key in shared), default=0.0)
            ties = file.startswith("mask") and column not in ("update_density", "update_count")
            noise = "drift" in column or (file.startswith("base") and float(np.median([abs(mine[key].get("spectral_drift_l2_ratio") or 1) for key in shared])) < NOISY)
            bad = worst > (0 if exact(column) else LIMIT) and not ties and not noise
            wrong += bad
            if worst > 0:
                print(f"{name} {file}.{column}: {worst:.2g}{'  beyond the limit' if bad else '  (ties)' if ties else '  (their fp32)' if noise and worst > LIMIT else ''}")
    return wrong


def main() -> int:
    checkout, python, folder, *given = sys.argv[1:]
    pairs = write_pairs(Path(folder)) + [(Path(a), Path(b)) for a, b in zip(given[::2], given[1::2], strict=True)]
    wrong = 0
    for i, (source, trained) in enumerate(pairs):
        ours, theirs = Path(folder) / f"ours{i}", Path(folder) / f"theirs{i}"
        script = [python, f"{checkout}/scripts/analyze_opd_delta.py", "--src_model", source, "--opd_model", trained, "--out_dir", theirs]
        subprocess.run([*map(str, script), "--device", "cpu"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        command = [sys.executable, "-m", "opdkernels", "analyze", source, trained, "-o", ours, "--authors-csv", "--overwrite", "-q", "--no-report"]
        subprocess.run(list(map(str, command)), check=True)
        wrong += compare(f"{source.parent.name}:", ours, theirs)
    print("beyond the limit:", wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
