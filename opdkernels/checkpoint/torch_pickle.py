"""PyTorch `.bin` and `.pt` files: the pickle is loaded with weights_only on the meta device, the storages in ranges.

torch.save writes a zip archive with uncompressed storages. Loading the pickle to the meta device gives each tensor's
storage and offset without reading a storage, so that memory stays bounded and no mapping is unguarded.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any, NamedTuple

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, FileFormat, TensorInfo
from opdkernels.checkpoint.io import TORCH_DTYPES, Buffer, OpenFile, bits_dtype, torch_dtype
from opdkernels.checkpoint.state_dict import find_state_dict
from opdkernels.errors import InputError, printable

if TYPE_CHECKING:
    import torch

MAX_LEGACY_BYTES = 2**30
"""Files from before torch 1.6 are not archives and can only be loaded in full."""

EDGE_BYTES = 2**20


class Location(NamedTuple):
    """Position of a tensor: `storage` is the byte where its storage begins; `offset` and `stride` count elements."""

    storage: int
    offset: int
    stride: tuple[int, ...]
    contiguous: bool


class TorchFile:
    """One open PyTorch file; `tensors` is in the order of the bytes.

    Raises InputError for an invalid file, and never executes code from it.
    """

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
            self.fingerprint = FileFingerprint(
                self._file.name, self._file.size, self._file.mtime_ns, _digest(self._file)
            )
        except BaseException:
            self._file.close()
            raise

    def _open_archive(self) -> None:
        records = _records(self._file)
        state_dict = find_state_dict(_load(self._file, "meta"), str(self._file))
        locations = {name: _locate(self._file, name, tensor, records) for name, tensor in state_dict.items()}
        first: dict[tuple[Any, ...], str] = {}
        for name in sorted(locations, key=lambda n: locations[n][:2]):  # stable: equal keys keep the state dict's order
            tensor, location = state_dict[name], locations[name]
            self._describe(name, tensor)
            self._locations[name] = location
            if tensor.numel():
                identity = (location, tensor.dtype, tensor.shape)
                if identity in first:
                    self.aliases[name] = first[identity]
                first.setdefault(identity, name)

    def _open_legacy(self) -> None:
        if self._file.size > MAX_LEGACY_BYTES:
            raise InputError(
                f"{self._file} is in the format from before torch 1.6, which is loaded in full, and its"
                f" {self._file.size} bytes are over the limit of {MAX_LEGACY_BYTES};"
                " load it once and torch.save() it again"
            )
        state_dict = find_state_dict(_load(self._file, "cpu"), str(self._file))
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, tensor in state_dict.items():
            self._describe(name, tensor)
            self._loaded[name] = tensor.detach()
            if tensor.numel():
                identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                groups.setdefault(identity, []).append(name)
        self.aliases = {name: names[0] for names in groups.values() for name in names[1:]}

    def _describe(self, name: str, tensor: torch.Tensor) -> None:
        shape = tuple(int(n) for n in tensor.shape)
        numel = math.prod(shape)
        dtype = torch_dtype_name(tensor.dtype)
        self.tensors[name] = TensorInfo(name, dtype, shape, numel, self._file.name, numel * tensor.dtype.itemsize)
        if len(self.tensors) > MAX_TENSORS:
            raise InputError(f"{self._file} holds more than the limit of {MAX_TENSORS} tensors; split it")

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns flat elements [start, stop) of a tensor: a view of the mapping or of `buffer`, or gathered rows."""
        import torch

        info = self.tensors[name]
        if name in self._loaded:
            tensor = self._loaded[name]
            return tensor.reshape(-1)[start:stop] if tensor.is_contiguous() else _rows(tensor, start, stop)
        location = self._locations[name]
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise InputError(
                f"{self._file}: tensor {printable(name)} is {printable(info.dtype)}, which PyTorch does not support;"
                " convert it to bf16"
            )
        begin = location.storage + location.offset * dtype.itemsize
        if location.contiguous or stop == start:
            return self._file.elements(begin + start * dtype.itemsize, stop - start, dtype, buffer)
        # A transposed or sliced view: its elements are spread over its span, which is read once.
        span = self._file.elements(begin, _span(info.shape, location.stride), dtype, buffer)
        return _rows(torch.as_strided(span, info.shape, location.stride), start, stop)

    def read_bits(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns items [start, stop) of a tensor as integers: a view of the mapping or of `buffer`, or rows."""
        info = self.tensors[name]
        size = info.item_bytes
        items_per_element = max(info.items // max(info.numel, 1), 1)
        location = self._locations.get(name)
        if location is not None and location.contiguous:
            begin = location.storage + (location.offset * items_per_element + start) * size
            return self._file.elements(begin, stop - start, bits_dtype(size), buffer)
        first = start // items_per_element
        elements = self.read(name, first, -(-stop // items_per_element), buffer)
        skipped = first * items_per_element
        return elements.view(bits_dtype(size))[start - skipped : stop - skipped]

    def header(self) -> None:
        """Returns None: this format describes its tensors in a pickle."""

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
    """Returns the offset and size of each record of the archive. Raises InputError if torch.save did not write it."""
    try:
        with open(os.dup(file.fd), "rb") as handle, zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
            byteorder = [archive.read(e) for e in entries if e.filename.endswith("/byteorder") and e.file_size <= 16]
    except Exception as error:  # zipfile raises half a dozen kinds for damaged archives
        raise InputError(
            f"{file} is not a complete zip archive ({printable(str(error))}): it has {file.size} bytes and was probably"
            " truncated; copy or download it again"
        ) from error
    pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise InputError(f"{file} is a zip archive without a data.pkl and therefore no PyTorch file; give a checkpoint")
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
            raise InputError(f"{file}: record {printable(entry.filename)} is outside the file; download it again")
        local = file.bytes_at(entry.header_offset, 30)
        table[entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))] = entry.file_size
    return table


def _load(file: OpenFile, device: str) -> Any:
    import torch

    try:
        with open(os.dup(file.fd), "rb") as handle:
            handle.seek(0)
            return torch.load(handle, map_location=device, weights_only=True)
    except Exception as error:  # unpickler, zip reader and torch's checks raise different classes
        raise InputError(_load_error_message(file, str(error) or type(error).__name__)) from error


def _load_error_message(file: OpenFile, text: str) -> str:
    code = re.search(r"GLOBAL\s+([\w.]+\.[\w.]+)", text)
    if code:
        return (
            f"{file} runs code ({printable(code[1])}) when it is loaded, which is not allowed;"
            " save only the tensors, torch.save(model.state_dict(), ...), or convert it to safetensors"
        )
    if "quantized" in text:
        return f"{file} holds quantised tensors, which are not read yet; dequantise the model to bf16 and save it again"
    # torch puts a paragraph of advice (to trust the file) before the reason.
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0][:160]
    return (
        f"{file} is not a PyTorch checkpoint that can be read safely ({printable(reason)}); download it again, or save"
        " the state dict as safetensors"
    )


def _locate(file: OpenFile, name: str, tensor: torch.Tensor, records: dict[int, int]) -> Location:
    """Returns the position of a meta tensor in the archive, validated against the archive's table of records."""
    stride = tuple(int(n) for n in tensor.stride())
    offset = int(tensor.storage_offset())
    if tensor.numel() == 0:
        return Location(0, 0, stride, True)
    storage = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if storage not in records:
        raise InputError(
            f"{file}: the bytes of tensor {printable(name)} are not at the position that torch.save() uses;"
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
    """Returns the number of elements from a tensor's first to its last, both included; exact."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Returns flat elements [start, stop) in logical order; copies only the rows that hold them."""
    import torch

    if stop == start:
        return tensor.new_empty(0)
    row = tensor[0].numel()
    first = start // row
    elements = tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]
    # A single strided row reshapes to a view; contiguous() would keep the stride of a single element.
    return elements if elements.stride(0) == 1 else elements.clone(memory_format=torch.contiguous_format)


def torch_dtype_name(dtype: torch.dtype) -> str:
    """Returns this package's name of a torch dtype.

    >>> import torch
    >>> torch_dtype_name(torch.bfloat16), torch_dtype_name(torch.float8_e4m3fn)
    ('bf16', 'f8_e4m3')
    """
    text = str(dtype).removeprefix("torch.")
    return next((name for name, torch_name in TORCH_DTYPES.items() if torch_name == text), _float8(text))


def _float8(text: str) -> str:
    """Returns safetensors' name of other dtypes: float8_e4m3fn is f8_e4m3."""
    return re.sub(r"^float(?=\d)", "f", text).removesuffix("fn") if text.startswith("float") else text


def _is_torch(first_bytes: bytes) -> bool:
    """Whether a file begins as a zip archive, or as a pickle of protocol 2 to 5."""
    is_pickle = first_bytes[:1] == b"\x80" and first_bytes[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return first_bytes[:4] == b"PK\x03\x04" or is_pickle


FORMAT = FileFormat(
    name="torch",
    sharded_name="torch",
    main_file="pytorch_model.bin",
    suffixes=(".bin", ".pt", ".pth"),
    hub_patterns=("pytorch_model.bin",),
    recognizes=_is_torch,
    open=TorchFile,
)
