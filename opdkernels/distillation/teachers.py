"""Teachers: what says, at each token of a completion, what should have come: hidden states, and the head that reads them.

A model of its own, one of several by a prompt's tag, or the student itself: the weights that it began with, or an average over its
steps, swapped in for as long as it scores; that takes no second model, and a copy of the active coordinates alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Any, Protocol

import torch

from opdkernels.distillation.models import (
    Text,
    head_of,
    load_model,
    load_text,
    positions,
    refuse_other_tokens,
    states_at_completions,
)
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.rollout import Rollout, beside, encode
from opdkernels.errors import InputError, printable
from opdkernels.ops.divergence import Head
from opdkernels.optim.active import active_of, put_active
from opdkernels.optim.binding import Shard, local_part
from opdkernels.optim.masked import MaskedOptimizer

UNCUT = 1 << 60  # tokens of a prompt with what is teacher_context


class Teacher(Protocol):
    """What the loop asks of a teacher."""

    model: torch.nn.Module

    def score(self, rollout: Rollout) -> tuple[torch.Tensor, Head]:
        """Hidden states [n, width] at the n tokens of the completions, and the head, neither with a gradient."""

    def after_step(self) -> None:
        """Called when the student has taken a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@torch.no_grad()
def scored(model: Any, rollout: Rollout) -> tuple[torch.Tensor, Head]:
    """Hidden states [n, width] at the tokens of the completions, and a copy of the head that is there now."""
    hidden, head = states_at_completions(model, rollout), head_of(model)
    return hidden, replace(
        head, weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.detach().clone()
    )


class ModelTeacher:
    """A model of its own."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.requires_grad_(False)

    def score(self, rollout: Rollout) -> tuple[torch.Tensor, Head]:
        with torch.no_grad():
            return states_at_completions(self.model, rollout), head_of(self.model)

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class OwnWeights:
    """The student itself with other active values: those it began with (ema 1), or their average over its steps.

    Values are kept as fp32 where they are averaged, else as the weights are, [active] of each parameter that is trained. With
    `teacher_context` in a prompt it reads that first; the completion's tokens, `longest` at most, are the same.
    """

    def __init__(self, model: Any, optimizer: MaskedOptimizer, ema: float, text: Text, longest: int):
        self.model, self.optimizer, self.ema, self.text = model, optimizer, ema, text
        self.places = positions(model) - longest
        self.values = [self._kept(active_of(local, shard), local) for local, shard in self._parts()]

    def _parts(self) -> list[tuple[torch.Tensor, Shard]]:
        """What of each trained parameter lives here."""
        return [(local_part(param)[0], binding.shard(param)) for _, param, binding in self.optimizer._live()]

    def _kept(self, values: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        return values if self.ema < 1 else values.to(param.dtype)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The student with the teacher's weights, for a while."""
        parts = self._parts()
        with torch.no_grad():
            own = [active_of(param, shard).to(param.dtype) for param, shard in parts]
            for (param, shard), values in zip(parts, self.values, strict=True):
                put_active(param, shard, values.float())
        try:
            yield
        finally:
            with torch.no_grad():
                for (param, shard), values in zip(parts, own, strict=True):
                    put_active(param, shard, values.float())

    def score(self, rollout: Rollout) -> tuple[torch.Tensor, Head]:
        if any(entry.teacher_context is not None for entry in rollout.entries):
            prompts = encode(self.text, rollout.entries, UNCUT, teacher_context=True)
            tokens, entry = max(zip(map(len, prompts.ids), rollout.entries, strict=True), key=itemgetter(0))
            if tokens > self.places:
                raise InputError(
                    f"the prompt {printable(str(entry.prompt))[:80]!r} is {tokens} tokens with its `teacher_context`, and the student has {self.places} positions beside a completion; shorten it"
                )
            rollout = beside(
                prompts, rollout.completions(), rollout.ended.tolist(), rollout.own, self.text.pad, rollout.ids.device
            )
        with self.swapped():
            hidden, head = self.model.scored(rollout)
        return hidden, head

    @torch.no_grad()
    def after_step(self) -> None:
        if self.ema == 1:
            return
        for values, (local, shard) in zip(self.values, self._parts(), strict=True):
            values.lerp_(active_of(local, shard), 1 - self.ema)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for values, saved in zip(self.values, state["values"], strict=True):
            values.copy_(saved)


def teachers_of(
    options: DistillOptions, model: torch.nn.Module, optimizer: MaskedOptimizer, text: Text, device: torch.device
) -> dict[str, Teacher]:
    """Teachers by tag. Raises InputError for a tokenizer that is not the student's."""
    loaded: dict[str, Teacher] = {}
    for place in options.teachers.values():
        if place in loaded:
            continue
        if place == SELF:
            loaded[place] = OwnWeights(model, optimizer, options.ema_decay, text, options.max_completion_length)
        else:
            refuse_other_tokens(text.tokenizer, load_text(place).tokenizer, f"the teacher {printable(place)}")
            loaded[place] = ModelTeacher(load_model(place, options.dtype, device))
    return {tag: loaded[place] for tag, place in options.teachers.items()}
