"""Matches two checkpoints tensor by tensor from their headers: what is compared with what, and what is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdkernels.checkpoint.base import DTYPES, Checkpoint, TensorInfo
from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.conversions import model_types_of
from opdkernels.checkpoint.correspondence import match_tensors
from opdkernels.checkpoint.coverage import Coverage
from opdkernels.checkpoint.equality import same_bits
from opdkernels.checkpoint.names import canonical_name, parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.tied import Side, drop_left_over_copies, drop_tied, unpaired_vocabulary
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

EXCLUDED_KINDS = ("shape", "shard", "untied")
"""Kinds of `Unmatched` that have a counterpart with which they are not compared: exit status 3."""

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


FLAT_PARAMETERS = frozenset({"_flat_param", "flat_param"})


@dataclass(frozen=True)
class Match:
    """Flat elements [base_start, base_start + numel) of a base tensor against as many of a trained tensor.

    Attributes:
        name: Name in the base; where one side is fused, the name of the split side.
        trained_name: Name in the trained checkpoint.
        base: Header entry of the base tensor.
        trained: Header entry of the trained tensor.
        numel: Number of compared elements.
        shape: Shape of the compared elements.
        base_start: First compared element of the base tensor.
        trained_start: First compared element of the trained tensor.
        match_kind: "exact", "prefix", "fused", "common rows" (of a resized vocabulary), or "tied" (an embedding against
            the head that is the same matrix).
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
    """A tensor, or the added rows of one, that is compared with nothing.

    Attributes:
        side: "base" or "trained".
        name: Name of the tensor.
        reason: Why it has no match, for messages.
        shape: Shape; empty if the shard is absent.
        dtype: Name of the dtype; empty if the shard is absent.
        numel: Number of elements; 0 if the shard is absent.
        kind: "missing" on the other side, "shape", "rows" added to a vocabulary, "dtype" without a delta, "shard" if
            the file that holds it is absent, or "untied" if it differs from the tensor to which it is tied.
    """

    side: str
    name: str
    reason: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    kind: str = "missing"


@dataclass(frozen=True)
class BufferMatch:
    """A buffer, which is no parameter and is left out of every metric.

    Attributes:
        name: Name in the base; in the trained checkpoint if the base does not have it.
        sides: "both", "base" or "trained".
        equal: Whether both sides have the same bits; None if one side does not have it, or has another shape or dtype.
        numel: Number of elements.
    """

    name: str
    sides: str
    equal: bool | None
    numel: int


