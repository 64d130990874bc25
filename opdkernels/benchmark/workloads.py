"""What is timed: operators of each kernel family on inputs that are made on the device.

Weights and updates are random, with the sizes of trained models: about 88 % of the bf16 coordinates are unchanged. The
work of a call is what any implementation has to do at least: bytes that are read and written once, or operations of
products of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdkernels.benchmark import eager
from opdkernels.benchmark.limits import unit_of
from opdkernels.distillation.products import computes_in_fp32
from opdkernels.ops import patch, step
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS, Tally
from opdkernels.ops.divergence import Divergence, tiles
from opdkernels.ops.overlap import DEFAULT_THRESHOLD_BITS as OVERLAP_THRESHOLD_BITS
from opdkernels.ops.overlap import Overlap
from opdkernels.ops.step.args import ADAMW_FIELDS, StepArgs, flatten
from opdkernels.ops.step.layout import BLOCK, PRECISIONS

Kernel = Callable[[str], Callable[..., Any]]
"""Returns the implementation of an operator by its name."""

GRAM_ROWS, GRAM_COLUMNS = 4864, 896  # the MLP matrices of Qwen2.5-0.5B
MAX_TOKENS, MAX_VOCAB, WIDTHS = 4096, 151_936, (896, 1536)  # Qwen2.5: 0.5B learns from 1.5B
ACTIVE, CHANGED = 0.2, 0.17  # fractions of the coordinates: of a mask, of a patch
UPDATE = 1e-5
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Timed:
    """A workload on a device.

    Attributes:
        call: Runs the operators on the inputs, and returns their outputs.
        eager: The same in plain PyTorch.
        work: Bytes that must be moved, or operations.
        size: Sizes of the inputs, for people.
        compilable: The code for torch.compile, where it is other code than `eager`.
        reset: Restores the inputs that calls change.
    """

    call: Callable[[Kernel], list[Tensor]]
    eager: Callable[[], Any]
    work: float
    size: str
    compilable: Callable[[], Any] | None = None
    reset: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        name: What is computed, on which inputs.
        family: The kernel family.
        make: Returns the workload for a number of coordinates on a device.
        compared_with: What `eager` does.
        limit: The limit of the device that bounds it (opdkernels/benchmark/limits.py).
        cpu_limit: The limit on a CPU, if another one.
        fuses: Whether a compiler can fuse passes of the plain code.
    """

    name: str
    family: str
    make: Callable[[int, torch.device], Timed]
    compared_with: str
    limit: str
    cpu_limit: str = ""
    fuses: bool = False

    def limit_on(self, device: torch.device) -> str:
        """The limit that bounds it on a device."""
        return self.cpu_limit or self.limit if device.type == "cpu" else self.limit

    @property
    def unit(self) -> str:
        """The unit of its work: "bytes" or "operations"."""
        return unit_of(self.limit)


def dispatched(operator: str) -> Callable[..., Any]:
    """An operator as the public functions call it: through torch's dispatcher."""
    return getattr(torch.ops.opdkernels, operator)


def make_inputs(
    n: int, device: torch.device, dtype: torch.dtype = BF16, runs: int = 1, update: float = UPDATE
) -> list[Tensor]:
    """A weight and updates of it, of this standard deviation; by UPDATE, 12 % of the coordinates change in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(n, generator=generator, device=device)

    base = (0.02 * random()).to(dtype)
    return [base, *((base.float() + update * random()).to(dtype) for _ in range(runs))]


def random_flags(n: int, device: torch.device, density: float) -> Tensor:
    """Flags of which about a fraction `density` is set."""
    return torch.rand(n, generator=torch.Generator(device).manual_seed(1), device=device) < density


def pack(flags: Tensor) -> Tensor:
    """Flags as bits, uint8 [ceil(n / 8)], least significant bit first."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (padded << shifts).sum(1, dtype=torch.uint8)


def block_counts(flags: Tensor) -> Tensor:
    """Flags that are set before each block of a bitmap, int64 [ceil(n / BLOCK) + 1]."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % BLOCK)).view(-1, BLOCK)
    return torch.nn.functional.pad(padded.sum(1).cumsum(0), (1, 0))


def zeros_like(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Zeros of the shapes and dtypes of arrays, made on the device: a copy from the host would be timed, too."""
    return [torch.zeros_like(torch.from_numpy(array), device=device) for array in arrays]


def coordinates_text(n: int) -> str:
    return f"{n:,} coordinates"


def delta_of(
    dtype: torch.dtype, plain: Callable[[Tensor, Tensor], Any], update: float = UPDATE
) -> Callable[[int, torch.device], Timed]:
    """`delta` of a pair of tensors, read once."""

    def make(n: int, device: torch.device) -> Timed:
        w, v = make_inputs(n, device, dtype, update=update)

        def call(kernel: Kernel) -> list[Tensor]:
            tally = Tally.empty()
            outputs = zeros_like([tally.tables, tally.counts, tally.sums, tally.maximum], device)
            kernel("delta_")(w, v, list(DEFAULT_THRESHOLD_BITS), list(THRESHOLDS), *outputs, None)
            return outputs

        return Timed(call, lambda: plain(w, v), w.nbytes + v.nbytes, coordinates_text(n))

    return make


