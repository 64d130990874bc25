"""What is timed: the work that is counted, and plain PyTorch that computes the same."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from opdkernels.benchmark import eager, workloads
from opdkernels.benchmark.run import agree, check
from opdkernels.benchmark.workloads import WORKLOADS, dispatched
from opdkernels.config import Family
from opdkernels.masks import Mask
from opdkernels.ops import all_operators
from opdkernels.ops.delta import Tally, delta
from opdkernels.ops.gram import symmetric
from opdkernels.ops.overlap import overlap
from opdkernels.ops.patch import BLOCK
from opdkernels.ops.quantile import quantiles
from tests.test_structure import FAMILIES

HERE = torch.device("cpu")
N = 70_001
BY_NAME = {workload.name: workload for workload in WORKLOADS}
EVERY = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)


class Recorder:
    """Runs operators through the dispatcher, and keeps the arguments of each."""

    def __init__(self):
        self.arguments = {}

    def __call__(self, operator):
        def call(*arguments):
            self.arguments[operator] = arguments
            return dispatched(operator)(*arguments)

        return call


def test_every_family_has_a_workload_and_is_an_option():
    assert {workload.family for workload in WORKLOADS} == set(FAMILIES) - {"null"} == set(get_args(Family))
    assert len(BY_NAME) == len(WORKLOADS)


@EVERY
def test_operators_agree_with_their_references(workload):
    check(workload, HERE)


@EVERY
def test_operators_are_those_of_the_family(workload):
    recorder = Recorder()
    workload.make(4096, HERE).call(recorder)
    assert {all_operators()[name].family for name in recorder.arguments} == {workload.family}


@pytest.mark.parametrize(
    ("name", "operator", "argument"),
    [
        ("delta of a bf16 pair", "delta_", 4),
        ("overlap of two bf16 runs", "overlap_", 5),
        ("gather of a bf16 pair", "patch_gather_", 4),
        ("gather of a bf16 pair", "patch_gather_", 5),
        ("gather of a bf16 pair", "patch_gather_", 6),
        ("scatter of a bf16 pair", "patch_scatter_", 5),
        ("AdamW step of bf16, exact, 20 % active", "masked_adamw_", 0),
        ("AdamW step of bf16, exact, 20 % active", "masked_adamw_", 7),
        ("gram of a bf16 pair", "gram_", 5),
    ],
)
def test_a_wrong_value_in_any_output_is_noticed(name, operator, argument):
    def spoiled(called):
        def call(*arguments):
            result = dispatched(called)(*arguments)
            if called == operator:
                output = arguments[argument][0] if operator == "masked_adamw_" else arguments[argument]
                output.view(-1)[0] += 1
            return result

        return call

    with pytest.raises(ArithmeticError, match="differs from that of the reference"):
        check(BY_NAME[name], HERE, spoiled)


def patch_bytes(w, v):
    """Bytes of both sides, and of positions and values as docs/patch.md defines them."""
    changed = w != v
    blocks = changed.split(BLOCK)
    positions = sum(min(2 * int(block.sum()), (len(block) + 7) // 8) for block in blocks)
    return 2 * 2 * len(w) + positions + 2 * int(changed.sum())


def step_bytes(recorder, weight_bytes, state_bytes):
    param, grad, mask, counts = (argument[0] for argument in recorder.arguments["masked_adamw_"][:4])
    assert param.numel() == grad.numel() == N
    assert 0.19 < int(counts[-1]) / N < 0.21
    return 3 * weight_bytes * N + 2 * state_bytes * int(counts[-1]) + len(mask)


COUNTED = {
    "delta of a bf16 pair": lambda recorder: 2 * 2 * N,
    "delta against three tables": lambda recorder: 2 * 2 * N,
    "overlap of two bf16 runs": lambda recorder: 3 * 2 * N,
    "quantile of bf16 and a mask": lambda recorder: 2 * N + (N + 7) // 8,
    "gather of a bf16 pair": lambda recorder: patch_bytes(*recorder.arguments["patch_gather_"][:2]),
    "scatter of a bf16 pair": lambda recorder: patch_bytes(
        recorder.arguments["patch_scatter_"][0], recorder.arguments["patch_scatter_"][5]
    ),
    "AdamW step of bf16, exact, 20 % active": lambda recorder: step_bytes(recorder, 2, 4 + 4 + 2),
    "AdamW step of fp32, 20 % active": lambda recorder: step_bytes(recorder, 4, 4 + 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_tensors(name):
    recorder = Recorder()
    timed = BY_NAME[name].make(N, HERE)
    timed.call(recorder)
    assert BY_NAME[name].unit == "bytes"
    assert timed.work == COUNTED[name](recorder)
    assert timed.size == "70,001 coordinates"


def test_operations_are_those_of_the_products():
    recorder = Recorder()
    timed = BY_NAME["gram of a bf16 pair"].make(N, HERE)
    timed.call(recorder)
    rows, columns = recorder.arguments["gram_"][0].shape
    entries = columns * (columns + 1) / 2 * 2 + columns**2  # of two triangles with their diagonals and a full matrix
    assert timed.work == pytest.approx(2 * rows * entries, rel=1 / columns)
    for name in ("reverse KL and its gradients", "JSD and its gradients"):
        timed = BY_NAME[name].make(1 << 20, HERE)
        timed.call(recorder)
        (hidden, weight), (teacher_hidden, teacher_weight) = recorder.arguments["divergence_scan"][:2]
        logits = 2 * len(hidden) * len(weight) * hidden.shape[1]
        teacher_logits = 2 * len(teacher_hidden) * len(teacher_weight) * teacher_hidden.shape[1]
        assert timed.work == 3 * logits + teacher_logits  # two more products for the gradients
        assert timed.size == f"{len(hidden)} tokens, {len(weight):,} ids"


@pytest.mark.parametrize("n", [1, 31, 2048, 70_001])
def test_packed_masks_are_those_of_the_package(n):
    flags = workloads.random_flags(n, HERE, 0.3)
    mask = Mask.from_bool(flags)
    assert torch.equal(workloads.pack(flags), mask.bitmap)
    assert torch.equal(workloads.block_counts(flags), mask.block_counts)


def test_plain_counts_and_tables_equal_the_kernel():
    w, v = workloads.make_inputs(N, HERE)
    tally = delta(w, v)
    counts = [float(value) for value in eager.eager_counts(w, v)]
    assert counts[5] == tally.bit_equal
    assert counts[4] == tally.max_delta
    assert counts[6:] == [float(value) for pair in zip(tally.lt, tally.le, strict=True) for value in pair]
    tables = (tally.hist_base, tally.hist_delta, tally.hist_base_over[0])
    for histogram, table in zip(eager.eager_tables(w, v), tables, strict=True):
        assert histogram.tolist() == table.tolist()


def test_plain_overlap_equals_the_kernel():
    w, a, b = workloads.make_inputs(N, HERE, runs=2)
    counts = overlap(w, [a, b])
    both, in_a, in_b, hist, hist_a, hist_b = eager.eager_overlap(w, a, b)
    assert (int(both), int(in_a), int(in_b)) == (counts.n_both(0, 1), counts.n_changed(0), counts.n_changed(1))
    assert hist.tolist() == counts.hist_base.tolist()
    assert [hist_a.tolist(), hist_b.tolist()] == counts.hist_changed.tolist()


def test_plain_quantile_equals_the_kernel():
    values, flags = workloads.make_inputs(N, HERE)[0], workloads.random_flags(N, HERE, 0.5)
    ranks = [N // 20, N // 5]
    expected = quantiles(values, ranks, mask=workloads.pack(flags))
    results = eager.eager_quantile(values, ranks, flags)
    assert [float(t) for t in results[::2]] == [quantile.threshold for quantile in expected]
    assert [int(n) for n in results[1::2]] == [quantile.above_masked for quantile in expected]
    magnitudes = values.abs()
    assert eager.thresholds_by_sort(magnitudes, ranks) == eager.thresholds_by_topk(magnitudes, ranks)


def test_plain_patch_equals_the_kernel():
    recorder = Recorder()
    out, _ = BY_NAME["scatter of a bf16 pair"].make(N, HERE).call(recorder)
    w, values = recorder.arguments["patch_scatter_"][0], recorder.arguments["patch_scatter_"][3]
    indices, gathered = eager.eager_gather(w, out)
    assert torch.equal(gathered, values)
    assert torch.equal(eager.eager_scatter(w, indices.long(), values), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_steps_equal_the_kernel(dtype):
    """Up to the order of operations; the kernel's state is that of the first step, too."""
    name = "AdamW step of fp32, 20 % active" if dtype == torch.float32 else "AdamW step of bf16, exact, 20 % active"
    param, grad = workloads.make_inputs(N, HERE, dtype)
    active = workloads.random_flags(N, HERE, workloads.ACTIVE)
    stepped = BY_NAME[name].make(N, HERE).call(dispatched)[0]
    fused, formula = param.clone(), param.clone()
    eager.fused_step(fused, grad, active)()
    eager.formula_step(formula, grad, active, torch.zeros(N), torch.zeros(N))
    assert not torch.equal(stepped, param)
    for result in (fused, formula):
        assert torch.equal(result[~active], param[~active])
        torch.testing.assert_close(result, stepped, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-9)


