"""`lineage`: which of several checkpoints another one was trained from, from a sample of their tensors."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.match import Pair, match
from opdkernels.checkpoint.open import open_checkpoint, repeated_path
from opdkernels.config import LineageOptions
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.metrics.verdict import UNRELATED
from opdkernels.ops.delta import delta, exact_float

MAX_TENSORS = 32  # sampled tensors, evenly over the file: first and last layers change differently
SLICE = 1 << 14  # elements of one sampled slice
MAX_SLICES = 4  # slices per tensor


def rank_candidates(
    child: str | os.PathLike[str], candidates: Sequence[str | os.PathLike[str]], options: LineageOptions
) -> dict[str, Any]:
    """`opdkernels.lineage`."""
    paths = [os.fspath(path) for path in candidates]
    if len(paths) < 1:
        raise UsageError("lineage takes a checkpoint and one or more candidates for its base")
    rows = []
    with contextlib.closing(open_checkpoint(child, **options.open_kwargs)) as trained:
        if repeated := repeated_path(paths):
            raise UsageError(f"{printable(repeated[0])} and {printable(repeated[1])} are one candidate; give it once")
        if repeated := repeated_path([os.fspath(child), *paths]):
            raise UsageError(
                f"{printable(repeated[1])} is the trained checkpoint itself; give other checkpoints as candidates"
            )
        for path in paths:
            try:
                with contextlib.closing(open_checkpoint(path, **options.open_kwargs)) as base:
                    rows.append({"path": path, **distance(base, trained), "reason": ""})
            except InputError as error:
                unknown = dict.fromkeys(("relative_norm", "bit_equal", "compared", "sampled"))
                rows.append({"path": path, **unknown, "plausible": False, "reason": str(error)})
    order = sorted(rows, key=lambda row: (not row["plausible"], *nearness(row)))
    best = order[0]["path"] if order[0]["plausible"] else None
    return {"child": os.fspath(child), "base": best, "candidates": order}


def nearness(row: dict[str, Any]) -> tuple[float, float]:
    """What candidates are ranked by: the distance, then the fraction of different bits."""
    if row["relative_norm"] is None:
        return math.inf, math.inf
    return row["relative_norm"], 1 - row["bit_equal"]


def distance(base: Checkpoint, child: Checkpoint) -> dict[str, Any]:
    """Distance of two open checkpoints from a sample of the matched tensors.

    Returns:
        relative_norm: ||child - base|| / ||base||, the median over sampled tensors weighted by their size; bit_equal:
        fraction of sampled coordinates with the same bits; compared: fraction of the child's parameters that match;
        sampled: number of sampled coordinates; plausible: whether this can be the base.
    """
    pair = match(base, child)
    tallies = [sampled_tally(pair, index) for index in sample_of(pair)]
    norms, weights, equal, total = [], [], 0, 0
    for size, tally in tallies:
        equal, total = equal + tally.bit_equal, total + tally.numel
        base_norm = exact_float(tally.sum_base_sq)
        if base_norm > 0 and tally.nonfinite == 0:
            norms.append(math.sqrt(exact_float(tally.sum_delta_sq) / base_norm))
            weights.append(size)
    if not norms:
        raise InputError(f"{base.path} has no tensor with finite values to compare; give another candidate")
    order = np.argsort(norms)
    below = np.cumsum(np.array(weights, float)[order])
    relative_norm = float(np.array(norms)[order][np.searchsorted(below, below[-1] / 2)])
    coverage = pair.coverage
    return {
        "relative_norm": relative_norm,
        "bit_equal": equal / total,
        "compared": coverage.fractions["trained"],
        "sampled": total,
        "plausible": coverage.sufficient and relative_norm < UNRELATED,
    }


def sample_of(pair: Pair) -> list[int]:
    """Indices of the sampled matches: matrices if there are any, evenly over the file."""
    usable = [i for i, m in enumerate(pair.matches) if m.numel and len(m.shape) > 1]
    usable = usable or [i for i, m in enumerate(pair.matches) if m.numel]
    count = min(MAX_TENSORS, len(usable))
    return [usable[i] for i in sorted({round(x) for x in np.linspace(0, len(usable) - 1, count)})] if count else []


def sampled_tally(pair: Pair, index: int) -> tuple[int, Any]:
    """Size of a match, and the tally of slices evenly over it."""
    matched = pair.matches[index]
    tally = None
    count = min(MAX_SLICES, -(-matched.numel // SLICE))
    for start in np.linspace(0, max(0, matched.numel - SLICE), count).astype(int).tolist():
        base, child = pair.read(matched, start, min(start + SLICE, matched.numel))
        tally = delta(base, child, out=tally)
    return matched.numel, tally
