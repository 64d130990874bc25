"""Speed of each family on a device: bytes per second compared with a device copy, and with eager and compiled PyTorch.

Implementations are timed with device events, in rounds after a warm-up; the median counts. The outputs of every backend
are compared with those of the first one, so a fast but wrong kernel has no result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.backends import FAMILIES, Backend
from benchmarks.gpu.checks import on_gpu
from benchmarks.gpu.record import sources_of
from opdkernels.backends.layout import BINS
from opdkernels.ops import patch, step
from opdkernels.ops.delta import THRESHOLDS, base_and_delta, bf16_bits
from opdkernels.ops.divergence import Divergence, divergence, tiles
from tests.ops.conformance import BF16, FP32, FP64, Allocator, Kernel
from tests.ops.delta.cases import call_delta
from tests.ops.divergence.cases import KIND_CODES
from tests.ops.gram.cases import call_gram
from tests.ops.overlap.cases import call_overlap
from tests.ops.step.cases import mask_tensors

ROUNDS = 7
LARGEST = 1 << 28  # coordinates
GRAM_ROWS, GRAM_COLUMNS = 4864, 896
TOKENS, VOCABULARY, WIDTHS = 4096, 151_936, (896, 1536)  # Qwen2.5: 0.5B from 1.5B
SUMMED = ("gram", "divergence")  # families in which backends choose the order of sums
ACTIVE, CHANGED = 0.2, 0.17


@dataclass(frozen=True)
class Timed:
    """A workload on a device.

    Args:
        call: Runs a kernel on the inputs.
        eager: The same in eager PyTorch.
        work: Bytes that must be moved, or operations.
        reset: Restores the inputs that calls change.
    """

    call: Callable[[Kernel], list[torch.Tensor]]
    eager: Callable[[], Any]
    work: float
    reset: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        make: Returns the workload for a number of coordinates on a device.
        limit: The limit of the device that bounds it.
        fuses: A compiler may fuse its passes.
    """

    name: str
    family: str
    make: Callable[[int, torch.device], Timed]
    limit: str = "copy"
    fuses: bool = False

    @property
    def unit(self) -> str:
        """Unit of its work per second."""
        return "bytes_per_s" if self.limit == "copy" else "flops_per_s"


