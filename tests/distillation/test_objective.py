from __future__ import annotations

import pytest
import torch

from opdkernels.distillation.examples import Example
from opdkernels.distillation.models import lm_head_of
from opdkernels.distillation.objective import compute_loss, grpo_advantages
from opdkernels.distillation.rollout import encode, pad_rollout
from opdkernels.distillation.text import TextProcessor
from tests.distillation.conftest import model, tokenizer

TEXT = TextProcessor(tokenizer(), None, 0)


def rollout(own=True):
    return pad_rollout(
        encode(TEXT, [Example("1+1="), Example("12+13=")], 32),
        [[4, 1], [5, 6, 7]],
        [True, False],
        on_policy=own,
        pad_id=0,
        device=torch.device("cpu"),
    )


def expected_log_probs(student, part):
    logits = student(part.ids, attention_mask=part.attention_mask.long()).logits[:, :-1][part.completion_mask]
    return logits.double().log_softmax(1).gather(1, part.tokens[:, None]).squeeze(1)


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-6)


def test_sft_loss_is_negative_log_likelihood(options):
    student, part = model(0, initializer_range=0.2).eval(), rollout(own=False)
    chosen = options(divergence_weight=0, sft_weight=2, teacher="", on_policy_fraction=0)
    result = compute_loss(student, part, None, None, num_tokens=5, vocab_size=15, options=chosen)
    expected = -2 * expected_log_probs(student, part).sum() / 5
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(gradients(student, result.loss), gradients(student, expected))
    on_policy = compute_loss(student, rollout(own=True), None, None, num_tokens=5, vocab_size=15, options=chosen)
    assert on_policy.loss.item() == 0  # the student is not trained on its own samples


def test_reward_loss_is_the_policy_gradient(options):
    student, part = model(0, initializer_range=0.2).eval(), rollout()
    chosen = options(divergence_weight=0, reward_weight=0.5, num_generations=2, teacher="")
    result = compute_loss(student, part, None, torch.tensor([1.0, -2.0]), num_tokens=5, vocab_size=15, options=chosen)
    expected = -0.5 * (expected_log_probs(student, part) * torch.tensor([1.0, 1, -2, -2, -2])).sum() / 5
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal_gradients(gradients(student, result.loss), gradients(student, expected))


@pytest.mark.parametrize("vocab_size", [15, 9])
def test_divergence_loss_matches_full_logits(options, vocab_size):
    """Gradients are at most twice as far from fp64 as those through whole logits in fp32; a millionth where these are
    exact. Ids from `vocab_size` on have no probability."""
    from opdkernels.distillation.teachers import ModelTeacher

    student, teacher, part = (
        model(0, initializer_range=0.2).eval(),
        model(1, 48, initializer_range=0.2).eval(),
        rollout(),
    )
    result = compute_loss(
        student,
        part,
        ModelTeacher(teacher).score(part),
        None,
        num_tokens=5,
        vocab_size=vocab_size,
        options=options(divergence_weight=3),
    )
    ours, losses, grads = gradients(student, result.loss), [], []
    for dtype in (torch.float32, torch.float64):
        p, q = (
            one(part.ids, attention_mask=part.attention_mask.long())
            .logits[:, :-1, :vocab_size][part.completion_mask]
            .log_softmax(1)
            for one in (teacher.to(dtype), student.to(dtype))
        )
        losses.append(3 * (q.exp() * (q - p.detach())).sum() / 5)
        grads.append(gradients(student, losses[-1]))
    plain, best = grads
    assert result.loss.item() == pytest.approx(losses[1].item(), rel=1e-4)
    assert result.scores.reverse_kl.sum().item() * 3 / 5 == pytest.approx(losses[1].item(), rel=1e-4)
    assert ours.keys() == best.keys()
    for name, exact in best.items():
        assert error(ours[name], exact) <= 2 * error(plain[name], exact) + 1e-6 * max(1, float(exact.norm()))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm())


def test_gradient_checkpointing_gives_equal_gradients(options):
    student, part = model(0, initializer_range=0.2).eval(), rollout(own=False)
    forwards, result = [], []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    for more in ({}, {"gradient_checkpointing": True}):
        if more:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        loss = compute_loss(
            student,
            part,
            None,
            None,
            num_tokens=5,
            vocab_size=15,
            options=options(divergence_weight=0, sft_weight=1, teacher="", on_policy_fraction=0, **more),
        ).loss
        result.append(gradients(student, loss))
    assert len(forwards) == 3
    assert_equal_gradients(*result)


def test_loss_without_tokens_is_zero_with_gradient(options):
    student = model(0).eval()
    empty = pad_rollout(
        encode(TEXT, [Example("1+1=")], 32), [[]], [False], on_policy=True, pad_id=0, device=torch.device("cpu")
    )
    result = compute_loss(
        student, empty, (torch.zeros(0, 32), lm_head_of(student)), None, num_tokens=1, vocab_size=15, options=options()
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_of_equal_rewards_are_zero(dtype):
    for value in (0.1, 0.3, 1000.1, -1e-30):
        for samples in (3, 7):
            assert not grpo_advantages(torch.full((2 * samples,), value, dtype=dtype), samples).any()
    result = grpo_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0], dtype=dtype), 2)
    assert result.dtype == torch.float32
    assert result[:2].sum().abs() < 1e-6
    assert result[1] > 0 > result[0]
