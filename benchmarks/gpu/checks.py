"""Checks of kernels on a device: each is a function of a family, a backend, a device and input sizes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.gpu import graphs
from benchmarks.gpu.backends import CPU, Backend, Inconclusive
from opdkernels.checkpoint import streaming
from opdkernels.ops import delta, gram
from opdkernels.spectral.exact import from_grams
from tests.ops.conformance import (
    MILLION,
    MISALIGNED,
    SIZES,
    Allocator,
    Case,
    Family,
    check_case,
    expected_outputs,
    inputs_of,
    make_pair,
)

SIZES = (*SIZES, MILLION)
RUNS = 20
SLEEP_CYCLES = 1 << 30  # over half a second
BITS = {  # inputs of integers that may have any value
    "patch_gather_": ("base", "trained"),
    "patch_scatter_": ("base", "values"),
    "patch_check": ("positions",),
    "patch_digest": ("values",),
}
BEYOND, TILE = 2**31, 1 << 20  # elements that 32 bits cannot index; elements that are repeated until there are as many


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.lru_cache(maxsize=64)
def cases(family: Family, n: int) -> tuple[Case, ...]:
    return tuple(family.cases(n))


@functools.lru_cache(maxsize=8)
def special_cases(family: Family) -> tuple[Case, ...]:
    return tuple(family.special_cases())


def check(case: Case, backend: Backend, device: torch.device, offsets: Sequence[int] = (0,)) -> None:
    check_case(case, backend.kernel, device, offsets, expected_by=CPU.kernel)


def matches_cpu(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    for n in sizes:
        for case in cases(family, n):
            check(case, backend, device)


def matches_cpu_on_special_cases(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    """Hostile values, options and edge cases, which have their own sizes."""
    for case in special_cases(family):
        check(case, backend, device)


def accepts_misaligned_views(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    for n in sizes[:-1]:
        for case in cases(family, n):
            check(case, backend, device, offsets=(1,))
    for case in cases(family, sizes[-1])[:1]:
        check(case, backend, device, offsets=MISALIGNED)


def is_deterministic(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """Every run gives the same bits, whatever the order of threads and blocks; also for `gram` and `divergence`."""
    case = cases(family, sizes[-1])[0]
    first: list[torch.Tensor] | None = None
    for i in range(RUNS):
        allocator = Allocator(device)
        outputs = [output.cpu() for output in case.call(backend.kernel, allocator, *allocator.put(inputs_of(case)))]
        first = first or outputs
        for a, b in zip(outputs, first, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"run {i} differs from the first: {case.name}"


def first_calls(family: Family, n: int) -> dict[str, list[Any]]:
    """The arguments of the first call of each operator in the cases of n coordinates, or else in the special ones."""
    calls: dict[str, list[Any]] = {}

    def kernel(operator: str) -> Callable:
        def call(*arguments: Any) -> Any:
            calls.setdefault(operator, Allocator().put(arguments))
            return CPU.kernel(operator)(*arguments)

        return call

    for case in (*cases(family, n), *special_cases(family)):
        if set(calls) >= set(family.operators):
            break
        allocator = Allocator()
        case.call(kernel, allocator, *allocator.put(inputs_of(case)))
    return calls


def parameters_of(operator: str) -> list[Any]:
    """The parameters of an operator by its schema."""
    return getattr(torch.ops.opdkernels, operator).default._schema.arguments


def is_written(parameter: Any) -> bool:
    return parameter.alias_info is not None and parameter.alias_info.is_write


def changed_arguments(operator: str, arguments: list[Any], change: int) -> list[Any]:
    """The arguments with other values of their inputs; masks, counts and positions stay as they are, and valid."""
    number = itertools.count(1)

    def changed(parameter: Any, leaf: Any) -> Any:
        values_of = BITS.get(operator, ())
        if not isinstance(leaf, torch.Tensor) or not (leaf.is_floating_point() or parameter.name in values_of):
            return leaf
        values = leaf.flatten().roll(change * next(number))  # another distance in each tensor
        values[: leaf.numel() * change // 4] = values[-1:].clone()  # histograms change, too
        return values.view(leaf.shape)

    return [
        argument if is_written(parameter) else pytree.tree_map(functools.partial(changed, parameter), argument)
        for argument, parameter in zip(arguments, parameters_of(operator), strict=True)
    ]


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check_replays(operator: str, kernel: Callable, arguments: list[Any], device: torch.device) -> None:
    """Raises NotCapturable, or AssertionError where a replay gives another result than a call."""
    put = Allocator(device).put
    static = put(arguments)
    replay, result = graphs.capture(lambda: kernel(*static), device)
    for change in (1, 2):
        changed = put(changed_arguments(operator, arguments, change))
        for old, new in zip(tensors_of(static), tensors_of(changed), strict=True):
            old.copy_(new)
        replay()
        expected = tensors_of([kernel(*changed), changed])
        for a, b in zip(tensors_of([result, static]), expected, strict=True):
            same = torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
            assert same, f"replay {change} of {operator} gives another result than a call"


def replays_in_graph(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """Every operator is captured in a CUDA graph, whose replays on changed inputs give what calls give."""
    reasons = []
    for operator, arguments in first_calls(family, sizes[-2]).items():
        try:
            check_replays(operator, backend.kernel(operator), arguments, device)
        except graphs.NotCapturable as error:
            reasons.append(f"{operator}: {error}")
    if reasons:
        raise graphs.NotCapturable("; ".join(reasons))


def uses_current_stream(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """Another stream finishes while the default stream sleeps, and waits for its own late inputs."""
    case = cases(family, sizes[-1])[0]
    inputs, expected = inputs_of(case), expected_outputs(case, CPU.kernel)
    allocator = Allocator(device)
    ready = allocator.put(inputs)
    if not on_gpu(device):
        return case.compare(case.call(backend.kernel, allocator, *ready), expected, inputs)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        check(case, backend, device)  # compiling, loading or allocating for the first time would wait for every stream
        stream.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    default_stream_done = torch.cuda.Event()
    default_stream_done.record()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES >> 5)
        late = Allocator(device)
        outputs = case.call(backend.kernel, late, *late.put(ready))
        outputs = [output.cpu() for output in outputs]
    waited = default_stream_done.query()
    torch.cuda.synchronize(device)
    case.compare(outputs, expected, inputs)
    if waited:
        raise Inconclusive(
            "the default stream finished first: memory was allocated, or the operator waited for all streams"
        )
    return None


def indexes_beyond_32_bits(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    tile = TILE if sizes[-1] >= 1_000_000 else 1 << 16
    times = BEYOND // tile + 1
    if on_gpu(device):
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info(device)[0], tile * times * family.bytes_per_coordinate + (4 << 30)
        if backend.name == "reference":
            raise Inconclusive("the reference makes int64 copies of every tensor: too much memory")
        if free < needed:
            raise Inconclusive(f"{free / 1e9:.0f} GB of {needed / 1e9:.0f} GB are free")
    else:
        times = 3
    family.check_repeated(backend.kernel, CPU.kernel, device, tile, times)
    if on_gpu(device):
        torch.cuda.empty_cache()


def passes_opcheck(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """torch's opcheck of every operator: schema, mutations, and the fake kernel that torch.compile uses."""
    tests = ("test_schema", "test_faketensor")

    def kernel(operator: str) -> Callable:
        def call(*arguments):
            torch.library.opcheck(getattr(torch.ops.opdkernels, operator).default, arguments, test_utils=tests)
            return backend.kernel(operator)(*arguments)

        return call

    for case in cases(family, min(1025, sizes[-1]))[:2]:
        check(case, Backend(backend.name, kernel, backend.serves), device)


