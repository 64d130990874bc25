"""`divergence` and `linear_divergence` against an oracle in fp64, and what training relies on: gradients, memory,
limits, refusals."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opdkernels.errors import UsageError
from opdkernels.ops import divergence as ops
from opdkernels.ops.divergence import KINDS, Divergence, LMHead, divergence, linear_divergence, linear_log_prob, tiles

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SPECS = [
    *(Divergence(kind, k=4 if kind.startswith("topk") else 0) for kind in KINDS),
    Divergence("jsd", beta=0.2, temperature=1.7),
    Divergence("jsd", beta=0.0),
    Divergence("jsd", beta=1.0),
    Divergence("topk_forward_kl", k=3, tail=False),
    Divergence("reverse_kl", temperature=0.5),
    Divergence("topk_reverse_kl", k=100),
]
NAMES = [f"{s.kind}-{s.beta}-{s.k}-{s.tail}-{s.temperature}" for s in SPECS]


def oracle(spec: Divergence, student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Per token, from fp64 logits [N, V], directly from the probabilities."""
    lq, lp = (x / spec.temperature - (x / spec.temperature).logsumexp(1, keepdim=True) for x in (student, teacher))
    q, p = lq.exp(), lp.exp()
    rows = torch.arange(len(q))
    forward, reverse = (p * (lp - lq)).sum(1), (q * (lq - lp)).sum(1)
    if spec.kind == "forward_kl" or (spec.kind == "jsd" and spec.beta == 0):
        return forward
    if spec.kind == "reverse_kl" or (spec.kind == "jsd" and spec.beta == 1):
        return reverse
    if spec.kind == "jsd":
        lm = torch.logaddexp(math.log(spec.beta) + lp, math.log(1 - spec.beta) + lq)
        return spec.beta * (p * (lp - lm)).sum(1) + (1 - spec.beta) * (q * (lq - lm)).sum(1)
    if spec.kind == "total_variation":
        return (p - q).abs().sum(1) / 2
    if spec.sampled:
        a, b = lq[rows, tokens], lp[rows, tokens]
        return (a - b).detach() * a if spec.kind == "sampled_reverse_kl" else (a - b) ** 2 / 2
    chosen = torch.zeros_like(q, dtype=torch.bool).scatter(
        1, (p if "forward" in spec.kind else q).topk(min(spec.k, q.shape[1]), 1).indices, True
    )
    buckets = [torch.cat([x.masked_fill(~chosen, 0), x.masked_fill(chosen, 0).sum(1, keepdim=True)], 1) for x in (q, p)]
    q, p = (x if spec.tail else x[:, :-1] for x in buckets)
    mine, other = (p, q) if "forward" in spec.kind else (q, p)
    return torch.where(mine > 0, mine * (mine.clamp(min=1e-300).log() - other.clamp(min=1e-300).log()), 0).sum(1)


