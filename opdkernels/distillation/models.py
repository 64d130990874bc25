"""Models of transformers: loading, and the LM head as `linear_divergence` takes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.torch_pickle import TorchFile
from opdkernels.distillation.text import MODEL_REMEDY, TextProcessor, input_errors, transformers
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.ops.divergence import LMHead

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(path: str, dtype: str, device: torch.device) -> Any:
    """A causal or image-text model in evaluation mode (no dropout). Raises InputError if it cannot be loaded."""
    hf = transformers()
    name = printable(path)
    validate_pickles(path)
    with input_errors(f"{name} cannot be loaded as a model", MODEL_REMEDY):
        config = hf.AutoConfig.from_pretrained(path)
        takes_images = type(config) in hf.AutoModelForImageTextToText._model_mapping
        auto_class = hf.AutoModelForImageTextToText if takes_images else hf.AutoModelForCausalLM
        model, loading = auto_class.from_pretrained(path, dtype=DTYPES[dtype], output_loading_info=True)
        if loading["missing_keys"]:
            missing = printable(sorted(loading["missing_keys"])[0])
            raise InputError(
                f"{name} lacks {missing} (and {len(loading['missing_keys']) - 1} more); these weights would be random"
            )
        model = model.to(device).eval()
        validate_lm_head(model, path)
    return model


def validate_pickles(path: str) -> None:
    """Raises InputError if a folder has weights in a pickle that would run code or exhaust memory when it is loaded."""
    for file in sorted(Path(path).glob("pytorch_model*.bin")):
        TorchFile(os.fspath(file), "read").close()


@torch.no_grad()
def validate_lm_head(model: Any, path: str) -> None:
    """Raises InputError if a model computes logits that are NaN, or differently from `lm_head_of`."""
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    mask = torch.ones_like(ids)
    hidden = unwrap_peft(model).base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, attention_mask=mask).logits[0].float()
    if expected.isnan().any():
        raise InputError(
            f"{printable(path)} computes logits that are NaN: its weights are damaged; choose another model"
        )
    logits = head_logits(hidden[0].float(), lm_head_of(model))
    if not (logits - expected).abs().max() <= 0.02 * expected.abs().max() and torch.isfinite(expected).all():
        raise InputError(
            f"{printable(path)} computes its logits in an unsupported way ({type(model).__name__}); "
            "choose another model"
        )


def head_logits(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    """fp32 logits [num_tokens, vocab_size] of hidden states [num_tokens, hidden_size]."""
    logits = hidden.float() @ head.weight[: head.vocab].float().T
    if head.bias is not None:
        logits = logits + head.bias[: head.vocab].float()
    logits = logits * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def max_positions(model: Any) -> int:
    """Maximum length of prompt and completion together; `model` may be a configuration."""
    return getattr(text_config(model), "max_position_embeddings", None) or 1 << 30


def common_vocab_size(student: Any, teachers: Iterable[Any]) -> int:
    """Number of ids that all models (or configurations) have: models of one family pad their heads to different
    sizes."""
    return min(
        len(lm_head_of(model).weight) if isinstance(model, torch.nn.Module) else text_config(model).vocab_size
        for model in (student, *teachers)
    )


def text_config(model: Any) -> Any:
    """The configuration of a model's language part; `model` may be a configuration."""
    return getattr(unwrap_peft(model), "config", model).get_text_config()


def load_config(path: str) -> Any:
    """The configuration of a model. Raises InputError if it cannot be loaded."""
    with input_errors(f"{printable(path)} cannot be loaded as a model", MODEL_REMEDY):
        return transformers().AutoConfig.from_pretrained(path)


def end_token_ids(model: Any, text: TextProcessor, stop_token: str) -> list[int]:
    """Ids that end a completion: end tokens of the model and the tokenizer, and `stop_token` if it is not empty."""
    model_ids = getattr(model.generation_config, "eos_token_id", None)
    ids = set(model_ids if isinstance(model_ids, (list, tuple)) else [model_ids]) | {text.tokenizer.eos_token_id}
    if stop_token:
        stop_ids = text.ids(stop_token, add_special_tokens=False)
        if len(stop_ids) != 1:
            raise UsageError(
                f"stop_token is {stop_token!r}, which is {len(stop_ids)} tokens of the student; "
                "choose a text of one token"
            )
        ids.add(stop_ids[0])
    return sorted(i for i in ids if i is not None)


def unwrap_peft(model: Any) -> Any:
    """The model of transformers inside a peft wrapper, with its LoRA factors in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head_of(model: Any, vocab: int | None = None) -> LMHead:
    """The LM head of a model; ids from `vocab` on are padding without probability."""
    base = unwrap_peft(model)
    linear, config = base.get_output_embeddings(), text_config(base)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    weight = linear.weight if not hasattr(linear, "base_layer") else linear.base_layer.weight
    return LMHead(
        weight,
        getattr(linear, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        vocab=vocab,
    )
