"""Hidden states at completions. A prefix that all prompts share, such as instructions and examples, runs once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from opdkernels.distillation.models import text_config, unwrap_peft
from opdkernels.distillation.rollout import Rollout
from opdkernels.distillation.text import image_input_errors

MIN_SHARED_PREFIX = 16  # tokens; a shorter shared prefix is not worth a separate forward pass


def hidden_states(model: Any, ids: Tensor, attention_mask: Tensor, model_inputs: dict[str, Tensor]) -> Tensor:
    """Inputs of the LM head [batch, length, hidden_size] for right-padded ids [batch, length]."""
    body = unwrap_peft(model).base_model
    with image_input_errors(model_inputs):
        output = body(input_ids=ids, attention_mask=attention_mask.long(), use_cache=False, **model_inputs)
        return output.last_hidden_state


def completion_hidden_states(model: Any, rollout: Rollout) -> Tensor:
    """Inputs of the LM head at the positions whose next token belongs to a completion.

    A prefix that all prompts share runs once, in one row; its gradient is the sum over all rows.

    Args:
        model: Model of transformers.
        rollout: Prompts and completions.

    Returns:
        [num_tokens, hidden_size], in the order of `rollout.tokens`.
    """
    ids, attention_mask, model_inputs = rollout.batch()
    prefix_length = rollout.shared_prefix_length
    cache = prefill_shared_prefix(model, ids[:1, :prefix_length], len(ids))
    if not cache:
        return hidden_states(model, ids, attention_mask, model_inputs)[:, :-1][rollout.completion_mask]
    body = unwrap_peft(model).base_model
    output = body(input_ids=ids[:, prefix_length:], attention_mask=attention_mask.long(), use_cache=True, **cache)
    return output.last_hidden_state[:, :-1][rollout.completion_mask[:, prefix_length:]]


def prefill_shared_prefix(model: Any, prefix: Tensor, num_rows: int) -> dict[str, Any]:
    """Runs a prefix [1, length] once and repeats its key-value cache for `num_rows` rows.

    Returns:
        The keyword argument with the cache; empty if the prefix is short or the model does not cache all of it.
    """
    cache = make_kv_cache(model) if prefix.shape[1] >= MIN_SHARED_PREFIX else None
    if cache is None:
        return {}
    body = unwrap_peft(model).base_model
    cache_argument = {cache_argument_name(body): cache}
    body(input_ids=prefix, use_cache=True, **cache_argument)
    if cache.get_seq_length() != prefix.shape[1]:  # the model keeps its past elsewhere
        return {}
    cache.batch_repeat_interleave(num_rows)
    return cache_argument


def make_kv_cache(model: Any) -> Any:
    """An empty, differentiable key-value cache.

    None if the model takes no cache, or if a cached prefix would change its result: models with images, sliding
    windows, recurrent states or rotary embeddings that depend on the length; gradient checkpointing; and FSDP layers,
    which all processes must gather equally often.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers.cache_utils import DynamicCache, DynamicLayer  # type: ignore[import-not-found]

    base = unwrap_peft(model)
    config = text_config(base)
    rotary = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    modules = list(base.modules())
    if (
        config is not base.config
        or "dynamic" in rotary
        or "longrope" in rotary
        or any(getattr(module, "gradient_checkpointing", False) for module in modules)
        or any(isinstance(module, FSDPModule) for module in modules)
        or not cache_argument_name(base.base_model)
    ):
        return None
    cache = DynamicCache(config=config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def cache_argument_name(body: torch.nn.Module) -> str:
    """Name of the cache argument (`past_key_values` in older versions of transformers); empty if there is none."""
    parameters = inspect.signature(body.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")