def matches_cpu_when_streamed(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    """Slices that are read, copied and counted concurrently, as in `analyze`: every tally equals that of the CPU."""
    sides = [make_pair(n, dtype, seed=n) for n in sizes for dtype in (torch.bfloat16, torch.float32)]
    info = {torch.bfloat16: SimpleNamespace(dtype="bf16"), torch.float32: SimpleNamespace(dtype="fp32")}
    matches = [
        (i, SimpleNamespace(numel=w.numel(), base=info[w.dtype], trained=info[v.dtype]))
        for i, (w, v) in enumerate(sides)
    ]
    source = SimpleNamespace(
        read=lambda match, begin, end: next(
            tuple(side[begin:end] for side in sides[i]) for i, candidate in matches if candidate is match
        )
    )
    tallies = [delta.Tally.empty() for _ in sides]
    for slice_, ready in streaming.stage_slices(
        source, streaming.split_matches(matches, 1), streaming.min_slice_bytes(matches), device
    ):  # type: ignore[arg-type]
        delta.delta(*ready(), out=tallies[slice_.index])
    for (w, v), tally in zip(sides, tallies, strict=True):
        assert tally == delta.delta(w, v), f"another tally of {w.numel()} coordinates of {w.dtype}"


def matches_cpu_spectra(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """Gram matrices and their eigenproblems on the device: every metric equals that of the CPU within its tolerance."""
    w, v = (side.view(-1, 128) for side in make_pair(1 << 16, hostile=False))
    spectra, expected = (
        from_grams(gram.symmetric(gram.gram(w.to(to), v.to(to))).unbind(), tall=True)
        for to in (device, torch.device("cpu"))
    )
    assert spectra is not None
    assert expected is not None
    for name, tolerance in (
        ("base", 1e-8),
        ("trained", 1e-8),
        ("delta", 1e-8),
        ("projection", 1e-6),
        ("projection_left", 1e-6),
        ("rotation_left", 1e-4),
    ):
        a, b = getattr(spectra, name).cpu(), getattr(expected, name)
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())), f"{name} is off"


CHECKS = {
    check.__name__: check
    for check in (
        matches_cpu,
        accepts_misaligned_views,
        is_deterministic,
        replays_in_graph,
        uses_current_stream,
        passes_opcheck,
        matches_cpu_when_streamed,
        matches_cpu_spectra,
        matches_cpu_on_special_cases,
        indexes_beyond_32_bits,
    )
}
PACKAGE_CHECKS = {
    passes_opcheck.__name__: None,
    matches_cpu_when_streamed.__name__: "delta",
    matches_cpu_spectra.__name__: "gram",
}
"""Checks of the package itself, whichever backend it selects, and the family that they concern (None: every one)."""


def is_kernel(backend: Backend, family: Family) -> bool:
    """Whether a backend has kernels for a family: the package calls another one, and the reference is a definition."""
    return backend.name not in ("reference", "package") and backend.serves_all(family)


def concerns(check: str, family: Family, backend: Backend) -> bool:
    if not backend.serves_all(family):
        return False
    if check == replays_in_graph.__name__:
        return is_kernel(backend, family)
    return check not in PACKAGE_CHECKS or (backend.name == "package" and PACKAGE_CHECKS[check] in (None, family.name))


def units(families: list[Family], backends: list[Backend]) -> Iterator[tuple[str, Family, Backend]]:
    """Every check to run, the most informative first."""
    for check in CHECKS:
        for family in families:
            for backend in backends:
                if concerns(check, family, backend):
                    yield check, family, backend
