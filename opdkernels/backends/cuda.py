"""CUDA C++ kernels (csrc/cuda), for NVIDIA GPUs. The operators check their arguments before they come here.

Kernels come from a library that the install builds where nvcc is: machine code for sm_80, sm_90 and sm_100 and PTX for what
comes after. Without it NVRTC compiles them at the first call, through CuPy, which keeps the result on disk by source and
architecture. Where neither is at hand this backend serves nothing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import gpu

PACKAGE = Path(__file__).parent.parent
LIBRARY = PACKAGE / "_cuda.so"
SOURCES = (PACKAGE / "csrc", PACKAGE.parent / "csrc")  # installed, in a checkout
OPTIONS = ("-std=c++17", "--fmad=false")  # products and sums are never fused, each rounds as on the CPU

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
BINS = 1 << 15
SMALL_BYTES, TABLE_BYTES = 35 << 10, 4 << 14  # of shared memory: before the tables, and a table (csrc/cuda/grid.h)

WORK_ROWS, LOW_ROWS = 10, 2  # of `delta`: work tables, sums of low halves
MANTISSAS = 128
DELTA_ROWS, MASK_ROWS, SET_ROWS = 3, 2, 3  # tables that are worth shared memory, where it is there
THREADS = 1024  # a block of `quantile` and `overlap`
EIGHT = 8  # coordinates that a thread of `overlap` takes at a time


def flattened(source: Path, seen: set[Path] | None = None) -> str:
    """A source with its own headers in place, each once: a compiler without files, and a cache that sees every change."""
    seen = set() if seen is None else seen

    def included(match: re.Match) -> str:
        header = (source.parent / match[1]).resolve()
        if header in seen:
            return ""
        seen.add(header)
        return flattened(header, seen)

    return re.sub(r'^#include "(.+)"$', included, source.read_text().replace("#pragma once\n", ""), flags=re.MULTILINE)


class Built:
    """The library that the install built, or another of its interface."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.opd_cuda_error.restype = ctypes.c_char_p

    def launch(self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device) -> None:
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
    """Kernels that NVRTC compiles for the device at hand."""

    def __init__(self) -> None:
        self.cupy: Any = importlib.import_module("cupy")
        self.functions: dict[tuple[str, int], Any] = {}

    def function(self, name: str, device: int) -> Any:
        """Called within the device's guard: CuPy compiles for the current one."""
        if (name, device) not in self.functions:
            source = source_of(name.split("_", 1)[0])
            self.functions[name, device] = self.cupy.RawModule(code=source, options=OPTIONS, backend="nvrtc").get_function(name)
        return self.functions[name, device]

    def launch(self, name: str, arguments: Sequence[int], blocks: int, threads: int, shared_bytes: int, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = self.cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index)
        with self.cupy.cuda.Device(index), stream:
            function = self.function(name, index)
            function.max_dynamic_shared_size_bytes = shared_bytes
            function((blocks,), (threads,), tuple(np.int64(a) for a in arguments), shared_mem=shared_bytes)


@functools.cache
def source_of(family: str) -> str:
    folder = next(folder for folder in SOURCES if (folder / "cuda" / f"{family}.cu").is_file())
    return flattened(folder / "cuda" / f"{family}.cu")


@functools.cache
def cuda_of_library() -> int | None:
    """CUDA's major version of the library that the install built, if it did and it loads."""
    try:
        return ctypes.CDLL(str(LIBRARY)).opd_cuda_major() if LIBRARY.is_file() else None
    except OSError:
        return None


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
    return "built" if cuda_of_library() == wanted else "nvrtc" if cuda_of_cupy() == wanted else None


def why_not() -> str:
    """Why CUDA C++ kernels cannot serve here, and the remedy; empty where they can."""
    if torch.version.hip is not None:
        return "torch is built for AMD's GPUs, which Triton serves"
    if torch.version.cuda is None:
        return "torch is built without CUDA: install a CUDA build of torch"
    if source_at_hand():
        return ""
    major = torch.version.cuda.split(".")[0]
    library, cupy = cuda_of_library(), cuda_of_cupy()
    built = f"the kernels built at install are for CUDA {library}" if library else "no kernels were built at install, where nvcc was missing"
    other = f"CuPy is for CUDA {cupy}" if cupy else "CuPy is not installed"
    return f"torch is built for CUDA {major}, {built} and {other}: pip install cupy-cuda{major}x, or reinstall with CUDA {major}'s nvcc"


@functools.cache
def kernels() -> Built | Compiled:
    return Built(LIBRARY) if source_at_hand() == "built" else Compiled()


def serves(operator: str) -> bool:
    return operator in KERNELS and not why_not()


def kernel(operator: str) -> Callable:
    return KERNELS[operator]