def seconds(call: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of the rounds after one warm-up."""
    call()
    times = []
    for _ in range(rounds):
        if on_gpu(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device, n: int) -> float:
    """Bytes per second, read and written, of a copy of 4 n bytes within the device: the memory limit."""
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak device memory of a call beyond the memory held before, results included; None on a CPU."""
    if not on_gpu(device):
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def product_flops(device: torch.device, n: int, dtype: torch.dtype) -> float:
    """Operations per second of torch's product of n x n matrices."""
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def make_inputs(n: int, device: torch.device, dtype: torch.dtype = BF16, runs: int = 1) -> list[torch.Tensor]:
    """A weight and updates of it, made on the device; in bf16, four of five coordinates are unchanged."""
    generator = torch.Generator(device).manual_seed(0)

    def random():
        return torch.randn(n, generator=generator, device=device)

    source = (0.02 * random()).to(dtype)
    return [source, *((source.float() + 1e-5 * random()).to(dtype) for _ in range(runs))]


def random_flags(n: int, device: torch.device, density: float) -> torch.Tensor:
    """Flags of which about a fraction `density` is set."""
    return torch.rand(n, generator=torch.Generator(device).manual_seed(1), device=device) < density


# eager PyTorch: the usual code


def eager_counts(w: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Sums, and a count per threshold: no histogram."""
    w, v = w.float(), v.float()
    d = (v - w).abs()
    results = [w.square().sum(), v.square().sum(), d.square().sum(), d.sum(), d.max(), (d == 0).sum()]
    for threshold in THRESHOLDS:
        results += [(d < threshold).sum(), (d <= threshold).sum()]
    return results


def eager_tables(w: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Three histograms, from which every visible metric follows."""
    visible, magnitude = bf16_bits(v - w) & 0x7FFF, bf16_bits(w) & 0x7FFF
    return [torch.bincount(bits, minlength=BINS) for bits in (magnitude, visible, magnitude[visible > 0])]


def eager_overlap(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    x, y = ((run - w).abs() > 1e-5 for run in (a, b))
    magnitude = bf16_bits(w) & 0x7FFF
    return [
        (x & y).sum(),
        x.sum(),
        y.sum(),
        *(torch.bincount(bits, minlength=BINS) for bits in (magnitude, magnitude[x], magnitude[y])),
    ]


def eager_gather(w: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    changed = (w != v).nonzero().flatten()
    return changed.int(), v[changed]


def eager_step(param: torch.Tensor, grad: torch.Tensor, active: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> None:
    """Dense AdamW, then frozen weights are restored."""
    g = grad.float()
    m.lerp_(g, 0.1)
    v.mul_(0.999).addcmul_(g, g, value=0.001)
    new = param.float() * (1 - 1e-7) - 1e-5 * m / (v.sqrt() + 1e-8)
    param.copy_(torch.where(active, new.to(param.dtype), param))


def eager_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    spec: Divergence,
) -> tuple[torch.Tensor, ...]:
    """Full logits in the dtype of the products, as in trainers, then the definition in fp32; returns gradients."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in (hidden, weight))
    loss = divergence(hidden @ weight.T, teacher_hidden @ teacher_weight.T, spec).sum()
    return torch.autograd.grad(loss, (hidden, weight))


# workloads


def delta_of(dtype: torch.dtype, eager: Callable[..., Any]) -> Callable:
    def make(n: int, device: torch.device) -> Timed:
        w, v = make_inputs(n, device, dtype)
        return Timed(
            lambda kernel: call_delta(kernel, Allocator(device), w, v, split=0),
            lambda: eager(w, v),
            w.nbytes + v.nbytes,
        )

    return make


def make_overlap(n: int, device: torch.device) -> Timed:
    sides = make_inputs(n, device, runs=2)
    return Timed(
        lambda kernel: call_overlap(kernel, Allocator(device), sides[0], sides[1:]),
        lambda: eager_overlap(*sides),
        sum(side.nbytes for side in sides),
    )


def quantile_of(dtype: torch.dtype) -> Callable:
    def make(n: int, device: torch.device) -> Timed:
        values = make_inputs(n, device, dtype)[0]
        mask = random_flags(n, device, 0.5).view(-1, 8)[:, 0].mul(255).to(torch.uint8)
        ranks = [n // 20, n // 10, n // 5]

        def call(kernel):
            return list(kernel("quantile")(values, ranks, True, mask))

        return Timed(call, lambda: values.abs().sort(), values.nbytes + mask.nbytes)

    return make


def make_gram(n: int, device: torch.device) -> Timed:
    w, v = (
        side.view(-1, min(GRAM_COLUMNS, n))
        for side in make_inputs(min(n, GRAM_ROWS * GRAM_COLUMNS) // GRAM_COLUMNS * GRAM_COLUMNS or n, device)
    )

    def eager():
        a, b = base_and_delta(w, v, False)
        a, b = a.double(), b.double()
        return a.T @ a, a.T @ b, b.T @ b

    return Timed(
        lambda kernel: call_gram(kernel, Allocator(device), w, v, False, 0), eager, 4 * w.numel() * w.shape[1]
    )  # two triangles and a full matrix


def changed_pair(n: int, device: torch.device) -> list[torch.Tensor]:
    w, v = (patch.bits(side) for side in make_inputs(n, device))
    return [w, torch.where(random_flags(n, device, CHANGED), v ^ 1, w)]


def make_gather(n: int, device: torch.device) -> Timed:
    w, v = changed_pair(n, device)
    room, digests = (
        patch.GatherBuffers.of(n, 2, device),
        torch.zeros(2, patch.blocks_of(n), 2, dtype=torch.int64, device=device),
    )

    def call(kernel: Kernel):
        kernel("patch_gather_")(w, v, False, room.counts, room.positions, room.values, digests)
        return [room.counts.clone(), digests.clone()]

    return Timed(call, lambda: eager_gather(w, v), 2 * w.nbytes + n / 8 + 2 * CHANGED * n)


def make_scatter(n: int, device: torch.device) -> Timed:
    w, v = changed_pair(n, device)
    changes, _ = patch.gather(w, v)
    out, digests = torch.empty_like(w), torch.zeros(patch.blocks_of(n), 2, dtype=torch.int64, device=device)
    places, values = (w != v).nonzero().flatten(), changes.values

    def call(kernel: Kernel):
        kernel("patch_scatter_")(w, changes.counts, changes.positions, values, False, out, digests)
        return [out, digests.clone()]

    return Timed(call, lambda: w.clone().index_copy_(0, places, values), 2 * w.nbytes + n / 8 + values.nbytes)


def step_of(dtype: torch.dtype, precision: str) -> Callable:
    def make(n: int, device: torch.device) -> Timed:
        param, grad = make_inputs(n, device, dtype)
        before, active = param.clone(), random_flags(n, device, ACTIVE)
        mask, offsets = (tensor.to(device) for tensor in mask_tensors(active.cpu()))
        count = int(offsets[-1])
        m, v = torch.zeros(count, device=device), torch.zeros(count, device=device)
        kind = step.validation.RESIDUAL_DTYPES.get(precision) if dtype == BF16 else None
        residuals = [torch.zeros(count, dtype=kind, device=device)] if kind else []
        scalars = step.adamw_scalars([1], 1e-5, (0.9, 0.999), 1e-8, 0.01).to(device)
        common = ([], [], scalars, [0], [0], [0], None, None, None, False, step.PRECISIONS.index(precision), 0)

        def call(kernel: Kernel):
            kernel("masked_adamw_")([param], [grad], [mask], [offsets], [m], [v], [], residuals, *common)
            return [param, m, v]

        def reset():
            param.copy_(before)
            for tensor in (m, v, *residuals):
                tensor.zero_()

        dense = [torch.zeros(n, device=device) for _ in range(2)]
        # Weights read and written, gradients read, by full lines; moments and residuals read and written; the mask.
        moved = 3 * param.nbytes + count * 2 * (8 + (2 if kind else 0)) + n / 8
        return Timed(call, lambda: eager_step(param, grad, active, *dense), moved, reset)

    return make


def divergence_of(kind: str) -> Callable:
    def make(n: int, device: torch.device) -> Timed:
        tokens, vocabulary = min(TOKENS, n // 64), min(VOCABULARY, n // 64)
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator, device=device)

        student, teacher = (
            [random(tokens, width).to(BF16), (random(vocabulary, width) / width**0.5).to(BF16)] for width in WIDTHS
        )
        ids, code, beta = torch.zeros(tokens, 0, dtype=torch.int64, device=device), KIND_CODES[kind], 0.5
        params = [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]

        def call(kernel: Kernel):
            moments, at, _, _ = kernel("divergence_scan")(student, teacher, ids, 0, vocabulary, *params, False)
            center = moments[tiles.MEAN_REVERSE] - moments[tiles.STUDENT_LOG] + moments[tiles.TEACHER_LOG]
            shift = torch.zeros_like(center)
            if kind == "jsd":
                means = kernel("divergence_means")(student, teacher, moments, vocabulary, *params, beta, code)
                _, shift, center = means
            scalars = torch.stack([*moments[:4], shift, center, torch.ones_like(center)])
            return list(
                kernel("divergence_backward")(
                    student, teacher, scalars, ids, at[0], vocabulary, *params, beta, code, [True, True, False]
                )
            )[:2]

        least = (
            2 * tokens * vocabulary * (sum(WIDTHS) + 2 * WIDTHS[0])
        )  # logits of both sides and the student's two gradients, once each
        return Timed(call, lambda: eager_divergence(*student, *teacher, Divergence(kind)), least)

    return make


WORKLOADS = (
    Workload("delta of a bf16 pair", "delta", delta_of(BF16, eager_counts), fuses=True),
    Workload("overlap of two bf16 runs", "overlap", make_overlap, fuses=True),
    Workload("quantile of bf16 and a mask", "quantile", quantile_of(BF16)),
    Workload("gather of a bf16 pair", "patch", make_gather),
    Workload("scatter of a bf16 pair", "patch", make_scatter),
    Workload("AdamW step of bf16, exact", "step", step_of(BF16, "split_master"), fuses=True),
    Workload("AdamW step of fp32", "step", step_of(FP32, "nearest"), fuses=True),
    Workload("gram of a bf16 pair", "gram", make_gram, "fp64 product"),
    Workload("reverse KL and its gradients", "divergence", divergence_of("reverse_kl"), "bf16 product", fuses=True),
    Workload("JSD and its gradients", "divergence", divergence_of("jsd"), "bf16 product"),
    Workload("delta of an fp32 pair", "delta", delta_of(FP32, eager_counts)),
    Workload("quantile of fp32 and a mask", "quantile", quantile_of(FP32)),
    Workload("delta against three tables", "delta", delta_of(BF16, eager_tables)),
)


def coordinates(device: torch.device) -> int:
    """As many as leave memory for the copies of eager PyTorch."""
    if not on_gpu(device):
        return 1 << 16
    free = torch.cuda.mem_get_info(device)[0]
    return min(LARGEST, 1 << (free // 160).bit_length() - 1)


def time_workload(
    workload: Workload, backends: list[Backend], device: torch.device, limits: dict[str, float], n: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each backend and for eager PyTorch. The reference is not timed: it is a definition."""
    timed = workload.make(n or coordinates(device), device)
    first: list[torch.Tensor] | None = None
    for backend in backends:
        if backend.name in ("package", "reference") or not backend.serves_all(FAMILIES[workload.family]):
            continue
        timed.reset()
        outputs = [output.clone() for output in timed.call(backend.kernel)]
        first = first or outputs
        if workload.family not in SUMMED:
            same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(outputs, first, strict=True)]
            assert all(same), f"{backend.name} gives a different result for {workload.name}"
        yield row(workload, backend.name, lambda backend=backend: timed.call(backend.kernel), device, timed, limits)
    yield row(workload, "eager PyTorch", timed.eager, device, timed, limits)


def time_compiled(
    workload: Workload, device: torch.device, limits: dict[str, float], compiled: Callable, n: int | None = None
) -> Iterator[dict[str, Any]]:
    """The row of the compiled eager code."""
    timed = workload.make(n or coordinates(device), device)
    yield row(workload, "torch.compile", compiled(timed.eager), device, timed, limits)


def row(
    workload: Workload,
    implementation: str,
    call: Callable[[], Any],
    device: torch.device,
    timed: Timed,
    limits: dict[str, float],
) -> dict[str, Any]:
    median_s = seconds(call, device)
    rate = timed.work / median_s
    return {
        "workload": workload.name,
        "family": workload.family,
        "implementation": implementation,
        "sources": sources_of(workload.family, implementation),
        "median_s": median_s,
        workload.unit: rate,
        "fraction_of_limit": rate / limits[workload.limit],
        "extra_bytes": peak_bytes(call, device),
    }


def measured_limits(device: torch.device, n: int | None = None) -> dict[str, float]:
    """Limits of the device: bytes per second of a copy, operations per second of products in fp64 and bf16."""
    side = 4096 if on_gpu(device) else 128
    return {
        "copy": copy_bandwidth(device, n or coordinates(device)),
        "fp64 product": product_flops(device, side, FP64),
        "bf16 product": product_flops(device, 2 * side, BF16),
    }
