"""Teachers: the next-token distribution at each token of a completion, as hidden states and the head that reads them.

A teacher is a model, one of several models that a prompt's teacher_id selects, or the student itself: with its initial
weights or an average of its weights over the steps. The self-teacher swaps these weights in while it scores; it needs
no second model, only a copy of the active coordinates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, Protocol

import torch

from opdkernels.distillation.examples import describe
from opdkernels.distillation.forward import completion_hidden_states
from opdkernels.distillation.models import lm_head_of, load_model, max_positions
from opdkernels.distillation.objective import TeacherOutput
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.rollout import Rollout, encode, pad_rollout
from opdkernels.distillation.text import ALL_IDS, TextProcessor, load_text_processor, num_shared_ids
from opdkernels.distillation.world import Student
from opdkernels.errors import InputError, printable
from opdkernels.optim.active import gather_active, scatter_active
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.binding import LocalMask, local_part

UNLIMITED = 1 << 60  # maximum length of a prompt with teacher_context, which is validated instead of truncated


class Teacher(Protocol):
    """What the training loop needs of a teacher."""

    model: torch.nn.Module

    def score(self, rollout: Rollout) -> TeacherOutput:
        """Hidden states at the tokens of the completions, and the head; without a gradient."""

    def after_step(self) -> None:
        """Called after each optimizer step of the student."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that a resumed run restores in place."""


@torch.no_grad()
def score_with(model: Any, rollout: Rollout) -> TeacherOutput:
    """The output of a model whose weights change afterwards: its head is copied."""
    hidden, head = completion_hidden_states(model, rollout), lm_head_of(model)
    bias = None if head.bias is None else head.bias.detach().clone()
    return TeacherOutput(hidden, replace(head, weight=head.weight.detach().clone(), bias=bias))


class ModelTeacher:
    """A separate model."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.requires_grad_(False)

    def score(self, rollout: Rollout) -> TeacherOutput:
        with torch.no_grad():
            return TeacherOutput(completion_hidden_states(self.model, rollout), lm_head_of(self.model))

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class SelfTeacher:
    """The student with other weights: its initial ones (ema_decay 1), or their exponential moving average.

    If a prompt has `teacher_context`, the teacher reads it before the prompt; the completion's tokens are the same.
    """

    def __init__(
        self,
        student: Student,
        optimizer: MaskedOptimizer,
        *,
        ema_decay: float,
        text: TextProcessor,
        max_completion_length: int,
    ):
        self.student, self.model, self.optimizer = student, student.model, optimizer
        self.ema_decay, self.text = ema_decay, text
        self.max_prompt_length = max_positions(self.model) - max_completion_length
        # [num_active] per trained parameter; fp32 for an average, else the dtype of the parameter
        self.values = [
            gather_active(param, local_mask) if ema_decay < 1 else gather_active(param, local_mask).to(param.dtype)
            for param, local_mask in self._local_params()
        ]

    def _local_params(self) -> list[tuple[torch.Tensor, LocalMask]]:
        """The local part of each trained parameter."""
        return [(local_part(param)[0], binding.local_mask(param)) for _, param, binding in self.optimizer._bindings()]

    @contextlib.contextmanager
    def with_teacher_weights(self) -> Iterator[None]:
        """Swaps the teacher's weights into the student, and the student's back in at the end."""
        params = self._local_params()
        with torch.no_grad():
            student_values = [gather_active(param, local_mask).to(param.dtype) for param, local_mask in params]
            for (param, local_mask), values in zip(params, self.values, strict=True):
                scatter_active(param, local_mask, values.float())
        try:
            yield
        finally:
            with torch.no_grad():
                for (param, local_mask), values in zip(params, student_values, strict=True):
                    scatter_active(param, local_mask, values.float())

    def score(self, rollout: Rollout) -> TeacherOutput:
        if any(example.teacher_context is not None for example in rollout.examples):
            rollout = self._with_teacher_context(rollout)
        with self.with_teacher_weights():
            return self.student(score_with, rollout)

    def _with_teacher_context(self, rollout: Rollout) -> Rollout:
        prompts = encode(self.text, rollout.examples, UNLIMITED, with_teacher_context=True)
        length, example = max(zip(map(len, prompts.ids), rollout.examples, strict=True), key=itemgetter(0))
        if length > self.max_prompt_length:
            raise InputError(
                f"{describe(example)} is {length} tokens with its `teacher_context`, and the student has "
                f"{self.max_prompt_length} positions before the completion; shorten it"
            )
        return pad_rollout(
            prompts,
            rollout.completions(),
            rollout.finished.tolist(),
            on_policy=rollout.on_policy,
            pad_id=self.text.pad_id,
            device=rollout.ids.device,
        )

    @torch.no_grad()
    def after_step(self) -> None:
        if self.ema_decay == 1:
            return
        for values, (param, local_mask) in zip(self.values, self._local_params(), strict=True):
            values.lerp_(gather_active(param, local_mask), 1 - self.ema_decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {str(i): values for i, values in enumerate(self.values)}


def load_teachers(
    options: DistillOptions,
    student: Student,
    optimizer: MaskedOptimizer,
    text: TextProcessor,
    device: torch.device,
    models: Mapping[str, Any],
) -> dict[str, Teacher]:
    """Teachers by teacher_id. `models`: loaded models, by their names in the options.

    Raises InputError for a teacher that cannot be loaded.
    """
    teachers: dict[str, Teacher] = {}
    for path in options.teachers.values():
        if path in teachers:
            continue
        if path == SELF:
            teachers[path] = SelfTeacher(
                student,
                optimizer,
                ema_decay=options.ema_decay,
                text=text,
                max_completion_length=options.max_completion_length,
            )
        elif path in models:
            teachers[path] = ModelTeacher(models[path].to(device).eval())
        else:
            teachers[path] = ModelTeacher(load_model(path, options.dtype, device))
    return {teacher_id: teachers[path] for teacher_id, path in options.teachers.items()}


def shared_vocab_size(options: DistillOptions, text: TextProcessor, models: Mapping[str, Any]) -> int:
    """Number of leading ids that mean the same to the student and all teachers that are folders or hub ids.

    Raises InputError for a teacher whose tokenizer does not have all tokens of the student's, with the same ids."""
    paths = {path for path in options.teachers.values() if path != SELF and path not in models}
    return min(
        (
            num_shared_ids(text.tokenizer, load_text_processor(path).tokenizer, f"the teacher {printable(path)}")
            for path in sorted(paths)
        ),
        default=ALL_IDS,
    )
