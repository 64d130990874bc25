"""Runs one stage of the paper's reference scripts from a checkout; prints its seconds and a result to compare.

python benchmarks/paper_csv_stage.py CHECKOUT elementwise SOURCE TRAINED THREADS python benchmarks/paper_csv_stage.py
CHECKOUT overlap SOURCE RUN_A RUN_B THREADS python benchmarks/paper_csv_stage.py CHECKOUT everything:PART SOURCE
TRAINED THREADS   (tensors whose names contain PART)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch


def everything(script, name: str, source: torch.Tensor, trained: torch.Tensor) -> float:
    """What their main() makes of one tensor; the spectral norm of delta to compare."""
    script.compute_tensor_metrics(name, source, trained, torch.bfloat16)
    source, trained, delta = script.cast_for_delta(source, trained, torch.bfloat16, torch.device("cpu"))
    wide, change = source.float(), delta.float()
    row = script.compute_svd_metrics(name, change, torch.device("cpu"), 4096, 64, None)
    script.compute_base_geometry_metrics(name, wide, wide + change, torch.device("cpu"), 4096)
    script.compute_coordinate_mask_overlap_metrics_for_thresholds(name, wide, change, torch.device("cpu"), 4096)
    return row["spectral_norm"] if row else 0.0


def main() -> None:
    checkout, stage, *paths, threads = sys.argv[1:]
    sys.path.insert(0, str(Path(checkout) / "scripts"))
    torch.set_num_threads(int(threads))
    import analyze_opd_delta as script

    stores = [script.load_tensor_map(Path(path)) for path in paths]
    names = stores[0].keys()
    for store in stores:  # warm: the files in memory
        for name in names:
            store.get(name).sum()
    started, total = time.perf_counter(), 0
    with torch.inference_mode():
        for name in names:
            tensors = [store.get(name) for store in stores]
            if stage == "elementwise":
                row = script.compute_tensor_metrics(name, *tensors, torch.bfloat16)
                total += round(row["frac_delta_eq_0"] * row["numel"])
            elif stage.startswith("everything:"):
                if stage.split(":")[1] in name:
                    total += everything(script, name, *tensors)
            else:
                base, a, b = tensors
                mask_a, mask_b = (a - base).abs() > 1e-5, (b - base).abs() > 1e-5
                both, either = mask_a & mask_b, mask_a | mask_b
                total += torch.count_nonzero(both).item()
                for mask in (mask_a, mask_b, either):  # the counts that their loop makes of each tensor
                    torch.count_nonzero(mask).item()
    print(json.dumps({"seconds": time.perf_counter() - started, "found": total}))


main()
