"""Prompts and completions as token ids. Completions are sampled by a model or read from the data set; sampled ids are
never recomputed from text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdkernels.distillation.examples import Example, describe
from opdkernels.distillation.text import TextProcessor
from opdkernels.errors import InputError

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
ModelInputs = list[dict[str, Tensor]]  # per row: what the model takes besides ids, such as pixel_values


@dataclass
class Prompts:
    """Token ids of prompts, truncated to the maximum length."""

    examples: list[Example]
    ids: list[list[int]]
    model_inputs: ModelInputs
    num_truncated: int

    def repeat(self, times: int) -> Prompts:
        """Each prompt `times` times in a row."""

        def repeat(rows: list[Any]) -> list[Any]:
            return [row for row in rows for _ in range(times)]

        return Prompts(repeat(self.examples), repeat(self.ids), repeat(self.model_inputs), self.num_truncated)


@dataclass
class Rollout:
    """Prompts and their completions, one row each."""

    examples: list[Example]
    ids: Tensor  # int64 [num_rows, max_row_length], right-padded
    prompt_lengths: Tensor  # int64 [num_rows]
    row_lengths: Tensor  # int64 [num_rows], prompt and completion
    finished: Tensor  # bool [num_rows]: whether the completion ends with an end token
    model_inputs: ModelInputs
    on_policy: bool  # whether the student sampled the completions

    @property
    def attention_mask(self) -> Tensor:
        """bool [num_rows, max_row_length]: False for padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.row_lengths.unsqueeze(1)

    @property
    def completion_mask(self) -> Tensor:
        """bool [num_rows, max_row_length - 1]: positions whose next token belongs to the completion."""
        next_position = torch.arange(self.ids.shape[1], device=self.ids.device)[1:]
        return (next_position >= self.prompt_lengths.unsqueeze(1)) & (next_position < self.row_lengths.unsqueeze(1))

    @property
    def tokens(self) -> Tensor:
        """int64 [num_tokens]: tokens of all completions, row after row."""
        return self.ids[:, 1:][self.completion_mask]

    @property
    def lengths(self) -> Tensor:
        """int64 [num_rows]: tokens per completion."""
        return self.row_lengths - self.prompt_lengths

    @property
    def shared_prefix_length(self) -> int:
        """Number of leading tokens that all rows share, at most all but the last token of the shortest prompt; 0 for
        one row and for prompts with images."""
        if any(self.model_inputs) or not len(self.ids):
            return 0
        return common_prefix_length(self.ids[:, : int(self.prompt_lengths.min()) - 1])

    def select(self, rows: Sequence[int]) -> Rollout:
        """Some of the rows, without padding that all of them share."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.ids.device)
        longest = int(self.row_lengths[index].max()) if len(index) else 0
        return Rollout(
            [self.examples[i] for i in rows],
            self.ids[index, :longest],
            self.prompt_lengths[index],
            self.row_lengths[index],
            self.finished[index],
            [self.model_inputs[i] for i in rows],
            self.on_policy,
        )

    def completions(self) -> list[list[int]]:
        """Token ids of each completion."""
        bounds = zip(self.prompt_lengths.tolist(), self.row_lengths.tolist(), strict=True)
        return [self.ids[i, start:stop].tolist() for i, (start, stop) in enumerate(bounds)]

    def batch(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids, attention mask and further inputs of the model, as `hidden_states` takes them."""
        return self.ids, self.attention_mask, collate(self.model_inputs, self.ids.shape[1], pad_left=False)


def common_prefix_length(ids: Tensor) -> int:
    """Number of leading tokens that all rows of ids [num_rows, length] share; 0 for one row."""
    return int((ids == ids[:1]).all(0).int().cumprod(0).sum()) if len(ids) > 1 else 0


