"""Tensors that are stored under two names: shared storages, one embedding under several names, tied heads.

A tensor is a copy only if it has the bits of the tensor that it repeats: a head that was trained apart from the
embedding is a parameter, whatever the config says.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkernels.checkpoint.base import Checkpoint, TensorInfo
from opdkernels.checkpoint.equality import same_bits
from opdkernels.checkpoint.names import EMBEDDINGS, HEADS, canonical_name, parse_tensor_name
from opdkernels.errors import printable

MAX_SAMPLE = 1 << 16
VOCABULARY = EMBEDDINGS | HEADS | {"output", "decoder", "proj_out"}
"""Parts of the names of embeddings and heads."""


@dataclass
class Side:
    """One checkpoint during matching.

    Attributes:
        label: "base" or "trained".
        checkpoint: The open checkpoint.
        remaining: Tensors that have no match yet.
        tied_to: Tensors that were dropped because they repeat another tensor, and the name of that tensor.
        reasons: Why a tensor has no match, for messages.
        untied: Tensors that the config ties to another one, from which they differ.
        heads: The language model's 2-D head tensors.
        embeddings: The language model's token embeddings.
    """

    label: str
    checkpoint: Checkpoint
    remaining: dict[str, TensorInfo]
    tied_to: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    untied: set[str] = field(default_factory=set)
    heads: list[TensorInfo] = field(default_factory=list)
    embeddings: list[TensorInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, info in self.remaining.items():
            if VOCABULARY.isdisjoint(name.lower().split(".")):
                continue
            role = parse_tensor_name(name)
            if role.tower == "language" and role.module == "lm_head" and len(info.shape) == 2:
                self.heads.append(info)
            elif role.tower == "language" and role.module == "embed_tokens":
                self.embeddings.append(info)

    def is_copy(self, info: TensorInfo, keeper: TensorInfo) -> bool:
        """Whether a tensor has the bits of another one of this side."""
        return same_bits(self.checkpoint, info, self.checkpoint, keeper)

    def drop(self, name: str, keeper: str) -> None:
        """Removes a tensor that repeats the tensor `keeper`."""
        self.tied_to[name] = keeper
        del self.remaining[name]


def drop_tied(a: Side, b: Side, notes: list[str]) -> None:
    """Removes every tensor that repeats another one from both sides.

    Args:
        a: One side; modified.
        b: The other side; modified.
        notes: Receives remarks for the reader.
    """
    for side, other in ((a, b), (b, a)):
        _drop_aliases(side, other.checkpoint.tensors)
    _drop_embedding_copies(a, b)
    _drop_heads(a, b, notes)


def copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the tensors of one checkpoint that repeat another one, and the name of that one.

    A head with the bits of the embedding is a copy unless the config says that they are not tied.
    """
    side = Side("base", checkpoint, dict(checkpoint.tensors))
    _drop_aliases(side, {})
    _drop_embedding_copies(side)
    head = _head(side) if tie_word_embeddings(checkpoint.config) is not False else None
    embedding = _embedding(side, head) if head is not None else None
    if head is not None and embedding is not None and side.is_copy(head, embedding):
        side.drop(head.name, embedding.name)
    return side.tied_to


def _drop_aliases(side: Side, other: Container[str]) -> None:
    groups: dict[str, list[str]] = {}
    for name, first in side.checkpoint.aliases.items():
        groups.setdefault(first, [first]).append(name)
    for names in groups.values():
        names = [name for name in names if name in side.remaining]
        # The other side may have stored another one of the names.
        keeper = next((name for name in names if name in other), names[0] if names else "")
        for name in names:
            if name != keeper:
                side.drop(name, keeper)


