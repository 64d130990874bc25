"""How CUDA C++ kernels are found and launched: on the tensors' device and its current stream.

Every argument of a kernel has eight bytes: a pointer or an integer.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda.sources import family_source, is_built_from_sources
from opdkernels.backends.layout import QUEUE_BLOCKS_PER_SM, QUEUE_SIZE, SMEM_HEADER_BYTES, SMEM_TABLE_BYTES, WARP
from opdkernels.files import remove_leftovers, write_atomically

LIBRARY = Path(__file__).parents[2] / "_cuda.so"
OPTIONS = ("-std=c++17", "--fmad=false")  # no fused multiply-add: every product and sum is rounded as on the CPU


class LibraryKernels:
    """Kernels of the library that the install built, or of another library with its interface."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.opd_cuda_error.restype = ctypes.c_char_p

    def launch(
        self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device
    ) -> None:
        """Launch a kernel on the current stream; raises RuntimeError if the launch fails."""
        status = getattr(self.library, f"{name}_launch")(
            (ctypes.c_longlong * len(arguments))(*arguments),
            len(arguments),
            ctypes.c_longlong(blocks),
            threads,
            shared_bytes,
            device_index(device),
            ctypes.c_void_p(stream_address(device)),
        )
        if status:
            raise RuntimeError(
                f"{name} did not start on {device}: {self.library.opd_cuda_error(status).decode()}; "
                "update the NVIDIA driver, or set OPDKERNELS_BACKEND=triton"
            )


class NvrtcKernels:
    """Kernels that NVRTC compiles for the current device, through CuPy.

    They are cached on disk by source, options, device and compiler version.

    Args:
        source_of: Returns the CUDA source of a family, the first word of the names of its kernels.
    """

    def __init__(self, source_of: Callable[[str], str] = family_source) -> None:
        self.source_of = source_of
        self.cupy: Any = importlib.import_module("cupy")
        self.functions: dict[tuple[str, int], Any] = {}

    def function(self, name: str, device: int) -> Any:
        """A kernel of a device. Call it with that device current: CuPy compiles for it and loads into it."""
        if (name, device) not in self.functions:
            cubin = self.cubin(name.split("_", 1)[0], self.cupy.cuda.Device(device).compute_capability)
            self.functions[name, device] = self.cupy.RawModule(path=str(cubin)).get_function(name)
        return self.functions[name, device]

    def cubin(self, family: str, capability: str) -> Path:
        """The file with a family's machine code, from the cache or compiled.

        It is not RawModule that compiles: its options would flush subnormals to zero.
        """
        source, nvrtc_version = self.source_of(family), self.cupy.cuda.nvrtc.getVersion()
        key = hashlib.blake2b(
            "\0".join(map(str, (source, OPTIONS, capability, nvrtc_version))).encode(), digest_size=16
        ).hexdigest()
        name = f"{family}-{key}.cubin"
        path = cache_dir() / name
        if os.access(path, os.R_OK):
            return path
        code, _ = importlib.import_module("cupy.cuda.compiler").compile_using_nvrtc(
            source, OPTIONS, filename=f"{family}.cu"
        )
        code = code.encode() if isinstance(code, str) else code
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            write_atomically(path, code)
        except OSError:  # the disk is full, or the cache is not writable
            path = process_dir() / name
            write_atomically(path, code)
        return path

    def launch(
        self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device
    ) -> None:
        """Launch a kernel on the current stream; CuPy raises what fails."""
        index = device_index(device)
        stream = self.cupy.cuda.ExternalStream(stream_address(device), index)
        with self.cupy.cuda.Device(index), stream:
            function = self.function(name, index)
            function.max_dynamic_shared_size_bytes = shared_bytes
            function((blocks,), (threads,), tuple(np.int64(a) for a in arguments), shared_mem=shared_bytes)


@functools.cache
def cache_dir() -> Path:
    """Where compiled kernels are cached: the user's cache directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdkernels"
    except RuntimeError:  # no home directory
        return process_dir()


@functools.cache
def process_dir() -> Path:
    """A temporary directory of this process, removed when it exits."""
    folder = tempfile.mkdtemp(prefix="opdkernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def library_cuda_major() -> int | None:
    """CUDA's major version of the library that the install built; None if there is none or it does not load."""
    try:
        return ctypes.CDLL(str(LIBRARY)).opd_cuda_major() if LIBRARY.is_file() else None
    except OSError:
        return None


@functools.cache
def library_is_stale() -> bool:
    """Whether the library was built from other than the installed sources: its kernels may take other arguments."""
    return LIBRARY.is_file() and not is_built_from_sources(LIBRARY)


