"""Damage for files: bytes changed at random, and values of JSON replaced, removed, repeated or nested."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    -(10**30),
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "start",
    "../x",
    "a\ud800",
    "\u202e<script>",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    [1] * 100,
    {"a": {}},
]
SIZES = [0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def damage_bytes(rng: random.Random, data: bytes, *, first: int = 0) -> bytes:
    """Changes one to four places of `data` from byte `first` on: flips, sizes, removed, repeated and moved pieces."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(content) <= first:
            break
        at = rng.randrange(first, len(content))
        length = min(rng.choice((1, 1, 2, 4, 8, 30, 200)), len(content) - at)
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            content[at : at + width] = (rng.choice(SIZES) % (1 << 8 * width)).to_bytes(
                width, rng.choice(("little", "big"))
            )
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + length] * rng.choice((1, 1, 2, 50))
        elif kind == 5:
            other = rng.randrange(first, len(content))
            content[at : at + length] = content[other : other + length]
        else:
            del content[at:]
    return bytes(content)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The position of every value inside of `value`, as keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from paths(inner, (*prefix, key))


def damage_json(rng: random.Random, value: Any) -> Any:
    """A copy of `value` with one to three values replaced, removed, repeated, renamed, nested or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        positions = list(paths(value))
        if not positions:
            break
        *outer, key = rng.choice(positions)
        holder = value
        for part in outer:
            holder = holder[part]
        kind = rng.randrange(6)
        if kind <= 1:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == 2:
            del holder[key]
        elif kind == 3:
            other = rng.choice(positions)
            source = value
            for part in other:
                source = source[part] if not isinstance(source, (str, int, float, type(None))) else source
            holder[key] = copy.deepcopy(source)
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice(("", "a", str(key) + "x", "\ud800", "__metadata__"))] = holder.pop(key)
        elif kind == 4:
            holder.insert(0, copy.deepcopy(holder[key]))
        else:
            number = holder[key]
            plain = isinstance(number, (int, float)) and not isinstance(number, bool)
            holder[key] = number + rng.choice((-1, 1, 8, 2**32, 0.5)) if plain else [number]
    return value


def json_text(rng: random.Random, value: Any) -> str:
    """`value` as JSON, now and then with damage that no value can express."""
    text = json.dumps(value)
    kind = rng.randrange(20)
    if kind == 0:
        return "\ufeff" + text
    if kind == 1:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 2 and text.startswith("{"):
        return text[:-1] + "," + text[1:] if len(text) > 2 else text  # every key twice
    if kind == 3:
        return "[" * 50_000 + text
    if kind == 4:
        return text.replace("1", "1" * rng.choice((20, 5000)), 1)
    return text
