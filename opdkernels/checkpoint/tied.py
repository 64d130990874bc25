"""Tensors that are one and the same under two names: shared storages, and heads tied to the embedding."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkernels.checkpoint.base import Checkpoint, TensorInfo
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.errors import printable


@dataclass
class Side:
    """One checkpoint while it is being matched: what is left of it, and what is held by another of its tensors."""

    label: str
    checkpoint: Checkpoint
    rest: dict[str, TensorInfo]
    tied_to: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    heads: list[TensorInfo] = field(default_factory=list)
    embeddings: list[TensorInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, info in self.rest.items():
            where = parse_tensor_name(name)
            if where.tower == "language" and where.module == "lm_head" and len(info.shape) == 2:
                self.heads.append(info)
            elif where.tower == "language" and where.module == "embed_tokens":
                self.embeddings.append(info)

    def drop(self, name: str, keeper: str) -> None:
        self.tied_to[name] = keeper
        del self.rest[name]


def drop_tied(a: Side, b: Side, notes: list[str]) -> list[str]:
    """Takes every tensor that repeats another one out of both sides; returns the names taken out, each once."""
    for one, other in ((a, b), (b, a)):
        _drop_aliases(one, other.checkpoint.tensors)
    _drop_heads(a, b, notes)
    return list(dict.fromkeys([*a.tied_to, *b.tied_to]))


def _drop_aliases(side: Side, other: Container[str]) -> None:
    groups: dict[str, list[str]] = {}
    for name, first in side.checkpoint.aliases.items():
        groups.setdefault(first, [first]).append(name)
    for names in groups.values():
        names = [name for name in names if name in side.rest]
        # The other side may have kept another one of the names.
        keeper = next((name for name in names if name in other), names[0] if names else "")
        for name in names:
            if name != keeper:
                side.drop(name, keeper)


def tie_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """What config.json says of the head, itself or its text_config; None where it is silent."""
    for table in (config, config.get("text_config")):
        if isinstance(table, Mapping) and isinstance(table.get("tie_word_embeddings"), bool):
            return table["tie_word_embeddings"]
    return None


def _head(side: Side) -> TensorInfo | None:
    found = [head for head in side.heads if head.name in side.rest]
    return found[0] if len(found) == 1 else None


def _embedding(side: Side, head: TensorInfo) -> TensorInfo | None:
    found = [e for e in side.embeddings if e.name in side.rest and e.shape[1:] == head.shape[1:]]
    return found[0] if found else None


def _drop_heads(a: Side, b: Side, notes: list[str]) -> None:
    heads = _head(a), _head(b)
    ties = tie_word_embeddings(a.checkpoint.config), tie_word_embeddings(b.checkpoint.config)
    head_a, head_b = heads
    if head_a is not None and head_b is not None:
        _both(a, b, head_a, head_b, ties, notes)
    elif head_a is not None:
        _one(a, b, head_a, ties, notes)
    elif head_b is not None:
        _one(b, a, head_b, ties[::-1], notes)


def _both(
    a: Side, b: Side, head_a: TensorInfo, head_b: TensorInfo, ties: tuple[bool | None, bool | None], notes: list[str]
) -> None:
    keepers = _embedding(a, head_a), _embedding(b, head_b)
    if True not in ties:
        return
    if False in ties:
        tied, untied = (a, b) if ties[0] else (b, a)
        notes.append(
            f"the {tied.label}'s config ties {printable(head_a.name)} to the embedding, the {untied.label}'s does not:"
            " both are compared as they are stored"
        )
    elif keepers[0] is not None and keepers[1] is not None:
        a.drop(head_a.name, keepers[0].name)
        b.drop(head_b.name, keepers[1].name)
    elif keepers[0] is not None or keepers[1] is not None:
        # One side stored the tied matrix as its head alone: heads are compared, the other side's embedding repeats it.
        side, keeper, head = (a, keepers[0], head_a) if keepers[0] is not None else (b, keepers[1], head_b)
        assert keeper is not None
        side.drop(keeper.name, head.name)


def _one(one: Side, other: Side, head: TensorInfo, ties: tuple[bool | None, bool | None], notes: list[str]) -> None:
    """`one` has a head and `other` has none."""
    own, keeper = _embedding(one, head), _embedding(other, head)
    if keeper is None or ties[1] is False:
        return
    if own is None:
        return  # the head is all that `one` stored of the tied matrix: pair.match compares it with the embedding
    if ties[0] is False:
        one.reasons[head.name] = (
            f"the {other.label}'s head is tied to {printable(keeper.name)}, which is compared as the embedding"
        )
        return
    one.drop(head.name, own.name)
    if ties[0] is None and own.name != head.name:
        notes.append(
            f"{printable(head.name)} is in the {one.label} only and the {other.label}'s head is tied: it is taken for a"
            f" copy of {printable(own.name)} and counted once"
        )


def unpaired_heads(a: Side, b: Side) -> tuple[str, str] | None:
    """The names of an embedding and a head that are one tied matrix, where each side stored only one of the two."""
    for one, other, swap in ((a, b, False), (b, a, True)):
        head = _head(one)
        if head is None or other.heads or any(e.shape[1:] == head.shape[1:] for e in one.embeddings):
            continue
        keeper = _embedding(other, head)
        if keeper is not None and tie_word_embeddings(other.checkpoint.config) is not False:
            return (keeper.name, head.name) if swap else (head.name, keeper.name)
    return None
