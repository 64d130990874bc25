"""Sampling of completions by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opdkernels.distillation.forward import prefill_shared_prefix
from opdkernels.distillation.models import unwrap_peft
from opdkernels.distillation.rollout import (
    Prompts,
    Rollout,
    collate,
    common_prefix_length,
    pad_rollout,
    until_end,
)
from opdkernels.distillation.text import TextProcessor, image_input_errors


@torch.no_grad()
def sample(
    model: Any,
    text: TextProcessor,
    prompts: Prompts,
    *,
    max_length: int,
    end_ids: Sequence[int],
    vocab_size: int,
    temperature: float,
    on_policy: bool,
    num_processes: int = 1,
) -> Rollout:
    """Samples one completion per prompt from the model's own distribution.

    Args:
        model: Model of transformers.
        text: Its tokenizer.
        prompts: Token ids of the prompts.
        max_length: Maximum length of a completion, in tokens.
        end_ids: Ids that end a completion; a completion includes its end token.
        vocab_size: Ids from here on are never sampled, nor are image and video placeholders.
        temperature: Sampling temperature; 0 decodes greedily.
        on_policy: Whether the model is the student.
        num_processes: Processes that share the sharded model; all generate until each of them has finished.

    Returns:
        Prompts and completions.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts.ids))
    padding = [longest - len(row) for row in prompts.ids]
    rows = list(zip(padding, prompts.ids, strict=True))
    ids = torch.tensor([[text.pad_id] * pad + list(row) for pad, row in rows], device=device)
    attention_mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in rows], device=device)
    batch = collate(prompts.model_inputs, longest, pad_left=True)
    model_inputs = {name: value.to(device) for name, value in batch.items()}
    from transformers import GenerationConfig  # type: ignore[import-not-found]

    cache: dict[str, Any] = {}
    if not any(padding) and not model_inputs and num_processes == 1:
        cache = prefill_shared_prefix(model, ids[:1, : common_prefix_length(ids[:, :-1])], len(ids))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        suppress_tokens=suppressed_ids(model, vocab_size) or None,
        max_new_tokens=max_length,
        eos_token_id=list(end_ids) or None,
        pad_token_id=text.pad_id,
        use_cache=True,
        remove_invalid_values=True,  # sampling from NaN would fail; the loss is NaN then, and the step is skipped
        **sampling,
    )
    base = unwrap_peft(model)
    shipped_config, base.generation_config = (
        base.generation_config,
        GenerationConfig(),
    )  # its penalties fill unset fields
    try:
        with image_input_errors(model_inputs):
            output = model.generate(
                input_ids=ids,
                attention_mask=attention_mask,
                generation_config=config,
                synced_gpus=num_processes > 1,
                **model_inputs,
                **cache,
            )
    finally:
        base.generation_config = shipped_config
    truncated = [until_end(row, end_ids) for row in output[:, longest:].tolist()]
    completions, finished = [row for row, _ in truncated], [ends for _, ends in truncated]
    return pad_rollout(prompts, completions, finished, on_policy=on_policy, pad_id=text.pad_id, device=device)


def suppressed_ids(model: Any, vocab_size: int) -> list[int]:
    """Ids that another model lacks, and placeholders of images and videos, which a completion does not contain."""
    base = unwrap_peft(model)
    placeholders = (getattr(base.config, f"{kind}_token_id", None) for kind in ("image", "video"))
    return [
        *range(vocab_size, base.get_output_embeddings().weight.shape[0]),
        *(token for token in placeholders if token is not None and token < vocab_size),
    ]
