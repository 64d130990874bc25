"""`divergence` in Triton's interpreter: losses and gradients at most twice as far from fp64 as through full logits in
fp32."""

from __future__ import annotations

import math

import pytest
import torch

from opdkernels.ops import divergence as ops
from opdkernels.ops.divergence import KINDS, Divergence, LMHead, linear_divergence
from opdkernels.ops.divergence import triton as kernels
from tests.ops.conformance import backend_kernel, check_case
from tests.ops.divergence.cases import FAMILY
from tests.ops.divergence.test_divergence import (
    BF16,
    CONFIDENT,
    FP16,
    FP32,
    NAMES,
    SPECS,
    assert_bucket,
    assert_confident_jsd,
    assert_log_prob,
    assert_twice_plain,
    leaves_of,
    make_case,
)


@pytest.fixture(autouse=True)
def through_triton(monkeypatch):
    monkeypatch.setattr(ops, "operator", lambda name, student: getattr(kernels, name))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The interpreter's time grows with programs and steps, not with elements."""
    monkeypatch.setattr(kernels, "COLUMNS", 256)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_every_kind(spec):
    """With cap, scale, bias, temperature and unlike widths that are not whole tiles."""
    assert_twice_plain(make_case(n=9, vocab=300, width=20, dtype=FP32), spec)


@pytest.mark.parametrize(("beta", "spread"), CONFIDENT)
def test_jsd_of_sides_sure_of_different_ids_is_within_twice_plain(beta, spread):
    assert_confident_jsd(beta, spread)


@pytest.mark.parametrize("case", FAMILY.collect((0, 1, 31, 1025)), ids=str)
def test_operators_match_reference(case):
    check_case(case, backend_kernel("triton"))


HALVES = [
    *((kind, BF16, 64) for kind in ("forward_kl", "reverse_kl", "jsd", "sampled_reverse_kl", "topk_reverse_kl")),
    ("reverse_kl", BF16, 40),
    ("reverse_kl", FP16, 64),
    ("forward_kl", FP16, 40),
]


@pytest.mark.parametrize(("kind", "dtype", "width"), HALVES, ids=str)
def test_half_precision(kind, dtype, width):
    """The gradient of the logits is rounded to bf16 where everything is: still within twice."""
    spec = Divergence(kind, k=4 if kind.startswith("topk") else 0)
    assert_twice_plain(
        make_case(
            n=40, vocab=520, width=width, teacher_width=width, dtype=dtype, spread=4, shaped=False, bias=dtype == FP16
        ),
        spec,
    )


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (7, 31), (130, 65), (2, 1025), (0, 31)])
def test_sizes(n, vocab):
    for spec in (Divergence("total_variation"), Divergence("topk_forward_kl", k=5)):
        assert_twice_plain(make_case(n=n, vocab=vocab, width=16, dtype=FP32), spec)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_linear_log_prob_error_is_at_most_twice_that_of_full_logits(dtype):
    assert_log_prob(make_case(n=9, vocab=300, width=40, dtype=dtype))


@pytest.mark.parametrize("numbers", [1, 5 * 64, 5 * 192])
def test_vocabulary_chunks_are_merged(monkeypatch, numbers):
    """Chunks of one tile, and of several tiles."""
    monkeypatch.setattr(kernels, "COLUMNS", 64)
    monkeypatch.setattr(kernels, "LEAST_COLUMNS", 64)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", kernels.BYTES_AN_ID * numbers)
    for spec in (Divergence("jsd"), Divergence("topk_reverse_kl", k=6)):
        assert_twice_plain(make_case(n=5, vocab=700, width=16, dtype=FP32), spec)


