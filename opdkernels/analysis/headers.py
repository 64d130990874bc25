"""`inspect`: the content of checkpoints and the cost of analysing a pair, from headers alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from opdkernels.analysis.matrices import matrices, views_of
from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.match import EXCLUDED_KINDS, ITEM_BYTES, Pair, match
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.config import AnalyzeOptions, validate_options

FIXED_MEMORY_BYTES = 40 * 10**6  # tables of the kernels and pending records
ASSUMED_FLOPS_S = 40e9  # fp64 matrix products of one core with AVX2
ASSUMED_PAIRS_S = 0.5e9  # coordinates per second and core, a cautious value for any instruction set with vectors


def rough_duration(seconds: float) -> str:
    """An estimated duration, two significant digits.

    >>> rough_duration(7000)
    '1.9 h'
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Path, format, sizes and dtypes of an open checkpoint."""
    tensors = checkpoint.tensors.values()
    return {
        "path": checkpoint.path,
        "kind": checkpoint.kind,
        "files": len(checkpoint.files),
        "bytes": sum(file.bytes for file in checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel for tensor in tensors if tensor.name not in checkpoint.aliases),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
        "missing": sorted(checkpoint.missing),
    }


def inspect(
    a: str,
    b: str | None = None,
    *,
    memory: str | int = "4GB",
    io: str = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    paper_csv: bool = False,
) -> dict[str, Any]:
    """Inspects one checkpoint, or a pair of checkpoints, reading headers only.

    Args:
        a: A folder, a file or a hub id.
        b: A second checkpoint to match with the first.
        memory: Memory limit that the plan assumes, in bytes or such as "2GB".
        io: How files are read: "auto", "mmap" or "read".
        revision: Revision of hub ids.
        allow_missing: Continue without shards that the index lists but the folder does not contain.
        paper_csv: Plan an analysis that also writes the files of the paper's reference script.

    Returns:
        Format, dtypes and sizes of "a" (and "b"); for a pair also what matches, what does not, and under "plan" the
        bytes, memory and time that `analyze` would take.

    Raises:
        InputError: A checkpoint cannot be read.
        UsageError: An option is invalid.
    """
    options = {"memory": memory, "io": io, "revision": revision, "allow_missing": allow_missing, "paper_csv": paper_csv}
    analyze_options = validate_options(AnalyzeOptions, options)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(open_checkpoint(a, **analyze_options.open_kwargs)))
        content: dict[str, Any] = {"a": describe_checkpoint(first)}
        if b is None:
            return content
        second = stack.enter_context(contextlib.closing(open_checkpoint(b, **analyze_options.open_kwargs)))
        content["b"] = describe_checkpoint(second)
        return content | describe_match(match(first, second), analyze_options)


def describe_match(pair: Pair, options: AnalyzeOptions) -> dict[str, Any]:
    """What matches, what does not, and the planned cost of `analyze`."""
    coordinates = sum(match.numel for match in pair.matches)
    sizes = (match.numel * (ITEM_BYTES[match.base.dtype] + ITEM_BYTES[match.trained.dtype]) for match in pair.matches)
    return {
        "matched": len(pair.matches),
        "how": dict(Counter(match.match_kind for match in pair.matches)),
        "coordinates": coordinates,
        "coverage": pair.coverage.to_dict(),
        "unmatched": [vars(tensor) | {"shape": list(tensor.shape)} for tensor in pair.unmatched],
        "excluded": [tensor.name for tensor in pair.unmatched if tensor.kind in EXCLUDED_KINDS],
        "tied": pair.tied,
        "buffers": [vars(buffer) for buffer in pair.buffers],
        "notes": pair.notes,
        "plan": {
            "bytes": pair.nbytes,
            "memory_bytes": FIXED_MEMORY_BYTES + min(max(sizes, default=0), options.memory // 2),
            "seconds_one_core": round(coordinates / ASSUMED_PAIRS_S, 2),
            "spectra": plan_spectra(pair, options),
        },
    }


def plan_spectra(pair: Pair, options: AnalyzeOptions) -> dict[str, Any]:
    """The cost of exact spectra: floating-point operations, seconds on one core, bytes of the largest matrix, and how
    many matrices need more memory than is allowed."""
    planned = [(matrix, len(views_of(matrix.match, options.paper_csv))) for matrix in matrices(pair)]
    flops = sum(matrix.cost * views for matrix, views in planned)
    return {
        "matrices": len(planned),
        "flops": flops,
        "seconds_one_core": round(flops / ASSUMED_FLOPS_S, 1),
        "memory_bytes": max((matrix.memory for matrix, _ in planned), default=0),
        "beyond_memory": sum(matrix.memory > options.memory for matrix, _ in planned),
    }
