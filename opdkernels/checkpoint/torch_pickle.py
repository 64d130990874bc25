"""PyTorch `.bin` and `.pt` files: the pickle is read as data, the storages in ranges.

torch.save writes a zip archive with uncompressed storages; before torch 1.6 it wrote pickles, followed by the storages.
`pickle_data` reads the pickle without executing anything and gives each tensor's storage and offset, so that memory
stays bounded and no mapping is unguarded.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS, FileFingerprint, FileFormat, TensorInfo
from opdkernels.checkpoint.io import TORCH_DTYPES, Buffer, OpenFile, bits_dtype, readable_dtype
from opdkernels.checkpoint.pickle_data import CodeError, Pickle, PickledTensor, PickleError, Truncated, read_pickle
from opdkernels.checkpoint.state_dict import find_state_dict, validate_tensor
from opdkernels.errors import InputError, printable
from opdkernels.untrusted import other_content

if TYPE_CHECKING:
    import torch

EDGE_BYTES = 2**20
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""The pickle of the number with which torch.save began its files before torch 1.6."""


class Location(NamedTuple):
    """Position of a tensor: `storage` is the byte where its storage begins; `offset` and `stride` count elements."""

    storage: int
    offset: int
    stride: tuple[int, ...]
    contiguous: bool


class Record(NamedTuple):
    """The bytes of a storage: the first one in the file, and their number."""

    start: int
    nbytes: int


class TorchFile:
    """One open PyTorch file; `tensors` is in the order of the bytes.

    Raises InputError for an invalid file, and never executes code from it.
    """

    def __init__(self, path: str, io: str) -> None:
        self._file = OpenFile(path, io)
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self._locations: dict[str, Location] = {}
        try:
            if self._file.bytes_at(0, min(4, self._file.size)) == b"PK\x03\x04":
                pickle, records = _open_archive(self._file)
            else:
                pickle, records = _open_legacy(self._file)
            self._add_tensors(find_state_dict(pickle.value, str(self._file)), records)
            self.fingerprint = FileFingerprint(
                self._file.name, self._file.size, self._file.mtime_ns, self._file.ctime_ns, _digest(self._file)
            )
        except BaseException:
            self._file.close()
            raise

    def _add_tensors(self, state_dict: dict[str, PickledTensor], records: dict[str, Record]) -> None:
        if len(state_dict) > MAX_TENSORS:
            raise InputError(f"{self._file} holds more than the limit of {MAX_TENSORS} tensors; split it")
        locations = {name: _locate(self._file, name, tensor, records) for name, tensor in state_dict.items()}
        first: dict[tuple[Any, ...], str] = {}
        for name in sorted(locations, key=lambda n: locations[n][:2]):  # stable: equal keys keep the state dict's order
            tensor, location = state_dict[name], locations[name]
            numel, dtype = math.prod(tensor.shape), _torch_dtype(tensor.dtype)
            info = TensorInfo(
                name, torch_dtype_name(dtype), tensor.shape, numel, self._file.name, numel * dtype.itemsize
            )
            self.tensors[name] = info
            self._locations[name] = location
            if numel:
                identity = (location, dtype, tensor.shape)
                if identity in first:
                    self.aliases[name] = first[identity]
                first.setdefault(identity, name)

    def read(self, name: str, start: int, stop: int, buffer: Buffer) -> torch.Tensor:
        """Returns flat elements [start, stop) of a tensor: a view of the mapping or of `buffer`, or gathered rows."""
        import torch

        info = self.tensors[name]
        location = self._locations[name]
        dtype = readable_dtype(self._file, info)
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
        location = self._locations[name]
        if location.contiguous:
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


def _digest(file: OpenFile) -> str:
    edge = min(EDGE_BYTES, file.size)
    edges = file.bytes_at(0, edge) + file.bytes_at(file.size - edge, edge)
    return hashlib.blake2b(edges, digest_size=16).hexdigest()


