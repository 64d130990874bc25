"""The optimizer of a run: masked in every case, with every coordinate active where there are no masks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.names import canonical_name, match_names
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.world import Ranks
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks import MaskSet
from opdkernels.optim import MaskedAdamW, MaskedSGD
from opdkernels.optim.binding import local_part
from opdkernels.optim.masked import MaskedOptimizer
from opdkernels.spectral.randomized import RandomizedSVD, randomized_svd


def optimizer_of(options: DistillOptions, model: torch.nn.Module) -> MaskedOptimizer:
    """MaskedAdamW or MaskedSGD of the parameters that are trained. Raises InputError for masks of another model, or of nothing."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    masks = MaskSet.load(Path(options.masks)) if options.masks else {}
    unmasked = "freeze" if options.masks else "train"
    names = {canonical_name(name, keep_prefixes=True) for name, _ in named}
    if isinstance(masks, MaskSet):  # of a checkpoint, whose names may not be those of parameters
        own = match_names(masks, names)
        masks = MaskSet({own.get(name, name): mask for name, mask in masks.items()})
    other = (
        next((name for name, (active, _) in masks.counts().items() if active and name not in names), None)
        if isinstance(masks, MaskSet)
        else None
    )
    if other is not None:
        raise InputError(
            f"there is a mask of {printable(other)} and no such parameter is trained; take masks by the student's own names, such as a run's masks/"
        )
    if isinstance(masks, MaskSet) and not masks.num_active:
        raise InputError(
            f"{printable(options.masks)} has no active coordinate, so that nothing would be trained; give masks that have some"
        )
    try:
        if options.optimizer == "sgd":
            return MaskedSGD(
                named,
                lr=options.learning_rate,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
                masks=masks,
                unmasked=unmasked,
                precision=options.precision,
                seed=options.seed,
            )
        return MaskedAdamW(
            named,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            masks=masks,
            unmasked=unmasked,
            precision=options.precision,
            seed=options.seed,
        )
    except (InputError, UsageError):
        raise
    except ValueError as error:
        if options.masks and "mask" in str(error):
            raise InputError(
                f"the masks do not fit the student ({printable(str(error))}); make them from this model"
            ) from None
        raise UsageError(str(error)) from None


class WholeNorm:
    """The norm of the whole gradient, frozen coordinates included, taken before gradients are gathered: what other trainers clip by.

    Of one backward; gradients of several that add up are gone by the time they could be added.
    """

    def __init__(self, model: torch.nn.Module):
        self.square: Any = 0.0
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._add)

    def _add(self, param: torch.Tensor) -> None:
        self.square = (
            self.square + torch.linalg.vector_norm(local_part(param.grad)[0].detach(), dtype=torch.float64).square()
        )  # type: ignore[arg-type]

    def take(self, ranks: Ranks, device: torch.device) -> float:
        """The norm since the last call, over all processes."""
        found, self.square = ranks.total({"square": float(self.square)}, device)["square"], 0.0
        return found**0.5


def with_lora(options: DistillOptions, model: torch.nn.Module) -> torch.nn.Module:
    """The model with LoRA factors on every linear layer but the head, these alone trained; with `subspace`, of fixed inputs."""
    try:
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("lora_rank needs peft, which is not installed; pip install 'opdkernels[distill]'") from None

    config = LoraConfig(
        r=options.lora_rank, lora_alpha=options.lora_rank, target_modules="all-linear", lora_dropout=0.0
    )
    wrapped = get_peft_model(model, config).eval()
    if options.subspace:
        with contextlib.closing(open_checkpoint(options.subspace)) as later:
            for name, module in wrapped.get_base_model().named_modules():
                if hasattr(module, "lora_A"):
                    take_inputs(module, f"{name}.weight", later, options.lora_rank)
    return wrapped


@torch.no_grad()
def take_inputs(module: Any, name: str, later: Checkpoint, rank: int) -> None:
    """Fixes the inputs of a LoRA layer to the top right singular vectors of what its weight had changed in a checkpoint; zeros
    where nothing had. Raises InputError for a checkpoint of another model."""
    weight, factor = module.base_layer.weight, module.lora_A["default"].weight
    info = later.tensors.get(name)
    if info is None or info.shape != tuple(weight.shape):
        raise InputError(
            f"{printable(later.path)} has no {printable(name)} of shape {list(weight.shape)}, as the student has; give a later checkpoint of this student"
        )
    change = later.read(name, 0, info.numel).view(info.shape).float() - weight.float().cpu()
    if module.fan_in_fan_out:
        change = change.T.contiguous()
    factor.zero_().requires_grad_(False)
    if change.any():
        kept = min(rank, *change.shape)
        found = randomized_svd(change, kept, names=name)
        assert isinstance(found, RandomizedSVD)
        factor[:kept] = found.v.T.to(factor)


def rate(options: DistillOptions, step: int) -> float:
    """Learning rate of step 0, 1, …: rises over the warm-up, then stays."""
    return options.learning_rate * min(1.0, (step + 1) / (options.warmup_steps + 1))
