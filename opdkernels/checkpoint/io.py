"""One open file: its identity, positioned reads or a guarded mapping, and detection of changes while it is open."""

from __future__ import annotations

import errno
import functools
import importlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.untrusted import TOO_MANY_FILES, open_regular, reason_of

if TYPE_CHECKING:
    import numpy
    import torch

    from opdkernels.checkpoint.base import TensorInfo

# A page fault on these costs a round trip to a server, one page at a time: mapped reads are 30 to 50 times slower.
NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs"}
    | {"nfs4", "ocfs2", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"}
)

CHECKPOINT_REMEDY = "give the path of a checkpoint file"

MOUNT_TABLE = "/proc/self/mountinfo"

TORCH_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "bool": "bool",
    "c64": "complex64",
    "c128": "complex128",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
}


def guard() -> ModuleType | None:
    """Returns the compiled kernels, which guard mappings, so that a truncated file does not kill the process."""
    try:
        return importlib.import_module("opdkernels.native")
    except ImportError:
        return None


def guard_array(array: numpy.ndarray) -> Callable[[], int] | None:
    """Guards a mapped array as long as it or a view of it exists.

    Returns:
        A function that returns how many reads were beyond the end of a file that was truncated; they gave zeros. None
        where the array cannot be guarded: a truncated file would then end the process.
    """
    module = guard()
    if module is None or not array.nbytes:
        return None
    try:
        handle = module.guard_mapping(array.ctypes.data, array.nbytes)
    except RuntimeError:  # 4,096 files are mapped already
        return None
    weakref.finalize(array, module.unguard_mapping, handle)
    return functools.partial(module.mapping_faults, handle)


def on_network(path: str) -> bool:
    """Whether `path` is on a network or user-space file system, by the mount table; False if there is no table."""
    try:
        device = os.stat(path).st_dev
        with open(MOUNT_TABLE, encoding="utf-8", errors="surrogateescape") as table:
            for line in table:
                mount, _, filesystem = line.partition(" - ")
                if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                    kind = filesystem.split()[0]
                    return kind in NETWORK_FILE_SYSTEMS or kind.split(".")[0] == "fuse"
    except (OSError, IndexError):
        return False
    return False


def choose_io(io: str, path: str) -> str:
    """Returns "mmap" or "read" for `io`. Raises UsageError if "mmap" is requested and mappings cannot be guarded."""
    if io == "mmap" and guard() is None:
        raise UsageError(
            "io='mmap' needs the compiled kernels, which are not built: without it a file that is truncated"
            " while it is mapped kills the process; use io='read', or install a C++ compiler and reinstall opdkernels"
        )
    if io == "auto":
        return "read" if guard() is None or on_network(path) else "mmap"
    return io