def _drop_embedding_copies(*sides: Side) -> None:
    """Drops the copies of one embedding under several names, such as `shared` and those of encoder and decoder.

    A name is a copy only if it is one on every side that stores it.
    """
    members = []
    for side in sides:
        embeddings = [e for e in side.embeddings if e.name in side.remaining and len(e.shape) == 2]
        # Of another shape: another matrix.
        members.append({canonical_name(e.name): e for e in embeddings if e.shape == embeddings[0].shape})
    if all(len(names) < 2 for names in members):
        return
    common = [name for name in members[0] if all(name in names for names in members)]
    common.sort(key=lambda name: "shared" not in name.split("."))  # the name of the model's parameter
    keepers = [names.get(common[0]) if common else next(iter(names.values()), None) for names in members]
    distinct = {
        name
        for side, names, keeper in zip(sides, members, keepers, strict=True)
        for name, info in names.items()
        if keeper is not None and info is not keeper and not side.is_copy(info, keeper)
    }
    for side, names, keeper in zip(sides, members, keepers, strict=True):
        for name, info in names.items():
            if keeper is not None and info is not keeper and name not in distinct:
                side.drop(info.name, keeper.name)


def drop_left_over_copies(side: Side) -> None:
    """Drops matrices that only one side stores and that have the bits of an embedding of that side.

    For tied heads with other names than those of language models. Other tensors that are equal, such as those of layers
    that were copied to make a model deeper, are separate parameters.
    """
    keepers = [e for e in side.embeddings if e.name not in side.remaining and e.name not in side.tied_to]
    for info in list(side.remaining.values()):
        keeper = next((e for e in keepers if e.shape == info.shape and side.is_copy(info, e)), None)
        if keeper is not None and info.numel and not _is_constant(side.checkpoint, info):
            side.drop(info.name, keeper.name)