def cupy_cuda_major() -> int | None:
    """CUDA's major version of the installed CuPy, the latest if there are several; None without CuPy."""
    for major in (13, 12):
        try:
            version(f"cupy-cuda{major}x")
        except PackageNotFoundError:
            continue
        return major
    return None


def kernel_source() -> str | None:
    """Where kernels for torch's CUDA version come from: "built", "nvrtc" or None."""
    torch_major = int((torch.version.cuda or "0").split(".")[0])
    if torch.version.hip is not None or not torch_major:
        return None
    built = library_cuda_major() == torch_major and not library_is_stale()
    return "built" if built else "nvrtc" if cupy_cuda_major() == torch_major else None


@functools.cache
def kernels() -> LibraryKernels | NvrtcKernels:
    """The kernels that this process launches."""
    return LibraryKernels(LIBRARY) if kernel_source() == "built" else NvrtcKernels()


def device_index(device: torch.device) -> int:
    """The number of a device; 0 for the CPU."""
    if device.index is None:
        return torch.cuda.current_device() if device.type == "cuda" else 0
    return device.index


def stream_address(device: torch.device) -> int:
    """The current stream of a device; 0 for the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device captures a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


workspaces: dict[tuple[str, str, int, int], torch.Tensor] = {}


def workspace(family: str, device: torch.device, words: int) -> torch.Tensor:
    """Zeros for the kernels of a family, int32 [words]. A kernel leaves them zero for the next one on the same stream.

    In the capture of a CUDA graph they are allocated by, and set to zero in, the graph.
    """
    if is_capturing(device):
        return torch.zeros(words, dtype=torch.int32, device=device)
    key = family, device.type, device_index(device), stream_address(device)
    if key not in workspaces:
        workspaces[key] = torch.zeros(words, dtype=torch.int32, device=device)
    return workspaces[key]


def device_limits(device: torch.device) -> tuple[int, int]:
    """Number of SMs of a device, and the most shared memory of a block in bytes."""
    properties = torch.cuda.get_device_properties(device)
    default = properties.shared_memory_per_block  # what a kernel gets without opting in
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", default)


@dataclass(frozen=True)
class Shape:
    """The kernel that counts tensors of some dtypes, and what a launch of it needs.

    Attributes:
        kernel: The kernel.
        threads: Threads per block.
        values_per_thread: Coordinates that a thread takes per step.
        shared_bytes: Dynamic shared memory per block.
        smem_tables: How many tables are in shared memory.
    """

    kernel: str
    threads: int
    values_per_thread: int
    shared_bytes: int
    smem_tables: int


def smem_rows(device: torch.device, max_rows: int, table_bytes: int = SMEM_TABLE_BYTES) -> int:
    """How many tables of `table_bytes`, at most `max_rows`, fit the shared memory of a block."""
    return max(0, min(max_rows, (device_limits(device)[1] - SMEM_HEADER_BYTES) // table_bytes))


def num_blocks(
    device: torch.device, elements: int, threads: int, values_per_thread: int, blocks_per_sm: int = 1
) -> int:
    """Blocks of a grid-stride kernel: `blocks_per_sm` on every SM, and no more than there are tiles.

    `blocks_per_sm` is as many as the shared memory and registers of an SM hold.
    """
    return min(-(-elements // (threads * values_per_thread)), device_limits(device)[0] * blocks_per_sm)


def num_queue_blocks(device: torch.device, tiles: int, threads: int) -> int:
    """Blocks of a grid-stride kernel whose warps each take tiles of QUEUE_SIZE coordinates."""
    return num_blocks(device, tiles, threads // WARP, 1, QUEUE_BLOCKS_PER_SM)


def queue_bytes(threads: int) -> int:
    """Shared memory for the queues of a block's warps: QUEUE_SIZE indices of two bytes each."""
    return threads // WARP * QUEUE_SIZE * 2


def change_queue_bytes(step: int) -> int:
    """Shared memory for a warp's queue of changes: four bytes each, what may be left and all of a step."""
    return 4 * (WARP - 1 + WARP * step)


def run(
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    device: torch.device,
    *arguments: torch.Tensor | list[torch.Tensor] | int | None,
) -> None:
    """Launch a kernel on a device and its current stream.

    Args:
        name: The kernel.
        blocks: Blocks of the grid.
        threads: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        device: The device of the tensors.
        arguments: Tensors are passed as addresses, a list of tensors as a table of addresses on the device.
    """
    scalars = [gpu.on_device([gpu.address(t) for t in a], device) if isinstance(a, list) else a for a in arguments]
    with torch.cuda.device(-1 if device.index is None else device.index):
        kernels().launch(name, [gpu.address(a) for a in scalars], blocks, threads, shared_bytes, device)