def collate(model_inputs: ModelInputs, length: int, pad_left: bool) -> dict[str, Tensor]:
    """One batch of the rows' model inputs: per-token tensors [1, prompt_length] are padded with zeros to `length`, all
    others are concatenated."""
    if not any(model_inputs):
        return {}
    batch: dict[str, list[Tensor]] = {}
    # rows without an image have empty per-token inputs
    empty = {name: value[:, :0] for row in model_inputs for name, value in row.items() if name in PER_TOKEN}
    for row in model_inputs:
        for name, value in (empty | row).items():
            if name in PER_TOKEN:
                missing = length - value.shape[1]
                value = torch.nn.functional.pad(value, (missing, 0) if pad_left else (0, missing))
            batch.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in batch.items()}


def encode(
    text: TextProcessor, examples: Sequence[Example], max_length: int, with_teacher_context: bool = False
) -> Prompts:
    """Tokenizes prompts and keeps the last `max_length` tokens of each; prompts with images are not truncated."""
    rows, model_inputs, num_truncated = [], [], 0
    for example in examples:
        prompt = prepend_teacher_context(example) if with_teacher_context else example.prompt
        try:
            ids, inputs = text.encode(prompt, example.images)
        except InputError as error:
            raise InputError(f"{example.source}: {error}" if example.source else str(error)) from None
        if not ids:
            raise InputError(f"{describe(example)} has no token; give another")
        if len(ids) > max_length and not inputs:
            ids, num_truncated = ids[-max_length:], num_truncated + 1
        rows.append(ids)
        model_inputs.append(inputs)
    return Prompts(list(examples), rows, model_inputs, num_truncated)


def prepend_teacher_context(example: Example) -> Any:
    """The prompt of the self-teacher: `teacher_context` and then the prompt, as text or as a system message."""
    if example.teacher_context is None:
        return example.prompt
    if isinstance(example.prompt, str):
        return example.teacher_context + example.prompt
    return [{"role": "system", "content": example.teacher_context}, *example.prompt]


def pad_rollout(
    prompts: Prompts,
    completions: Sequence[Sequence[int]],
    finished: Sequence[bool],
    *,
    on_policy: bool,
    pad_id: int,
    device: torch.device,
) -> Rollout:
    """Prompts and completions as right-padded rows."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts.ids, completions, strict=True)]
    longest = max(map(len, rows), default=0)
    padded = [row + [pad_id] * (longest - len(row)) for row in rows]
    ids = torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), longest)
    prompt_lengths, row_lengths = (
        torch.tensor([len(row) for row in token_rows], dtype=torch.long, device=device)
        for token_rows in (prompts.ids, rows)
    )
    return Rollout(
        prompts.examples,
        ids,
        prompt_lengths,
        row_lengths,
        torch.tensor(list(finished), dtype=torch.bool, device=device),
        [{name: value.to(device) for name, value in row.items()} for row in prompts.model_inputs],
        on_policy,
    )


def load_completions(
    text: TextProcessor, prompts: Prompts, *, max_length: int, end_ids: Sequence[int], device: torch.device
) -> Rollout:
    """The completions of the data set, each with an end token unless `max_length` truncates it."""
    rows = [text.ids(example.completion or "", add_special_tokens=False) for example in prompts.examples]
    eos = text.tokenizer.eos_token_id
    end = [eos if eos in end_ids else end_ids[0]] if end_ids else []
    rows = [row + end * (not row or row[-1] not in end_ids) for row in rows]
    truncated = [until_end(row[:max_length], end_ids) for row in rows]
    completions, finished = [row for row, _ in truncated], [ends for _, ends in truncated]
    return pad_rollout(prompts, completions, finished, on_policy=False, pad_id=text.pad_id, device=device)


def until_end(row: Sequence[int], end_ids: Sequence[int]) -> tuple[list[int], bool]:
    """A completion up to and including its first end token, and whether there is one.

    >>> until_end([5, 6, 2, 0, 0], [2])
    ([5, 6, 2], True)
    """
    for i, token in enumerate(row):
        if token in end_ids:
            return list(row[: i + 1]), True
    return list(row), False
