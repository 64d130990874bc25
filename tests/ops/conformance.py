"""Runs the cases of a kernel family on any backend and compares the outputs with those of the reference.

The inputs of a family are defined once, in tests/ops/<family>/cases.py. pytest runs them with the CPU kernels of every
instruction set, with CUDA C++ on fibers and in Triton's interpreter; `make gpu` runs them on a device
(benchmarks/gpu/checks.py). Needs torch and NumPy only: a machine with a GPU may have nothing else installed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import dispatch
from opdkernels.ops import all_operators

BF16, FP16, FP32, FP64 = DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INT64, BYTES = torch.int64, torch.uint8
SIZES = (0, 1, 31, 1023, 1025, 2049, 70_001)
MILLION = 1_000_003
MISALIGNED = (3, 1, 5)  # elements; consecutive tensors differ, so that no two of a call share an alignment
SENTINEL = 85
GUARD = 16  # elements between a tensor and the ends of its memory

Kernel = Callable[[str], Callable]  # returns the implementation of an operator by its name
OPERATORS = all_operators()


def reference(operator: str) -> Callable:
    """The definition of an operator, in plain PyTorch or NumPy."""
    return OPERATORS[operator].reference


def backend_kernel(backend: str) -> Kernel:
    """The kernels of one backend of the package: "cpu", "cuda" or "triton"."""
    return lambda operator: dispatch.load_kernel(OPERATORS[operator].family, backend, operator)


def dispatched(operator: str) -> Callable:
    """An operator as the public functions call it: through torch's dispatcher."""
    return getattr(torch.ops.opdkernels, operator)


