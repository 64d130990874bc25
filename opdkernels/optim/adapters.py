"""Adapters for trainers that create the optimizer themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opdkernels.optim.adamw import MaskedAdamW
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.bind_masks import Masks, masks_of_model


def optimizer_cls_and_kwargs(
    model: torch.nn.Module, masks: Masks, args: Any = None, *, cls: type[MaskedOptimizer] = MaskedAdamW, **options: Any
) -> tuple[type[MaskedOptimizer], dict[str, Any]]:
    """The argument `optimizer_cls_and_kwargs` of Hugging Face's Trainer and TRL's trainers.

    Parameters are passed with their names, which Trainer's own groups lack, in groups with and without weight decay.

    Args:
        model: The model that is trained.
        masks: As for `MaskedAdamW`, by the names of the model, or a list in the order of `model.parameters()`.
        args: A TrainingArguments: its learning_rate and weight_decay, and for AdamW adam_beta1, adam_beta2 and
            adam_epsilon are used (default: none).
        cls: MaskedAdamW or MaskedSGD (default: MaskedAdamW).
        **options: Options of `cls`; they override those of `args`.

    Returns:
        The optimizer class and its keyword arguments.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> cls, kwargs = optimizer_cls_and_kwargs(model, {"weight": torch.tensor([[True, False]])}, lr=0.1)
        >>> optimizer = cls(**kwargs)
    """
    if args is not None:
        from_args = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        if issubclass(cls, MaskedAdamW):
            from_args |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options = {**from_args, **options}
    return cls, {"params": NamedGroups(model), "masks": masks_of_model(masks, model), **options}


class NamedGroups:
    """Groups of a model's trainable parameters with their names: vectors (biases, norms) without weight decay.

    The parameters are read when the groups are iterated, since FSDP replaces them.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with_decay: list[tuple[str, torch.nn.Parameter]] = []
        without_decay: list[tuple[str, torch.nn.Parameter]] = []
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                (without_decay if param.ndim < 2 else with_decay).append((name, param))
        if with_decay:
            yield {"params": with_decay}
        if without_decay:
            yield {"params": without_decay, "weight_decay": 0.0}
