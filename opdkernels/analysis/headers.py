"""`inspect`: what a checkpoint holds and what analysing a pair would take, from headers alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from opdkernels.analysis.matrices import matrices, views_of
from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.match import ITEM_BYTES, Pair, match
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.config import AnalyzeOptions, validate_options
from opdkernels.errors import printable
from opdkernels.formatting import byte_size

FIXED_MEMORY_BYTES = 40 * 10**6  # tables of the kernels and of the records in flight
ASSUMED_FLOPS_S = 40e9  # fp64 matrix products of one core with AVX2
ASSUMED_PAIRS_S = 0.5e9  # coordinates a second and core, a cautious figure for any instruction set with vectors


def duration(seconds: float) -> str:
    """Time for people.

    >>> duration(7000)
    '1.9 h'
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def holdings(source: Checkpoint) -> dict[str, Any]:
    tensors = source.tensors.values()
    return {
        "path": source.path,
        "kind": source.kind,
        "files": len(source.files),
        "bytes": sum(fact.bytes for fact in source.files),
        "tensors": len(source.tensors),
        "parameters": sum(t.numel for t in tensors if t.name not in source.aliases),
        "dtypes": dict(Counter(t.dtype for t in tensors)),
        "missing": sorted(source.missing),
    }


def inspect(a: str, b: str | None = None, *, memory: str | int = "4GB", **options: Any) -> dict[str, Any]:
    """Formats, dtypes and sizes of one checkpoint; of two also what matches, what does not, and the planned bytes, memory
    and time of `analyze`. Reads headers only. Raises InputError as `analyze` would."""
    chosen = validate_options(AnalyzeOptions, {"memory": memory, **options})
    assert isinstance(chosen, AnalyzeOptions)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.closing(open_checkpoint(a, **chosen.open_kwargs)))
        found: dict[str, Any] = {"a": holdings(first)}
        if b is None:
            return found
        second = stack.enter_context(contextlib.closing(open_checkpoint(b, **chosen.open_kwargs)))
        found["b"] = holdings(second)
        pair = match(first, second)
        coordinates = sum(m.numel for m in pair.matches)
        largest = max(
            (m.numel * (ITEM_BYTES[m.base.dtype] + ITEM_BYTES[m.trained.dtype]) for m in pair.matches), default=0
        )
        found |= {
            "matched": len(pair.matches),
            "how": dict(Counter(m.match_kind for m in pair.matches)),
            "coordinates": coordinates,
            "unmatched": [vars(u) | {"shape": list(u.shape)} for u in pair.unmatched],
            "excluded": [u.name for u in pair.unmatched if u.kind in ("shape", "shard")],
            "tied": pair.tied,
            "notes": pair.notes,
            "plan": {
                "bytes": pair.nbytes,
                "memory_bytes": FIXED_MEMORY_BYTES + min(largest, chosen.memory // 2),
                "seconds_one_core": round(coordinates / ASSUMED_PAIRS_S, 2),
                "spectra": plan_spectra(pair, chosen),
            },
        }
        return found


def plan_spectra(pair: Pair, chosen: AnalyzeOptions) -> dict[str, Any]:
    """What exact spectra take: floating-point operations, time on one core, memory of the largest matrix, and how many
    matrices need more memory than is allowed."""
    wanted = [(matrix, len(views_of(matrix.match, chosen.paper_csv))) for matrix in matrices(pair)]
    flops = sum(matrix.cost * views for matrix, views in wanted)
    return {
        "matrices": len(wanted),
        "flops": flops,
        "seconds_one_core": round(flops / ASSUMED_FLOPS_S, 1),
        "memory_bytes": max((matrix.memory for matrix, _ in wanted), default=0),
        "beyond_memory": sum(matrix.memory > chosen.memory for matrix, _ in wanted),
    }


def format_text(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    text = []
    for side in ("a", "b"):
        if side in found:
            one = found[side]
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in one["dtypes"].items())
            text.append(f"{printable(one['path'])}: {one['kind']}, {one['files']} files, {byte_size(one['bytes'])}")
            text.append(f"  {one['tensors']} tensors ({dtypes}), {one['parameters']:,} parameters")
    if "plan" in found:
        how = ", ".join(f"{count} {way}" for way, count in found["how"].items())
        text.append(f"matched: {found['matched']} tensors ({how}), {found['coordinates']:,} coordinates")
        text += [
            f"not compared: {printable(u['name'])} ({u['side']}): {printable(u['reason'])}" for u in found["unmatched"]
        ]
        text += [f"tied, counted once: {printable(name)}" for name in found["tied"]]
        text += [f"note: {printable(note)}" for note in found["notes"]]
        plan = found["plan"]
        text.append(
            f"analyze would read {byte_size(plan['bytes'])}, hold up to {byte_size(plan['memory_bytes'])} beyond torch itself, "
            f"and take about {plan['seconds_one_core']:g} s on one core once the files are in memory"
        )
        spectra = plan["spectra"]
        if spectra["matrices"]:
            text.append(
                f"spectra of {spectra['matrices']} matrices: about {duration(spectra['seconds_one_core'])} more on one core "
                f"({spectra['flops']:.2g} operations), {byte_size(spectra['memory_bytes'])} for the largest; --spectra off leaves them out"
            )
        if spectra["beyond_memory"]:
            text.append(
                f"{spectra['beyond_memory']} matrices need more than the memory allowed; raise --memory, or take --spectra topk"
            )
    return text
