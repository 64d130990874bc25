"""A safetensors file: the header is validated by the safetensors library, the bytes are read in ranges.

`safe_open` itself is not used for reading: its pread backend reads the whole tensor for every slice, and its mapped
backend dies with the file when that is cut off.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, TensorInfo
from opdkernels.checkpoint.io import TOO_MANY_FILES, Buffer, OpenFile, bits_dtype, exhausted, torch_dtype
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
STORED_NAMES = {ours: theirs for theirs, ours in DTYPE_NAMES.items()}
DTYPE_BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


def dtype_name(stored: str) -> str:
    """What this package calls a dtype of a safetensors header: the inverse of `stored_dtype`."""
    return DTYPE_NAMES.get(stored, stored.lower())


def stored_dtype(name: str) -> str:
    """What a safetensors header calls a dtype.

    >>> stored_dtype("fp16"), stored_dtype("f8_e4m3")
    ('F16', 'F8_E4M3')
    """
    return STORED_NAMES.get(name, name.upper())


class DuplicateKey(ValueError):
    """A JSON object that holds one key twice."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that takes no key twice: which of the two counts would be up to the reader."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(key)
            seen.add(key)
    return table


class SafetensorsFile:
    """The tensors of one safetensors file, in the order of their bytes. Raises InputError on any invalid header."""

    def __init__(self, path: str, io: str) -> None:
        self._file = OpenFile(path, io)
        try:
            header = _header_bytes(self._file)
            entries, self.metadata = _parse(self._file, header)
            self._offsets: dict[str, int] = {}
            self.tensors: dict[str, TensorInfo] = {}
            for name, entry in entries:
                self._add(name, entry, 8 + len(header))
        except BaseException:
            self._file.close()
            raise
        self.aliases: dict[str, str] = {}
        digest = hashlib.blake2b(header, digest_size=16).hexdigest()
        self.fact = FileFingerprint(self._file.name, self._file.size, self._file.mtime_ns, digest)

    def _add(self, name: str, entry: dict[str, Any], data_start: int) -> None:
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = dtype_name(entry["dtype"])
        # math.prod on Python integers is exact; a product in 64 bits could wrap around to the right answer.
        numel = math.prod(shape)
        bits = DTYPE_BITS.get(dtype)
        if begin < 0 or end < begin or (bits is not None and numel * bits != 8 * (end - begin)):
            raise InputError(
                f"{self._file}: tensor {printable(name)} has shape {list(shape)} of {printable(dtype)} but bytes"
                f" {begin} to {end}; save or download the file again"
            )
        self._offsets[name] = data_start + begin
        self.tensors[name] = TensorInfo(name, dtype, shape, numel, self._file.name, end - begin)

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Flat elements [start, stop) of a tensor: a view of the mapping, or `buffer`."""
        info = self.tensors[name]
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise InputError(
                f"{self._file}: tensor {printable(name)} is {printable(info.dtype)}, for which there is no rule;"
                " convert it to bf16"
            )
        return self._file.elements(self._offsets[name] + start * dtype.itemsize, stop - start, dtype, buffer)

    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Items [start, stop) of a tensor of any dtype, as integers: a view of the mapping, or `buffer`."""
        size = self.tensors[name].item_bytes
        return self._file.elements(self._offsets[name] + start * size, stop - start, bits_dtype(size), buffer)

    def header(self) -> bytes:
        """What stands before the tensors: the header's length in 8 bytes, and the header."""
        content = _header_bytes(self._file)
        return len(content).to_bytes(8, "little") + content

    def check(self) -> None:
        self._file.check()

    def close(self) -> None:
        self._file.close()


def _header_bytes(file: OpenFile) -> bytes:
    if file.size < 8:
        raise InputError(
            f"{file} is not a safetensors file: it has {file.size} bytes, and the length of the header alone takes 8;"
            " download it again"
        )
    length = int.from_bytes(file.bytes_at(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            f"{file}: its header claims {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows;"
            " it is not a safetensors file, or a damaged one: download it again"
        )
    if 8 + length > file.size:
        raise InputError(
            f"{file} is cut off within its header: {8 + length} bytes expected, it has {file.size};"
            " copy or download it again"
        )
    return file.bytes_at(8, length)


def _parse(file: OpenFile, header: bytes) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    # Counted before it is parsed: 400,000 empty tensors cost the library seconds and hundreds of megabytes.
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise _too_many(file, count)
    try:
        _validate(file.path)
    except InputError:
        raise
    except BaseException as error:
        # A panic in Rust arrives as a BaseException; an interrupt of the user's goes on as it is.
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _diagnose(file, header, error) from error
    file.check()  # the library opened the path by itself: what it validated is what is held open here
    try:
        table = json.loads(header, object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise InputError(
            f"{file}: key {printable(str(error))} stands twice in the header; save the file again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: its header is not JSON ({printable(str(error))}); save or download it again"
        ) from error
    metadata = table.pop("__metadata__", None) or {}
    if len(table) > MAX_TENSORS:
        raise _too_many(file, len(table))
    return sorted(table.items(), key=lambda item: item[1]["data_offsets"]), metadata


def _validate(path: str) -> None:
    from safetensors import safe_open

    try:
        # The pread backend maps nothing: a sparse file larger than memory opens, and a cut-off one cannot kill us.
        opened = safe_open(path, framework="numpy", backend="pread")
    except TypeError:
        opened = safe_open(path, framework="numpy")
    with opened:
        pass


def _too_many(file: OpenFile, count: int) -> InputError:
    return InputError(
        f"{file} holds {count} tensors, more than the limit of {MAX_TENSORS}; it is not a checkpoint, or split it"
    )


def _diagnose(file: OpenFile, header: bytes, error: BaseException) -> InputError:
    """The error for a header that safetensors refused, with expected and actual bytes where the end is what is wrong."""
    end = None
    try:
        entries = json.loads(header)
        end = 8 + len(header) + max(v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    if isinstance(end, int) and end > file.size:
        return InputError(f"{file} is cut off: {end} bytes expected, it has {file.size}; copy or download it again")
    if isinstance(end, int) and end < file.size:
        return InputError(
            f"{file}: its header accounts for {end} bytes, it has {file.size} ({_first_line(error)});"
            " copy or download it again"
        )
    if exhausted():
        return InputError(f"{file} cannot be opened: {TOO_MANY_FILES}")
    return InputError(f"{file}: its header is invalid ({_first_line(error)}); save or download the file again")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0][:200])