def make_case(n=7, vocab=33, width=5, dtype=FP64, *, teacher_width=None, bias=True, spread=1.0, seed=0, shaped=True):
    """Hidden states and heads, the student's first, with what every option does."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=FP64).to(dtype)

    sides = []
    for w in (width, teacher_width or width + 3):
        weight = (random(vocab, w).double() * spread / math.sqrt(w)).to(dtype)
        head = LMHead(weight, random(vocab) if bias else None, *((0.8, 6.0) if shaped else (1.0, 0.0)))
        sides += [random(n, w), head]
    return (*sides, torch.randint(vocab, (n,), generator=generator))


def leaves_of(hidden: torch.Tensor, head: LMHead) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in (hidden, head.weight, head.bias) if t is not None]


def logits_in(dtype, hidden, head):
    x = hidden.to(dtype) @ head.weight.to(dtype).T
    x = head.scale * (x if head.bias is None else x + head.bias.to(dtype))
    return head.softcap * torch.tanh(x / head.softcap) if head.softcap else x


def expected(case, spec, dtype=FP64, weights=1.0):
    """Losses and gradients of their weighted sum, through full logits in a dtype: in fp64 by the oracle, unrounded."""
    hidden, head, teacher, teacher_head, tokens = case
    leaves = [
        t.detach().to(FP64 if dtype == FP64 else t.dtype).requires_grad_()
        for t in (hidden, head.weight, head.bias)
        if t is not None
    ]
    mine = LMHead(leaves[1], leaves[2] if len(leaves) > 2 else None, head.scale, head.softcap)
    logits = logits_in(dtype, leaves[0], mine), logits_in(dtype, teacher, teacher_head).detach()
    loss = oracle(spec, *logits, tokens) if dtype == FP64 else divergence(*logits, spec, tokens=tokens)
    return loss, torch.autograd.grad((loss * weights).sum(), leaves)


def found_by(case, spec, **options):
    hidden, head, teacher, teacher_head, tokens = case
    leaves = leaves_of(hidden, head)
    loss = linear_divergence(hidden, head, teacher, teacher_head, spec, tokens=tokens, reduction="none", **options)
    return loss, leaves


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm())


def assert_twice_plain(case, spec, losses=True):
    """Losses and gradients are at most twice as far from fp64 as those through full logits in fp32; a millionth where
    these are exact."""
    exact, exact_grads = expected(case, spec)
    plain, plain_grads = expected(case, spec, FP32)
    loss, leaves = found_by(case, spec)
    grads = torch.autograd.grad(loss.sum(), leaves)
    if losses and spec.code != ops.AT_IDS:
        assert error(loss, exact) <= 2 * error(plain, exact) + 1e-6 * (
            math.sqrt(len(loss)) + float(exact.detach().norm())
        )
    for result, full, best in zip(grads, plain_grads, exact_grads, strict=True):
        assert result.dtype == full.dtype
        assert error(result, best) <= 2 * error(full, best) + 1e-6 * max(1, float(best.norm()))


CONFIDENT = [(0.5, 100.0), (0.3, 300.0), (0.5, 300.0), (0.7, 1000.0), (0.5, 3000.0)]  # beta, scale of the logits


def assert_confident_jsd(beta, spread):
    """Both sides are sure of different ids, so that the true gradient is far below the rounding of log(q / m): it is at
    most twice as far from fp64 as through full logits in fp32, without an allowance for small numbers, and over several
    draws closer."""
    total = total_plain = 0.0
    for seed in range(3):
        case = make_case(n=12, vocab=300, width=16, dtype=FP32, spread=spread, shaped=False, seed=seed)
        spec = Divergence("jsd", beta=beta)
        exact, exact_grads = expected(case, spec)
        plain, plain_grads = expected(case, spec, FP32)
        loss, leaves = found_by(case, spec)
        assert exact.isfinite().all()
        assert error(loss, exact) <= 2 * error(plain, exact) + 1e-7
        for result, full, best in zip(torch.autograd.grad(loss.sum(), leaves), plain_grads, exact_grads, strict=True):
            assert error(result, best) <= 2 * error(full, best) + 1e-9 * float(best.norm())
            total, total_plain = total + error(result, best), total_plain + error(full, best)
    assert total < total_plain / 2


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, with an odd last one, of few ids."""
    monkeypatch.setattr(tiles, "TILE", 16)
    monkeypatch.setattr(tiles, "ROWS", 3)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_definition_matches_oracle(spec):
    hidden, head, teacher, teacher_head, tokens = make_case(n=20)
    student, teacher = logits_in(FP64, hidden, head).requires_grad_(), logits_in(FP64, teacher, teacher_head)
    loss, exact = divergence(student, teacher, spec, tokens=tokens), oracle(spec, student, teacher, tokens)
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 2, len(loss), dtype=FP64)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), student) for x in (loss, exact)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_gradient_of_definition_matches_finite_differences(spec):
    """Compared with finite differences, except the policy gradient, whose loss is no divergence."""
    hidden, head, teacher, teacher_head, tokens = make_case(n=3)
    student, teacher = logits_in(FP64, hidden, head).requires_grad_(), logits_in(FP64, teacher, teacher_head)
    if spec.kind != "sampled_reverse_kl":
        assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, spec, tokens=tokens), student)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_divergence_matches_definition(spec, bias):
    """Every kind and option, in fp64: cap, scale, bias, temperature, unlike widths, odd tiles, weights of either
    sign."""
    case = make_case(n=8, vocab=37, bias=bias)
    weights = torch.linspace(-1, 2, 8, dtype=FP64)
    exact, exact_grads = expected(case, spec, weights=weights)
    loss, leaves = found_by(case, spec, weights=weights)
    torch.testing.assert_close(loss, exact * weights, rtol=1e-9, atol=1e-9)
    for result, best in zip(torch.autograd.grad(loss.sum(), leaves), exact_grads, strict=True):
        torch.testing.assert_close(result, best, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "topk_reverse_kl", "sampled_reverse_kl_k2"])
def test_linear_divergence_gradcheck(kind):
    hidden, head, teacher, teacher_head, tokens = make_case(n=3, vocab=19, width=3)
    spec = Divergence(kind, k=3 if "topk" in kind else 0)

    def loss(hidden, weight, bias):
        return linear_divergence(
            hidden, LMHead(weight, bias, head.scale, head.softcap), teacher, teacher_head, spec, tokens=tokens
        )

    assert torch.autograd.gradcheck(loss, leaves_of(hidden, head))


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_error_is_at_most_twice_that_of_full_logits(spec, dtype):
    assert_twice_plain(
        make_case(n=40, vocab=1025, width=64, dtype=dtype, spread=4, shaped=False, bias=dtype != BF16), spec
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("beta", "spread"), CONFIDENT)
def test_jsd_of_sides_sure_of_different_ids_is_within_twice_plain(beta, spread):
    assert_confident_jsd(beta, spread)


