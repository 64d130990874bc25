"""The inputs on which every backend of `step` must equal the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opdkernels.ops import step
from opdkernels.ops.step.args import ADAMW_FIELDS, SGD_FIELDS
from opdkernels.ops.step.layout import BLOCK
from opdkernels.ops.step.validation import DTYPES, RESIDUAL_DTYPES
from tests.ops.conformance import BF16, BYTES, FP32, INT64, Allocator, Case, Family, Kernel, assert_equal, pack_bits

INF, NAN = float("inf"), float("nan")
EXTREMES = (0.0, -0.0, 1e-45, 1e-40, 3e-39, 1.2e-38, 1e-30, 1.0, 1e19, 3e38, -3.39e38, INF, -INF, NAN)
SIZES = (0, 31, 2049, 1, 2048, 1023, 1025)
BETAS, EPS = (0.9, 0.999), 1e-8
LAYOUTS = (None, torch.int32)  # of a mask: a bitmap, or indices of a dtype
STATE = ["exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers", "residuals", "changed"]


def mask_tensors(flags: torch.Tensor, index_dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """A mask and its block counts: a bitmap and the active coordinates before each block, or indices of a dtype."""
    if index_dtype:
        return [flags.nonzero().flatten().to(index_dtype), torch.zeros(0, dtype=INT64)]
    padded = flags.new_zeros((len(flags) + BLOCK - 1) // BLOCK * BLOCK)
    padded[: len(flags)] = flags
    return [
        pack_bits(flags),
        torch.cat([torch.zeros(1, dtype=INT64), padded.view(-1, BLOCK).sum(1).cumsum(0)]),
    ]


class Inputs:
    """Builds the parameters, masks and state of an optimizer, and the arguments of its steps."""

    def __init__(
        self,
        sizes: Sequence[int] = SIZES,
        *,
        dtype: torch.dtype = FP32,
        precision: str = "nearest",
        index_dtype: torch.dtype | None = None,
        density: float = 0.2,
        adamw: bool = True,
        amsgrad: bool = False,
        momentum: bool = True,
        hostile: bool = False,
    ):
        self.generator = torch.Generator().manual_seed(sum(sizes))
        self.sizes, self.dtype, self.precision, self.adamw, self.hostile = sizes, dtype, precision, adamw, hostile
        self.params = [self.values(n, 0.02, dtype) for n in sizes]
        self.flags = [torch.rand(n, generator=self.generator) < density for n in sizes]
        masks = [mask_tensors(flags, index_dtype) for flags in self.flags]
        self.masks, self.block_counts = ([pair[i] for pair in masks] for i in (0, 1))
        self.active = [int(flags.sum()) for flags in self.flags]
        self.exp_avgs, self.exp_avg_sqs = (self.zeros(), self.zeros()) if adamw else ([], [])
        self.max_exp_avg_sqs = self.zeros() if amsgrad else []
        self.momentum_buffers = [] if adamw or not momentum else self.zeros()
        residual = RESIDUAL_DTYPES.get(precision) if dtype == BF16 else None
        self.residuals = self.zeros(residual) if residual else []
        self.init_values: list[torch.Tensor] = []
        self.step_groups: list[torch.Tensor] = []
        self.changed: list[torch.Tensor] = []
        self.steps: list[dict[str, Any]] = []

    def values(self, n: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
        values = (scale * torch.randn(n, generator=self.generator)).to(dtype)
        for i, value in enumerate(EXTREMES if self.hostile else ()):
            values[i :: 199 + i] = value
        return values

    def zeros(self, dtype: torch.dtype = FP32) -> list[torch.Tensor]:
        return [torch.zeros(count, dtype=dtype) for count in self.active]

    def add_step(self, grads: list[torch.Tensor] | torch.dtype = FP32, **options: Any) -> Inputs:
        """Adds a step of other options than the defaults. grads: the gradients, or the dtype of random ones."""
        if isinstance(grads, torch.dtype):
            grads = [self.values(n, 1e-3, grads) for n in self.sizes]
        t, ids = len(self.steps) + 1, list(range(len(self.sizes)))
        if self.adamw:
            scalars = step.adamw_scalars([t] * len(ids), 1e-3, BETAS, EPS, 0.01)
        else:
            scalars = step.sgd_scalars([t] * len(ids), 0.1, 0.9, 0.0, 0.01)
        defaults = {
            "scalars": scalars,
            "scalar_rows": ids,
            "shard_offsets": [0] * len(ids),
            "param_ids": ids,
            **dict.fromkeys(("grad_scale", "clip", "found_inf")),
            **dict.fromkeys(("maximize", "nesterov"), False),
            "precision": step.PRECISIONS.index(self.precision),
            "seed": 0,
        }
        self.steps.append({**defaults, "grads": grads, **options})
        return self

    def with_changed(self) -> Inputs:
        """Adds bits for changes. Some are set: those of NaN, whose payload after a step differs between backends, and
        random ones."""
        for param, flags, mask in zip(self.params, self.flags, self.masks, strict=True):
            is_set = param.isnan() | (torch.rand(len(param), generator=self.generator) < 0.1)
            self.changed.append(pack_bits(is_set if mask.dtype == BYTES else is_set[flags]))
        return self

    def compact(self, grads: list[torch.Tensor]) -> list[torch.Tensor]:
        return [grad[flags].float() for grad, flags in zip(grads, self.flags, strict=True)]

    def finish(self) -> list[Any]:
        """The inputs of a case."""
        names = ("params", "masks", "block_counts", "init_values", "step_groups", *STATE)
        return [{name: getattr(self, name) for name in names}, self.steps, self.adamw]


def call_steps(
    kernel: Kernel, allocator: Allocator, state: dict[str, list], steps: list[dict[str, Any]], adamw: bool
) -> list[torch.Tensor]:
    """Parameters and state after the steps."""
    for options in steps:
        operator, fields = ("masked_adamw_", ADAMW_FIELDS) if adamw else ("masked_sgd_", SGD_FIELDS)
        kernel(operator)(*((state | options)[field] for field in fields))
    return [tensor for name in ("params", *STATE) for tensor in state[name]]


def call_compared_steps(
    kernel: Kernel, allocator: Allocator, state: dict[str, list], steps: list[dict[str, Any]], adamw: bool
) -> list[torch.Tensor]:
    """Steps; after each, `changed` has the bits that it had, and those of the weights that differ from before."""
    for options in steps:
        before = [bf16_patterns(param) for param in state["params"]]
        had = [bits.cpu().numpy().copy() for bits in state["changed"]]
        call_steps(kernel, allocator, state, [options], adamw)
        for i, bits in enumerate(state["changed"]):
            differs, mask = bf16_patterns(state["params"][i]) != before[i], state["masks"][i].cpu()
            flags = differs if mask.dtype == BYTES else differs[mask.numpy()]
            expected = had[i] | np.packbits(flags, bitorder="little") if bits.numel() else had[i]
            assert np.array_equal(bits.cpu().numpy(), expected), f"changed of tensor {i}"
    return [tensor for name in ("params", *STATE) for tensor in state[name]]


def bf16_patterns(values: torch.Tensor) -> np.ndarray:
    """The 16 bits of bf16 values, or of fp32 values rounded to nearest even, as integers."""
    if values.dtype == BF16:
        return values.cpu().view(torch.int16).numpy().copy()
    bits = values.cpu().view(torch.int32).numpy().astype(np.int64) & 0xFFFFFFFF
    upper, lower = bits >> 16, bits & 0xFFFF
    is_nan = (upper & 0x7FFF) * 65536 + lower > 0x7F800000
    rounded = upper + ((lower > 0x8000) | ((lower == 0x8000) & (upper % 2 == 1)))
    return np.where(is_nan, upper | 0x40, rounded)


def call_steps_and_copies(
    kernel: Kernel, allocator: Allocator, state: dict[str, list], steps: list[dict[str, Any]], adamw: bool
) -> list[torch.Tensor]:
    """Steps; then active weights are gathered into the first state, for AdamW added to it, and scattered."""
    call_steps(kernel, allocator, state, steps, adamw)
    compact = state["exp_avgs" if adamw else "momentum_buffers"]
    for param, mask, counts, values in zip(
        state["params"], state["masks"], state["block_counts"], compact, strict=True
    ):
        kernel("masked_gather_")(param, mask, counts, values, adamw)
        kernel("masked_scatter_")(param, mask, counts, values)
    return [tensor for name in ("params", *STATE) for tensor in state[name]]


def call_copies(
    kernel: Kernel, allocator: Allocator, values: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor, active: int
) -> list[torch.Tensor]:
    """Gathers, gathers and adds, scatters. Two times two bits of a bf16 are lost in rounding, and ties go to even."""
    compact = allocator.alloc([active], FP32).fill_(7)
    kernel("masked_gather_")(values, mask, counts, compact, False)
    kernel("masked_gather_")(values, mask, counts, compact, True)
    gathered = compact.clone()
    compact += torch.arange(active, device=compact.device) * 2.0**-10
    kernel("masked_scatter_")(values, mask, counts, compact)
    return [gathered, values, compact]


def assert_identical(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    """Bit-identical, payloads of NaN included."""
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(a.cpu().view(BYTES), b.view(BYTES)), f"output {i} differs"


def assert_nan(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], inputs: list[Any]) -> None:
    assert_equal(outputs, expected, inputs)
    assert expected[0].isnan().any(), "the reference has no NaN"


def case(name: str, build: Any, call: Any = call_steps, compare: Any = assert_identical) -> Case:
    return Case(name, lambda: build().finish(), call, compare)


def layout_name(index_dtype: torch.dtype | None) -> str:
    return "indices" if index_dtype else "bitmap"


def cases(n: int) -> Iterator[Case]:
    sizes = (n, 31, 0, 2048)
    kinds = [(FP32, "nearest"), *((BF16, precision) for precision in step.PRECISIONS)]
    for adamw, (dtype, precision), layout in itertools.product((True, False), kinds, LAYOUTS):
        grad_dtype = BF16 if precision in ("nearest", "kahan") else FP32
        options = {"dtype": dtype, "precision": precision, "index_dtype": layout, "adamw": adamw, "amsgrad": adamw}

        def build(adamw=adamw, grad_dtype=grad_dtype, options=options) -> Inputs:
            inputs = Inputs(sizes, hostile=True, **options)
            for t in (1, 2):
                step_options = {
                    "grad_scale": torch.tensor([3.0]),
                    "clip": torch.tensor([0.7]),
                    "shard_offsets": [7 * i for i in range(len(sizes))],
                    "nesterov": True,
                    "seed": 11,
                }
                if not adamw:
                    step_options["scalars"] = step.sgd_scalars([t] * len(sizes), 1e-2, 0.9, 0.1, 0.01)
                inputs.add_step(grad_dtype, **step_options)
            return inputs

        name = f"{'AdamW' if adamw else 'SGD'} {dtype} {precision} {layout_name(layout)} {n}"
        yield case(name, build, call_steps_and_copies, assert_equal)


def dense_then_compact(sizes: Sequence[int], dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Inputs:
    """Three steps: the second with gradients of the active coordinates only."""
    inputs = Inputs(sizes, dtype=dtypes[0], amsgrad=True, **options)
    for compact in (False, True, False):
        grads = [inputs.values(n, 1e-3, dtypes[1]) for n in sizes]
        inputs.add_step(
            inputs.compact(grads) if compact else grads,
            grad_scale=torch.tensor(3.0),
            clip=torch.tensor(0.7),
            seed=7 << 40 | 3,
            shard_offsets=[2**33 + 5 * i for i in range(len(sizes))],
        )
    return inputs


def adamw_options(betas: tuple[float, float], amsgrad: bool, maximize: bool) -> Inputs:
    inputs = Inputs((3000,), amsgrad=amsgrad)
    for t in (1, 2, 3):
        inputs.add_step(maximize=maximize, scalars=step.adamw_scalars([t], 1e-3, betas, EPS, 0.01))
    return inputs


def sgd_options(
    sizes: Sequence[int], weight_decay: float, momentum: float, dampening: float, nesterov: bool, maximize: bool
) -> Inputs:
    inputs = Inputs(sizes, dtype=BF16, precision="split_master", adamw=False, momentum=momentum > 0)
    for t in (1, 2):
        scalars = step.sgd_scalars([t] * len(sizes), 0.1, momentum, dampening, weight_decay)
        inputs.add_step(BF16, scalars=scalars, nesterov=nesterov, maximize=maximize)
    return inputs


def groups_and_init_values(sizes: Sequence[int], adamw: bool, dtype: torch.dtype, **options: Any) -> Inputs:
    """Three step groups per tensor, weight decay towards initial values."""
    inputs = Inputs(sizes, dtype=dtype, adamw=adamw, **options)
    inputs.step_groups = [torch.randint(0, 3, (k,), generator=inputs.generator).to(BYTES) for k in inputs.active]
    inputs.init_values = [inputs.values(k, 1.0, dtype) for k in inputs.active]
    for t in (1, 2):
        steps = [t + 2 * group for _ in sizes for group in range(3)]
        if adamw:
            scalars = step.adamw_scalars(steps, 1e-3, BETAS, EPS, 0.1)
        else:
            scalars = step.sgd_scalars(steps, 1e-2, 0.9, 0.1, 0.1)
        ids = range(len(sizes))
        rows, param_ids = [3 * i for i in ids], [5 * i for i in ids]
        inputs.add_step(dtype, scalars=scalars, scalar_rows=rows, param_ids=param_ids, nesterov=not adamw, seed=-9)
    return inputs


def mixed(lr: float = 1e-3) -> Inputs:
    """Tensors of several kinds, some without an active coordinate or without any coordinate, in no order."""
    inputs = Inputs((0, 3000, 700, 5000, 9, 4097, 64), density=0.3, dtype=BF16, precision="split_master")
    inputs.flags[4] = torch.zeros(9, dtype=torch.bool)
    for i in (1, 5):
        inputs.params[i] = inputs.params[i].float()
    for i, flags in enumerate(inputs.flags):
        layout = None if i % 3 else (torch.int32, INT64)[i % 2]
        inputs.masks[i], inputs.block_counts[i] = mask_tensors(flags, layout)
    inputs.active = [int(flags.sum()) for flags in inputs.flags]
    inputs.exp_avgs, inputs.exp_avg_sqs, inputs.residuals = inputs.zeros(), inputs.zeros(), inputs.zeros(torch.int16)
    tensors = list(zip(inputs.active, inputs.params, strict=True))
    inputs.init_values = [inputs.values(k, 1.0, p.dtype) if i == 3 else p[:0] for i, (k, p) in enumerate(tensors)]
    inputs.step_groups = [torch.arange(k if i == 6 else 0).remainder(2).to(BYTES) for i, (k, _) in enumerate(tensors)]
    scalars = step.adamw_scalars([3, 4], lr, BETAS, EPS, 0.1)
    return inputs.add_step(BF16, scalars=scalars, scalar_rows=[0] * len(inputs.sizes))


def extremes(dtype: torch.dtype, precision: str) -> Inputs:
    """Every pair of an extreme weight and an extreme gradient: subnormal, huge, infinite, NaN."""
    values, count = torch.tensor(EXTREMES), len(EXTREMES)
    inputs = Inputs((count**2,), density=1.0, dtype=dtype, precision=precision, amsgrad=True)
    inputs.params = [values.repeat_interleave(count).to(dtype)]
    for _ in range(2):
        inputs.add_step([values.repeat(count)], seed=3)
    return inputs


def negative_second_moment(amsgrad: bool) -> Inputs:
    """No step leaves one, but a loaded state may hold it: it must not be taken for zero."""
    inputs = Inputs((2049,), density=0.5, amsgrad=amsgrad)
    for moments in (inputs.exp_avg_sqs, inputs.max_exp_avg_sqs):
        for moment in moments:
            moment.fill_(-1.0)
    return inputs.add_step()


def frozen_nan(index_dtype: torch.dtype | None) -> Inputs:
    """Frozen weights and their gradients are NaN: they are neither read nor written."""
    inputs = Inputs((5003,), dtype=BF16, precision="kahan", amsgrad=True, index_dtype=index_dtype)
    (grad,) = (inputs.values(n, 1e-3, BF16) for n in inputs.sizes)
    for tensor in (inputs.params[0], grad):
        tensor[~inputs.flags[0]] = NAN
    return inputs.add_step([grad])


def copies(n: int, dtype: torch.dtype, index_dtype: torch.dtype | None) -> list[Any]:
    inputs = Inputs((n,), dtype=dtype, index_dtype=index_dtype)
    return [inputs.params[0], inputs.masks[0], inputs.block_counts[0], inputs.active[0]]


def copy_cases(sizes: Sequence[int]) -> Iterator[Case]:
    for n, dtype, layout in itertools.product(sizes, DTYPES, LAYOUTS):
        make = functools.partial(copies, n, dtype, layout)
        yield Case(f"gather and scatter {dtype} {layout_name(layout)} {n}", make, call_copies, assert_identical)


def changed_inputs(sizes: Sequence[int], adamw: bool, **options: Any) -> Inputs:
    """Three steps that change some of the bf16 values; the second is skipped."""
    inputs = Inputs(sizes, adamw=adamw, hostile=True, **options).with_changed()
    for t in (1, 2, 3):
        if adamw:
            scalars = step.adamw_scalars([t] * len(sizes), 2e-5, BETAS, EPS, 0.01)
        else:
            scalars = step.sgd_scalars([t] * len(sizes), 2e-2, 0.9, 0.1, 0.01)
        offsets = [2**33 + 5 * i for i in range(len(sizes))]
        inputs.add_step(scalars=scalars, found_inf=torch.tensor(float(t == 2)), shard_offsets=offsets, seed=3)
    return inputs


def changed_of_some() -> Inputs:
    """Tensors of several kinds, of which every other one has bits for changes."""
    inputs = mixed(lr=2e-5).with_changed()
    inputs.changed = [bits if i % 2 else bits[:0] for i, bits in enumerate(inputs.changed)]
    return inputs


def changed_cases(sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    kinds = [(FP32, "nearest"), *((BF16, precision) for precision in step.PRECISIONS)]
    for adamw, (dtype, precision), layout in itertools.product((True, False), kinds, (*LAYOUTS, INT64)):
        build = functools.partial(
            changed_inputs, sizes, adamw, dtype=dtype, precision=precision, index_dtype=layout, momentum=layout != INT64
        )
        name = f"changed {'AdamW' if adamw else 'SGD'} {dtype} {precision} {layout or 'bitmap'}"
        yield case(name, build, call_compared_steps, assert_equal)
    for density in (0, 1):
        build = functools.partial(changed_inputs, sizes, True, dtype=BF16, density=density)
        yield case(f"changed density {density}", build, call_compared_steps, assert_equal)
    yield case("changed of some tensors", changed_of_some, call_compared_steps)


def unmoved_cases(sizes: Sequence[int]) -> Iterator[Case]:
    """Steps that change no weight."""
    for empty in ((), (0, 0)):
        yield case(f"sizes {empty}", lambda s=empty: Inputs(s).add_step())
    for layout in LAYOUTS:
        yield case(
            f"density 0 {layout_name(layout)}", lambda x=layout: Inputs(sizes, density=0, index_dtype=x).add_step()
        )
    for value in (1.0, INF, NAN):
        yield case(f"found_inf {value}", lambda v=value: Inputs(sizes).add_step(found_inf=torch.tensor(v)))


def special_cases(sizes: Sequence[int] = SIZES) -> Iterator[Case]:
    for dtypes, precision, layout in itertools.product(
        itertools.product((FP32, BF16), repeat=2), step.PRECISIONS, LAYOUTS
    ):
        build = functools.partial(dense_then_compact, sizes, dtypes, precision=precision, index_dtype=layout)
        yield case(f"AdamW {dtypes[0]}, {dtypes[1]} gradients {precision} {layout_name(layout)}", build)
    for betas, amsgrad, maximize in itertools.product(
        ((0.9, 0.999), (0.4, 0.9), (0.5, 0.5)), (False, True), (False, True)
    ):
        name = f"AdamW betas {betas}{' amsgrad' * amsgrad}{' maximize' * maximize}"
        yield case(name, functools.partial(adamw_options, betas, amsgrad, maximize))
    momenta = (0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)
    for decay, momentum, maximize in itertools.product((0.0, 0.01), momenta, (False, True)):
        name = f"SGD decay {decay} momentum, dampening, nesterov {momentum}{' maximize' * maximize}"
        yield case(name, functools.partial(sgd_options, sizes, decay, *momentum, maximize))
    for adamw, precision, dtype, layout in itertools.product((True, False), step.PRECISIONS, DTYPES, LAYOUTS):
        name = f"{'AdamW' if adamw else 'SGD'} step groups {dtype} {precision} {layout_name(layout)}"
        build = functools.partial(groups_and_init_values, sizes, adamw, dtype, precision=precision, index_dtype=layout)
        yield case(name, build)
    yield case("mixed tensors", mixed)
    yield case(
        "many tensors", lambda: Inputs([3000, *[5] * 70, 5000, *[1] * 33, 2049], density=0.4).add_step()
    )  # more than a warp has lanes
    for layout in LAYOUTS:
        yield case(
            f"density 1 {layout_name(layout)}", lambda x=layout: Inputs(sizes, density=1, index_dtype=x).add_step()
        )
        yield case(f"frozen NaN {layout_name(layout)}", functools.partial(frozen_nan, layout))
    yield case("found_inf 0.0", lambda: Inputs(sizes).add_step(found_inf=torch.tensor(0.0)))
    for precision, dtype in itertools.product(step.PRECISIONS, DTYPES):
        name = f"extremes {dtype} {precision}"
        yield case(name, functools.partial(extremes, dtype, precision), compare=assert_equal)
    for amsgrad in (False, True):
        name = f"negative second moment{' amsgrad' * amsgrad}"
        yield case(name, functools.partial(negative_second_moment, amsgrad), compare=assert_nan)
    yield from changed_cases(sizes)
    yield from unmoved_cases(sizes)
    yield from copy_cases((*sizes, 70_001))


def stochastic(layout: torch.dtype | None) -> Inputs:
    inputs = Inputs((5000, 1, 2048, 513), dtype=BF16, precision="stochastic", index_dtype=layout)
    return inputs.add_step()


def stochastic_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        yield case(f"stochastic {layout_name(layout)}", functools.partial(stochastic, layout))


def million() -> Case:
    sizes = (1_000_003, 70_001)
    return case("a million", lambda: Inputs(sizes, dtype=BF16, precision="split_master").add_step(BF16))


def check_repeated(kernel: Kernel, expected_by: Kernel, device: torch.device, tile: int, times: int) -> None:
    inputs = Inputs((tile // BLOCK * BLOCK,), dtype=BF16, density=0.05, amsgrad=True, hostile=True).with_changed()
    state, steps, adamw = inputs.add_step(BF16).add_step(BF16).finish()
    allocator = Allocator(device)
    repeated = {name: [tensor.to(device).repeat(times) for tensor in tensors] for name, tensors in state.items()}
    on_device = [
        allocator.put(options) | {"grads": [g.to(device).repeat(times) for g in options["grads"]]} for options in steps
    ]
    (counts,) = state["block_counts"]
    blocks = (counts[1:] + counts[-1] * torch.arange(times).unsqueeze(1)).flatten()
    repeated["block_counts"] = [torch.cat([torch.zeros(1, dtype=INT64), blocks]).to(device)]
    outputs = call_steps_and_copies(kernel, allocator, repeated, on_device, adamw)
    expected = call_steps_and_copies(expected_by, Allocator(), state, steps, adamw)
    for i, (output, once) in enumerate(zip(outputs, expected, strict=True)):
        parts = output.view(torch.int16 if output.itemsize == 2 else torch.int32).view(times, -1)
        assert bool((parts == parts[:1]).all()), f"output {i} is not the same in every part"
        assert_equal([output[: len(once)]], [once], [])


FAMILY = Family(
    "step",
    ("masked_adamw_", "masked_sgd_", "masked_gather_", "masked_scatter_"),
    cases,
    special_cases,
    check_repeated,
    bytes_per_coordinate=8,
)