def load_plain(path: str) -> Any:
    """Returns the object in a file of torch.save that has tensors, numbers, texts and collections of these only.

    The pickle is read as data first: torch.load would hash and call whatever it allows.

    Raises:
        InputError: The file is not a regular file, is damaged, or has other objects.
    """
    import torch

    file = OpenFile(path, "read")
    try:
        pickle, records = _open_archive(file, plain=True)
        for position, tensor in enumerate(pickle.tensors):
            validate_tensor(tensor, f"number {position}", str(file))
            _locate(file, f"number {position}", tensor, records)
        with os.fdopen(os.dup(file.fd), "rb") as handle:
            with zipfile.ZipFile(handle) as archive:
                damaged = archive.testzip()  # torch.load does not compare checksums
            if damaged is not None:
                raise InputError(f"the record {printable(damaged)} of {file} has another checksum; copy the file again")
            handle.seek(0)
            return torch.load(handle, map_location="cpu", weights_only=True)
    finally:
        file.close()


def _open_archive(file: OpenFile, plain: bool = False) -> tuple[Pickle, dict[str, Record]]:
    """Returns an archive's pickle, and the storages by key."""
    records = _records(file)
    pickles = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if not pickles:
        raise InputError(f"{file} is a zip archive without a data.pkl and therefore no PyTorch file; give a checkpoint")
    if len(pickles) > 1 or records[pickles[0]].nbytes > MAX_HEADER_BYTES:
        raise InputError(
            f"{file} has {len(pickles)} pickles, the first of {records[pickles[0]].nbytes} bytes; torch.save() writes"
            f" one, of at most {MAX_HEADER_BYTES} bytes here: it is not a checkpoint, or split it"
        )
    folder = pickles[0].removesuffix("data.pkl")
    order = records.get(folder + "byteorder")
    if order is not None and file.bytes_at(order.start, min(order.nbytes, 16)) != b"little":
        raise InputError(f"{file} is in big-endian byte order; write it again on a little-endian machine")
    with _pickle_errors(file):
        pickle = read_pickle(file.bytes_at(*records[pickles[0]]), plain=plain)
    prefix = folder + "data/"
    return pickle, {name.removeprefix(prefix): r for name, r in records.items() if name.startswith(prefix)}


def _records(file: OpenFile) -> dict[str, Record]:
    """Returns the position of each record of an archive. Raises InputError if torch.save did not write it."""
    _check_directory(file)
    try:
        with open(os.dup(file.fd), "rb") as handle, zipfile.ZipFile(handle) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises half a dozen kinds for damaged archives
        raise _incomplete(file, str(error)) from error
    if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
        raise InputError(f"{file} is a TorchScript archive, which holds code; save the model's state_dict() instead")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise InputError(f"{file} has compressed or encrypted records; write it again with torch.save()")
    table: dict[str, Record] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        shown = printable(entry.filename)
        if entry.header_offset < 0 or entry.header_offset + 30 > file.size:
            raise InputError(f"{file}: record {shown} is outside the file; download it again")
        local = file.bytes_at(entry.header_offset, 30)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
        if entry.filename in table or entry.header_offset < end or local[:4] != b"PK\x03\x04":
            raise InputError(
                f"{file}: record {shown} overlaps another one, or is there twice; write it again with torch.save()"
            )
        end = start + entry.file_size
        if end > file.size:
            raise InputError(
                f"{file} was truncated: record {shown} ends at byte {end}, it has {file.size}; download it again"
            )
        table[entry.filename] = Record(start, entry.file_size)
    return table


def _check_directory(file: OpenFile) -> None:
    """Raises InputError unless the list of records at the end is of a plausible size: zipfile reads it whole."""
    tail = file.bytes_at(max(file.size - 98, 0), min(file.size, 98))
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise _incomplete(file, "its list of records is not at its end")
    count, nbytes = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":  # 64-bit sizes, in the 56 bytes before the 20 of this locator
        if tail[-98:-94] != b"PK\x06\x06":
            raise _incomplete(file, "its list of records has no 64-bit sizes")
        count, nbytes = struct.unpack("<QQ", tail[-66:-50])
    if count > MAX_TENSORS + 16 or nbytes > MAX_HEADER_BYTES:
        raise InputError(
            f"{file} has {count} records, described in {nbytes} bytes, more than the limits of {MAX_TENSORS} and"
            f" {MAX_HEADER_BYTES}; it is not a checkpoint, or split it"
        )


def _incomplete(file: OpenFile, reason: str) -> InputError:
    if content := other_content(file.bytes_at(0, min(512, file.size))):
        return InputError(f"{file} is {content}")
    return InputError(
        f"{file} is not a complete zip archive ({printable(reason)}): it has {file.size} bytes and was probably"
        " truncated; copy or download it again"
    )


