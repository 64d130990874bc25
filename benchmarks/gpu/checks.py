"""What must hold of every kernel on every device: each check is a function of a family, a backend and a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from benchmarks.gpu.backends import CPU, Backend
from benchmarks.gpu.families import Allocator, Case, Family, pair
from opdkernels.checkpoint import streaming as feed
from opdkernels.ops import delta, gram
from opdkernels.spectral.exact import from_grams

SIZES = (0, 1, 31, 1023, 1025, 70_001, 1_000_003)
RUNS = 20
SLEEP_CYCLES = 1 << 30  # over half a second
BEYOND, TILE = 2**31, 1 << 20  # elements beyond which 32 bits do not reach; what is repeated up to there


class Inconclusive(Exception):
    """A check that says nothing here, and why."""


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.lru_cache(maxsize=64)
def cases(family: Family, n: int) -> tuple[Case, ...]:
    return tuple(family.cases(n))


@functools.lru_cache(maxsize=1024)
def expected(case: Case) -> list[torch.Tensor]:
    allocator = Allocator("cpu")
    return case.call(CPU.kernel, allocator, *allocator.put(case.inputs))


def run(case: Case, backend: Backend, device: torch.device, off: int = 0) -> None:
    """Runs a case and compares what it leaves, and what lies beside that."""
    allocator = Allocator(device, off)
    inputs = allocator.put(case.inputs)
    found = case.call(backend.kernel, allocator, *inputs)
    try:
        case.compare(found, expected(case), case.inputs)
        allocator.check()
    except AssertionError as error:
        raise AssertionError(f"{case.label}: {error}") from None


def matches_cpu(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    for n in sizes:
        for case in cases(family, n):
            run(case, backend, device)


def accepts_misaligned_views(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    for n in sizes[:-1]:
        for case in cases(family, n):
            run(case, backend, device, off=1)
    for case in cases(family, sizes[-1])[:1]:
        run(case, backend, device, off=3)


def is_deterministic(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """The same bits in every of many runs: no order of threads or blocks shows. `gram` too, whose sums have an order."""
    case = cases(family, sizes[-1])[0]
    once: list[torch.Tensor] | None = None
    for i in range(RUNS):
        allocator = Allocator(device)
        found = [one.cpu() for one in case.call(backend.kernel, allocator, *allocator.put(case.inputs))]
        once = once or found
        for a, b in zip(found, once, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (
                f"run {i} differs from the first: {case.label}"
            )


def uses_current_stream(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """The default stream sleeps: what was started there has not run when another stream is done. And inputs that come late on
    that other stream are waited for."""
    case = cases(family, sizes[-1])[0]
    allocator = Allocator(device)
    good = allocator.put(case.inputs)
    if not on_gpu(device):
        return case.compare(case.call(backend.kernel, allocator, *good), expected(case), case.inputs)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        run(case, backend, device)  # what is compiled, loaded or allocated once would wait for every stream
        stream.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES >> 5)
        late = Allocator(device)
        found = case.call(backend.kernel, late, *late.put(good))
        found = [one.cpu() for one in found]
    early = asleep.query()
    torch.cuda.synchronize(device)
    case.compare(found, expected(case), case.inputs)
    if early:
        raise Inconclusive(
            "the default stream was done first: memory was allocated, or the operator waited for all streams"
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
            raise Inconclusive("the reference takes int64 copies of everything: too much memory")
        if free < needed:
            raise Inconclusive(f"{free / 1e9:.0f} GB of {needed / 1e9:.0f} GB are free")
    else:
        times = 3
    family.repeated(backend.kernel, CPU.kernel, device, tile, times)
    if on_gpu(device):
        torch.cuda.empty_cache()


def passes_opcheck(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """torch's opcheck of every operator: schema, mutations, and the fake kernel that torch.compile sees."""
    tests = ("test_schema", "test_faketensor")

    def kernel(operator: str) -> Callable:
        def call(*arguments):
            torch.library.opcheck(getattr(torch.ops.opdkernels, operator).default, arguments, test_utils=tests)
            return backend.kernel(operator)(*arguments)

        return call

    for case in cases(family, min(1025, sizes[-1]))[:2]:
        run(case, Backend(backend.name, kernel, backend.serves), device)


def matches_cpu_when_streamed(
    family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> None:
    """Slices that are read, copied and counted side by side, as `analyze` does: every tensor's tally is that of the CPU."""
    sides = [pair(n, dtype, seed=n) for n in sizes for dtype in (torch.bfloat16, torch.float32)]
    info = {torch.bfloat16: SimpleNamespace(dtype="bf16"), torch.float32: SimpleNamespace(dtype="fp32")}
    matches = [
        (i, SimpleNamespace(numel=w.numel(), source=info[w.dtype], trained=info[v.dtype]))
        for i, (w, v) in enumerate(sides)
    ]
    source = SimpleNamespace(
        read=lambda match, begin, end: next(
            tuple(one[begin:end] for one in sides[i]) for i, each in matches if each is match
        )
    )
    tallies = [delta.Tally.empty() for _ in sides]
    for one, ready in feed.staged(source, feed.cut(matches, 1), feed.least(matches), device):  # type: ignore[arg-type]
        delta.delta(*ready(), into=tallies[one.index])
    for (w, v), tally in zip(sides, tallies, strict=True):
        assert tally == delta.delta(w, v), f"another tally of {w.numel()} coordinates of {w.dtype}"


def matches_cpu_spectra(family: Family, backend: Backend, device: torch.device, sizes: tuple[int, ...] = SIZES) -> None:
    """Gram matrices and their eigenproblems on the device: every figure that of the CPU, as near as the figures are asked to be."""
    w, v = (side.view(-1, 128) for side in pair(1 << 16, hostile=False))
    found, wanted = (
        from_grams(gram.symmetric(gram.gram(w.to(to), v.to(to))).unbind(), tall=True)
        for to in (device, torch.device("cpu"))
    )
    assert found is not None
    assert wanted is not None
    for name, off in (
        ("source", 1e-8),
        ("trained", 1e-8),
        ("delta", 1e-8),
        ("projection", 1e-6),
        ("projection_left", 1e-6),
        ("rotation_left", 1e-4),
    ):
        a, b = getattr(found, name).cpu(), getattr(wanted, name)
        assert float((a - b).abs().max()) <= off * max(1.0, float(b.abs().max())), f"{name} is off"


CHECKS = {
    check.__name__: check
    for check in (
        matches_cpu,
        accepts_misaligned_views,
        is_deterministic,
        uses_current_stream,
        passes_opcheck,
        matches_cpu_when_streamed,
        matches_cpu_spectra,
        indexes_beyond_32_bits,
    )
}
PACKAGE_CHECKS = {
    passes_opcheck.__name__: None,
    matches_cpu_when_streamed.__name__: "delta",
    matches_cpu_spectra.__name__: "gram",
}
"""Checks of what the package does with whoever serves, and of which family."""


def concerns(check: str, family: Family, backend: Backend) -> bool:
    if not backend.serves_all(family):
        return False
    return check not in PACKAGE_CHECKS or (backend.name == "package" and PACKAGE_CHECKS[check] in (None, family.name))


def units(families: list[Family], backends: list[Backend]) -> Iterator[tuple[str, Family, Backend]]:
    """What there is to check, the most telling first."""
    for check in CHECKS:
        for family in families:
            for backend in backends:
                if concerns(check, family, backend):
                    yield check, family, backend
