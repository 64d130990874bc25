"""How CUDA C++ kernels are found and started: on the tensors' device and its current stream, with arguments of eight bytes each."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda.sources import made, source_of
from opdkernels.files import write_atomically

LIBRARY = Path(__file__).parents[2] / "_cuda.so"
OPTIONS = ("-std=c++17", "--fmad=false")  # products and sums are never fused, each rounds as on the CPU

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
BINS = 1 << 15
SMALL_BYTES = 35 << 10  # of shared memory, before the tables (csrc/common/cuda/grid.h)
TABLE_BYTES = 4 << 12  # of a table of magnitudes there, of which near_rows says how many there is room for
WARP = 32
QUEUE, QUEUE_BLOCKS = (
    2048,
    4,
)  # coordinates that a warp queues at a time, blocks a multiprocessor (csrc/common/cuda/active.h)


class Built:
    """The library that the install built, or another of its interface."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.opd_cuda_error.restype = ctypes.c_char_p

    def launch(
        self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device
    ) -> None:
        on_gpu = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        status = getattr(self.library, f"{name}_launch")(
            (ctypes.c_longlong * len(arguments))(*arguments),
            len(arguments),
            ctypes.c_longlong(blocks),
            threads,
            shared_bytes,
            device.index or 0,
            ctypes.c_void_p(stream),
        )
        if status:
            raise RuntimeError(
                f"{name} did not start on {device}: {self.library.opd_cuda_error(status).decode()}; "
                "update NVIDIA's driver, or set OPDKERNELS_BACKEND=triton"
            )


class Compiled:
    """Kernels that NVRTC compiles for the device at hand, through CuPy; kept on disk by source, options, device and compiler."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.functions: dict[tuple[str, int], Any] = {}

    def function(self, name: str, device: int) -> Any:
        """Called within the device's guard: CuPy compiles for the current one, and loads into it."""
        if (name, device) not in self.functions:
            code = self.machine_code(name.split("_", 1)[0], self.cupy.cuda.Device(device).compute_capability)
            self.functions[name, device] = self.cupy.RawModule(path=str(code)).get_function(name)
        return self.functions[name, device]

    def machine_code(self, family: str, capability: str) -> Path:
        """A family's kernels for a device, compiled or as an earlier process left them. RawModule's own compilation would flush
        subnormals to zero, whatever the options."""
        source, version = source_of(family), self.cupy.cuda.nvrtc.getVersion()
        key = hashlib.blake2b(
            "\0".join(map(str, (source, OPTIONS, capability, version))).encode(), digest_size=16
        ).hexdigest()
        name = f"{family}-{key}.cubin"
        kept = cache_folder() / name
        if os.access(kept, os.R_OK):
            return kept
        code, _ = importlib.import_module("cupy.cuda.compiler").compile_using_nvrtc(
            source, OPTIONS, filename=f"{family}.cu"
        )
        code = code.encode() if isinstance(code, str) else code
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, code)
        except OSError:  # no room, no right to write
            kept = own_folder() / name
            write_atomically(kept, code)
        return kept

    def launch(
        self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device
    ) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = self.cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index)
        with self.cupy.cuda.Device(index), stream:
            function = self.function(name, index)
            function.max_dynamic_shared_size_bytes = shared_bytes
            function((blocks,), (threads,), tuple(np.int64(a) for a in arguments), shared_mem=shared_bytes)


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opdkernels"
    except RuntimeError:  # no home
        return own_folder()


@functools.cache
def own_folder() -> Path:
    """This process's, gone with it."""
    folder = tempfile.mkdtemp(prefix="opdkernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def cuda_of_library() -> int | None:
    """CUDA's major version of the library that the install built, if it did and it loads."""
    try:
        return ctypes.CDLL(str(LIBRARY)).opd_cuda_major() if LIBRARY.is_file() else None
    except OSError:
        return None


@functools.cache
def library_is_stale() -> bool:
    """Whether the library was built from other sources than those here: its kernels may take other arguments."""
    return LIBRARY.is_file() and not made(LIBRARY)


def cuda_of_cupy() -> int | None:
    """CUDA's major version of the CuPy installed, the latest where there are several."""
    for major in (13, 12):
        try:
            version(f"cupy-cuda{major}x")
        except PackageNotFoundError:
            continue
        return major
    return None


def source_at_hand() -> str | None:
    """Where kernels for torch's CUDA come from, "built" or "nvrtc"."""
    wanted = int((torch.version.cuda or "0").split(".")[0])
    if torch.version.hip is not None or not wanted:
        return None
    built = cuda_of_library() == wanted and not library_is_stale()
    return "built" if built else "nvrtc" if cuda_of_cupy() == wanted else None


@functools.cache
def kernels() -> Built | Compiled:
    return Built(LIBRARY) if source_at_hand() == "built" else Compiled()


def room(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and the most shared memory of a block, bytes."""
    properties = torch.cuda.get_device_properties(device)
    least = properties.shared_memory_per_block  # what a kernel has unasked
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", least)


def near_rows(device: torch.device, wanted: int, table_bytes: int = TABLE_BYTES) -> int:
    """How many tables a block has shared memory for."""
    return max(0, min(wanted, (room(device)[1] - SMALL_BYTES) // table_bytes))


def blocks_for(device: torch.device, elements: int, threads: int, each: int, a_processor: int = 1) -> int:
    """Blocks that share the tiles in turn: as many a multiprocessor as its shared memory and registers hold."""
    return min(-(-elements // (threads * each)), room(device)[0] * a_processor)


def blocks_of_queues(device: torch.device, tiles: int, threads: int) -> int:
    """Blocks whose warps take tiles of QUEUE coordinates in turn."""
    return blocks_for(device, tiles, threads // WARP, 1, QUEUE_BLOCKS)


def queue_bytes(threads: int) -> int:
    """Shared memory for the places that each warp of a block queues, two bytes each."""
    return threads // WARP * QUEUE * 2


def run(
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    device: torch.device,
    *arguments: torch.Tensor | list[torch.Tensor] | int | None,
) -> None:
    """Start a kernel on the device and its current stream. Tensors go as addresses, a list of them as a table on the device."""
    tables = [gpu.on_device([gpu.address(t) for t in a], device) if isinstance(a, list) else a for a in arguments]
    with torch.cuda.device(-1 if device.index is None else device.index):
        kernels().launch(name, [gpu.address(a) for a in tables], blocks, threads, shared_bytes, device)