def _open_legacy(file: OpenFile) -> tuple[Pickle, dict[str, Record]]:
    """Returns the pickle of a file from before torch 1.6, and the storages by key.

    Five pickles (a magic number, the version, the machine, the object, the keys of its storages), then for each key the
    number of elements in 8 bytes and the elements.
    """
    if file.bytes_at(0, min(len(LEGACY_MAGIC), file.size)) != LEGACY_MAGIC:
        _unpickle(file, 0)  # says what is wrong with it, such as code in it
        raise InputError(
            f"{file} is not a PyTorch checkpoint that can be read safely (it is a pickle that torch.save() did not"
            " write); save the state dict as safetensors"
        )
    version = _unpickle(file, len(LEGACY_MAGIC))
    machine = _unpickle(file, version.end)
    if version.value != 1001 or not isinstance(machine.value, dict) or machine.value.get("little_endian") is not True:
        raise InputError(
            f"{file} is of another version of PyTorch's format, or in big-endian byte order; load it once and"
            " torch.save() it again"
        )
    content = _unpickle(file, machine.end)
    keys = _unpickle(file, content.end)
    if not isinstance(keys.value, list) or not all(type(k) is str and k in content.storages for k in keys.value):
        raise InputError(f"{file} has no valid list of its storages; download it again, or save it as safetensors")
    records: dict[str, Record] = {}
    position = keys.end
    for key in keys.value:
        itemsize = _torch_dtype(content.storages[key] or "uint8").itemsize
        nbytes = int.from_bytes(file.bytes_at(position, 8), "little") * itemsize
        records[key] = Record(position + 8, nbytes)
        position += 8 + nbytes
        if position > file.size:
            raise InputError(
                f"{file} was truncated: its storages end at byte {position} or later, it has {file.size}; copy or"
                " download it again"
            )
    return content, records


def _unpickle(file: OpenFile, start: int) -> Pickle:
    """Reads the pickle at a position of a file, whose end is not known."""
    nbytes = EDGE_BYTES
    while True:
        available = min(nbytes, MAX_HEADER_BYTES, file.size - start)
        with _pickle_errors(file):
            try:
                pickle = read_pickle(file.bytes_at(start, available))
                return pickle._replace(end=start + pickle.end)
            except Truncated:
                if available < nbytes:
                    raise
        nbytes *= 8


@contextlib.contextmanager
def _pickle_errors(file: OpenFile) -> Iterator[None]:
    """Turns errors of `read_pickle` into InputError."""
    try:
        yield
    except CodeError as error:
        raise InputError(
            f"{file} {printable(str(error))}, which is not allowed; save only the tensors,"
            " torch.save(model.state_dict(), ...), or convert it to safetensors"
        ) from None
    except PickleError as error:
        raise InputError(
            f"{file} is not a PyTorch checkpoint that can be read safely (it {printable(str(error))}); download it"
            " again, or save the state dict as safetensors"
        ) from None


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return torch.__dict__[name]


def _locate(file: OpenFile, name: str, tensor: PickledTensor, records: dict[str, Record]) -> Location:
    """Returns the position of a tensor in the file, validated against the records."""
    shape, stride, itemsize = tensor.shape, tensor.stride, _torch_dtype(tensor.dtype).itemsize
    if math.prod(shape) == 0:
        return Location(0, 0, stride, True)
    storage = tensor.storage
    record = records.get(storage.key) if storage is not None else None
    if storage is None or record is None:
        raise InputError(
            f"{file}: the bytes of tensor {printable(name)} are missing: there is no such storage in the file;"
            " write the file again with torch.save()"
        )
    span = _span(shape, stride)
    offset = storage.start + tensor.offset
    end = (offset + span) * itemsize
    if end > record.nbytes:
        raise InputError(
            f"{file}: tensor {printable(name)} needs {end} bytes of a storage that has {record.nbytes};"
            " copy or download it again"
        )
    if math.prod(shape) > span:
        raise InputError(
            f"{file}: tensor {printable(name)} is an expanded view, of {math.prod(shape)} elements over {span};"
            " save it after .contiguous()"
        )
    return Location(record.start, offset, stride, _is_contiguous(shape, stride))


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements follow each other in logical order; strides of dimensions of one element do not count."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


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
