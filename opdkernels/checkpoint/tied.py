"""Tensors that are stored under two names: shared storages, and heads tied to the embedding."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkernels.checkpoint.base import Checkpoint, TensorInfo
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.errors import printable


@dataclass
class Side:
    """One checkpoint during matching.

    Attributes:
        label: "base" or "trained".
        checkpoint: The open checkpoint.
        remaining: Tensors that have no match yet.
        tied_to: Tensors that were dropped because they repeat another tensor, and the name of that tensor.
        reasons: Why a tensor has no match, for messages.
        heads: The language model's 2-D head tensors.
        embeddings: The language model's token embeddings.
    """

    label: str
    checkpoint: Checkpoint
    remaining: dict[str, TensorInfo]
    tied_to: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    heads: list[TensorInfo] = field(default_factory=list)
    embeddings: list[TensorInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, info in self.remaining.items():
            role = parse_tensor_name(name)
            if role.tower == "language" and role.module == "lm_head" and len(info.shape) == 2:
                self.heads.append(info)
            elif role.tower == "language" and role.module == "embed_tokens":
                self.embeddings.append(info)

    def drop(self, name: str, keeper: str) -> None:
        """Removes a tensor that repeats the tensor `keeper`."""
        self.tied_to[name] = keeper
        del self.remaining[name]


def drop_tied(a: Side, b: Side, notes: list[str]) -> list[str]:
    """Removes every tensor that repeats another one from both sides.

    Args:
        a: One side; modified.
        b: The other side; modified.
        notes: Receives remarks for the reader.

    Returns:
        The removed names, without duplicates.
    """
    for side, other in ((a, b), (b, a)):
        _drop_aliases(side, other.checkpoint.tensors)
    _drop_heads(a, b, notes)
    return list(dict.fromkeys([*a.tied_to, *b.tied_to]))


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


def tie_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Returns `tie_word_embeddings` of config.json or of its text_config; None if neither has it."""
    for table in (config, config.get("text_config")):
        if isinstance(table, Mapping) and isinstance(table.get("tie_word_embeddings"), bool):
            return table["tie_word_embeddings"]
    return None


def _head(side: Side) -> TensorInfo | None:
    """Returns the only head that remains, or None."""
    heads = [head for head in side.heads if head.name in side.remaining]
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
    embeddings = _embedding(a, head_a), _embedding(b, head_b)
    if True not in ties:
        return
    if False in ties:
        tied, untied = (a, b) if ties[0] else (b, a)
        notes.append(
            f"the {tied.label}'s config ties {printable(head_a.name)} to the embedding, the {untied.label}'s does not:"
            " both are compared as they are stored"
        )
    elif embeddings[0] is not None and embeddings[1] is not None:
        a.drop(head_a.name, embeddings[0].name)
        b.drop(head_b.name, embeddings[1].name)
    elif embeddings[0] is not None or embeddings[1] is not None:
        # One side stored the tied matrix only as its head: heads are compared, the other side's embedding repeats it.
        side, embedding, head = (a, embeddings[0], head_a) if embeddings[0] is not None else (b, embeddings[1], head_b)
        assert embedding is not None
        side.drop(embedding.name, head.name)


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
    side.drop(head.name, embedding.name)
    if ties[0] is None and embedding.name != head.name:
        notes.append(
            f"{printable(head.name)} is in the {side.label} only and the {other.label}'s head is tied: it is treated as"
            f" a copy of {printable(embedding.name)} and counted once"
        )


def unpaired_heads(a: Side, b: Side) -> tuple[str, str] | None:
    """Finds a tied matrix that one side stored only as embedding and the other only as head.

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
    return None
