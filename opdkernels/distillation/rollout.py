"""Completions: sampled by a model or recorded, as token ids that are never made again from text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opdkernels.distillation.models import Text, begin, taken, unwrapped
from opdkernels.distillation.tasks import Entry
from opdkernels.errors import InputError, printable

PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
Extras = list[dict[str, torch.Tensor]]  # what a model takes beside ids, row by row


@dataclass
class Prompts:
    """Token ids of prompts, cut to what a run allows."""

    entries: list[Entry]
    ids: list[list[int]]
    extras: Extras
    cut: int  # how many lost their beginning

    def repeated(self, times: int) -> Prompts:
        """Each prompt several times, side by side."""

        def again(rows):
            return [row for row in rows for _ in range(times)]

        return Prompts(again(self.entries), again(self.ids), again(self.extras), self.cut)


@dataclass
class Rollout:
    """Prompts and completions side by side.

    `ids` int64 [rows, length], right-padded; `prompt` and `length` int64 [rows]: where a row's completion begins and ends;
    `ended` bool [rows]: whether by an end token; `own` whether the student sampled it.
    """

    entries: list[Entry]
    ids: torch.Tensor
    prompt: torch.Tensor
    length: torch.Tensor
    ended: torch.Tensor
    extras: Extras
    own: bool

    @property
    def attention(self) -> torch.Tensor:
        """bool [rows, length]: what is not padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.length.unsqueeze(1)

    @property
    def targets(self) -> torch.Tensor:
        """bool [rows, length - 1]: the positions whose next token is of the completion."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)[1:]
        return (place >= self.prompt.unsqueeze(1)) & (place < self.length.unsqueeze(1))

    @property
    def tokens(self) -> torch.Tensor:
        """int64 [n]: the completions' tokens, row after row."""
        return self.ids[:, 1:][self.targets]

    @property
    def shared(self) -> int:
        """How many tokens all rows begin with that come before the last of their prompts; 0 of one row, and beside images."""
        return 0 if any(self.extras) or not len(self.ids) else alike(self.ids[:, : int(self.prompt.min()) - 1])

    @property
    def sizes(self) -> torch.Tensor:
        """int64 [rows]: tokens of each completion."""
        return self.length - self.prompt

    def rows(self, chosen: Sequence[int]) -> Rollout:
        """Some of the rows, no longer than they need be."""
        at = torch.tensor(list(chosen), dtype=torch.long, device=self.ids.device)
        longest = int(self.length[at].max()) if len(at) else 0
        return Rollout(
            [self.entries[i] for i in chosen],
            self.ids[at, :longest],
            self.prompt[at],
            self.length[at],
            self.ended[at],
            [self.extras[i] for i in chosen],
            self.own,
        )

    def completions(self) -> list[list[int]]:
        return [
            self.ids[i, p:n].tolist()
            for i, (p, n) in enumerate(zip(self.prompt.tolist(), self.length.tolist(), strict=True))
        ]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What `hidden_states` takes."""
        return self.ids, self.attention, together(self.extras, self.ids.shape[1], left=False)


def alike(ids: torch.Tensor) -> int:
    """With how many equal ids rows [rows, length] begin; 0 of one row."""
    return int((ids == ids[:1]).all(0).int().cumprod(0).sum()) if len(ids) > 1 else 0


def together(extras: Extras, length: int, left: bool) -> dict[str, torch.Tensor]:
    """What rows take beside ids as one batch: per token ([1, prompt]) padded with zeros, else one row's after another's."""
    if not any(extras):
        return {}
    found: dict[str, list[torch.Tensor]] = {}
    none = {
        name: value[:, :0] for row in extras for name, value in row.items() if name in PER_TOKEN
    }  # of rows without an image
    for row in extras:
        for name, value in (none | row).items():
            if name in PER_TOKEN:
                space = (length - value.shape[1], 0) if left else (0, length - value.shape[1])
                value = torch.nn.functional.pad(value, space)
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def encode(text: Text, entries: Sequence[Entry], most: int, teacher_context: bool = False) -> Prompts:
    """Prompts as ids, the last `most` tokens of each."""
    rows, extras, cut = [], [], 0
    for entry in entries:
        ids, extra = text.encode(prepend_teacher_context(entry) if teacher_context else entry.prompt, entry.images)
        if not ids:
            raise InputError(f"the prompt {printable(str(entry.prompt))[:80]!r} has no token; give another")
        if len(ids) > most and not extra:
            ids, cut = ids[-most:], cut + 1
        rows.append(ids)
        extras.append(extra)
    return Prompts(list(entries), rows, extras, cut)


def prepend_teacher_context(entry: Entry) -> Any:
    """The prompt with what only the teacher sees before it."""
    if entry.teacher_context is None:
        return entry.prompt
    if isinstance(entry.prompt, str):
        return entry.teacher_context + entry.prompt
    return [{"role": "system", "content": entry.teacher_context}, *entry.prompt]


def beside(
    prompts: Prompts,
    completions: Sequence[Sequence[int]],
    ended: Sequence[bool],
    own: bool,
    pad: int,
    device: torch.device,
) -> Rollout:
    """Prompts and completions as right-padded rows."""
    rows = [[*p, *c] for p, c in zip(prompts.ids, completions, strict=True)]
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long, device=device).view(
        len(rows), longest
    )
    prompt, length = (
        torch.tensor([len(one) for one in many], dtype=torch.long, device=device) for many in (prompts.ids, rows)
    )
    extras = [{name: value.to(device) for name, value in row.items()} for row in prompts.extras]
    return Rollout(
        prompts.entries, ids, prompt, length, torch.tensor(list(ended), dtype=torch.bool, device=device), extras, own
    )


@torch.no_grad()
def sample(
    model: Any,
    text: Text,
    prompts: Prompts,
    *,
    most: int,
    ends: Sequence[int],
    vocab: int,
    temperature: float,
    own: bool,
    together_with: int = 1,
) -> Rollout:
    """Completions from a model by transformers' `generate`, of ids below `vocab`; temperature 0 is greedy. A completion holds its end
    token. Of several processes that share a model all go on until each has ended."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts.ids))
    ids = torch.tensor([[text.pad] * (longest - len(row)) + list(row) for row in prompts.ids], device=device)
    attention = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts.ids], device=device)
    extras = {name: value.to(device) for name, value in together(prompts.extras, longest, left=True).items()}
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    from transformers import GenerationConfig  # type: ignore[import-not-found]

    unpadded = len(set(map(len, prompts.ids))) == 1 and not extras and together_with == 1
    begun = begin(model, ids[:1, : alike(ids[:, :-1])], len(ids)) if unpadded else {}
    own_model, config = (
        unwrapped(model),
        GenerationConfig(
            suppress_tokens=never_sampled(model, vocab) or None,
            max_new_tokens=most,
            eos_token_id=list(ends) or None,
            pad_token_id=text.pad,
            use_cache=True,
            **sampling,
        ),
    )
    kept, own_model.generation_config = (
        own_model.generation_config,
        GenerationConfig(),
    )  # whose penalties would fill what is not set here
    try:
        with taken(extras):
            found = model.generate(
                input_ids=ids,
                attention_mask=attention,
                generation_config=config,
                synced_gpus=together_with > 1,
                **extras,
                **begun,
            )
    finally:
        own_model.generation_config = kept
    cut = [until_end(row, ends) for row in found[:, longest:].tolist()]
    return beside(prompts, [row for row, _ in cut], [ended for _, ended in cut], own, text.pad, device)


