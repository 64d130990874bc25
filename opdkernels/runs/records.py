"""Finished tensors on disk: appended through a temporary file, fsync and rename, so that a killed run goes on where it stopped.

A record is a tally and where it came from; every figure follows from it later. Records are written in fragments of a
second's work, numbered in order: names of tensors are data and never become names of files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from opdkernels.errors import InputError, printable
from opdkernels.files import write_atomically
from opdkernels.metrics.coordinates import SparseTally

FLUSH_EVERY_S = 1.0
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Record:
    """One matched tensor: its place in the run, its tally, or why there is none (`failure`)."""

    index: int
    name: str
    trained_name: str
    shape: tuple[int, ...]
    dtype_source: str
    dtype_trained: str
    how: str
    tally: SparseTally | None
    failure: str = ""

    @property
    def key(self) -> int:
        return self.index


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def to_table(records: list[Record]) -> pa.Table:
    def lists(arrays: list[np.ndarray], of: pa.DataType) -> pa.Array:
        offsets = np.concatenate(([0], np.cumsum([a.size for a in arrays]))).astype(np.int64)
        values = np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0)
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, of))

    tallies = [r.tally for r in records]
    none = np.zeros(0, np.int64)
    # Half the bytes to compress, where every count fits.
    small = all(t is None or not t.tables.size or t.tables.max() < 1 << 32 for t in tallies)
    columns: dict[str, Any] = {
        "index": pa.array([r.index for r in records], pa.int64()),
        "name": pa.array([r.name for r in records], pa.string()),
        "trained_name": pa.array([r.trained_name for r in records], pa.string()),
        "shape": lists([np.array(r.shape, np.int64) for r in records], pa.int64()),
        "dtype_source": pa.array([r.dtype_source for r in records], pa.string()),
        "dtype_trained": pa.array([r.dtype_trained for r in records], pa.string()),
        "how": pa.array([r.how for r in records], pa.string()),
        "failure": pa.array([r.failure for r in records], pa.string()),
        "max_delta": pa.array([t.max_delta if t else None for t in tallies], pa.float64()),
        "cuts": lists([np.array(t.cuts, np.int64) if t else none for t in tallies], pa.int64()),
        "patterns": lists([t.patterns if t else none for t in tallies], pa.uint16()),
        "tables": lists([t.tables if t else none for t in tallies], pa.uint32() if small else pa.int64()),
        "counts": lists([t.counts if t else none for t in tallies], pa.int64()),
        "sums": lists([t.sums if t else none for t in tallies], pa.int64()),
    }
    return pa.table(columns, metadata={"opdkernels_records": str(SCHEMA_VERSION)})


def from_table(table: pa.Table) -> Iterator[Record]:
    if (table.schema.metadata or {}).get(b"opdkernels_records") != str(SCHEMA_VERSION).encode():
        raise ValueError("written by another version of opdkernels")
    plain = {
        c: table[c].to_pylist()
        for c in ("index", "name", "trained_name", "dtype_source", "dtype_trained", "how", "failure", "max_delta")
    }
    lists = {c: table[c].combine_chunks() for c in ("shape", "cuts", "patterns", "tables", "counts", "sums")}

    def at(column: str, i: int) -> np.ndarray:
        return lists[column][i].values.to_numpy(zero_copy_only=False)

    for i in range(table.num_rows):
        tally = None
        if not plain["failure"][i]:
            cuts, patterns = tuple(at("cuts", i).tolist()), at("patterns", i).astype(np.int64)
            tables = at("tables", i).astype(np.int64).reshape(5 + len(cuts), len(patterns))
            tally = SparseTally(
                cuts, patterns, tables, at("counts", i), at("sums", i).reshape(4, -1), plain["max_delta"][i]
            )
        yield Record(
            plain["index"][i],
            plain["name"][i],
            plain["trained_name"][i],
            tuple(at("shape", i).tolist()),
            plain["dtype_source"][i],
            plain["dtype_trained"][i],
            plain["how"][i],
            tally,
            plain["failure"][i],
        )


class Keyed(Protocol):
    @property
    def key(self) -> Any: ...


R = TypeVar("R", bound=Keyed)


class Records(Generic[R]):
    """The records of a run; with a folder, appended there. `done` maps a record's key to it. A fragment's name is its number
    and the digest of its bytes: damage does not become a figure."""

    def __init__(
        self, folder: Path | None, write: Callable[[list[R]], pa.Table], read: Callable[[pa.Table], Iterator[R]]
    ):
        self.folder, self.write, self.read = folder, write, read
        self.done: dict[Any, R] = {}
        self.pending: list[R] = []
        self.fragments = 0
        self.flushed = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            for path in sorted(folder.glob("[0-9]*.arrow")):
                self.load(path)

    def load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
            number, found, _ = path.name.split(".")
            if found != digest(content):
                raise ValueError("its bytes are not those that were written")
            for record in self.read(pa.ipc.open_file(pa.py_buffer(content)).read_all()):
                self.done[record.key] = record
        except InputError:
            raise
        except (pa.ArrowInvalid, ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{printable(str(path))} cannot be read ({printable(str(error))}); delete it, or start again with --overwrite"
            ) from None
        self.fragments = max(self.fragments, int(number))

    def add(self, record: R) -> None:
        self.done[record.key] = record
        self.pending.append(record)
        if time.monotonic() - self.flushed > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self.pending and self.folder is not None:
            self.fragments += 1
            sink = pa.BufferOutputStream()
            table = self.write(self.pending)
            with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
                writer.write_table(table)
            content = sink.getvalue()
            write_atomically(self.folder / f"{self.fragments:06d}.{digest(content)}.arrow", content)
        self.pending.clear()
        self.flushed = time.monotonic()


def tallies(folder: Path | None) -> Records[Record]:
    """The tallies of a run, kept in `folder`."""
    return Records(folder, to_table, from_table)