class Buffer(threading.local):
    """Memory of one thread for positioned reads; it grows to the largest read and is reused by the next one."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def take(self, nbytes: int) -> torch.Tensor:
        """Returns the first `nbytes` of the buffer, uint8, 64-byte aligned; the next read overwrites them."""
        import torch

        if self._memory is None or self._memory.numel() < nbytes:
            self._memory = None  # release first: never hold the old and the new memory together
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes]

    def clear(self) -> None:
        """Releases the memory of this thread."""
        self._memory = None


class OpenFile:
    """A regular file held open. Raises InputError, naming `path`, if it cannot be opened, read or mapped."""

    def __init__(self, path: str, io: str, *, remedy: str = CHECKPOINT_REMEDY) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self._block: Any = None
        self._faults: Callable[[], int] | None = None
        self.fd = open_regular(path, remedy=remedy)
        self._opened = os.fstat(self.fd)
        self.size = self._opened.st_size
        self.mtime_ns, self.ctime_ns = self._opened.st_mtime_ns, self._opened.st_ctime_ns
        if io == "mmap" and self.size:
            self._map()

    def __str__(self) -> str:
        return printable(self.path)

    def _map(self) -> None:
        import ctypes

        import numpy

        module = guard()
        assert module is not None, "choose_io allows a mapping only where it can be guarded"
        try:
            # Shared and read-only: a private writable mapping would count against the memory limit of the machine.
            mapping = mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            reason = TOO_MANY_FILES if out_of_descriptors() else f"{printable(str(error))}; use --io read"
            raise InputError(f"{self} cannot be mapped: {reason}") from error
        address = numpy.frombuffer(mapping, dtype=numpy.uint8).ctypes.data
        try:
            handle = module.guard_mapping(address, self.size)
        except RuntimeError:  # 4,096 files are mapped already: this one is read
            return
        # torch warns about read-only buffers, not about an array over the address, which keeps the mapping alive.
        block: Any = (ctypes.c_uint8 * self.size).from_address(address)
        block.mapping = mapping
        # Views may outlive close(): the range stays guarded until the last of them is gone.
        weakref.finalize(block, module.unguard_mapping, handle)
        self._block, self._address = block, address
        self._faults = functools.partial(module.mapping_faults, handle)

    @property
    def is_mapped(self) -> bool:
        """Whether `elements` returns views of a mapping, which stay valid after the next read."""
        return self._block is not None

    def bytes_at(self, offset: int, nbytes: int) -> bytes:
        """Returns `nbytes` at `offset` by a positioned read, for headers."""
        content = bytearray(nbytes)
        self._read_into(memoryview(content), offset)
        return bytes(content)

    def _read_into(self, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, [target[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{self} cannot be read at byte {offset + done}: {reason_of(error)}") from error
            if count == 0:
                raise InputError(
                    f"{self} was truncated: {offset + len(target)} bytes expected, it has {offset + done};"
                    " copy or download it again"
                )
            done += count

    def elements(self, offset: int, count: int, dtype: torch.dtype, buffer: Buffer) -> torch.Tensor:
        """Returns `count` elements of `dtype` at byte `offset`: a view of the mapping, or a copy in `buffer`."""
        import torch

        if count == 0:
            return torch.empty(0, dtype=dtype)
        nbytes = count * dtype.itemsize
        if self._block is not None:
            if (self._address + offset) % dtype.itemsize == 0:
                return torch.frombuffer(self._block, dtype=dtype, count=count, offset=offset)
            # Kernels may assume aligned elements, as in torch's tensors; those of a file may not be aligned.
            memory = buffer.take(nbytes)
            memory.copy_(torch.frombuffer(self._block, dtype=torch.uint8, count=nbytes, offset=offset))
        else:
            memory = buffer.take(nbytes)
            self._read_into(memory.numpy().data, offset)
        return memory.view(dtype)

    def check(self) -> None:
        """Raises InputError if the file at `path` is another one, or in another state, than when it was opened."""
        try:
            by_path = os.stat(self.path)
            opened = os.fstat(self.fd)
        except OSError as error:
            raise InputError(
                f"{self} was removed while it was open ({reason_of(error)}); restore it and start again"
            ) from error
        if opened.st_size < self.size or (self._faults is not None and self._faults()):
            raise InputError(
                f"{self} was truncated while it was open: {self.size} bytes expected, it has {opened.st_size};"
                " copy or download it again"
            )
        if _identity(by_path) != _identity(self._opened) or _identity(opened) != _identity(self._opened):
            raise InputError(
                f"{self} changed while it was open ({self.size} bytes when opened, {by_path.st_size} now);"
                " start again once nothing writes to it"
            )

    def close(self) -> None:
        """Closes the file; existing views of the mapping stay readable."""
        self._block = self._faults = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # The time of modification can be set back, as rsync and cp -p do; that of the status change cannot.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def out_of_descriptors() -> bool:
    """Whether the process has no file descriptor left, which libraries report in many ways."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def bits_dtype(item_bytes: int) -> torch.dtype:
    """Returns the integer dtype of items of 1, 2, 4 or 8 bytes."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item_bytes]


def torch_dtype(name: str) -> torch.dtype | None:
    """Returns the torch dtype of a dtype name, or None if this version of torch has none."""
    import torch

    return getattr(torch, TORCH_DTYPES.get(name, ""), None)


def readable_dtype(file: OpenFile, tensor: TensorInfo) -> torch.dtype:
    """Returns the torch dtype of a tensor in a file. Raises InputError if this version of torch has none."""
    dtype = torch_dtype(tensor.dtype)
    if dtype is None:
        raise InputError(
            f"{file}: tensor {printable(tensor.name)} is {printable(tensor.dtype)}, which PyTorch does not support;"
            " convert it to bf16"
        )
    return dtype