def test_scores_match_reference(monkeypatch):
    hidden, head, teacher, teacher_head, tokens = make_case(n=20, vocab=300, width=16, dtype=FP32)

    def score(spec):
        return linear_divergence(hidden, head, teacher, teacher_head, spec, tokens=tokens, scores=True)[1]

    specs = Divergence("reverse_kl", k=6), Divergence("topk_reverse_kl", k=3)
    result = [score(spec) for spec in specs]
    monkeypatch.setattr(ops, "operator", lambda name, student: getattr(torch.ops.opdkernels, name))
    for ours, spec in zip(result, specs, strict=True):
        for name, a, b in zip(ours._fields, ours, score(spec), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_underflow_and_masked_ids_match_reference(monkeypatch, kind):
    rows = [[-math.inf, 0, 1, 2], [1e4, -9e3, 0, 0], [200, 0, 0, -150], [3, 2, 1, 0], [-9e3, 1e4, 5, 5]]
    hidden, masked = torch.tensor([[max(x, -2e4) for x in row] for row in rows]), torch.tensor([0.0, 0, 0, -math.inf])
    result = {}
    for name in ("triton", "reference"):
        leaves = leaves_of(hidden.detach().clone(), LMHead(torch.eye(4), torch.zeros(4)))
        loss = linear_divergence(
            leaves[0],
            LMHead(*leaves[1:]),
            hidden.flip(0).detach(),
            LMHead(torch.eye(4), masked),
            Divergence(kind),
            reduction="none",
        )
        result[name] = [loss, *torch.autograd.grad(loss.sum(), leaves)]
        monkeypatch.setattr(ops, "operator", lambda name, student: getattr(torch.ops.opdkernels, name))
    for a, b in zip(*result.values(), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_token():
    hidden, head, teacher, teacher_head, _ = make_case(n=5, width=16, dtype=FP32)
    teacher[2] = math.nan
    for kind in KINDS[:4]:
        loss = linear_divergence(hidden, head, teacher, teacher_head, Divergence(kind), reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False, False]
    hidden = hidden.detach().clone()
    hidden[2] = math.nan
    loss = linear_divergence(hidden.requires_grad_(), head, teacher.nan_to_num(), teacher_head, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert grad.isnan().all(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("gap", [2.0, 16.0, 60.0])
@pytest.mark.parametrize("kind", ["topk_forward_kl", "topk_reverse_kl"])
def test_tail_of_confident_student_has_its_gradient(monkeypatch, kind, gap):
    monkeypatch.setattr(kernels, "COLUMNS", 16)
    monkeypatch.setattr(kernels, "LEAST_COLUMNS", 16)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", kernels.BYTES_AN_ID * 6 * 16)
    assert_bucket(kind, FP32, gap, whole_logits=False)


def test_logits_at_ids_come_from_the_summed_products():
    """No log-probability of a confident token is above 0 by more than its rounding, whatever the width."""
    hidden, head, *_ = make_case(n=8, vocab=300, width=1024, dtype=FP32, spread=8, shaped=False)
    tokens = (hidden @ head.weight.T + head.bias).argmax(1)
    assert ops.linear_log_prob(hidden, head, tokens).max() <= 1e-7
    assert_log_prob((hidden, head, None, None, tokens))


def test_total_variation_gradient_of_nan_teacher_is_nan():
    hidden, head, teacher, teacher_head, _ = make_case(n=5, width=16, dtype=FP32)
    teacher[1] = math.nan
    leaf = hidden.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_divergence(leaf, head, teacher, teacher_head, Divergence("total_variation"), reduction="sum"), leaf
    )
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [1]


def test_autocast_does_not_round_products():
    hidden, head, teacher, teacher_head, _ = make_case(n=5, vocab=300, width=16, dtype=FP32)
    result = []
    for enabled in (False, True):
        leaf = hidden.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            loss = linear_divergence(leaf, head, teacher, teacher_head)
            loss.backward()
        result.append((loss.detach(), leaf.grad))
    assert result[0][0] == result[1][0]
    assert torch.equal(result[0][1], result[1][1])


def test_tokens_outside_vocabulary_give_nan():
    hidden, head, teacher, teacher_head, tokens = make_case(vocab=30, width=16, dtype=FP32)
    tokens[1], tokens[2] = 30, -1
    loss = linear_divergence(
        hidden, head, teacher, teacher_head, Divergence("sampled_reverse_kl"), tokens=tokens, reduction="none"
    )
    assert loss.isnan().nonzero().flatten().tolist() == [1, 2]


def test_only_needed_products_are_computed(monkeypatch):
    hidden, head, teacher, teacher_head, _ = make_case(vocab=300, width=16, dtype=FP32)
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 1)  # one tile per chunk
    plain, shapes = kernels.product, []
    monkeypatch.setattr(kernels, "product", lambda a, b: (shapes.append((*a.shape, b.shape[1])), plain(a, b))[1])
    linear_divergence(hidden.requires_grad_(), head, teacher, teacher_head).backward()
    n, width = hidden.shape
    forward = [(n, side.shape[1], size) for side in (hidden, teacher) for size in (256, 44)]
    assert sorted(shapes) == sorted([*forward, *forward, (n, 256, width), (n, 44, width)])
