"""MaskedAdamW: AdamW on the active coordinates of a mask."""

from __future__ import annotations

from typing import Any

import torch

from opdkernels.ops.step import adamw_scalars, masked_adamw
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.batch import StepBatch
from opdkernels.optim.bind_masks import Masks


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the active coordinates of `masks`. All other coordinates stay bit-identical; weight decay skips them.

    In fp32, active coordinates equal those of `torch.optim.AdamW(foreach=False, fused=False)` bit for bit, provided
    that its square root is rounded correctly: this one is, and torch's is off by one unit in the last place for some
    values on some CPUs. This holds for `lr` as a number or a tensor and for `betas` as numbers; with `betas` as
    tensors, results agree to rounding.

    State takes 8 bytes per active coordinate (12 with amsgrad, 2 more for bf16 with "split_master" or "kahan", the size
    of the dtype more with weight_decay_target="init"); a mask takes 1 bit per coordinate or, below a density of 1/32, 4
    bytes per active coordinate.

    The weights are checked at each step before anything changes: a model may be moved, or cast between fp32 and bf16,
    only before its first step.

    Args:
        params: Parameters or parameter groups as `torch.optim.AdamW` takes them, fp32 or bf16, preferably named
            (`model.named_parameters()`).
        lr: Learning rate (default: 1e-3).
        betas: Decay rates of the first and second moments (default: (0.9, 0.999)).
        eps: Added to the denominator (default: 1e-8).
        weight_decay: Decoupled weight decay (default: 1e-2).
        amsgrad: Use the largest second moment so far (default: False).
        masks: A MaskSet, the path of one, a mapping of names to Masks or bool tensors, or a list of these, one per
            parameter in their order. Names are matched as `analyze` matches checkpoints: without the prefixes of
            wrappers, and fused against split. A mask with active coordinates must have a parameter.
        unmasked: What to do with a parameter without a mask: "error", "freeze" it, or "train" all of it
            (default: "error").
        precision: How updates of bf16 parameters are kept: "split_master" stores 16 more bits per coordinate, so that
            weight and remainder are an fp32 master; "kahan" stores a bf16 compensation; "stochastic" rounds randomly by
            `seed`; "nearest" rounds each step (default: "split_master").
        weight_decay_target: What weight decay pulls towards: "zero", or "init", the value that a weight had when it
            last became active (default: "zero").
        seed: Seed of "stochastic", 64 bits (default: 0).
        maximize: Ascend instead of descend (default: False).
        foreach: Without effect (default: None).
        capturable: Not supported; must be False (default: False).
        differentiable: Not supported; must be False (default: False).
        fused: If True, a GradScaler's scale is applied in the step itself (default: None).

    Raises:
        ValueError: A parameter has no mask or one of another shape, a mask has no parameter, a list has another length,
            a parameter is given twice or shares memory with another one, or an option is out of range.
        TypeError: A parameter is neither fp32 nor bf16, the masks are of another type, or an option is not supported.
        RuntimeError: foreach=True together with fused=True.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = MaskedAdamW([weight], masks=[torch.tensor([True, False, False, True])], lr=0.5)
        >>> weight.grad = torch.ones(4)
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    required_moments = ("exp_avg", "exp_avg_sq")
    own_option = "betas"
    dense_options = {"decoupled_weight_decay": True}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        masks: Masks,
        unmasked: str = "error",
        precision: str = "split_master",
        weight_decay_target: str = "zero",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "precision": precision,
            "weight_decay_target": weight_decay_target,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, masks, unmasked, defaults)

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["amsgrad"] else self.moments[:2]

    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        lr, beta1, beta2 = (
            value.detach().reshape(()).cpu() if isinstance(value, torch.Tensor) else value
            for value in (group["lr"], *group["betas"])
        )
        return adamw_scalars(steps, lr, (beta1, beta2), group["eps"], group["weight_decay"])

    def _launch(
        self,
        batch: StepBatch,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        masked_adamw(
            **batch.tensors(),
            exp_avgs=batch.state_tensors("exp_avg"),
            exp_avg_sqs=batch.state_tensors("exp_avg_sq"),
            scalars=scalars,
            max_exp_avg_sqs=batch.state_tensors("max_exp_avg_sq"),
            grad_scale=grad_scale,
            clip=clip,
            **batch.options(group),
        )