def test_steps_are_reset():
    timed = BY_NAME["AdamW step of bf16, exact, 20 % active"].make(4096, HERE)
    first = [output.clone() for output in timed.call(dispatched)]
    timed.reset()
    assert all(torch.equal(a, b) for a, b in zip(timed.call(dispatched), first, strict=True))


def test_plain_gram_equals_the_kernel():
    timed = BY_NAME["gram of a bf16 pair"].make(N, HERE)
    (grams,) = timed.call(dispatched)
    assert agree("gram", grams, torch.stack(timed.eager()))
    assert not agree("gram", symmetric(grams) * 1.001, torch.stack(timed.eager()))


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["reverse KL and its gradients", "JSD and its gradients"])
def test_plain_gradients_equal_the_kernel(name, products, monkeypatch):
    monkeypatch.setenv("OPDKERNELS_CPU_PRODUCTS", products)
    timed = BY_NAME[name].make(1 << 14, HERE)
    for gradient, expected in zip(timed.call(dispatched), timed.eager(), strict=True):
        assert gradient.dtype == expected.dtype
        error = (gradient.float() - expected.float()).norm() / expected.float().norm()
        assert error <= (0.05 if products == "bfloat16" else 0.005)  # logits in bf16 are rounded


def test_inputs_are_mostly_unchanged():
    w, v = workloads.make_inputs(N, HERE)
    assert 0.7 < float((w == v).float().mean()) < 0.9
    assert delta(w, v) != Tally.empty()
