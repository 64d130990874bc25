"""Two checkpoints, matched tensor by tensor from their headers: what is compared with what, and what is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdkernels.checkpoint import fused
from opdkernels.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.tied import Side, drop_tied, unpaired_heads
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Match:
    """Flat elements [base_start, base_start + numel) of one tensor against as many of another.

    `name` is the source's name, or the split side's where one side is fused; `how` is "exact", "prefix", "fused",
    "common rows" (of a resized vocabulary) or "tied" (an embedding against the head that is the same matrix).
    """

    name: str
    trained_name: str
    base: TensorInfo
    trained: TensorInfo
    numel: int
    shape: tuple[int, ...]
    base_start: int
    trained_start: int
    match_kind: str


@dataclass(frozen=True)
class Unmatched:
    """A tensor, or the added rows of one, that is compared with nothing, and why.

    `kind` is "missing" on the other side, "shape", "rows" added to a vocabulary, "dtype" without a delta, or "shard",
    the file that would hold it being absent (its shape is not known then).
    """

    side: str
    name: str
    reason: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    kind: str = "missing"


@dataclass
class Pair:
    """Two open checkpoints and what was found in both, in the source's file order."""

    base: Checkpoint
    trained: Checkpoint
    matches: list[Match]
    unmatched: list[Unmatched] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The bytes of both sides that reading every match takes."""
        return sum(m.numel * (ITEM_BYTES[m.base.dtype] + ITEM_BYTES[m.trained.dtype]) for m in self.matches)

    def read(self, match: Match, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements [start, stop) of a match on both sides, 1-D, in the stored dtypes; valid until the next read of this thread."""
        source = self.base.read(match.base.name, match.base_start + start, match.base_start + stop)
        trained = self.trained.read(match.trained.name, match.trained_start + start, match.trained_start + stop)
        return source, trained

    def check(self) -> None:
        """Raises InputError if a file of either side changed since it was opened."""
        self.base.check()
        self.trained.check()

    def close(self) -> None:
        """Closes both sides."""
        self.base.close()
        self.trained.close()


def open_pair(source: str | os.PathLike[str], trained: str | os.PathLike[str], **options: Any) -> Pair:
    """Opens and matches two checkpoints; `options` are those of `open_checkpoint`, for both.

    Raises InputError, before any tensor is read, where a side cannot be read, nothing matches, or a name is ambiguous.
    """
    first = open_checkpoint(source, **options)
    try:
        second = open_checkpoint(trained, **options)
    except BaseException:
        first.close()
        raise
    try:
        return match(first, second)
    except BaseException:
        first.close()
        second.close()
        raise


def match(source: Checkpoint, trained: Checkpoint) -> Pair:
    """Matches by exact name, by name without wrapper prefixes, and fused against split; every coordinate at most once.

    Raises InputError where a name has several candidates, or nothing at all matches.
    """
    a, b = Side("source", source, dict(source.tensors)), Side("trained", trained, dict(trained.tensors))
    pair = Pair(source, trained, [])
    for side in (a, b):
        pair.unmatched.extend(_without_delta(side))
    pair.tied = drop_tied(a, b, pair.notes)
    for name, trained_name, how in _same_names(a, b):
        _compare(pair, a.rest.pop(name), b.rest.pop(trained_name), how)
    for side, other in ((a, b), (b, a)):
        _match_fused(pair, side, other)
    for side, other in ((a, b), (b, a)):
        pair.unmatched.extend(_left_over(side, other))
    order = {name: index for index, name in enumerate(source.tensors)}
    pair.matches.sort(key=lambda m: (order[m.base.name], m.base_start))
    if not pair.matches:
        raise InputError(_nothing(pair))
    pair.notes.extend(_remarks(pair.matches))
    return pair


def _without_delta(side: Side) -> Iterator[Unmatched]:
    for name, info in list(side.rest.items()):
        if info.dtype not in DTYPES:
            del side.rest[name]
            reason = f"{printable(info.dtype)} is no floating dtype that has a delta"
            yield _unmatched(side.label, info, reason, "dtype")


def _same_names(a: Side, b: Side) -> Iterator[tuple[str, str, str]]:
    """Pairs of names, and how: those that are equal, then those whose keys are, then an embedding with a tied head."""
    for name in [name for name in a.rest if name in b.rest]:
        yield name, name, "exact"
    keys_a, keys_b = _by_key(a), _by_key(b)
    for key, names in keys_a.items():
        others = keys_b.get(key, [])
        if len(names) == 1 and len(others) == 1:
            yield names[0], others[0], "prefix"
        elif others:
            raise InputError(
                f"{printable(key)} is ambiguous: {', '.join(map(printable, names))} in {printable(a.checkpoint.path)} may"
                f" each be {' or '.join(map(printable, others))} in {printable(b.checkpoint.path)}; rename one of them"
            )
    lone = unpaired_heads(a, b)
    if lone is not None:
        yield lone[0], lone[1], "tied"


def _by_key(side: Side) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for name in side.rest:
        keys.setdefault(fused.key(name), []).append(name)
    return keys


