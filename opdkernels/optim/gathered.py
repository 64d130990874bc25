"""The gradient of a parameter as its active values, in the place of the dense gradient.

`p.grad` is then a tensor of the shape, dtype and device of the parameter with memory for the active coordinates only;
frozen coordinates count as zero. What trainers do with gradients between the backward pass and the step works on it:
`torch.nn.utils.clip_grad_norm_`, a GradScaler, scaling, adding, resetting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
NORMS = {aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dtype}
IN_PLACE = {aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar, aten.zero_.default}
OUT_OF_PLACE = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.clone.default}
UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_.default


class GatheredGrad(torch.Tensor):
    """The gradient of the active coordinates of one parameter.

    Attributes:
        active: fp32 [num_active].
        add_dense: Adds the active coordinates of a dense gradient to `active`.
    """

    active: torch.Tensor
    add_dense: Callable[[torch.Tensor, torch.Tensor], None]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        active: torch.Tensor,
        like: torch.Tensor,
        add_dense: Callable[[torch.Tensor, torch.Tensor], None],
        dtype: torch.dtype | None = None,
    ) -> GatheredGrad:
        grad = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype or like.dtype, device=active.device
        )
        grad.active, grad.add_dense = active, add_dense
        return grad

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GatheredGrad({list(self.shape)}, active={self.active})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs, grad = kwargs or {}, args[0]
        if func is UNSCALE:
            for item in grad:  # the arguments are a list of gradients, found_inf and the inverse scale
                func([item.active if isinstance(item, cls) else item], *args[1:])
            return None
        if isinstance(grad, cls):
            others = args[1:]
            has_scalars = not any(isinstance(other, cls) or (torch.is_tensor(other) and other.ndim) for other in others)
            if func in NORMS:
                return func(grad.active, *others, **kwargs)
            if func in IN_PLACE and has_scalars:
                func(grad.active, *others, **kwargs)
                return grad
            if func in OUT_OF_PLACE and has_scalars:
                return cls(func(grad.active, *others, **kwargs), grad, grad.add_dense)
            if func in (aten.add_.Tensor, aten.add.Tensor) and not kwargs and others[0].shape == grad.shape:
                result = grad if func is aten.add_.Tensor else cls(grad.active.clone(), grad, grad.add_dense)
                if isinstance(others[0], cls):
                    result.active.add_(others[0].active)
                else:
                    result.add_dense(result.active, others[0])
                return result
            if func is aten.detach.default:
                return cls(grad.active, grad, grad.add_dense)
            if func is aten._to_copy.default:
                moved = grad.active.to(kwargs.get("device") or grad.device, copy=True)
                return cls(moved, grad, grad.add_dense, kwargs.get("dtype"))
        raise RuntimeError(
            f"{func} is not supported on the gradients that gather_active_grads gathers; use zero_frozen_grads, which "
            "leaves dense gradients"
        )
