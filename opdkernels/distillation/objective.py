"""What a step minimises: a divergence from the teacher, the policy gradient of a reward, the likelihood of recorded answers, each
with its weight, over the tokens of completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from opdkernels.distillation.models import head_of, states_at_completions
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.rollout import Rollout
from opdkernels.ops.divergence import Head, Scores, linear_divergence, linear_log_prob


class Objective(NamedTuple):
    """`loss`: a number with a gradient; `scores`: per token, where there is a teacher; `log_prob`: the student's of each token,
    where a reward or a likelihood needs it, detached."""

    loss: torch.Tensor
    scores: Scores | None
    log_prob: torch.Tensor | None


def objective(
    model: torch.nn.Module,
    rollout: Rollout,
    taught: tuple[torch.Tensor, Head] | None,
    advantage: torch.Tensor | None,
    tokens: float,
    vocab: int,
    options: DistillOptions,
) -> Objective:
    """The loss of some rows, a sum over their tokens divided by `tokens`, those of the whole step.

    taught: the teacher's hidden states and head; advantage [rows]: of each completion; vocab: how many ids all models have.
    """
    with recomputing(model, options.gradient_checkpointing):
        hidden = states_at_completions(model, rollout)
    head, ids = head_of(model, vocab), rollout.tokens
    loss, scores, log_prob = hidden.sum().float() * 0, None, None  # connected, whatever there is
    if taught is not None and options.divergence_weight:
        divergence, scores = linear_divergence(
            hidden, head, *taught, options.divergence_spec, tokens=ids, normalizer=tokens, scores=True
        )
        loss = loss + options.divergence_weight * divergence
    weight = options.reward_weight if advantage is not None else 0 if rollout.own else options.sft_weight
    if weight:
        of_tokens = linear_log_prob(hidden, head, ids)
        log_prob = of_tokens.detach()
        gain = of_tokens if advantage is None else of_tokens * advantage.repeat_interleave(rollout.sizes)
        loss = loss - weight * gain.sum() / tokens
    return Objective(loss, scores, log_prob)


@contextlib.contextmanager
def recomputing(model: Any, wanted: bool) -> Iterator[None]:
    """Has a model's layers drop their activations, for a while: transformers does so of layers that are in training, which with dropout
    and without a cache none is otherwise."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # type: ignore[import-not-found]

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def advantages(rewards: torch.Tensor, samples: int) -> torch.Tensor:
    """GRPO's, fp32: rewards [prompts * samples] less the mean of their prompt's, over its deviation; 0 where all are alike.

    >>> advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    groups = rewards.double().view(-1, samples)
    scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # whose mean may be rounded to another number
    return scaled.masked_fill(alike, 0).view(-1).float()