@dataclass
class Pair:
    """Two open checkpoints and their matches, in the base's file order.

    Attributes:
        base: The checkpoint before training.
        trained: The checkpoint after training.
        matches: What is compared; every coordinate at most once.
        unmatched: What is not compared, and why.
        tied: Names of tensors that repeat another tensor and are counted once.
        notes: Remarks for the reader of the results.
        buffers: Constants and statistics that are no parameters.
    """

    base: Checkpoint
    trained: Checkpoint
    matches: list[Match]
    unmatched: list[Unmatched] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    buffers: list[BufferMatch] = field(default_factory=list)

    @property
    def coverage(self) -> Coverage:
        """How many of the parameters of each side are compared."""
        compared = sum(m.numel for m in self.matches)
        left = {side: [u for u in self.unmatched if u.side == side] for side in ("base", "trained")}
        return Coverage(
            compared,
            {side: compared + sum(tensor.numel for tensor in tensors) for side, tensors in left.items()},
            [side for side, tensors in left.items() if tensors],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of both sides that reading every match takes."""
        return sum(m.numel * (ITEM_BYTES[m.base.dtype] + ITEM_BYTES[m.trained.dtype]) for m in self.matches)

    def read(self, match: Match, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns elements [start, stop) of a match on both sides, 1-D, in the stored dtypes.

        The result is valid until the next read of the same thread.
        """
        base = self.base.read(match.base.name, match.base_start + start, match.base_start + stop)
        trained = self.trained.read(match.trained.name, match.trained_start + start, match.trained_start + stop)
        return base, trained

    def check(self) -> None:
        """Raises InputError if a file of either side changed since it was opened."""
        self.base.check()
        self.trained.check()

    def close(self) -> None:
        """Closes both sides."""
        self.base.close()
        self.trained.close()


def open_pair(base: str | os.PathLike[str], trained: str | os.PathLike[str], **options: Any) -> Pair:
    """Opens and matches two checkpoints.

    Args:
        base: The checkpoint before training: folder, file or hub id.
        trained: The checkpoint after training.
        **options: Options of `open_checkpoint`, for both.

    Returns:
        The open pair; close it after use.

    Raises:
        InputError: A side cannot be read, nothing matches, or a name is ambiguous. Raised before any tensor is read.
    """
    base_checkpoint = open_checkpoint(base, **options)
    try:
        trained_checkpoint = open_checkpoint(trained, **options)
    except BaseException:
        base_checkpoint.close()
        raise
    try:
        return match(base_checkpoint, trained_checkpoint)
    except BaseException:
        base_checkpoint.close()
        trained_checkpoint.close()
        raise


def match(base: Checkpoint, trained: Checkpoint) -> Pair:
    """Matches by exact name, by canonical name, and fused against split; every coordinate at most once.

    Reads headers, and the tensors that may be copies of another one, and buffers, to compare their bits.

    Args:
        base: The open checkpoint before training.
        trained: The open checkpoint after training.

    Returns:
        The pair; it closes both checkpoints when it is closed.

    Raises:
        InputError: A name has several candidates, or nothing matches.
    """
    a, b = Side("base", base, dict(base.tensors)), Side("trained", trained, dict(trained.tensors))
    pair = Pair(base, trained, [])
    pair.buffers = list(_take_buffers(a, b))
    _validate_dtypes(a, b)
    for side in (a, b):
        pair.unmatched.extend(_without_delta(side))
    drop_tied(a, b, pair.notes)
    _match_remaining(pair, a, b)
    for side in (a, b):
        drop_left_over_copies(side)
    pair.tied = list(dict.fromkeys([*a.tied_to, *b.tied_to]))
    for side, other in ((a, b), (b, a)):
        pair.unmatched.extend(_left_over(side, other))
    order = {name: index for index, name in enumerate(base.tensors)}
    pair.matches.sort(key=lambda m: (order[m.base.name], m.base_start))
    if not pair.matches:
        raise InputError(_no_match_message(pair))
    pair.notes.extend(_notes(pair.matches))
    return pair


def _validate_dtypes(a: Side, b: Side) -> None:
    """Raises InputError for a tensor of integers whose counterpart is floating: it is quantised."""
    for side, other in ((a, b), (b, a)):
        integers = {canonical_name(name): i for name, i in side.remaining.items() if i.dtype not in DTYPES}
        for name, info in other.remaining.items() if integers else ():
            quantised = integers.get(canonical_name(name))
            if quantised is not None and info.dtype in DTYPES:
                is_complex = quantised.dtype.startswith("c")
                remedy = "convert both to bf16" if is_complex else "one is quantised; dequantise it to bf16 first"
                raise InputError(
                    f"{printable(quantised.name)} is {printable(quantised.dtype)} in {printable(side.checkpoint.path)}"
                    f" and {info.dtype} in the other checkpoint: {remedy}"
                )


def _take_buffers(a: Side, b: Side) -> Iterator[BufferMatch]:
    """Removes the buffers of both sides and compares their bits."""
    taken: list[dict[str, TensorInfo]] = []
    for side in (a, b):
        buffers = [info for info in side.remaining.values() if is_buffer(info.name, info.shape, info.dtype)]
        taken.append({canonical_name(info.name): info for info in buffers})
        for info in buffers:
            del side.remaining[info.name]
    base, trained = taken
    for canonical, info in base.items():
        other = trained.get(canonical)
        if other is None:
            yield BufferMatch(info.name, "base", None, info.numel)
        else:
            comparable = (info.shape, info.dtype) == (other.shape, other.dtype)
            equal = same_bits(a.checkpoint, info, b.checkpoint, other) if comparable else None
            yield BufferMatch(info.name, "both", equal, info.numel)
    for canonical, info in trained.items():
        if canonical not in base:
            yield BufferMatch(info.name, "trained", None, info.numel)


def _without_delta(side: Side) -> Iterator[Unmatched]:
    for name, info in list(side.remaining.items()):
        if info.dtype not in DTYPES:
            del side.remaining[name]
            reason = f"{printable(info.dtype)} is no floating dtype that has a delta"
            yield _unmatched(side.label, info, reason, "dtype")


def _match_remaining(pair: Pair, a: Side, b: Side) -> None:
    """Matches by name, an embedding with the head that is the same matrix, and fused against split tensors."""
    shapes, trained_shapes = ({name: info.shape for name, info in side.remaining.items()} for side in (a, b))
    model_types = model_types_of(a.checkpoint.config, b.checkpoint.config)
    result = match_tensors(shapes, trained_shapes, model_types=model_types)
    if result.ambiguous:
        canonical, names, others = result.ambiguous[0]
        raise InputError(
            f"{printable(canonical)} is ambiguous: {', '.join(map(printable, names))} in"
            f" {printable(a.checkpoint.path)} may each be {' or '.join(map(printable, others))} in"
            f" {printable(b.checkpoint.path)}; rename one of them"
        )
    for name, trained_name, match_kind in result.pairs:
        _compare(pair, a.remaining.pop(name), b.remaining.pop(trained_name), match_kind)
    for part in result.parts:
        base, trained = a.checkpoint.tensors[part.name], b.checkpoint.tensors[part.other]
        split_name = base.name if base.numel == part.numel else trained.name
        pair.matches.append(
            Match(
                split_name, trained.name, base, trained, part.numel, part.shape, part.start, part.other_start, "fused"
            )
        )
        a.remaining.pop(part.name, None), b.remaining.pop(part.other, None)
    if (unpaired := unpaired_vocabulary(a, b)) is not None:
        _compare(pair, a.remaining.pop(unpaired[0]), b.remaining.pop(unpaired[1]), "tied")
    a.reasons |= {name: printable(reason) for name, reason in result.reasons.items()}
    b.reasons |= {name: printable(reason) for name, reason in result.other_reasons.items()}


def _compare(pair: Pair, base: TensorInfo, trained: TensorInfo, match_kind: str) -> None:
    """Adds two tensors of one name: a match, a match of the common rows, or a mismatch of shapes."""
    if base.shape == trained.shape:
        match = Match(base.name, trained.name, base, trained, base.numel, base.shape, 0, 0, match_kind)
        pair.matches.append(match)
        return
    rows = min(base.shape[:1] + trained.shape[:1], default=0)
    same_columns = len(base.shape) == len(trained.shape) and base.shape[1:] == trained.shape[1:]
    if same_columns and rows > 0 and _in_vocabulary(base.name):
        longer, side = (base, "base") if base.shape[0] > trained.shape[0] else (trained, "trained")
        shape, numel = (rows, *base.shape[1:]), min(base.numel, trained.numel)
        pair.matches.append(Match(base.name, trained.name, base, trained, numel, shape, 0, 0, "common rows"))
        added = longer.shape[0] - rows
        reason = f"{added} rows beyond the vocabulary of {rows} that both have"
        added_shape = (added, *longer.shape[1:])
        pair.unmatched.append(
            Unmatched(side, longer.name, reason, added_shape, longer.dtype, longer.numel - numel, kind="rows")
        )
        return
    reason = f"shape {list(base.shape)} in the base against {list(trained.shape)} in the trained checkpoint"
    if len(base.shape) == 2 and base.shape == trained.shape[::-1]:
        reason += "; it fits transposed: transpose it on one side"
    pair.unmatched.append(_unmatched("base", base, reason, "shape"))
    pair.unmatched.append(_unmatched("trained", trained, reason, "shape"))


def _in_vocabulary(name: str) -> bool:
    role = parse_tensor_name(name)
    has_token_rows = role.module == "embed_tokens" or role.block == "lm_head"
    has_token_rows |= "embed_tokens_per_layer" in name.split(".")  # Gemma 3n's second embedding of the tokens
    return has_token_rows and role.tower == "language"


def _left_over(side: Side, other: Side) -> Iterator[Unmatched]:
    """Yields the tensors of a side that have no match, and those of its absent shards."""
    absent = {canonical_name(name): shard for name, shard in other.checkpoint.missing.items()}
    for name, info in side.remaining.items():
        reason = side.reasons.get(name, f"not in the {other.label} checkpoint")
        kind = "missing"
        if name in other.tied_to:
            keeper = printable(other.tied_to[name])
            reason = f"the {other.label} checkpoint holds it as one with {keeper}, which is compared"
        elif canonical_name(name) in absent:
            reason = f"in {printable(absent[canonical_name(name)])} of the {other.label} checkpoint, which is missing"
            kind = "shard"
        elif name in side.untied:
            kind = "untied"
        yield _unmatched(side.label, info, reason, kind)
    for name, shard in side.checkpoint.missing.items():
        if is_buffer(name, ()):
            continue
        yield Unmatched(side.label, name, f"in {printable(shard)}, which is missing", (), "", 0, kind="shard")


def _unmatched(side: str, info: TensorInfo, reason: str, kind: str) -> Unmatched:
    return Unmatched(side, info.name, reason, info.shape, info.dtype, info.numel, kind)


def _no_match_message(pair: Pair) -> str:
    paths = f"{printable(pair.base.path)} and {printable(pair.trained.path)}"
    for entry in pair.unmatched:
        if entry.kind in ("shape", "dtype"):
            return (
                f"{paths} have nothing that can be compared: {printable(entry.name)}: {entry.reason};"
                " give two checkpoints of one model"
            )
    names = [printable(next(iter(side.tensors), "none")) for side in (pair.base, pair.trained)]
    return f"{paths} have no tensor in common ({names[0]} against {names[1]}); give two checkpoints of one model"


def _notes(matches: list[Match]) -> Iterator[str]:
    """Yields remarks on the matching for the reader of the metrics."""
    flat = [m.base.name for m in matches if m.base.name.rpartition(".")[2] in FLAT_PARAMETERS]
    if flat:
        yield (
            f"{len(flat)} tensors are flat parameters of FSDP, such as {printable(flat[0])}, with all weights of a"
            " module in one: metrics by module and spectra need a full state dict"
        )
    counts: dict[tuple[str, str], int] = {}
    for m in matches:
        if m.base.dtype != m.trained.dtype:
            counts[m.base.dtype, m.trained.dtype] = counts.get((m.base.dtype, m.trained.dtype), 0) + 1
    for (base_dtype, trained_dtype), count in counts.items():
        yield f"{count} tensors are {base_dtype} in the base and {trained_dtype} in the trained checkpoint"
    for match_kind, text in (("prefix", "matched under other names"), ("fused", "matched as parts of fused ones")):
        of_kind = [m for m in matches if m.match_kind == match_kind]
        if of_kind:
            names = f"{printable(of_kind[0].base.name)} with {printable(of_kind[0].trained.name)}"
            yield f"{len(of_kind)} tensors were {text}, such as {names}"
