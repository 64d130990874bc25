"""The loss of a distillation step: weighted sum of a divergence from the teacher, the policy gradient of a reward, and
the likelihood of completions that the student did not sample, over the tokens of completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from opdkernels.distillation.forward import completion_hidden_states
from opdkernels.distillation.models import lm_head_of
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.rollout import Rollout
from opdkernels.distillation.world import Student
from opdkernels.ops.divergence import LMHead, Scores, linear_divergence, linear_log_prob


class TeacherOutput(NamedTuple):
    """The teacher's view of the tokens of completions."""

    hidden: Tensor  # [num_tokens, teacher_hidden_size]
    head: LMHead


class DistillLoss(NamedTuple):
    """Result of `distill_loss`."""

    loss: Tensor  # scalar with a gradient
    scores: Scores | None  # per token, if there is a teacher; detached
    log_prob: (
        Tensor | None
    )  # [num_tokens], the student's log-probabilities if a reward or sft_weight needs them; detached


def distill_loss(
    student: Student,
    rollout: Rollout,
    teacher_out: TeacherOutput | None,
    advantages: Tensor | None,
    *,
    num_tokens: float,
    vocab_size: int,
    options: DistillOptions,
) -> DistillLoss:
    """The loss of a micro-batch, as a forward pass of the student.

    Args:
        student: The trained model.
        rollout: Prompts and completions of the micro-batch.
        teacher_out: Hidden states and head of the teacher at the completions' tokens; None without a divergence.
        advantages: Advantage of each completion, [num_rows]; None without a reward.
        num_tokens: Divisor of the sum over tokens: the tokens of the whole step, so that each counts alike.
        vocab_size: Number of ids that all models have.
        options: Weights and divergence.

    Returns:
        Loss, scores and log-probabilities.
    """
    return student(
        compute_loss, rollout, teacher_out, advantages, num_tokens=num_tokens, vocab_size=vocab_size, options=options
    )


def compute_loss(
    model: Any,
    rollout: Rollout,
    teacher_out: TeacherOutput | None,
    advantages: Tensor | None,
    *,
    num_tokens: float,
    vocab_size: int,
    options: DistillOptions,
) -> DistillLoss:
    """`distill_loss` of a model whose parameters are gathered."""
    with activation_checkpointing(model, options.gradient_checkpointing):
        hidden = completion_hidden_states(model, rollout)  # [num_tokens, hidden_size]
    head, tokens = lm_head_of(model, vocab_size), rollout.tokens
    loss, scores, log_prob = hidden.sum().float() * 0, None, None  # 0 with a gradient, so that backward always runs
    if teacher_out is not None and options.divergence_weight:
        divergence, scores = linear_divergence(
            hidden, head, *teacher_out, options.divergence_spec, tokens=tokens, normalizer=num_tokens, scores=True
        )
        loss = loss + options.divergence_weight * divergence
    if advantages is not None:
        weight = options.reward_weight
    else:
        weight = 0 if rollout.on_policy else options.sft_weight
    if weight:
        token_log_prob = linear_log_prob(hidden, head, tokens)  # [num_tokens]
        log_prob = token_log_prob.detach()
        objective = token_log_prob
        if advantages is not None:
            objective = token_log_prob * advantages.repeat_interleave(rollout.lengths)
        loss = loss - weight * objective.sum() / num_tokens
    return DistillLoss(loss, scores, log_prob)


@contextlib.contextmanager
def activation_checkpointing(model: Any, enabled: bool) -> Iterator[None]:
    """Lets a model's layers drop their activations. transformers does this only for layers in training mode, which is
    otherwise off (no dropout, no cache)."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # type: ignore[import-not-found]

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if enabled else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def grpo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Advantages of GRPO: each reward minus the mean of its group, divided by the group's standard deviation.

    Args:
        rewards: [num_prompts * num_generations]; completions of one prompt are adjacent.
        num_generations: Completions per prompt.

    Returns:
        fp32 [num_prompts * num_generations]; 0 if all rewards of a group are equal.

    Examples:
        >>> import torch
        >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
        tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    groups = rewards.double().view(-1, num_generations)
    scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    # the mean of equal rewards may round to another number
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return scaled.masked_fill(equal, 0).view(-1).float()