def make_overlap(n: int, device: torch.device) -> Timed:
    """`overlap` of two runs: three tensors, read once."""
    sides = make_inputs(n, device, runs=2)

    def call(kernel: Kernel) -> list[Tensor]:
        outputs = zeros_like(Overlap.empty(2).arrays, device)
        kernel("overlap_")(sides[0], sides[1:], OVERLAP_THRESHOLD_BITS, *outputs)
        return outputs

    return Timed(call, lambda: eager.eager_overlap(*sides), sum(side.nbytes for side in sides), coordinates_text(n))


def quantile_of(dtype: torch.dtype) -> Callable[[int, torch.device], Timed]:
    """`quantile` at three ranks, inside a mask: values and one bit per value, read once."""

    def make(n: int, device: torch.device) -> Timed:
        values, flags = make_inputs(n, device, dtype)[0], random_flags(n, device, 0.5)
        mask, ranks = pack(flags), [max(1, n // part) for part in (20, 10, 5)]

        def call(kernel: Kernel) -> list[Tensor]:
            return list(kernel("quantile")(values, ranks, True, mask))

        return Timed(
            call,
            lambda: eager.eager_quantile(values, ranks, flags),
            values.nbytes + mask.nbytes,
            coordinates_text(n),
        )

    return make


def changed_pair(n: int, device: torch.device) -> list[Tensor]:
    """The bits of a weight, and of an update that flips the last bit of about a fraction CHANGED of them."""
    w = patch.bits(make_inputs(n, device)[0])
    return [w, torch.where(random_flags(n, device, CHANGED), w ^ 1, w)]


def make_gather(n: int, device: torch.device) -> Timed:
    """Gathering a patch: both sides read, positions and values written."""
    w, v = changed_pair(n, device)
    buffers = patch.GatherBuffers.of(n, 2, device)
    digests = torch.zeros(2, patch.blocks_of(n), 2, dtype=torch.int64, device=device)
    changes, _ = patch.gather(w, v)

    def call(kernel: Kernel) -> list[Tensor]:
        kernel("patch_gather_")(w, v, False, buffers.counts, buffers.positions, buffers.values, digests)
        used, changed = changes.positions.numel(), changes.changed  # the rest of the buffers is undefined
        return [buffers.counts, buffers.positions[:used], buffers.values[:changed], digests]

    work = 2 * w.nbytes + changes.positions.nbytes + changes.values.nbytes
    return Timed(call, lambda: eager.eager_gather(w, v), work, coordinates_text(n))


def make_scatter(n: int, device: torch.device) -> Timed:
    """Applying a patch: the base, positions and values read, the trained tensor written."""
    w, v = changed_pair(n, device)
    changes, _ = patch.gather(w, v)
    out, digests = torch.empty_like(w), torch.zeros(patch.blocks_of(n), 2, dtype=torch.int64, device=device)
    indices = (w != v).nonzero().flatten()

    def call(kernel: Kernel) -> list[Tensor]:
        kernel("patch_scatter_")(w, changes.counts, changes.positions, changes.values, False, out, digests)
        return [out, digests]

    work = 2 * w.nbytes + changes.positions.nbytes + changes.values.nbytes
    return Timed(call, lambda: eager.eager_scatter(w, indices, changes.values), work, coordinates_text(n))


def step_of(dtype: torch.dtype, precision: str) -> Callable[[int, torch.device], Timed]:
    """A step of masked AdamW. The mask is so dense that nearly every cache line of the weights has an active one:
    weights read and written, gradients read; of active coordinates moments and residuals read and written; the mask."""

    def make(n: int, device: torch.device) -> Timed:
        param, grad = make_inputs(n, device, dtype)
        before, active = param.clone(), random_flags(n, device, ACTIVE)
        mask, counts = pack(active), block_counts(active)
        num_active = int(counts[-1])
        m, v = (torch.zeros(num_active, device=device) for _ in range(2))
        residual_dtype = step.RESIDUAL_DTYPES.get(precision) if dtype == BF16 else None
        residuals = [torch.zeros(num_active, dtype=residual_dtype, device=device)] if residual_dtype else []
        scalars = step.adamw_scalars([1], eager.LEARNING_RATE, eager.BETAS, eager.EPS, eager.WEIGHT_DECAY).to(device)
        arguments = flatten(
            StepArgs(
                [param],
                [grad],
                [mask],
                [counts],
                [m],
                [v],
                residuals=residuals,
                scalars=scalars,
                scalar_rows=[0],
                shard_offsets=[0],
                param_ids=[0],
                precision=PRECISIONS.index(precision),
            ),
            ADAMW_FIELDS,
        )

        def call(kernel: Kernel) -> list[Tensor]:
            kernel("masked_adamw_")(*arguments)
            return [param, m, v, *residuals]

        def reset() -> None:
            param.copy_(before)
            for tensor in (m, v, *residuals):
                tensor.zero_()

        plain_param = param.clone()
        dense = [torch.zeros(n, device=device) for _ in range(2)]
        state_bytes = m.element_size() + v.element_size() + sum(tensor.element_size() for tensor in residuals)
        return Timed(
            call,
            eager.fused_step(plain_param, grad, active),
            3 * param.nbytes + 2 * num_active * state_bytes + mask.nbytes,
            coordinates_text(n),
            lambda: eager.formula_step(plain_param, grad, active, *dense),
            reset,
        )

    return make


def make_gram(n: int, device: torch.device) -> Timed:
    """Gram matrices of a pair: two triangles and a full matrix."""
    columns = min(GRAM_COLUMNS, n)
    rows = max(1, min(n // columns, GRAM_ROWS))
    w, v = (side.view(rows, columns) for side in make_inputs(rows * columns, device))

    def call(kernel: Kernel) -> list[Tensor]:
        out = torch.zeros(3, columns, columns, dtype=torch.float64, device=device)
        kernel("gram_")(w, v, 7, False, 0, out)
        return [out]

    return Timed(call, lambda: eager.eager_gram(w, v), 4 * rows * columns**2, f"[{rows:,}, {columns}]")


def divergence_of(kind: str) -> Callable[[int, torch.device], Timed]:
    """A divergence and the student's gradients: logits of both models once, and two products for the gradients."""

    def make(n: int, device: torch.device) -> Timed:
        tokens, vocab = max(8, min(MAX_TOKENS, n >> 16)), max(64, min(MAX_VOCAB, n >> 10))
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        student, teacher = (
            [random(tokens, width).to(BF16), (random(vocab, width) / width**0.5).to(BF16)] for width in WIDTHS
        )
        spec = Divergence(kind)
        # Logits of plain PyTorch: bf16, as in trainers; fp32 on a CPU without bf16 instructions, where that is faster.
        dtype = FP32 if computes_in_fp32(device) else BF16
        ids = torch.zeros(tokens, 0, dtype=torch.int64, device=device)
        params = [1.0, 0.0, 1.0], [1.0, 0.0, 1.0]

        def call(kernel: Kernel) -> list[Tensor]:
            moments, at_ids, _, _ = kernel("divergence_scan")(student, teacher, ids, 0, vocab, *params, False)
            center = moments[tiles.MEAN_REVERSE] - moments[tiles.STUDENT_LOG] + moments[tiles.TEACHER_LOG]
            shift = torch.zeros_like(center)
            if kind == "jsd":
                means = kernel("divergence_means")(student, teacher, moments, vocab, *params, spec.beta, spec.code)
                _, shift, center = means
            scalars = torch.stack([*moments[:4], shift, center, torch.ones_like(center)])
            needs_grad = [True, True, False]
            gradients = kernel("divergence_backward")(
                student, teacher, scalars, ids, at_ids[0], vocab, *params, spec.beta, spec.code, needs_grad
            )
            return list(gradients)[:2]

        return Timed(
            call,
            lambda: eager.eager_divergence(student, teacher, spec, dtype),
            2 * tokens * vocab * (sum(WIDTHS) + 2 * WIDTHS[0]),
            f"{tokens:,} tokens, {vocab:,} ids",
        )

    return make


WORKLOADS = (
    Workload(
        "delta of a bf16 pair", "delta", delta_of(BF16, eager.eager_counts), "sums and counts", "read", fuses=True
    ),
    Workload("delta against three tables", "delta", delta_of(BF16, eager.eager_tables), "three histograms", "read"),
    Workload("overlap of two bf16 runs", "overlap", make_overlap, "counts and histograms", "read", fuses=True),
    Workload("quantile of bf16 and a mask", "quantile", quantile_of(BF16), "topk; on a GPU sort", "read"),
    Workload("gather of a bf16 pair", "patch", make_gather, "nonzero and index", "read"),
    Workload("scatter of a bf16 pair", "patch", make_scatter, "clone and index_copy_", "copy"),
    Workload(
        "AdamW step of bf16, exact, 20 % active",
        "step",
        step_of(BF16, "split_master"),
        "fused AdamW of an fp32 master, frozen weights restored",
        "update",
        fuses=True,
    ),
    Workload(
        "AdamW step of fp32, 20 % active",
        "step",
        step_of(FP32, "nearest"),
        "fused AdamW, frozen weights restored",
        "update",
        fuses=True,
    ),
    Workload("gram of a bf16 pair", "gram", make_gram, "fp64 products", "fp64 product"),
    Workload(
        "reverse KL and its gradients",
        "divergence",
        divergence_of("reverse_kl"),
        "full logits",
        "bf16 product",
        "fp32 product",
        fuses=True,
    ),
    Workload(
        "JSD and its gradients", "divergence", divergence_of("jsd"), "full logits", "bf16 product", "fp32 product"
    ),
)