def _compare(pair: Pair, one: TensorInfo, other: TensorInfo, how: str) -> None:
    """Two tensors of one name: a match, a match of the common rows, or a mismatch of shapes."""
    if one.shape == other.shape:
        pair.matches.append(Match(one.name, other.name, one, other, one.numel, one.shape, 0, 0, how))
        return
    rows = min(one.shape[:1] + other.shape[:1], default=0)
    same_columns = len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]
    if same_columns and rows > 0 and _in_vocabulary(one.name):
        longer, side = (one, "source") if one.shape[0] > other.shape[0] else (other, "trained")
        shape, numel = (rows, *one.shape[1:]), min(one.numel, other.numel)
        pair.matches.append(Match(one.name, other.name, one, other, numel, shape, 0, 0, "common rows"))
        added = longer.shape[0] - rows
        reason = f"{added} rows beyond the vocabulary of {rows} that both have"
        extra = (added, *longer.shape[1:])
        pair.unmatched.append(
            Unmatched(side, longer.name, reason, extra, longer.dtype, longer.numel - numel, kind="rows")
        )
        return
    reason = f"shape {list(one.shape)} in the source against {list(other.shape)} in the trained checkpoint"
    if len(one.shape) == 2 and one.shape == other.shape[::-1]:
        reason += "; it fits transposed: transpose it on one side"
    pair.unmatched.append(_unmatched("source", one, reason, "shape"))
    pair.unmatched.append(_unmatched("trained", other, reason, "shape"))


def _in_vocabulary(name: str) -> bool:
    where = parse_tensor_name(name)
    words = where.module == "embed_tokens" or where.block == "lm_head"
    return words and where.tower == "language"


def _match_fused(pair: Pair, side: Side, other: Side) -> None:
    """Matches what is fused in `side` and split in `other`."""
    # A key that two tensors share could be either: it stands for none.
    keys = {key: other.rest[names[0]] for key, names in _by_key(other).items() if len(names) == 1}
    for whole in list(side.rest.values()):
        parts = fused.split(whole, keys)
        if isinstance(parts, str):
            side.reasons[whole.name] = printable(parts)
        if not isinstance(parts, list):
            continue
        del side.rest[whole.name]
        for part, start in parts:
            del other.rest[part.name]
            del keys[fused.key(part.name)]
            if side.label == "source":
                found = Match(part.name, part.name, whole, part, part.numel, part.shape, start, 0, "fused")
            else:
                found = Match(part.name, whole.name, part, whole, part.numel, part.shape, 0, start, "fused")
            pair.matches.append(found)


def _left_over(side: Side, other: Side) -> Iterator[Unmatched]:
    absent = {fused.key(name): shard for name, shard in other.checkpoint.missing.items()}
    for name, info in side.rest.items():
        reason = side.reasons.get(name, f"not in the {other.label} checkpoint")
        kind = "missing"
        if name in other.tied_to:
            keeper = printable(other.tied_to[name])
            reason = f"the {other.label} checkpoint holds it as one with {keeper}, which is compared"
        elif fused.key(name) in absent:
            reason = f"in {printable(absent[fused.key(name)])} of the {other.label} checkpoint, which is missing"
            kind = "shard"
        yield _unmatched(side.label, info, reason, kind)
    for name, shard in side.checkpoint.missing.items():
        yield Unmatched(side.label, name, f"in {printable(shard)}, which is missing", (), "", 0, kind="shard")


def _unmatched(side: str, info: TensorInfo, reason: str, kind: str) -> Unmatched:
    return Unmatched(side, info.name, reason, info.shape, info.dtype, info.numel, kind)


def _nothing(pair: Pair) -> str:
    paths = f"{printable(pair.base.path)} and {printable(pair.trained.path)}"
    for entry in pair.unmatched:
        if entry.kind in ("shape", "dtype"):
            return (
                f"{paths} have nothing that can be compared: {printable(entry.name)}: {entry.reason};"
                " give two checkpoints of one model"
            )
    names = [printable(next(iter(side.tensors), "none")) for side in (pair.base, pair.trained)]
    return f"{paths} have no tensor in common ({names[0]} against {names[1]}); give two checkpoints of one model"


def _remarks(matches: list[Match]) -> Iterator[str]:
    """What a reader of the figures should know of how they were matched."""
    counts: dict[tuple[str, str], int] = {}
    for m in matches:
        if m.base.dtype != m.trained.dtype:
            counts[m.base.dtype, m.trained.dtype] = counts.get((m.base.dtype, m.trained.dtype), 0) + 1
    for (one, other), count in counts.items():
        yield f"{count} tensors are {one} in the source and {other} in the trained checkpoint"
    for how, text in (("prefix", "matched under other names"), ("fused", "matched as parts of fused ones")):
        found = [m for m in matches if m.match_kind == how]
        if found:
            names = f"{printable(found[0].base.name)} with {printable(found[0].trained.name)}"
            yield f"{len(found)} tensors were {text}, as {names}"
