"""The optimizer of a run, LoRA, and the learning-rate schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.base import Checkpoint
from opdkernels.checkpoint.conversions import model_types_of
from opdkernels.checkpoint.names import unwrap_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.world import World
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks import MaskSet, map_masks
from opdkernels.optim import MaskedAdamW, MaskedSGD
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.binding import local_part
from opdkernels.spectral.randomized import RandomizedSVD, randomized_svd


def build_optimizer(options: DistillOptions, model: torch.nn.Module) -> MaskedOptimizer:
    """MaskedAdamW or MaskedSGD over the trained parameters; without masks every coordinate is active.

    Raises InputError for masks of another model and for masks without an active coordinate.
    """
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    shapes = {unwrap_name(name): tuple(param.shape) for name, param in params}
    masks = load_masks(options.masks, shapes, _model_types(model)) if options.masks else {}
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "weight_decay": options.weight_decay,
        "masks": masks,
        "unmasked": "freeze" if options.masks else "train",
        "precision": options.precision,
        "seed": options.seed,
    }
    try:
        if options.optimizer == "sgd":
            return MaskedSGD(params, momentum=options.momentum, **common)
        return MaskedAdamW(params, betas=options.betas, eps=options.eps, **common)
    except (InputError, UsageError):
        raise
    except ValueError as error:
        if options.masks and "mask" in str(error):
            raise InputError(
                f"the masks do not fit the student ({printable(str(error))}); make them from this model"
            ) from None
        raise UsageError(str(error)) from None


def _model_types(model: torch.nn.Module) -> list[str]:
    config = getattr(model, "config", None)
    return model_types_of(config.to_dict()) if config is not None and hasattr(config, "to_dict") else []


def load_masks(path: str, shapes: Mapping[str, tuple[int, ...]], model_types: Sequence[str] = ()) -> MaskSet:
    """Masks by the names of the trained parameters, whose shapes are given. Those of a checkpoint may have other names.

    Raises InputError if a mask has no trained parameter, or no mask has an active coordinate.
    """
    stored = MaskSet.load(Path(path))
    mapped = map_masks(stored, shapes, model_types=model_types)
    masks, counts = mapped.masks, stored.counts()
    unknown = next((name for name in mapped.unbound if counts[name][0]), None)
    if unknown is not None:
        raise InputError(
            f"there is a mask of {printable(unknown)} and no such parameter is trained; use masks with the student's "
            "parameter names, such as a run's masks/"
        )
    if not masks.num_active:
        raise InputError(
            f"{printable(path)} has no active coordinate, so nothing would be trained; give masks that have some"
        )
    return masks


class FullGradNorm:
    """Norm of the full gradient, frozen coordinates included, taken before gradients are gathered: what trainers
    without masks clip by.

    Covers one backward pass: the gradients of several micro-batches are gathered before they could be added.
    """

    def __init__(self, model: torch.nn.Module):
        self.sum_of_squares: Any = 0.0
        trained = [param for param in model.parameters() if param.requires_grad]
        self.handles = [param.register_post_accumulate_grad_hook(self._add) for param in trained]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()

    def _add(self, param: torch.Tensor) -> None:
        grad = local_part(param.grad)[0].detach()  # type: ignore[arg-type]
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        self.sum_of_squares = self.sum_of_squares + norm.square()

    def pop(self, world: World, device: torch.device) -> float:
        """The norm since the last call, over all processes."""
        total = world.all_reduce({"sum_of_squares": float(self.sum_of_squares)}, device)["sum_of_squares"]
        self.sum_of_squares = 0.0
        return total**0.5


def with_lora(options: DistillOptions, model: torch.nn.Module) -> torch.nn.Module:
    """The model with trainable LoRA factors on every linear layer but the head; `subspace` fixes their inputs."""
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
                    fix_lora_inputs(module, f"{name}.weight", later, options.lora_rank)
    return wrapped


@torch.no_grad()
def fix_lora_inputs(module: Any, name: str, later: Checkpoint, rank: int) -> None:
    """Fixes the inputs of a LoRA layer to the top right singular vectors of the weight's update in a later checkpoint;
    zeros if nothing changed. Raises InputError for a checkpoint of another model."""
    weight, lora_a = module.base_layer.weight, module.lora_A["default"].weight
    info = later.tensors.get(name)
    if info is None or info.shape != tuple(weight.shape):
        raise InputError(
            f"{printable(later.path)} has no {printable(name)} of shape {list(weight.shape)}, as the student has; "
            "give a later checkpoint of this student"
        )
    update = later.read(name, 0, info.numel).view(info.shape).float() - weight.float().cpu()
    if module.fan_in_fan_out:
        update = update.T.contiguous()
    lora_a.zero_().requires_grad_(False)  # [rank, in_features]
    if update.any():
        num_vectors = min(rank, *update.shape)
        svd = randomized_svd(update, num_vectors, names=name)
        assert isinstance(svd, RandomizedSVD)
        lora_a[:num_vectors] = svd.v.T.to(lora_a)


def lr_at(options: DistillOptions, step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant."""
    return options.learning_rate * min(1.0, (step + 1) / (options.warmup_steps + 1))