def never_sampled(model: Any, vocab: int) -> list[int]:
    """Ids that another model lacks, and those that stand for an image or a video, which a completion has none of."""
    own = unwrapped(model)
    places = (getattr(own.config, f"{kind}_token_id", None) for kind in ("image", "video"))
    return [
        *range(vocab, own.get_output_embeddings().weight.shape[0]),
        *(place for place in places if place is not None and place < vocab),
    ]


def recorded(text: Text, prompts: Prompts, *, most: int, ends: Sequence[int], device: torch.device) -> Rollout:
    """The completions that the prompts came with, ended where they are whole."""
    rows = [text.ids(entry.completion or "", add_special_tokens=False) for entry in prompts.entries]
    own = text.tokenizer.eos_token_id
    end = [own if own in ends else ends[0]] if ends else []
    rows = [row + end * (not row or row[-1] not in ends) for row in rows]
    cut = [until_end(row[:most], ends) for row in rows]
    return beside(prompts, [row for row, _ in cut], [ended for _, ended in cut], False, text.pad, device)


def until_end(row: Sequence[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """A completion up to its first end token, that included, and whether there is one.

    >>> until_end([5, 6, 2, 0, 0], [2])
    ([5, 6, 2], True)
    """
    for i, token in enumerate(row):
        if token in ends:
            return list(row[: i + 1]), True
    return list(row), False
