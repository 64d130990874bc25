"""`lineage`: which of several checkpoints another one was trained from, from a sample of their tensors."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.match import match
from opdkernels.checkpoint.open import open_checkpoint, repeated_path
from opdkernels.config import LineageOptions
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.metrics.distance import sampled_distance
from opdkernels.metrics.verdict import UNRELATED


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
        relative_norm: as in `opdkernels.metrics.distance.Distance`; bit_equal: fraction of sampled coordinates with the
        same bits; compared: fraction of the child's parameters that match; sampled: number of sampled coordinates;
        plausible: whether this can be the base.
    """
    pair = match(base, child)
    sample = sampled_distance(pair)
    if sample.relative_norm is None:
        raise InputError(f"{base.path} is 0, NaN or Inf in every sampled coordinate; give another candidate")
    coverage = pair.coverage
    return {
        "relative_norm": sample.relative_norm,
        "bit_equal": sample.bit_equal / sample.sampled,
        "compared": coverage.fractions["trained"],
        "sampled": sample.sampled,
        "plausible": coverage.sufficient and sample.relative_norm < UNRELATED,
    }