def _is_constant(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    bits = checkpoint.read_bits(info.name, 0, min(info.items, MAX_SAMPLE))
    return bool((bits == bits[0]).all())


def tie_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Returns `tie_word_embeddings` of config.json or of its text_config; None if neither has it."""
    for table in (config, config.get("text_config")):
        if isinstance(table, Mapping) and isinstance(table.get("tie_word_embeddings"), bool):
            return table["tie_word_embeddings"]
    return None


def _head(side: Side) -> TensorInfo | None:
    """Returns the only head that remains, or None; the only one of an embedding's shape, where a head has layers."""
    heads = [head for head in side.heads if head.name in side.remaining]
    shapes = {embedding.shape for embedding in side.embeddings}
    heads = [head for head in heads if head.shape in shapes] or heads
    return heads[0] if len(heads) == 1 else None


def _embedding(side: Side, head: TensorInfo) -> TensorInfo | None:
    """Returns the embedding with the columns of a head, or None."""
    embeddings = [e for e in side.embeddings if e.name in side.remaining and e.shape[1:] == head.shape[1:]]
    return embeddings[0] if embeddings else None


def _drop_heads(a: Side, b: Side, notes: list[str]) -> None:
    head_a, head_b = _head(a), _head(b)
    ties = tie_word_embeddings(a.checkpoint.config), tie_word_embeddings(b.checkpoint.config)
    if head_a is not None and head_b is not None:
        _drop_both_heads(a, b, head_a, head_b, ties, notes)
    elif head_a is not None:
        _drop_one_head(a, b, head_a, ties, notes)
    elif head_b is not None:
        _drop_one_head(b, a, head_b, ties[::-1], notes)


def _drop_both_heads(
    a: Side, b: Side, head_a: TensorInfo, head_b: TensorInfo, ties: tuple[bool | None, bool | None], notes: list[str]
) -> None:
    """Drops the tied heads of two sides that both have a head."""
    if False in ties:
        if True in ties:
            tied, untied = (a, b) if ties[0] else (b, a)
            notes.append(
                f"the {tied.label}'s config ties {printable(head_a.name)} to the embedding, the {untied.label}'s does"
                " not: both are compared as they are stored"
            )
        return
    embedding_a, embedding_b = _embedding(a, head_a), _embedding(b, head_b)
    if embedding_a is not None and embedding_b is not None:
        untied_sides = [
            side.label
            for side, head, embedding in ((a, head_a, embedding_a), (b, head_b, embedding_b))
            if not side.is_copy(head, embedding)
        ]
        if not untied_sides:
            a.drop(head_a.name, embedding_a.name)
            b.drop(head_b.name, embedding_b.name)
        elif True in ties:
            notes.append(_untied_note(head_a, embedding_a, untied_sides) + ": it is compared as a parameter")
    elif embedding_a is not None or embedding_b is not None:
        # One side stored the tied matrix only as its head: heads are compared, the other side's embedding repeats it.
        side, embedding, head = (a, embedding_a, head_a) if embedding_a is not None else (b, embedding_b, head_b)
        assert embedding is not None
        if side.is_copy(embedding, head):
            side.drop(embedding.name, head.name)
        elif True in ties:
            _list_untied(side, embedding, head, notes)


def _drop_one_head(
    side: Side, other: Side, head: TensorInfo, ties: tuple[bool | None, bool | None], notes: list[str]
) -> None:
    """Drops the head of a side if the other side has none because its head is tied."""
    embedding, other_embedding = _embedding(side, head), _embedding(other, head)
    if other_embedding is None or ties[1] is False:
        return
    if embedding is None:
        return  # `side` stored the tied matrix only as its head: `match` compares it with the other side's embedding
    if ties[0] is False:
        side.reasons[head.name] = (
            f"the {other.label}'s head is tied to {printable(other_embedding.name)}, which is compared as the embedding"
        )
        return
    if not side.is_copy(head, embedding):
        _list_untied(side, head, embedding, notes)
        return
    side.drop(head.name, embedding.name)
    if ties[0] is None and embedding.name != head.name:
        notes.append(
            f"{printable(head.name)} is in the {side.label} only and the {other.label}'s head is tied: it is a copy of"
            f" {printable(embedding.name)} and counted once"
        )


def _list_untied(side: Side, info: TensorInfo, keeper: TensorInfo, notes: list[str]) -> None:
    """Lists a tensor that one side stored apart from the tensor to which it is tied."""
    side.untied.add(info.name)
    side.reasons[info.name] = (
        f"differs from {printable(keeper.name)}, to which it is tied; the other checkpoint stores one of the two"
    )
    notes.append(_untied_note(info, keeper, [side.label]) + ": it is not compared")


def _untied_note(info: TensorInfo, keeper: TensorInfo, sides: list[str]) -> str:
    return (
        f"{printable(info.name)} should be tied to {printable(keeper.name)} and their bits differ in the"
        f" {' and the '.join(sides)}"
    )


def unpaired_vocabulary(a: Side, b: Side) -> tuple[str, str] | None:
    """Finds a tied matrix that the sides stored under different names, after all equal names were matched.

    That is an embedding on one side and a head on the other, or one embedding under one of its several names.

    Returns:
        Its names in `a` and `b`, or None.
    """
    for side, other, swapped in ((a, b, False), (b, a, True)):
        head = _head(side)
        if head is None or other.heads or any(e.shape[1:] == head.shape[1:] for e in side.embeddings):
            continue
        embedding = _embedding(other, head)
        if embedding is not None and tie_word_embeddings(other.checkpoint.config) is not False:
            return (embedding.name, head.name) if swapped else (head.name, embedding.name)
    first, second = ([e for e in side.embeddings if e.name in side.remaining] for side in (a, b))
    same_columns = len(first) == len(second) == 1 and first[0].shape[1:] == second[0].shape[1:]
    if same_columns and _may_be_shared(first[0].name) and _may_be_shared(second[0].name):
        return first[0].name, second[0].name
    return None


def _may_be_shared(name: str) -> bool:
    """Whether a name is one of those under which models store an embedding of encoder and decoder."""
    return not {"shared", "embed_tokens"}.isdisjoint(canonical_name(name).split("."))
