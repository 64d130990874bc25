"""The safetensors format: the safetensors library validates the header, the bytes are read in ranges.

`safe_open` itself is not used for reading: its pread backend reads the whole tensor for every slice, and its mapped
backend crashes the process if the file is truncated.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

from opdkernels.checkpoint.base import MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, FileFormat, TensorInfo
from opdkernels.checkpoint.io import CHECKPOINT_REMEDY, Buffer, OpenFile, bits_dtype, out_of_descriptors, readable_dtype
from opdkernels.errors import InputError, printable
from opdkernels.untrusted import TOO_MANY_FILES, other_content, parse_json

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
STORED_NAMES = {name: stored for stored, name in DTYPE_NAMES.items()}
DTYPE_BITS = {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


def dtype_name(stored: str) -> str:
    """Returns this package's name of a dtype in a safetensors header: the inverse of `stored_dtype`.

    >>> dtype_name("F16"), dtype_name("F8_E4M3")
    ('fp16', 'f8_e4m3')
    """
    return DTYPE_NAMES.get(stored, stored.lower())


def stored_dtype(name: str) -> str:
    """Returns the name of a dtype in a safetensors header.

    >>> stored_dtype("fp16"), stored_dtype("f8_e4m3")
    ('F16', 'F8_E4M3')
    """
    return STORED_NAMES.get(name, name.upper())


class SafetensorsFile:
    """One open safetensors file; `tensors` is in the order of the bytes. Raises InputError for an invalid header."""

    def __init__(self, path: str, io: str, *, remedy: str = CHECKPOINT_REMEDY) -> None:
        self._file = OpenFile(path, io, remedy=remedy)
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
        self.fingerprint = FileFingerprint(
            self._file.name, self._file.size, self._file.mtime_ns, self._file.ctime_ns, digest
        )

    def _add(self, name: str, entry: dict[str, Any], data_start: int) -> None:
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if len(shape) > MAX_DIMS:
            raise InputError(
                f"{self._file}: tensor {printable(name)} has {len(shape)} dimensions, more than the limit of"
                f" {MAX_DIMS}; save or download the file again"
            )
        dtype = dtype_name(entry["dtype"])
        # math.prod on Python integers is exact; a product in 64 bits could wrap around to the right value.
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
        """Returns flat elements [start, stop) of a tensor: a view of the mapping or of `buffer`."""
        dtype = readable_dtype(self._file, self.tensors[name])
        return self._file.elements(self._offsets[name] + start * dtype.itemsize, stop - start, dtype, buffer)

    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns items [start, stop) of a tensor of any dtype, as integers: a view of the mapping or of `buffer`."""
        size = self.tensors[name].item_bytes
        return self._file.elements(self._offsets[name] + start * size, stop - start, bits_dtype(size), buffer)

    @property
    def is_mapped(self) -> bool:
        """Whether reads return views of a mapping, which stay valid after the next read."""
        return self._file.is_mapped

    def header(self) -> bytes:
        """Returns the bytes before the tensors: the header's length in 8 bytes, and the header."""
        content = _header_bytes(self._file)
        return len(content).to_bytes(8, "little") + content

    def check(self) -> None:
        self._file.check()

    def close(self) -> None:
        self._file.close()


def _header_bytes(file: OpenFile) -> bytes:
    if file.size < 8:
        raise InputError(
            f"{file} is not a safetensors file: it has {file.size} bytes, and the length of the header alone needs 8;"
            " download it again"
        )
    length = int.from_bytes(file.bytes_at(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        if content := other_content(file.bytes_at(0, min(512, file.size))):
            raise InputError(f"{file} is {content}")
        raise InputError(
            f"{file}: its header claims {length} bytes, more than the {MAX_HEADER_BYTES} that safetensors allows;"
            " it is damaged or not a safetensors file: download it again"
        )
    if 8 + length > file.size:
        raise InputError(
            f"{file} is truncated within its header: {8 + length} bytes expected, it has {file.size};"
            " copy or download it again"
        )
    return file.bytes_at(8, length)


def _parse(file: OpenFile, header: bytes) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str]]:
    check_structure(str(file), header)
    try:
        _validate(file.path)
    except InputError:
        raise
    except BaseException as error:
        # A panic in Rust is a BaseException; a user's interrupt is re-raised unchanged.
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _diagnose(file, header, error) from error
    file.check()  # the library opened the path itself: the file it validated must be the one that is open here
    table = parse_json(header, f"{file}: its header", remedy="save or download the file again")
    metadata = table.pop("__metadata__", None) or {}
    if len(table) > MAX_TENSORS:
        raise _too_many(str(file), len(table))
    return sorted(table.items(), key=lambda item: item[1]["data_offsets"]), metadata


def check_structure(shown: str, header: bytes) -> None:
    """Raises InputError if a header has far more lists and numbers than its tensors need.

    Counted before parsing: 400,000 empty tensors take seconds and hundreds of megabytes, and lists of short numbers 25
    times the header's size in memory, before any shape can be checked.
    """
    num_tensors = header.count(b'"data_offsets"')
    if num_tensors > MAX_TENSORS:
        raise _too_many(shown, num_tensors)
    limit = 16 * num_tensors + 4096
    if _count_parts(header) <= limit:
        return
    # Commas in texts, such as the JSON in metadata, do not count: the parts at even positions are outside of texts.
    plain = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') <= 2 * limit and sum(map(_count_parts, plain.split(b'"')[::2])) <= limit:
        return
    raise InputError(
        f"{shown}: its header describes {num_tensors} tensors in {len(header)} bytes, with more dimensions or entries"
        " than tensors have; save or download the file again"
    )


def _count_parts(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _validate(path: str) -> None:
    from safetensors import safe_open

    try:
        # The pread backend maps nothing: it opens a sparse file larger than memory, and survives a truncated one.
        opened = safe_open(path, framework="numpy", backend="pread")
    except TypeError:
        opened = safe_open(path, framework="numpy")
    with opened:
        pass


def _too_many(shown: str, count: int) -> InputError:
    return InputError(
        f"{shown} holds {count} tensors, more than the limit of {MAX_TENSORS}; it is not a checkpoint, or split it"
    )


def _diagnose(file: OpenFile, header: bytes, error: BaseException) -> InputError:
    """Returns the error for a header that safetensors rejected, with expected and actual bytes if the size is wrong."""
    end = None
    try:
        entries = json.loads(header)
        end = 8 + len(header) + max(v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    if isinstance(end, int) and end > file.size:
        return InputError(f"{file} is truncated: {end} bytes expected, it has {file.size}; copy or download it again")
    if isinstance(end, int) and end < file.size:
        return InputError(
            f"{file}: its header accounts for {end} bytes, it has {file.size} ({_first_line(error)});"
            " copy or download it again"
        )
    if out_of_descriptors():
        return InputError(f"{file} cannot be opened: {TOO_MANY_FILES}")
    return InputError(f"{file}: its header is invalid ({_first_line(error)}); save or download the file again")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0][:200])


def _is_safetensors(first_bytes: bytes) -> bool:
    length = int.from_bytes(first_bytes[:8], "little")
    return len(first_bytes) > 8 and first_bytes[8:9] == b"{" and length <= MAX_HEADER_BYTES


FORMAT = FileFormat(
    name="safetensors",
    sharded_name="safetensors sharded",
    main_file="model.safetensors",
    suffixes=(".safetensors",),
    hub_patterns=("model.safetensors", "*.safetensors"),
    recognizes=_is_safetensors,
    open=SafetensorsFile,
)
