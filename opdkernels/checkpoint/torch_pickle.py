"""A PyTorch `.bin` or `.pt` file: its pickle is read with weights_only on the meta device, its storages in ranges.

torch.save writes a zip archive whose storages are stored uncompressed. Loaded to the meta device the pickle tells each
tensor's storage and offset and no storage is read, so memory stays bounded and nothing maps the file unguarded.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, TensorInfo
from opdkernels.checkpoint.io import TORCH_DTYPES, Buffer, OpenFile, bits_dtype, torch_dtype
from opdkernels.checkpoint.state_dict import find_state_dict
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

MAX_LEGACY_BYTES = 2**30
"""Files from before torch 1.6 are no archives and can only be loaded whole."""

EDGE_BYTES = 2**20


class Location(NamedTuple):
    """Where a tensor lies: the byte its storage begins at, then as torch counts: elements."""

    storage: int
    offset: int
    stride: tuple[int, ...]
    contiguous: bool


class TorchFile:
    """The tensors of one PyTorch file, in the order of their bytes. Raises InputError, and never runs what it reads."""

    def __init__(self, path: str, io: str) -> None:
        self._file = OpenFile(path, io)
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._locations: dict[str, Location] = {}
        self._loaded: dict[str, torch.Tensor] = {}  # legacy files only
        try:
            if self._file.bytes_at(0, min(4, self._file.size)) == b"PK\x03\x04":
                self._open_archive()
            else:
                self._open_legacy()
            self.fact = FileFingerprint(self._file.name, self._file.size, self._file.mtime_ns, _digest(self._file))
        except BaseException:
            self._file.close()
            raise

    def _open_archive(self) -> None:
        records = _records(self._file)
        found = find_state_dict(_load(self._file, "meta"), str(self._file))
        locations = {name: _locate(self._file, name, tensor, records) for name, tensor in found.items()}
        first: dict[tuple[Any, ...], str] = {}
        for name in sorted(locations, key=lambda n: locations[n][:2]):  # stable: among equals the state dict's order
            tensor, location = found[name], locations[name]
            self._describe(name, tensor)
            self._locations[name] = location
            if tensor.numel():
                same = (location, tensor.dtype, tensor.shape)
                if same in first:
                    self.aliases[name] = first[same]
                first.setdefault(same, name)

    def _open_legacy(self) -> None:
        if self._file.size > MAX_LEGACY_BYTES:
            raise InputError(
                f"{self._file} is in the format from before torch 1.6, which is loaded whole, and its {self._file.size}"
                f" bytes are over the limit of {MAX_LEGACY_BYTES}; load it once and torch.save() it again"
            )
        found = find_state_dict(_load(self._file, "cpu"), str(self._file))
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in found.items():
            self._describe(name, tensor)
            self._loaded[name] = tensor.detach()
            if tensor.numel():
                same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                groups.setdefault(same, []).append(name)
        self.aliases = {name: names[0] for names in groups.values() for name in names[1:]}

    def _describe(self, name: str, tensor: torch.Tensor) -> None:
        shape = tuple(int(n) for n in tensor.shape)
        numel = math.prod(shape)
        dtype = torch_dtype_name(tensor.dtype)
        self.tensors[name] = TensorInfo(name, dtype, shape, numel, self._file.name, numel * tensor.dtype.itemsize)
        if len(self.tensors) > MAX_TENSORS:
            raise InputError(f"{self._file} holds more than the limit of {MAX_TENSORS} tensors; split it")

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Flat elements [start, stop) of a tensor: a view of the mapping, or `buffer`, or rows put together."""
        import torch

        info = self.tensors[name]
        if name in self._loaded:
            tensor = self._loaded[name]
            return tensor.reshape(-1)[start:stop] if tensor.is_contiguous() else _rows(tensor, start, stop)
        location = self._locations[name]
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise InputError(
                f"{self._file}: tensor {printable(name)} is {printable(info.dtype)}, for which there is no rule;"
                " convert it to bf16"
            )
        begin = location.storage + location.offset * dtype.itemsize
        if location.contiguous or stop == start:
            return self._file.elements(begin + start * dtype.itemsize, stop - start, dtype, buffer)
        # A transposed or cut-out view: its elements are spread over all that it spans, which is taken in once.
        span = self._file.elements(begin, _span(info.shape, location.stride), dtype, buffer)
        return _rows(torch.as_strided(span, info.shape, location.stride), start, stop)

    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Items [start, stop) of a tensor, as integers: a view of the mapping, or `buffer`, or rows put together."""
        info = self.tensors[name]
        size = info.item_bytes
        each = max(info.items // max(info.numel, 1), 1)  # items an element
        location = self._locations.get(name)
        if location is not None and location.contiguous:
            begin = location.storage + (location.offset * each + start) * size
            return self._file.elements(begin, stop - start, bits_dtype(size), buffer)
        first = start // each
        return self.read(name, first, -(-stop // each), buffer).view(bits_dtype(size))[
            start - first * each : stop - first * each
        ]

    def header(self) -> None:
        """None: what this format says of its tensors is a pickle."""

    def check(self) -> None:
        self._file.check()

    def close(self) -> None:
        self._file.close()
        self._loaded.clear()


def _digest(file: OpenFile) -> str:
    edge = min(EDGE_BYTES, file.size)
    edges = file.bytes_at(0, edge) + file.bytes_at(file.size - edge, edge)
    return hashlib.blake2b(edges, digest_size=16).hexdigest()


def _records(file: OpenFile) -> dict[int, int]:
    """Where each record of the archive begins, and its bytes. Raises InputError on anything torch.save does not do."""
    try:
        with open(os.dup(file.fd), "rb") as handle, zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
            byteorder = [archive.read(e) for e in entries if e.filename.endswith("/byteorder") and e.file_size <= 16]
    except Exception as error:  # zipfile raises half a dozen kinds for damaged archives
        raise InputError(
            f"{file} is not a complete zip archive ({printable(str(error))}): it has {file.size} bytes and was probably"
            " cut off; copy or download it again"
        ) from error
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise InputError(f"{file} is a zip archive without a data.pkl, so no PyTorch file; give a checkpoint")
    if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
        raise InputError(f"{file} is a TorchScript archive, which holds code; save the model's state_dict() instead")
    if len(entries) > MAX_TENSORS + 16 or max(entry.file_size for entry in pickles) > MAX_HEADER_BYTES:
        raise InputError(
            f"{file} has {len(entries)} records and a pickle of {pickles[0].file_size} bytes, more than the limits of"
            f" {MAX_TENSORS} and {MAX_HEADER_BYTES}; it is not a checkpoint, or split it"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise InputError(f"{file} has compressed or encrypted records; write it again with torch.save()")
    if any(order != b"little" for order in byteorder):
        raise InputError(f"{file} is in big-endian byte order; write it again on a little-endian machine")
    table = {}
    for entry in entries:
        if entry.header_offset < 0 or entry.header_offset + 30 > file.size:
            raise InputError(f"{file}: record {printable(entry.filename)} lies outside the file; download it again")
        local = file.bytes_at(entry.header_offset, 30)
        table[entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))] = entry.file_size
    return table


def _load(file: OpenFile, device: str) -> Any:
    import torch

    try:
        with open(os.dup(file.fd), "rb") as handle:
            handle.seek(0)
            return torch.load(handle, map_location=device, weights_only=True)
    except Exception as error:  # the pickle machine, the zip reader and torch's own checks each raise their own
        raise InputError(_refusal(file, str(error) or type(error).__name__)) from error


def _refusal(file: OpenFile, text: str) -> str:
    code = re.search(r"GLOBAL\s+([\w.]+\.[\w.]+)", text)
    if code:
        return (
            f"{file} wants to run code ({printable(code[1])}) to be loaded, which is never done;"
            " save only the tensors, torch.save(model.state_dict(), ...), or convert it to safetensors"
        )
    if "quantized" in text:
        return f"{file} holds quantised tensors, which are not read yet; dequantise the model to bf16 and save it again"
    # torch puts a paragraph of advice, which is to trust the file, before the reason.
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0][:160]
    return (
        f"{file} is not a PyTorch checkpoint that can be read safely ({printable(reason)}); download it again, or save"
        " the state dict as safetensors"
    )


def _locate(file: OpenFile, name: str, tensor: torch.Tensor, records: dict[int, int]) -> Location:
    """Where a meta tensor's elements are in the archive, checked against the archive's own table of records."""
    stride = tuple(int(n) for n in tensor.stride())
    offset = int(tensor.storage_offset())
    if tensor.numel() == 0:
        return Location(0, 0, stride, True)
    storage = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage not in records:
        raise InputError(
            f"{file}: the bytes of tensor {printable(name)} are not where torch.save() puts them;"
            " write the file again with torch.save()"
        )
    shape = tuple(int(n) for n in tensor.shape)
    span = _span(shape, stride)
    itemsize = tensor.dtype.itemsize
    end = (offset + span) * itemsize
    if offset < 0 or min(stride, default=0) < 0 or end > records[storage] or storage + end > file.size:
        raise InputError(
            f"{file}: tensor {printable(name)} needs {end} bytes of a storage that has {records[storage]};"
            " copy or download it again"
        )
    if math.prod(shape) > span:
        raise InputError(
            f"{file}: tensor {printable(name)} is an expanded view, of {math.prod(shape)} elements over {span};"
            " save it after .contiguous()"
        )
    return Location(int(storage), offset, stride, tensor.is_contiguous())


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie between a tensor's first and last, both included; exact."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Flat elements [start, stop) in logical order, copying only the rows that hold them."""
    import torch

    if stop == start:
        return tensor.new_empty(0)
    row = tensor[0].numel()
    first = start // row
    part = tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]
    # A single strided row reshapes to a view; contiguous() would leave one element the stride it had.
    return part if part.stride(0) == 1 else part.clone(memory_format=torch.contiguous_format)


def torch_dtype_name(dtype: torch.dtype) -> str:
    """What this package calls a torch dtype."""
    text = str(dtype).removeprefix("torch.")
    return next((name for name, torch_name in TORCH_DTYPES.items() if torch_name == text), _float8(text))


def _float8(text: str) -> str:
    """safetensors' names for the rest: float8_e4m3fn is f8_e4m3."""
    return re.sub(r"^float(?=\d)", "f", text).removesuffix("fn") if text.startswith("float") else text