def assert_log_prob(case, temperature=1.0):
    """Log-probabilities of tokens, and their gradients, are at most twice as far from fp64 as those through full logits
    in fp32."""
    hidden, head, _, _, tokens = case
    weights = torch.linspace(-1, 2, len(tokens), dtype=FP64)

    def through_logits(dtype):
        leaves = [
            t.detach().to(FP64 if dtype == FP64 else t.dtype).requires_grad_()
            for t in (hidden, head.weight, head.bias)
            if t is not None
        ]
        mine = LMHead(leaves[1], leaves[2] if len(leaves) > 2 else None, head.scale, head.softcap)
        result = (
            (logits_in(dtype, leaves[0], mine) / temperature)[:, : head.vocab]
            .log_softmax(1)
            .gather(1, tokens[:, None])
            .squeeze(1)
        )
        return result, *torch.autograd.grad((result * weights).sum(), leaves)

    leaves = leaves_of(hidden, head)
    result = linear_log_prob(hidden, head, tokens, temperature=temperature)
    grads = torch.autograd.grad((result * weights).sum(), leaves)
    for ours, full, best in zip(
        (result, *grads), through_logits(FP32 if hidden.dtype != FP64 else FP64), through_logits(FP64), strict=True
    ):
        assert ours.dtype == full.dtype
        assert error(ours, best) <= 2 * error(full, best) + 1e-6 * max(1, float(best.detach().norm()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_log_prob_error_is_at_most_twice_that_of_full_logits(dtype, temperature):
    assert_log_prob(make_case(n=8, vocab=37, bias=True, dtype=dtype), temperature)
    hidden, head, teacher, teacher_head, tokens = make_case(n=8, vocab=37, dtype=dtype)
    assert_log_prob((hidden, LMHead(head.weight, vocab=30), teacher, teacher_head, tokens % 30), temperature)


def test_linear_log_prob_shapes():
    hidden, head, _, _, tokens = make_case(n=6, vocab=9, dtype=FP32)
    flat = linear_log_prob(hidden, head, tokens)
    torch.testing.assert_close(linear_log_prob(hidden.view(2, 3, -1), head, tokens.view(2, 3)), flat.view(2, 3))
    assert linear_log_prob(hidden[:0], head, tokens[:0]).shape == (0,)
    assert linear_log_prob(hidden[:1], head, torch.tensor([9])).isnan().all()
    with pytest.raises(ValueError, match="tokens are"):
        linear_log_prob(hidden, head, tokens[:2])
    with pytest.raises(ValueError, match="their last sizes must be equal"):
        linear_log_prob(hidden[:, :2], head, tokens)


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (7, 31), (513, 33), (1025, 8), (2, 4097), (0, 31)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "total_variation", "topk_forward_kl"])
def test_sizes(n, vocab, kind):
    spec = Divergence(kind, k=5 if kind.startswith("topk") else 0)
    assert_twice_plain(make_case(n=n, vocab=vocab, width=8, dtype=FP32), spec)


