"""What plugs masked optimizers into trainers that make the optimizer themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opdkernels.optim.binding import Masks
from opdkernels.optim.masked import MaskedAdamW, MaskedOptimizer


def optimizer_cls_and_kwargs(
    model: torch.nn.Module, masks: Masks, args: Any = None, *, cls: type[MaskedOptimizer] = MaskedAdamW, **options: Any
) -> tuple[type[MaskedOptimizer], dict[str, Any]]:
    """For Hugging Face's Trainer and TRL's: `Trainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, masks, args))`.

    Parameters go in with their names, which Trainer's own groups lack, in groups with and without weight decay. From `args`, a
    TrainingArguments, come learning_rate, weight_decay and, of AdamW, adam_beta1, adam_beta2 and adam_epsilon; `options` go before them.
    """
    if args is not None:
        found = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        if issubclass(cls, MaskedAdamW):
            found |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options = {**found, **options}
    return cls, {"params": NamedGroups(model), "masks": masks, **options}


class NamedGroups:
    """Groups of a model's trainable parameters, named, with weight decay but for vectors (biases, norms): of those it has when they are asked for, since
    FSDP puts others in their place."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __iter__(self) -> Iterator[dict[str, Any]]:
        decayed: list[tuple[str, torch.nn.Parameter]] = []
        plain: list[tuple[str, torch.nn.Parameter]] = []
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                (plain if param.ndim < 2 else decayed).append((name, param))
        if decayed:
            yield {"params": decayed}
        if plain:
            yield {"params": plain, "weight_decay": 0.0}