class Allocator:
    """Allocates the tensors of a call on a device, each between guard bytes.

    Args:
        device: Where the tensors are allocated.
        offsets: Elements beyond alignment at which tensors begin, taken in turn.
    """

    def __init__(self, device: torch.device | str = "cpu", offsets: Sequence[int] = (0,)):
        self.device, self._offsets = torch.device(device), itertools.cycle(offsets)
        self._blocks: list[tuple[torch.Tensor, int, int]] = []

    def alloc(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor."""
        start, size = GUARD + next(self._offsets), math.prod(shape)
        memory = torch.full(((start + size + GUARD) * dtype.itemsize,), SENTINEL, dtype=BYTES, device=self.device)
        self._blocks.append((memory, start * dtype.itemsize, (start + size) * dtype.itemsize))
        return memory.view(dtype).narrow(0, start, size).view(tuple(shape))

    def zeros(self, *shape: int, dtype: torch.dtype = INT64) -> torch.Tensor:
        return self.alloc(shape, dtype).zero_()

    def put(self, tree: Any) -> Any:
        """Copies of all tensors of nested lists and dicts; the transpose of a contiguous matrix keeps its strides."""
        if isinstance(tree, torch.Tensor):
            if tree.ndim == 2 and not tree.is_contiguous():
                return self.put(tree.T).T
            return self.alloc(tree.shape, tree.dtype).copy_(tree)
        if isinstance(tree, dict):
            return {name: self.put(item) for name, item in tree.items()}
        return [self.put(item) for item in tree] if isinstance(tree, (list, tuple)) else tree

    def check_guards(self) -> None:
        for memory, start, stop in self._blocks:
            assert bool((memory[:start] == SENTINEL).all() & (memory[stop:] == SENTINEL).all()), (
                "memory outside a tensor was written"
            )


def assert_equal(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """Outputs are bit-identical; only the payload of a NaN may differ."""
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        a = a.cpu()
        assert a.dtype == b.dtype, f"output {i} is {a.dtype}, not {b.dtype}"
        assert a.shape == b.shape, f"output {i} is {list(a.shape)}, not {list(b.shape)}"
        if a.is_floating_point():
            valid = ~b.isnan()
            assert torch.equal(~a.isnan(), valid), f"output {i} is NaN at other positions"
            integers = {2: torch.int16, 4: torch.int32, 8: INT64}[a.itemsize]
            a, b = a[valid].view(integers), b[valid].view(integers)
        wrong = a != b
        first = int(wrong.flatten().nonzero()[0]) if wrong.any() else 0
        assert not wrong.any(), f"output {i}: {int(wrong.sum())} of {wrong.numel()} differ, the first at {first}"


@dataclass(frozen=True, eq=False)
class Case:
    """Calls of a family's operators on fixed inputs.

    Args:
        name: What is special about the inputs; unique within the family.
        make_inputs: Returns the inputs: tensors on the CPU, nested lists of tensors, and plain values.
        call: `call(kernel, allocator, *inputs)` runs the operators and returns the tensors to compare.
        compare: `compare(outputs, expected, inputs)` raises AssertionError where outputs are wrong.
    """

    name: str
    make_inputs: Callable[[], list[Any]]
    call: Callable[..., list[torch.Tensor]]
    compare: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], list[Any]], None] = assert_equal

    def __str__(self) -> str:
        return self.name


@functools.lru_cache(maxsize=64)
def inputs_of(case: Case) -> list[Any]:
    return case.make_inputs()


@functools.lru_cache(maxsize=1024)
def expected_outputs(case: Case, kernel: Kernel = reference) -> list[torch.Tensor]:
    """What a kernel on the CPU returns for a case, by default the reference."""
    allocator = Allocator()
    return case.call(kernel, allocator, *allocator.put(inputs_of(case)))


def run_case(case: Case, kernel: Kernel, device: torch.device | str = "cpu", offsets: Sequence[int] = (0,)) -> list:
    """The outputs of a case. Raises AssertionError where memory outside a tensor was written."""
    allocator = Allocator(device, offsets)
    outputs = case.call(kernel, allocator, *allocator.put(inputs_of(case)))
    allocator.check_guards()
    return outputs


@contextlib.contextmanager
def zero_pages(*sizes: int) -> Iterator[list[mmap.mmap]]:
    """Mappings of zeros that take memory only where they are written. A shared mapping, the default of mmap.mmap, takes
    it also where it is read; huge pages save two million page faults."""
    with contextlib.ExitStack() as stack:
        mappings = [
            stack.enter_context(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for size in sizes
        ]
        for mapping in mappings:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                mapping.madvise(mmap.MADV_HUGEPAGE)
        yield mappings


def check_case(
    case: Case,
    kernel: Kernel,
    device: torch.device | str = "cpu",
    offsets: Sequence[int] = (0,),
    expected_by: Kernel = reference,
) -> None:
    """Raises AssertionError where a kernel's outputs are not those expected, or where it writes outside a tensor."""
    try:
        case.compare(run_case(case, kernel, device, offsets), expected_outputs(case, expected_by), inputs_of(case))
    except AssertionError as error:
        raise AssertionError(f"{case.name}: {error}") from None


@dataclass(frozen=True)
class Family:
    """The conformance cases of a kernel family.

    Args:
        name: The family's folder under `opdkernels/ops`.
        operators: The operators that its cases call.
        cases: Yields the cases with inputs of a given number of coordinates.
        special_cases: Yields the cases whose inputs have their own size: hostile values, options, edge cases.
        check_repeated: `check_repeated(kernel, expected_by, device, tile, times)` repeats `tile` coordinates `times`
            times on a device, beyond what 32 bits can index, and compares with the outputs for one tile.
        bytes_per_coordinate: Device memory that `check_repeated` takes, per coordinate.
    """

    name: str
    operators: tuple[str, ...]
    cases: Callable[[int], Iterator[Case]]
    special_cases: Callable[[], Iterable[Case]]
    check_repeated: Callable[[Kernel, Kernel, torch.device, int, int], None]
    bytes_per_coordinate: int

    def collect(self, sizes: Iterable[int] = (), special: bool = False, only: str = "") -> list[Case]:
        """The cases of some sizes, and the special ones; `only` those with this text in their name."""
        listed = [case for n in sizes for case in self.cases(n)] + (list(self.special_cases()) if special else [])
        return [case for case in listed if only in case.name]


def load_families() -> dict[str, Family]:
    """Every family by name; imports tests/ops/<family>/cases.py of each."""
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/cases.py"))
    return {name: import_module(f"tests.ops.{name}.cases").FAMILY for name in names}


def make_pair(
    n: int,
    base_dtype: torch.dtype = BF16,
    trained_dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    hostile: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its update, of n coordinates each; every other coordinate is unchanged.

    `hostile` adds NaN, infinities, signed zeros, subnormals and extremes to both.
    """
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, n) * np.exp(rng.normal(0, 1, n))
    trained = base + 1e-5 * rng.normal(0, 1, n) * np.exp(2 * rng.normal(0, 1, n))
    trained[::2] = base[::2]
    if hostile:
        for side in (base, trained):
            for start, step, value in (
                (0, 97, np.nan),
                (5, 101, np.inf),
                (6, 103, -np.inf),
                (7, 89, 0.0),
                (8, 93, -0.0),
                (9, 91, 3.3e38),
                (10, 95, -3.3e38),
                (11, 87, 1e-40),
                (12, 85, 1.0),
                (13, 83, 2.0**-7),
                (14, 107, 65504.0),
                (15, 109, -1e-45),
            ):
                side[start::step] = value
            rng.shuffle(side[: n // 3])

    def as_tensor(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(x.copy()).to(dtype)

    return as_tensor(base, base_dtype), as_tensor(trained, trained_dtype or base_dtype)


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """uint8 [ceil(n / 8)]: flags as bits, little-endian; unused bits are 0."""
    padded = flags.new_zeros((len(flags) + 7) // 8 * 8)
    padded[: len(flags)] = flags
    return (padded.view(-1, 8).int() << torch.arange(8)).sum(1).to(BYTES)
