"""ArrowStore: records come back as they were, and only complete fragments of the same version are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from opdkernels import InputError
from opdkernels.runs import store
from opdkernels.runs.store import ArrowStore


@dataclass(frozen=True)
class Inner:
    counts: np.ndarray
    label: str


@dataclass(frozen=True)
class Row:
    key: int
    norm: float
    shape: tuple[int, ...]
    values: np.ndarray
    inner: Inner | None


ROWS = [
    Row(0, 0.1, (2, 3), np.arange(6.0).reshape(2, 3), Inner(np.arange(4).reshape(2, 2), "a")),
    Row(1, 1e300, (), np.zeros((0, 5)), None),
    Row(2, -0.0, (7,), np.array([np.nan, np.inf]), Inner(np.array([], np.int64), "")),
]


def assert_equal(a: Row, b: Row) -> None:
    assert (a.key, a.norm, a.shape, a.inner is None) == (b.key, b.norm, b.shape, b.inner is None)
    np.testing.assert_array_equal(a.values, b.values, strict=True)
    if a.inner is not None and b.inner is not None:
        assert a.inner.label == b.inner.label
        np.testing.assert_array_equal(a.inner.counts, b.inner.counts, strict=True)


def test_records_are_loaded_as_they_were_added(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_EVERY_S", 1e9)
    first = ArrowStore(tmp_path, Row, schema_version=1)
    for row in ROWS[:2]:
        first.add(row)
    first.flush()
    first.add(ROWS[2])
    first.flush()
    assert len(list(tmp_path.iterdir())) == 2
    loaded = ArrowStore(tmp_path, Row, schema_version=1).records
    assert list(loaded) == [0, 1, 2]
    for row in ROWS:
        assert_equal(loaded[row.key], row)


@pytest.mark.parametrize("largest", [0, (1 << 16) - 1, 1 << 16, (1 << 32) - 1, 1 << 32, (1 << 63) - 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_of_any_size_come_back_as_int64(largest, sign):
    memory = ArrowStore(None, Inner, schema_version=1)
    counts = sign * np.array([largest, 1, 0], np.int64)
    (loaded,) = memory.decode(memory.encode([Inner(counts, "x")]))
    np.testing.assert_array_equal(loaded.counts, counts, strict=True)


def test_later_record_replaces_earlier_one_with_same_key(tmp_path):
    first = ArrowStore(tmp_path, Row, schema_version=1)
    for norm in (1.0, 2.0):
        first.add(Row(0, norm, (), np.zeros(1), None))
        first.flush()
    assert ArrowStore(tmp_path, Row, schema_version=1).records[0].norm == 2.0


def test_incomplete_fragments_are_removed_and_damaged_ones_are_errors(tmp_path):
    first = ArrowStore(tmp_path, Row, schema_version=1)
    first.add(ROWS[0])
    first.flush()
    (path,) = tmp_path.iterdir()
    (tmp_path / f".{path.name}.opdkernels-0123456789abcdef.tmp").write_bytes(path.read_bytes()[:100])
    assert list(ArrowStore(tmp_path, Row, schema_version=1).records) == [0]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="written by another version of opdkernels"):
        ArrowStore(tmp_path, Row, schema_version=2)
    content = bytearray(path.read_bytes())
    content[-40] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(InputError, match="not those that were written"):
        ArrowStore(tmp_path, Row, schema_version=1)
