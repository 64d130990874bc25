"""Append-only storage of finished records in Arrow files, from which an interrupted run resumes.

Records are written in numbered fragments of about one second of work. Each fragment is written to a temporary file,
synced and renamed, so that a fragment is either complete or absent. Tensor names are data: no file is named after a
tensor.
"""

from __future__ import annotations

import hashlib
import time
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from opdkernels.bits import narrowest_dtype
from opdkernels.errors import InputError, printable
from opdkernels.files import remove_leftovers, write_atomically
from opdkernels.untrusted import read_file

FLUSH_EVERY_S = 1.0
MAX_FRAGMENT_BYTES = 2**32
SCALARS = {int: pa.int64(), float: pa.float64(), str: pa.string()}


class Keyed(Protocol):
    @property
    def key(self) -> Any: ...


R = TypeVar("R", bound=Keyed)


class ArrowStore(Generic[R]):
    """The records of a run, by their `key`. With a folder they are also appended there, and loaded from there at the
    start.

    The columns follow from the dataclass: `int`, `float` and `str` fields are plain columns; a `tuple[int, ...]` is a
    list; an `np.ndarray` is a list of values and a list with its shape; an optional dataclass is a boolean column and
    the columns of its fields under "name.". Integer arrays come back as int64.

    The name of a fragment holds its number and the digest of its content, so that damage is detected when it is loaded.

    Args:
        folder: Directory of the fragments; None keeps the records in memory only.
        record_type: Dataclass of the records. A later record replaces an earlier one with the same `key`.
        schema_version: Version of the columns; fragments of another version are rejected.

    Raises:
        InputError: A fragment is damaged or was written by another version.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Row:
        ...     key: int
        ...     norm: float
        >>> store = ArrowStore(None, Row, schema_version=1)
        >>> store.add(Row(7, 0.5))
        >>> store.records[7].norm
        0.5
    """

    def __init__(self, folder: Path | None, record_type: type[R], schema_version: int):
        self.folder, self.record_type = folder, record_type
        self.version = f"{record_type.__name__} {schema_version}"
        self.records: dict[Any, R] = {}
        self.pending: list[R] = []
        self.num_fragments = 0
        self.last_flush = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            for path in sorted(folder.glob("[0-9]*.arrow")):
                self._load(path)

    def add(self, record: R) -> None:
        """Adds a record; writes the pending ones if the last write is more than FLUSH_EVERY_S ago."""
        self.records[record.key] = record
        self.pending.append(record)
        if time.monotonic() - self.last_flush > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Writes the pending records to one fragment and syncs it to disk."""
        if self.pending and self.folder is not None:
            self.num_fragments += 1
            content = self.encode(self.pending)
            write_atomically(self.folder / f"{self.num_fragments:06d}.{digest(content)}.arrow", content)
        self.pending.clear()
        self.last_flush = time.monotonic()

    def encode(self, records: Sequence[R]) -> bytes:
        """The content of a fragment."""
        table = pa.table(to_columns(self.record_type, records), metadata={"opdkernels_records": self.version})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(table)
        return sink.getvalue()

    def decode(self, content: bytes) -> Iterator[R]:
        """The records of a fragment. Raises ValueError if it was written by another version."""
        table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        if (table.schema.metadata or {}).get(b"opdkernels_records") != self.version.encode():
            raise ValueError("written by another version of opdkernels")
        yield from from_table(self.record_type, table)

    def _load(self, path: Path) -> None:
        try:
            content = read_file(path, max_bytes=MAX_FRAGMENT_BYTES, remedy="delete it, or start again with --overwrite")
            number, expected_digest, _ = path.name.split(".")
            if expected_digest != digest(content):
                raise ValueError("its bytes are not those that were written")
            self.records |= {record.key: record for record in self.decode(content)}
        except InputError:
            raise
        except (pa.ArrowInvalid, ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{printable(str(path))} cannot be read ({printable(str(error))}); start again with --overwrite"
            ) from None
        self.num_fragments = max(self.num_fragments, int(number))


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def nested_type(hint: Any) -> type | None:
    """The dataclass of an optional dataclass field, else None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    return next((option for option in options if is_dataclass(option)), None)  # type: ignore[return-value]


def to_columns(record_type: Any, records: Sequence[Any], prefix: str = "") -> dict[str, pa.Array]:
    """One or more columns per field of the dataclass; a record that is None has nulls and empty lists."""
    columns: dict[str, pa.Array] = {}
    hints = typing.get_type_hints(record_type)
    for field in fields(record_type):
        name, hint = prefix + field.name, hints[field.name]
        values = [None if record is None else getattr(record, field.name) for record in records]
        if (nested := nested_type(hint)) is not None:
            columns[name] = pa.array([value is not None for value in values])
            columns |= to_columns(nested, values, f"{name}.")
        elif hint is np.ndarray:
            arrays = [np.zeros(0, np.int64) if value is None else value for value in values]
            columns[name] = list_column(arrays)
            columns[f"{name}.shape"] = list_column([np.array(array.shape, np.int64) for array in arrays])
        elif typing.get_origin(hint) is tuple:
            columns[name] = list_column([np.array(value or (), np.int64) for value in values])
        else:
            columns[name] = pa.array(values, SCALARS[hint])
    return columns


def list_column(arrays: Sequence[np.ndarray]) -> pa.Array:
    """Flattened arrays as lists. Integers take the narrowest of uint16, uint32 and int64 that holds all of them."""
    offsets = np.concatenate(([0], np.cumsum([array.size for array in arrays]))).astype(np.int64)
    values = np.concatenate([array.ravel() for array in arrays])
    if values.dtype.kind in "iu" and values.dtype != np.uint16:
        values = values.astype(narrowest_dtype(values), copy=False)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def from_table(record_type: Any, table: pa.Table, prefix: str = "") -> Iterator[Any]:
    """The records of a table that `to_columns` made, in its order; None where a nested record is absent."""
    hints = typing.get_type_hints(record_type)
    columns: dict[str, Sequence[Any]] = {}
    for field in fields(record_type):
        name, hint = prefix + field.name, hints[field.name]
        if (nested := nested_type(hint)) is not None:
            present = table[name].to_pylist()
            nested_records = from_table(nested, table, f"{name}.")
            columns[field.name] = [
                record if there else None for record, there in zip(nested_records, present, strict=True)
            ]
        elif hint is np.ndarray:
            shapes = read_lists(table[f"{name}.shape"])
            columns[field.name] = [
                values.reshape(shape) for values, shape in zip(read_lists(table[name]), shapes, strict=True)
            ]
        elif typing.get_origin(hint) is tuple:
            columns[field.name] = [tuple(values.tolist()) for values in read_lists(table[name])]
        else:
            columns[field.name] = table[name].to_pylist()
    for row in zip(*columns.values(), strict=True):
        yield record_type(**dict(zip(columns, row, strict=True)))


def read_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One array per row; integers as int64."""
    lists = column.combine_chunks()
    arrays = (lists[i].values.to_numpy(zero_copy_only=False) for i in range(len(lists)))
    return [array.astype(np.int64) if array.dtype.kind in "iu" else array for array in arrays]