def room(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and the most shared memory of a block, bytes."""
    properties = torch.cuda.get_device_properties(device)
    least = properties.shared_memory_per_block  # what a kernel has unasked
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", least)


def near_rows(device: torch.device, wanted: int) -> int:
    """How many tables a block has shared memory for."""
    return max(0, min(wanted, (room(device)[1] - SMALL_BYTES) // TABLE_BYTES))


def blocks_for(device: torch.device, elements: int, threads: int, each: int) -> int:
    """Blocks that share the tiles in turn: one a multiprocessor, whose shared memory and registers it fills."""
    return min(-(-elements // (threads * each)), room(device)[0])


def address(argument: torch.Tensor | int | None) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return 0 if argument is None else int(argument)


def run(
    name: str, blocks: int, threads: int, shared_bytes: int, device: torch.device, *arguments: torch.Tensor | list[torch.Tensor] | int | None
) -> None:
    """Start a kernel on the device and its current stream. Tensors go as addresses, a list of them as a table on the device."""
    tables = [torch.tensor([t.data_ptr() for t in a], dtype=torch.int64, device=device) if isinstance(a, list) else a for a in arguments]
    with torch.cuda.device(-1 if device.index is None else device.index):
        kernels().launch(name, [address(a) for a in tables], blocks, threads, shared_bytes, device)


def delta_shape(source: torch.dtype, trained: torch.dtype) -> tuple[str, int, int]:
    """The kernel of a pair, its threads a block, and the coordinates a thread takes at a time."""
    if source == trained == torch.bfloat16:
        return "delta_count_bf16", 768, 8
    if torch.float64 in (source, trained):
        return "delta_count_double", 512, 2
    return "delta_count_float", 512, 4


def delta_(
    source: torch.Tensor,
    trained: torch.Tensor,
    cuts: Sequence[int],
    thresholds: Sequence[float],
    tables: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    maximum: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    device, n = source.device, source.numel()
    name, threads, each = delta_shape(source.dtype, trained.dtype)
    kind = np.float64 if name == "delta_count_double" else np.float32
    rules = torch.tensor(gpu.rules_of(cuts, thresholds, kind), dtype=torch.int64, device=device)
    rows = near_rows(device, DELTA_ROWS)
    codes = DTYPE_CODES[source.dtype], DTYPE_CODES[trained.dtype]
    source, trained = source.view(-1), trained.view(-1)
    for start, size in gpu.slices(n):
        work = torch.zeros(WORK_ROWS, BINS, dtype=torch.int32, device=device)
        low_sums = torch.zeros(LOW_ROWS, BINS, dtype=torch.int64, device=device)
        run(
            name, blocks_for(device, size, threads, each), threads, SMALL_BYTES + rows * TABLE_BYTES, device,
            source.narrow(0, start, size), codes[0], trained.narrow(0, start, size), codes[1], gpu.mask_from(mask, start),
            work, low_sums, rules, tables, counts, sums, maximum, size, rows,
        )  # fmt: skip
        run("delta_fold", BINS // MANTISSAS, MANTISSAS, 0, device, work, low_sums, tables, sums, len(cuts), name == "delta_count_bf16")
    if n:
        run("delta_carry", 1, 32, 0, device, sums)


def digit_table(values: torch.Tensor, mask: torch.Tensor | None, prefixes: torch.Tensor, shift: int) -> torch.Tensor:
    """Counts of the digit at `shift`, int64 [prefixes, 2, 2^16], outside and inside the mask."""
    ranks, device, each = len(prefixes), values.device, 16 // values.itemsize
    first = shift == 8 * values.itemsize - gpu.DIGIT_BITS
    rows = near_rows(device, MASK_ROWS if mask is not None else 1) if first else 0
    total = torch.zeros(ranks, 2, gpu.DIGITS, dtype=torch.int64, device=device)
    for start, size in gpu.slices(values.numel()):
        table = torch.zeros(ranks, 2, gpu.DIGITS, dtype=torch.int32, device=device)
        run(
            f"quantile_count_{values.itemsize}", blocks_for(device, size, THREADS, each), THREADS, SMALL_BYTES + rows * TABLE_BYTES, device,
            values.narrow(0, start, size), gpu.mask_from(mask, start), prefixes, table, size, shift, ranks, rows,
        )  # fmt: skip
        total += table
    return total


def quantile(
    values: torch.Tensor, k: Sequence[int], largest: bool, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return gpu.cut_by_digits(digit_table, values, k, largest, mask)


def overlap_(
    source: torch.Tensor,
    trained: Sequence[torch.Tensor],
    cut: int,
    source_table: torch.Tensor,
    changed: torch.Tensor,
    both: torch.Tensor,
    runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    device, n_runs = source.device, len(trained)
    groups = -(-n_runs // gpu.GROUP)
    rows = near_rows(device, SET_ROWS)
    dtypes = torch.tensor([DTYPE_CODES[tensor.dtype] for tensor in trained], dtype=torch.int64, device=device)
    source, trained = source.view(-1), [tensor.view(-1) for tensor in trained]
    for start, size in gpu.slices(source.numel()):
        joint = torch.zeros(groups, gpu.GROUP_SETS, BINS, dtype=torch.int32, device=device)
        sets = torch.zeros(1 << n_runs, dtype=torch.int32, device=device) if groups > 1 else None
        run(
            "overlap_count", blocks_for(device, size, THREADS, EIGHT), THREADS, SMALL_BYTES + rows * TABLE_BYTES, device,
            source.narrow(0, start, size), DTYPE_CODES[source.dtype], [tensor.narrow(0, start, size) for tensor in trained], dtypes,
            joint, sets, counts, size, n_runs, gpu.change_limit(cut), rows,
        )  # fmt: skip
        gpu.fold_overlap(joint.long(), None if sets is None else sets.long(), (source_table, changed, both, runs))


KERNELS: dict[str, Callable] = {"delta_": delta_, "quantile": quantile, "overlap_": overlap_}
