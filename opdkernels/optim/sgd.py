"""MaskedSGD: SGD on the active coordinates of a mask."""

from __future__ import annotations

from typing import Any

import torch

from opdkernels.ops.step import masked_sgd, sgd_scalars
from opdkernels.ops.step.layout import IS_FIRST
from opdkernels.optim.base import MaskedOptimizer
from opdkernels.optim.batch import StepBatch
from opdkernels.optim.bind_masks import Masks


class MaskedSGD(MaskedOptimizer):
    """SGD on the active coordinates of `masks`. All other coordinates stay bit-identical; weight decay skips them.

    In fp32, active coordinates equal those of `torch.optim.SGD(foreach=False, fused=False)` bit for bit. State takes 4
    bytes per active coordinate with momentum and none without (2 more for bf16 with "split_master" or "kahan").

    Args:
        params: Parameters or parameter groups as `torch.optim.SGD` takes them, fp32 or bf16, preferably named.
        lr: Learning rate (default: 1e-3).
        momentum: Momentum (default: 0).
        dampening: Dampening of the momentum (default: 0).
        weight_decay: Weight decay, added to the gradient (default: 0).
        nesterov: Nesterov momentum (default: False).
        masks: As for `MaskedAdamW`.
        unmasked: As for `MaskedAdamW` (default: "error").
        precision: As for `MaskedAdamW` (default: "split_master").
        weight_decay_target: As for `MaskedAdamW` (default: "zero").
        seed: Seed of "stochastic", 64 bits (default: 0).
        maximize: Ascend instead of descend (default: False).
        foreach: Without effect (default: None).
        differentiable: Not supported; must be False (default: False).
        fused: If True, a GradScaler's scale is applied in the step itself (default: None).

    Raises:
        ValueError: As `MaskedAdamW`, and for nesterov without momentum or with dampening.
        TypeError, RuntimeError: As `MaskedAdamW`.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = MaskedSGD([weight], masks=[torch.tensor([True, False, False, True])], lr=0.5)
        >>> weight.grad = torch.ones(4)
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """

    moments = ("momentum_buffer",)
    own_option = "momentum"

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        masks: Masks,
        unmasked: str = "error",
        precision: str = "split_master",
        weight_decay_target: str = "zero",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "precision": precision,
            "weight_decay_target": weight_decay_target,
            "seed": seed,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, masks, unmasked, defaults)

    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["momentum"] else ()

    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        return sgd_scalars(steps, float(group["lr"]), group["momentum"], group["dampening"], group["weight_decay"])

    def _launch(
        self,
        batch: StepBatch,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        # A new buffer takes the gradient, also where the parameter was stepped without momentum before.
        scalars[torch.tensor(batch.is_first, device=scalars.device), IS_FIRST] = 1.0
        masked_sgd(
            **batch.tensors(),
            scalars=scalars,
            momentum_buffers=batch.state_tensors("momentum_buffer") if group["momentum"] else [],
            grad_scale=grad_scale,
            clip=clip,
            nesterov=group["nesterov"],
            **batch.options(group),
        )
