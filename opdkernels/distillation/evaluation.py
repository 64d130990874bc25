"""Rewards of completions, and evaluation on held-out prompts."""

from __future__ import annotations

import os
from typing import Any

import torch

from opdkernels.distillation.models import load_config, load_model
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.products import cpu_products
from opdkernels.distillation.rollout import Rollout
from opdkernels.distillation.state import Sampler, build_sampler, build_task, setup_device
from opdkernels.distillation.tasks import Task
from opdkernels.distillation.teachers import shared_vocab_size
from opdkernels.distillation.text import TextProcessor, load_text_processor
from opdkernels.distillation.world import Student, World


def reward_completions(task: Task, text: TextProcessor, rollout: Rollout) -> torch.Tensor:
    """The reward of each completion, [num_rows]."""
    completions = [text.decode(ids) for ids in rollout.completions()]
    pairs = zip(rollout.examples, completions, strict=True)
    return torch.tensor([task.score(example, completion) for example, completion in pairs])


def evaluate(sampler: Sampler, task: Task, options: DistillOptions) -> dict[str, Any]:
    """Scores greedy completions of the held-out prompts.

    Args:
        sampler: Samples from the student; every process calls it equally often.
        task: Held-out prompts and reward.
        options: Number of prompts, and how many are sampled at once.

    Returns:
        scores: Reward of each prompt, in their order.
        accuracy: Mean of the scores.
    """
    world, examples = sampler.world, task.eval_examples(options.num_eval_prompts)
    local_examples = examples[world.rank :: world.size]
    per_rank = -(-len(examples) // world.size)
    local_examples = local_examples + examples[:1] * (per_rank - len(local_examples))
    size, scores = options.micro_batch_size or options.batch_size, []
    for first in range(0, len(local_examples), size):
        rollout = sampler.sample(sampler.encode(local_examples[first : first + size]), temperature=0.0)
        scores += reward_completions(task, sampler.text, rollout).tolist()
    gathered = world.all_gather(scores)
    ordered = [gathered[i % world.size][i // world.size] for i in range(len(examples))]
    return {"accuracy": sum(ordered) / len(examples), "scores": ordered}


def evaluate_checkpoint(options: DistillOptions, path: str | os.PathLike[str]) -> list[float]:
    """The reward of each held-out prompt for a checkpoint, as a run with these options evaluates it.

    Args:
        options: Options of the run; their student is not used.
        path: Folder of the checkpoint.

    Raises:
        InputError: The model, the prompts or the reward cannot be used.
    """
    device, world = setup_device(options), World()
    model, text = load_model(os.fspath(path), options.dtype, device), load_text_processor(os.fspath(path))
    teachers = [load_config(teacher) for teacher in options.teachers.values() if teacher != SELF]
    shared = shared_vocab_size(options, text, {})
    sampler = build_sampler(options, Student(model, world), text, teachers, shared, world)
    with cpu_products(device):
        return evaluate(sampler, build_task(options), options)["scores"]