def test_tile_sizes_change_only_rounding(monkeypatch):
    case, result = make_case(n=9, vocab=301, width=16, dtype=FP32), []
    for width, rows in ((301, 9), (300, 4), (64, 2), (7, 1)):
        monkeypatch.setattr(tiles, "TILE", width)
        monkeypatch.setattr(tiles, "ROWS", rows)
        loss, leaves = found_by(case, Divergence("jsd"))
        result.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for other in result[1:]:
        for a, b in zip(other, result[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
def test_scores_match_full_logits():
    hidden, head, teacher, teacher_head, tokens = make_case(n=9, vocab=40)
    for spec in (Divergence("reverse_kl", k=6), Divergence("topk_reverse_kl", k=6)):
        _, scores = linear_divergence(hidden, head, teacher, teacher_head, spec, tokens=tokens, scores=True)
        lq, lp = (logits_in(FP64, x, h).log_softmax(1) for x, h in ((hidden, head), (teacher, teacher_head)))
        ids = (lp if spec.kind == "reverse_kl" else lq).topk(6, 1).indices
        rows = torch.arange(9)
        truth = (
            oracle(spec, lq, lp, tokens),
            (lp.exp() * (lp - lq)).sum(1),
            (lq.exp() * (lq - lp)).sum(1),
            -(lq.exp() * lq).sum(1),
            -(lp.exp() * lp).sum(1),
            (lq.argmax(1) == lp.argmax(1)).double(),
            lq[rows, tokens],
            lp[rows, tokens],
            lq.exp().gather(1, ids).sum(1),
            lp.exp().gather(1, ids).sum(1),
        )
        for name, a, b in zip(scores._fields, scores, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
            assert not a.requires_grad
    _, bare = linear_divergence(hidden, head, teacher, teacher_head, scores=True)
    assert bare.student_logp is bare.teacher_logp is bare.student_mass is bare.teacher_mass is None


def estimator_gradient(loss_of, student, lp):
    """Expectation over the student's own tokens, every one of them, of the gradient of a loss of log q_a and log
    p_a."""
    total = torch.zeros_like(student)
    q = student.detach().log_softmax(-1).exp()
    for a in range(len(student)):
        x = student.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(x, a), x)
        total += q[a] * grad
    return total


def test_estimators_have_their_documented_expected_gradient():
    """A vocabulary of 11 is enumerated; docs/divergence.md has the table."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 11, generator=generator, dtype=FP64)
    lp = teacher.log_softmax(-1)
    gradients = {"nothing": torch.zeros(11, dtype=FP64)}
    for kind in ("forward_kl", "reverse_kl"):
        x = student.clone().requires_grad_()
        (gradients[kind],) = torch.autograd.grad(divergence(x, teacher, Divergence(kind)), x)

    def ratio(x, a):
        return x.log_softmax(-1)[a] - lp[a]

    def sampled(kind):
        return lambda x, a: divergence(x, teacher, Divergence(kind), tokens=torch.tensor(a))

    estimators = {
        **{kind: sampled(kind) for kind in ("sampled_reverse_kl", "sampled_reverse_kl_k2")},
        "k1": ratio,
        "k3": lambda x, a: torch.expm1(-ratio(x, a)) + ratio(x, a),
        "|k1|": lambda x, a: ratio(x, a).abs(),
    }
    table = {}
    for name, loss_of in estimators.items():
        result = estimator_gradient(loss_of, student, lp)
        table[name] = [which for which, gradient in gradients.items() if torch.allclose(result, gradient, atol=1e-12)]
    print("\n".join(f"{name}: {', '.join(which) or 'neither'}" for name, which in table.items()))
    assert table == {
        "sampled_reverse_kl": ["reverse_kl"],
        "sampled_reverse_kl_k2": ["reverse_kl"],
        "k1": ["nothing"],
        "k3": ["forward_kl"],
        "|k1|": [],
    }


def test_tail_prevents_decreasing_reverse_kl():
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]], dtype=FP64)
    losses = []
    for away in (0.0, 3.0, 6.0):  # the student moves its mass to an id outside its k argmax_ids of before
        both = [x.log_softmax(1) for x in (teacher + torch.tensor([[0, 0, 0, 0, away]], dtype=FP64), teacher)]
        (lq, lp), rest = [x[:, :2] for x in both], [x[:, 2:].logsumexp(1) for x in both]
        losses.append(
            ((lq.exp() * (lq - lp)).sum(), ops.loss_at_ids(Divergence("topk_reverse_kl", k=2), lq, lp, *rest).sum())
        )
    truncated, full = zip(*losses, strict=True)
    assert min(truncated) < 0
    assert full[0] < full[1] < full[2]


@pytest.mark.parametrize("k", [1, 3, 40])
def test_topk_with_tail_is_bounded_by_full_divergence(k):
    hidden, head, teacher, teacher_head, _ = make_case(n=30, vocab=40)
    student, teacher = logits_in(FP64, hidden, head), logits_in(FP64, teacher, teacher_head)
    for kind, of in (("topk_forward_kl", "forward_kl"), ("topk_reverse_kl", "reverse_kl")):
        part, all_of_it = (
            divergence(student, teacher, Divergence(kind, k=k)),
            divergence(student, teacher, Divergence(of)),
        )
        assert (part >= -1e-12).all()
        assert (part <= all_of_it + 1e-12).all()
        if k == 40:
            torch.testing.assert_close(part, all_of_it, rtol=1e-6, atol=1e-9)


def test_jsd_is_discontinuous_at_its_ends():
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]], dtype=FP64), torch.tensor([[2.0, 0.0, 0.0]], dtype=FP64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            b: float(divergence(student, teacher, Divergence("jsd", beta=b))) for b in (0, 1e-3, 0.5, 1 - 1e-3, 1)
        }
    assert values[0] == float(divergence(student, teacher, Divergence("forward_kl")))
    assert values[1] == float(divergence(student, teacher, Divergence("reverse_kl")))
    assert values[1e-3] < 0.01 * values[0]
    assert values[1 - 1e-3] < 0.01 * values[1]
    for b in (0.01, 0.99):
        with pytest.warns(UserWarning, match="close to 0 for any two models"):
            Divergence("jsd", beta=b)


IDENTITY = LMHead(torch.eye(4))


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([0, 0, 0, 0], [-math.inf, 0, 1, 2]),  # only the student allows an id
        ([-math.inf, 0, 1, 2], [0, 0, 0, 0]),
        ([-math.inf, 0, 1, 2], [-math.inf, 2, 1, 0]),  # neither does
        ([1e4, -1e4, 0, 0], [-1e4, 1e4, 0, 0]),
        ([200, 0, 0, -150], [200, 0, -150, 0]),  # probabilities of both underflow
        ([1e4, 1e4 - 1, 0, 0], [1e4 - 1, 1e4, 0, 0]),
        ([3, 2, 1, 0], [3, 2, 1, 0]),
    ],
)
def test_finite_logits_never_give_nan(kind, student, teacher):
    """From a head whose bias is the logits; the definition and the tiles agree where log-probabilities do not fit
    fp32's exponent."""
    student, teacher = (torch.tensor([x], dtype=FP32) for x in (student, teacher))
    bias, zero = student[0].clone().requires_grad_(), torch.zeros(1, 4, requires_grad=True)
    loss = linear_divergence(
        zero,
        LMHead(torch.eye(4), bias),
        zero.detach(),
        LMHead(torch.eye(4), teacher[0]),
        Divergence(kind),
        reduction="none",
    )
    by_logits = divergence(student.requires_grad_(), teacher, Divergence(kind))
    grads = torch.autograd.grad(loss.sum(), (zero, bias)) + torch.autograd.grad(by_logits.sum(), student)
    assert all(g.isfinite().all() for g in (loss, by_logits, *grads))
    torch.testing.assert_close(loss, by_logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[2][0], rtol=1e-4, atol=1e-6)


def test_reverse_kl_of_masked_teacher_id_is_finite():
    loss = divergence(torch.zeros(1, 4), torch.tensor([[-math.inf, 0, 0, 0]]), Divergence("reverse_kl"))
    assert 2000 < float(loss) < 3000  # a quarter of 1e4 nats


def test_nan_stays_in_its_token():
    hidden, head, teacher, teacher_head, tokens = make_case(n=5, dtype=FP32)
    for side in (teacher, hidden):
        before = side[2].clone()
        side[2] = math.nan
        for kind in KINDS:
            spec = Divergence(kind, k=3 if "topk" in kind else 0)
            loss, scores = linear_divergence(
                hidden, head, teacher, teacher_head, spec, tokens=tokens, reduction="none", scores=True
            )
            assert loss.isnan().tolist() == scores.reverse_kl.isnan().tolist() == [False, False, True, False, False]
        assert linear_divergence(hidden, head, teacher, teacher_head).isnan()
        side[2] = before


def test_invalid_tokens_have_no_effect():
    hidden, head, teacher, teacher_head, tokens = (
        t.reshape(3, 4, -1) if i in (0, 2) else t for i, t in enumerate(make_case(n=12))
    )
    tokens, weights = tokens.reshape(3, 4), torch.linspace(0.5, 2, 12, dtype=FP64).reshape(3, 4)
    valid = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1]).bool().reshape(3, 4)
    leaves = leaves_of(hidden, head)
    for kind in ("reverse_kl", "sampled_reverse_kl"):

        def call(valid, h, kind=kind, **o):
            return linear_divergence(
                h,
                head,
                teacher,
                teacher_head,
                Divergence(kind),
                tokens=tokens,
                valid=valid,
                weights=weights,
                **o,
            )

        each = call(None, hidden, reduction="none")
        some = call(valid, hidden.masked_fill(~valid[..., None], math.nan), reduction="none")
        assert some.shape == (3, 4)
        torch.testing.assert_close(some, each * valid, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(call(valid, hidden, reduction="sum"), some.sum())
        torch.testing.assert_close(call(valid, hidden), some.sum() / 7)
        for normalizer in (20, torch.tensor(20)):
            torch.testing.assert_close(call(valid, hidden, normalizer=normalizer), some.sum() / 20)
        for a, b in zip(
            *(torch.autograd.grad(x, leaves) for x in (call(valid, hidden), (each * valid).sum() / 7)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["jsd", "topk_forward_kl", "sampled_reverse_kl"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 4])
def test_loss_without_valid_tokens_is_zero_with_gradient(kind, reduction, n):
    hidden, head, teacher, teacher_head, tokens = make_case(n=n, dtype=FP32)
    leaves = leaves_of(hidden, head)
    spec = Divergence(kind, k=3 if "topk" in kind else 0)
    loss = linear_divergence(
        hidden,
        head,
        teacher,
        teacher_head,
        spec,
        tokens=tokens,
        valid=torch.zeros(n, dtype=torch.bool),
        reduction=reduction,
    )
    assert not loss.any()
    for grad, leaf in zip(torch.autograd.grad(loss.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_vocabulary_padding_has_no_probability():
    hidden, head, teacher, teacher_head, _ = make_case(n=5, vocab=30, bias=False)

    def padded(head, rows, vocab):
        return LMHead(
            torch.cat([head.weight, torch.full((rows, head.weight.shape[1]), 9.0, dtype=FP64)]),
            None,
            head.scale,
            head.softcap,
            vocab,
        )

    exact = linear_divergence(hidden, head, teacher, teacher_head)
    for student_rows, teacher_rows, vocabs in (
        (2, 2, (30, 30)),
        (0, 5, (30, None)),
        (3, 0, (None, 30)),
        (4, 7, (30, None)),
    ):
        one, other = padded(head, student_rows, vocabs[0]), padded(teacher_head, teacher_rows, vocabs[1])
        one.weight.requires_grad_()
        loss = linear_divergence(hidden, one, teacher, other)
        torch.testing.assert_close(loss, exact)
        (grad,) = torch.autograd.grad(loss, one.weight)
        assert grad[:30].any()
        assert not grad[30:].any()
    with pytest.raises(ValueError, match=r"head has 30 rows, the teacher's 33; set LMHead\.vocab"):
        linear_divergence(hidden, head, teacher, padded(teacher_head, 3, None))


def test_only_needed_gradients_are_computed(monkeypatch):
    hidden, head, teacher, teacher_head, _ = make_case()
    asked = []
    real = tiles.divergence_backward
    monkeypatch.setattr(tiles, "divergence_backward", lambda *a: (asked.append(a[-1]), real(*a))[1])
    for wanted in itertools.product((True, False), repeat=3):
        if not any(wanted):
            continue
        leaves = [
            t.detach().requires_grad_(want) for t, want in zip((hidden, head.weight, head.bias), wanted, strict=True)
        ]
        linear_divergence(leaves[0], LMHead(leaves[1], leaves[2]), teacher, teacher_head).backward()
        assert tuple(asked[-1]) == wanted
        assert [t.grad is not None for t in leaves] == list(wanted)
    with torch.no_grad():
        assert not linear_divergence(leaves[0], LMHead(leaves[1], leaves[2]), teacher, teacher_head).requires_grad


def test_teacher_has_no_gradient():
    hidden, head, teacher, _, _ = make_case(teacher_width=5)
    teacher.requires_grad_()
    weight = head.weight.requires_grad_()
    loss = linear_divergence(hidden, LMHead(weight), teacher, LMHead(weight))
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (apart,) = torch.autograd.grad(
        linear_divergence(hidden, LMHead(weight), teacher, LMHead(weight.detach().clone())), weight
    )
    assert torch.equal(grad, apart)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_strides_do_not_change_results():
    hidden, head, teacher, teacher_head, _ = make_case(n=12, dtype=FP32)
    expected_loss, grads = None, None
    for view in (lambda t: t, lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]):
        leaves = [view(t).detach().requires_grad_() for t in (hidden, head.weight)]
        loss = linear_divergence(leaves[0], LMHead(leaves[1]), view(teacher), LMHead(view(teacher_head.weight)))
        result = torch.autograd.grad(loss, leaves)
        if grads is None:
            expected_loss, grads = loss, result
        torch.testing.assert_close(loss, expected_loss)
        for a, b in zip(result, grads, strict=True):
            torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of an operator's output, except the gradients of weights."""

    def __init__(self, *spared):
        super().__init__()
        self.spared, self.most = spared, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and tuple(t.shape) not in self.spared:
                self.most = max(self.most, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_by_vocabulary_exists(kind):
    """In fp64 the reference runs, whose operations are visible here; the sizes are those of the other dtypes."""
    n, vocab, width = 600, 9000, 4
    hidden, head, teacher, teacher_head, tokens = make_case(n=n, vocab=vocab, width=width, bias=False)
    leaves = leaves_of(hidden, head)
    with Largest() as seen:
        linear_divergence(hidden, head, teacher, teacher_head, Divergence(kind, k=8), tokens=tokens, scores=True)[
            0
        ].backward()
    assert 0 < seen.most <= n * tiles.TILE < n * vocab / 2
    assert all(t.grad is not None for t in leaves)
    with Largest() as plain:
        divergence(logits_in(FP64, hidden, head), logits_in(FP64, teacher, teacher_head))
    assert plain.most >= n * vocab


def test_saved_tensors_are_a_few_values_per_token():
    hidden, head, teacher, teacher_head, _ = make_case(n=50, vocab=400, dtype=FP32)
    leaves_of(hidden, head)
    addresses = {
        t.data_ptr() for t in (hidden, head.weight, head.bias, teacher, teacher_head.weight, teacher_head.bias)
    }
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(0 if t.data_ptr() in addresses else t.numel()), t)[1], lambda t: t
    ):
        linear_divergence(hidden, head, teacher, teacher_head, Divergence("jsd"))
    assert 0 < sum(sizes) <= 8 * 50


def test_second_derivative_is_refused():
    hidden, head, teacher, teacher_head, _ = make_case()
    leaves = leaves_of(hidden, head)
    with pytest.raises(
        RuntimeError, match=r"no second derivative; drop create_graph=True, or use divergence, from logits"
    ):
        torch.autograd.grad(linear_divergence(hidden, head, teacher, teacher_head), leaves, create_graph=True)
    loss = divergence(logits_in(FP64, hidden, head), logits_in(FP64, teacher, teacher_head)).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.autograd.grad(grad.sum(), hidden)[0].any()


def test_ill_posed_divergences_are_refused():
    for call, message in (
        (lambda: Divergence("k1"), "kind k1 is refused: .* its expected gradient is 0; use sampled_reverse_kl"),
        (lambda: Divergence("sampled_reverse_kl_k3"), "gradient of the forward KL, not of the reverse; use"),
        (lambda: Divergence("kl"), "choose one of forward_kl, reverse_kl, jsd"),
        (lambda: Divergence("jsd", beta=1.5), "beta is 1.5; choose from 0"),
        (lambda: Divergence("topk_forward_kl"), "k is 0; topk_forward_kl takes 1 or more"),
        (lambda: Divergence(k=-1), "k is -1; reverse_kl takes 0 or more"),
        (lambda: Divergence("topk_reverse_kl", k=4, tail=False), "pass tail=True"),
        (lambda: Divergence(temperature=0), "temperature is 0; choose one above 0"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_invalid_arguments_are_named():
    hidden, head, teacher, teacher_head, tokens = make_case()

    def bad(**o):
        return linear_divergence(
            *[
                o.pop(k, v)
                for k, v in {"hidden": hidden, "head": head, "teacher": teacher, "teacher_head": teacher_head}.items()
            ],
            **o,
        )

    for call, kind, message in (
        (lambda: bad(hidden=hidden[:, :-1]), ValueError, "student_hidden is .* last sizes must be equal"),
        (lambda: bad(teacher=teacher[:-1]), ValueError, "score the same tokens"),
        (lambda: bad(head=LMHead(head.weight, head.bias[:-1])), ValueError, "the bias of student_head"),
        (lambda: bad(hidden=hidden.long()), TypeError, "must be floating"),
        (lambda: bad(valid=tokens), TypeError, "valid is torch.int64; pass bool"),
        (lambda: bad(valid=torch.ones(3).bool()), ValueError, "valid is"),
        (lambda: bad(weights=torch.ones(3)), ValueError, "weights is"),
        (lambda: bad(reduction="batchmean"), ValueError, "choose mean, sum or none"),
        (lambda: bad(spec=Divergence("sampled_reverse_kl")), ValueError, "needs the sampled tokens"),
        (lambda: bad(tokens=tokens.int()), ValueError, "pass int64"),
        (lambda: bad(tokens=tokens[:-1]), ValueError, "pass int64"),
        (lambda: divergence(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "cut both to one vocabulary"),
        (
            lambda: divergence(torch.zeros(2, 3), torch.zeros(2, 3), Divergence("sampled_reverse_kl")),
            ValueError,
            "needs the sampled tokens",
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_token_outside_vocabulary_gives_nan():
    hidden, head, teacher, teacher_head, tokens = make_case(vocab=30)
    tokens[1] = 30
    loss = linear_divergence(
        hidden, head, teacher, teacher_head, Divergence("sampled_reverse_kl"), tokens=tokens, reduction="none"
    )
    assert loss.isnan().nonzero().tolist() == [[1]]


def bucketed(z: torch.Tensor, u: torch.Tensor, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """A top-k divergence in fp64 whose tail is computed as a sum."""
    (lq, lp), inside = (
        (x.double().log_softmax(1) for x in (z, u)),
        torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True),
    )
    lq, lp = (
        torch.cat([x.gather(1, ids), x.masked_fill(inside, -1e30).logsumexp(1, keepdim=True)], 1) for x in (lq, lp)
    )
    return (lp.exp() * (lp - lq)).sum(1) if kind == "topk_forward_kl" else (lq.exp() * (lq - lp)).sum(1)


def assert_bucket(kind: str, dtype: torch.dtype, gap: float, whole_logits: bool = True) -> None:
    """Loss and gradient of a student whose mass is on the ids, except for e^-gap."""
    generator = torch.Generator().manual_seed(0)
    z, u = (torch.randn(6, 40, generator=generator, dtype=FP64).float() for _ in range(2))
    z[:, :3] += gap
    u[:, :3] += 2
    ids = (u if kind == "topk_forward_kl" else z).topk(3, 1).indices
    exact = z.double().requires_grad_()
    wanted = bucketed(exact, u, ids, kind)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    leaf, head = z.to(dtype).requires_grad_(), LMHead(torch.eye(40, dtype=dtype))
    spec = Divergence(kind, k=3)
    for result in (
        *([divergence(leaf, u.to(dtype), spec)] if whole_logits else []),
        linear_divergence(leaf, head, u.to(dtype), head, spec, reduction="none"),
    ):
        (ours,) = torch.autograd.grad(result.sum(), leaf)
        assert torch.allclose(result.double(), wanted, rtol=2e-5, atol=1e-6)
        assert (ours - slope).norm() <= 1e-5 * slope.norm() + 1e-7


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("gap", [2.0, 12.0, 16.0, 25.0, 60.0])
@pytest.mark.parametrize("kind", ["topk_forward_kl", "topk_reverse_kl"])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_tail_of_confident_student_has_its_gradient(dtype, kind, gap):
    """1 - Q is noise in the dtype, or not distinguishable from 0."""
    assert_bucket(kind, dtype, gap)


def test_empty_tail_adds_nothing():
    """k of the whole vocabulary: the divergence over all of it, and its gradient."""
    hidden, head, teacher, teacher_head, _ = make_case(dtype=FP64, vocab=12)
    for kind, whole_kind in (("topk_forward_kl", "forward_kl"), ("topk_reverse_kl", "reverse_kl")):
        pairs = []
        for spec in (Divergence(kind, k=12), Divergence(whole_kind)):
            leaf = hidden.detach().requires_grad_()
            loss = linear_divergence(leaf, head, teacher, teacher_head, spec)
            pairs.append((loss, *torch.autograd.grad(loss, leaf)))
        for a, b in zip(*pairs, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_zero_normalizer_without_valid_tokens_gives_zero():
    hidden, head, teacher, teacher_head, _ = make_case()
    leaf = hidden.detach().requires_grad_()
    for normalizer in (0, torch.tensor(0.0)):
        loss = linear_divergence(
            leaf, head, teacher, teacher_head, valid=torch.zeros(len(hidden), dtype=torch.bool), normalizer=normalizer
        )
        assert loss == 0
        assert not torch.autograd.grad(loss, leaf)[0].any()


@pytest.mark.parametrize("kind", ["sampled_reverse_kl_k2", "reverse_kl"])
def test_nan_token_keeps_gradients_of_others(kind):
    """Next to another token whose id is at the floor."""
    hidden, head, teacher, teacher_head, tokens = make_case(vocab=30, shaped=False)
    head.bias[2], tokens[0] = -2e4, 2
    result = []
    for spoil in (False, True):
        leaf = hidden.detach().clone()
        if spoil:
            leaf[2] = math.nan
        leaf.requires_grad_()
        losses = linear_divergence(leaf, head, teacher, teacher_head, Divergence(kind), tokens=tokens, reduction="none")
        result.append(torch.autograd.grad(losses[:2].sum(), leaf)[0][:2])
    assert torch.equal(*result)


def test_total_variation_gradient_of_nan_teacher_is_nan():
    hidden, head, teacher, teacher_head, _ = make_case()
    teacher = teacher.clone()
    teacher[1] = math.nan
    leaf = hidden.detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_divergence(leaf, head, teacher, teacher_head, Divergence("total_variation"), reduction="sum"), leaf
    )
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_invalid_temperature_is_refused(temperature):
    with pytest.raises(UsageError, match="choose one above 0"):
        linear_log_prob(torch.zeros(1, 3), LMHead(torch.eye(3)), torch.tensor([0]), temperature=temperature)


@pytest.mark.parametrize("vocab", [0, -5, 34])
def test_vocab_outside_head_is_refused(vocab):
    hidden, head, teacher, teacher_head, _ = make_case(vocab=33)
    with pytest.raises(ValueError, match=f"vocab of student_head is {vocab}; it must be in 1 "):
        linear_divergence(hidden, dataclasses.replace(head, vocab=vocab), teacher, teacher_head)


@pytest.mark.parametrize("bias", [False, True])
def test_operators_pass_opcheck(bias):
    hidden, head, teacher, teacher_head, tokens = make_case(dtype=BF16, bias=bias)
    student, teacher = (
        ops.make_side(hidden, head.weight, head.bias),
        ops.make_side(teacher, teacher_head.weight, teacher_head.bias),
    )
    params, beta = ([0.8, 6.0, 1.0], [0.8, 6.0, 1.0]), 0.5
    ids, namespace = tokens[:, None], torch.ops.opdkernels
    moments, at, _, _ = namespace.divergence_scan(student, teacher, ids, 1, 33, *params, True)
    scalars = torch.cat([moments[:4], moments[:3]])
    for operator, arguments in (
        (namespace.divergence_scan, (student, teacher, torch.cat([ids, ids], 1), 2, 33, *params, True)),
        (namespace.divergence_scan, (student, teacher, ids[:, :0], 0, 33, *params, False)),
        (namespace.divergence_means, (student, teacher, moments, 33, *params, beta, ops.JSD)),
        (
            namespace.divergence_backward,
            (student, teacher, scalars, ids, at[0], 33, *params, beta, ops.REVERSE, [True, True, bias]),
        ),
        (
            namespace.divergence_backward,
            (student, teacher, scalars, ids, at[0], 33, *params, beta, ops.AT_IDS, [True, False, False]),
        ),
        (
            namespace.divergence_backward,
            (
                student,
                teacher,
                torch.cat([scalars, moments[:2]]),
                ids,
                at[0],
                33,
                *params,
                beta,
                ops.AT_IDS,
                [True, True, bias],
            ),
        ),
        (namespace.divergence_top, (teacher, 33, 4, params[1])),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("kind", ["jsd", "topk_forward_kl", "sampled_reverse_kl"])
def test_compiles_with_fullgraph(kind):
    hidden, head, teacher, teacher_head, tokens = make_case(dtype=BF16)
    spec = Divergence(kind, k=3 if "topk" in kind else 0)

    def loss(hidden, weight, bias):
        mine = LMHead(weight, bias, head.scale, head.softcap)
        return linear_divergence(hidden, mine, teacher, teacher_head, spec, tokens=tokens, scores=True)

    leaves = leaves_of(hidden, head)
    (eager, scores), (full, compiled_scores) = (
        loss(*leaves),
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves),
    )
    torch.testing.assert_close(full, eager)
    torch.testing.assert_close(compiled_scores, scores)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (full, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_docstring_examples():
    assert doctest.testmod(ops).failed == 0
