"""Pickles are read as data: equal to what pickle loads, in time and memory proportional to their size, without code."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdkernels.checkpoint import pickle_data
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.pickle_data import CodeError, Opaque, PickleError, Truncated, read_pickle
from opdkernels.errors import InputError

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(DATA, st.integers(2, 5))
def test_data_is_what_pickle_loads(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    read = read_pickle(b"before" + content + b"after", 6)
    assert read.value == value
    assert read.end == 6 + len(content)


@settings(max_examples=200, deadline=None)
@given(DATA, st.integers(2, 5), st.data())
def test_every_prefix_is_truncated(value: Any, protocol: int, data: st.DataObject) -> None:
    content = pickle.dumps(value, protocol)
    size = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(Truncated):
        read_pickle(content[:size])


def test_other_values_keep_their_class_only() -> None:
    values = [b"bytes", {1, 2}, frozenset([1]), 1 + 2j, bytearray(b"x"), np.float64(1.5), np.ones(2), 2**100]
    for protocol in (2, 4, 5):
        for value in values:
            assert isinstance(read_pickle(pickle.dumps(value, protocol)).value, Opaque), (value, protocol)
    keys = list(read_pickle(pickle.dumps({1: 2, (1, 2): 3, "a": 4})).value)
    assert [key if isinstance(key, str) else key.kind for key in keys] == ["1", "a tuple", "a"]


@pytest.mark.parametrize("function", [print, eval, exec, __import__, getattr, open, pickle.loads])
@pytest.mark.parametrize("protocol", [2, 4])
def test_functions_are_refused_by_name(function: Any, protocol: int) -> None:
    with pytest.raises(CodeError, match=function.__name__):
        read_pickle(pickle.dumps([function], protocol))


def nested_tuples(levels: int) -> bytes:
    """Tuple number i holds tuple number i - 1 twice: hashing or comparing the last one takes 2^levels steps."""
    return b"K\x01\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(levels))


def deep(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


TEXT_A = b"X\x01\x00\x00\x00a"
BOMBS = {
    "a key of nested tuples": b"\x80\x02}" + nested_tuples(40) + b"K\x01s.",
    "a value of nested tuples": b"\x80\x02}" + TEXT_A + nested_tuples(40) + b"s.",
    "a set of nested tuples": b"\x80\x04\x8f(" + nested_tuples(40) + b"\x90.",
    "a frozenset of nested tuples": b"\x80\x04(" + nested_tuples(40) + b"\x91.",
    "a dictionary of pairs with such a key": b"\x80\x02ccollections\nOrderedDict\n]("
    + nested_tuples(40)
    + b"K\x01\x86e\x85R.",
    "a bytearray of 3 GB": b"\x80\x02}" + TEXT_A + b"cbuiltins\nbytearray\nJ\x00\x00\x00\xc0\x85Rs.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary that holds itself": b"\x80\x02}q\x00" + TEXT_A + b"h\x00s.",
    "100,000 nested lists": deep(100_000),
    "keys with one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x08" + struct.pack("<q", (2**61 - 1) * (k % 4)) + b"N" for k in range(50_000))
    + b"u.",
}
BROKEN = {
    "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xffa.",
    "a text of 2^63 bytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
    "a position far beyond the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a position that was not memoized": b"\x80\x02h\x05.",
    "100,000 marks": b"\x80\x02" + b"(" * 100_000 + b".",
    "nothing to pop": b"\x80\x02000.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "a call of a storage class": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a tensor rebuilt by itself": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(h\x00h\x00h\x00NtR.",
    "an extension code": b"\x80\x02\x82\x01.",
    "the state of a list": b"\x80\x02]}b.",
    "a reference outside": b"\x80\x02K\x05Q.",
    "protocol 0": b"(dp0\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(name: str) -> None:
    tracemalloc.start()
    try:
        read_pickle(BOMBS[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 300 * len(BOMBS[name])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_refused(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PickleError) as caught:
            read_pickle(BROKEN[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert peak < 2**20 + 300 * len(BROKEN[name])


def test_the_number_of_opcodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_data, "MAX_OPCODES", 1000)
    assert read_pickle(deep(400)).end == 802
    with pytest.raises(PickleError, match="more than 1000 opcodes"):
        read_pickle(deep(600))


@pytest.mark.parametrize("name", [*BOMBS, *BROKEN])
def test_a_file_with_such_a_pickle_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", {**BOMBS, **BROKEN}[name])
        archive.writestr("archive/byteorder", b"little")
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()
    assert "pytorch_model.bin" in str(caught.value)


def test_torch_size_and_dtype_next_to_the_weights(tmp_path: Path) -> None:
    content = {"model": {"w": torch.ones(3)}, "size": torch.Size([2, 3]), "dtype": torch.bfloat16, "lr": np.float64(1)}
    torch.save(content, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").read("w", 0, 3).tolist() == [1, 1, 1]
