"""What MaskedAdamW and MaskedSGD share: stepping, clipping, state dicts and changes of the masks.

The state of a parameter is created at its first step. Every tensor is [num_active] unless noted:

- `step`: steps taken, fp32, one element
- `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` or `momentum_buffer`: fp32
- `remainder` (int16) or `compensation` (bf16): for bf16 parameters, by precision
- `init_value`: initial weights, dtype of the parameter
- `step_group` (uint8): group of each coordinate, and `group_steps` (fp32 [num_groups]): step count of each group; only
  after `set_masks`, if coordinates have different step counts
- `mask`: digest of the mask, int64, one element

For DTensor parameters, `state_dict` returns each [num_active] tensor as a DTensor of the parameter's shape, zero at
frozen coordinates, and step counts per coordinate as `steps`. torch.distributed.checkpoint can then load it at any
world size. `load_state_dict` accepts both forms.
"""

from __future__ import annotations

import inspect
import itertools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from opdkernels.errors import InputError, printable
from opdkernels.ops.step import active_indices
from opdkernels.ops.step.validation import RESIDUAL_DTYPES
from opdkernels.optim.active import gather_active, restore_dropped
from opdkernels.optim.batch import RESIDUALS, PendingStep, StepBatch, validate_addresses
from opdkernels.optim.bind_masks import Masks, bind_masks
from opdkernels.optim.binding import Binding, LocalMask, is_dtensor, local_gradient, local_part, validate_gradient_shape
from opdkernels.optim.distinct import named_params, validate_distinct, validate_memory
from opdkernels.optim.gathered import GatheredGrad
from opdkernels.optim.options import is_number, validate_flags, validate_options
from opdkernels.optim.state import (
    saved_digest,
    sharded_dims,
    state_error,
    step_groups_of,
    to_dense,
    validate_step,
    validate_step_counts,
)
from opdkernels.optim.state_dicts import SavedState, match_saved

ParamKey = tuple[int, int]  # group, parameter


class MaskedOptimizer(torch.optim.Optimizer):
    """Base class of MaskedAdamW and MaskedSGD."""

    moments: tuple[str, ...] = ()
    required_moments: tuple[str, ...] = ()  # that every state has after the first step
    own_option = ""  # tells a state dict of this optimizer from that of another one
    dense_options: dict[str, Any] = {}  # noqa: RUF012  options that only torch's own optimizer has in its groups

    def __init__(self, params: Any, masks: Masks, unmasked: str, defaults: dict[str, Any]):
        validate_options(defaults)
        validate_flags(defaults)
        self._unmasked = unmasked
        self._bindings_by_group: list[list[Binding]] = []
        self._gathered_grads: dict[ParamKey, torch.Tensor] = {}  # of DTensors, fp32 [num_active]
        self._clip_factor: torch.Tensor | None = None  # the next step multiplies gradients by it; fp32, one element
        super().__init__(params, defaults)
        self._validate_memory()
        # Which mask is meant by a name can depend on all names, so they are bound when all groups are known.
        self._bindings_by_group = bind_masks(masks, self.param_groups, unmasked)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for `torch.optim.Optimizer.add_param_group`; masks of its parameters are in `masks`, as in
                the constructor, and without it the constructor's `unmasked` applies.

        Raises:
            ValueError, TypeError: As the constructor; no group was added.
        """
        is_constructed, masks = bool(self._bindings_by_group), {}
        if isinstance(param_group, dict):
            if "masks" in param_group and not is_constructed:
                raise ValueError(
                    "a group has masks; give the masks of all groups as the argument masks. "
                    "ZeroRedundancyOptimizer, which copies them to its groups, is not supported; use FSDP2"
                )
            masks = param_group.pop("masks", {})
            if not isinstance(param_group.get("params", ()), (torch.Tensor, set)):
                param_group["params"] = list(param_group["params"])
                names = param_group.get("param_names")
                if names is not None and len(names) != len(param_group["params"]):
                    raise ValueError(
                        f"a group has {len(param_group['params'])} parameters and {len(names)} param_names; "
                        "give one name per parameter"
                    )
                validate_distinct(named_params([*self.param_groups, param_group]))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate_options(group)
            if is_constructed:
                self._validate_memory()
                num_params = sum(len(bindings) for bindings in self._bindings_by_group)
                self._bindings_by_group += bind_masks(masks, [group], self._unmasked, first_id=num_params)
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def _active_names(self) -> tuple[str, ...]:
        """Names of the state that is [num_active]."""
        return (*self.moments, *RESIDUALS.values(), "init_value", "step_group")

    def _validate_memory(self) -> None:
        validate_memory([(name, local_part(param)[0]) for name, param in named_params(self.param_groups)])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to `step`: with `fused=True`. Also with gathered gradients of DTensors,
        which a GradScaler cannot find; `step` then raises an error."""
        return bool(self.defaults["fused"] or self._gathered_grads)

    def __getstate__(self) -> dict[str, Any]:
        attributes = {key: self.__dict__[key] for key in ("_unmasked", "_bindings_by_group")}
        return {
            **super().__getstate__(),
            **attributes,
            "_gathered_grads": {},
            "_clip_factor": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; options that it lacks have the defaults of the constructor."""
        super().__setstate__(state)
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if parameter.default is not parameter.empty and name != "unmasked":
                for options in (self.defaults, *self.param_groups):
                    options.setdefault(name, parameter.default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the parameters that have a gradient. Returns the loss of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._gathered_grads and found_inf is not None:
            raise RuntimeError(
                "a GradScaler cannot see gradients of DTensors that gather_active_grads gathers; "
                "train in bfloat16 without one, or use zero_frozen_grads"
            )
        try:
            if found_inf is None or not bool(found_inf):
                # Every group is validated before any parameter changes.
                pending = [self._pending(index, group) for index, group in enumerate(self.param_groups)]
                validate_addresses(itertools.chain.from_iterable(pending))
                for group, steps in zip(self.param_groups, pending, strict=True):
                    self._step_group(group, steps, grad_scale)
        finally:
            self._clip_factor = None
        self._gathered_grads.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, gathered ones too, and the clipping of the next step."""
        super().zero_grad(set_to_none)
        self._gathered_grads.clear()
        self._clip_factor = None

    def _bindings(self) -> Iterable[tuple[ParamKey, torch.Tensor, Binding]]:
        """Key, current parameter and binding of every parameter."""
        for index, group in enumerate(self.param_groups):
            for j, (param, binding) in enumerate(zip(group["params"], self._bindings_by_group[index], strict=True)):
                yield (index, j), param, binding

    def _pending(self, index: int, group: dict[str, Any]) -> list[PendingStep]:
        """The parameters of a group that have a gradient, validated."""
        validate_options(group)
        pending = []
        for j, (param, binding) in enumerate(zip(group["params"], self._bindings_by_group[index], strict=True)):
            if param.grad is None and (index, j) not in self._gathered_grads:
                continue
            state, local = self.state.get(param), local_part(param)[0]
            binding.validate_weights(local, has_state=bool(state))
            local_mask, grad = binding.local_mask(param), self._gradient((index, j), param)
            assert grad is not None
            if (
                local_mask.num_active
                and group["precision"] == "stochastic"
                and local_mask.offset is None
                and param.dtype == torch.bfloat16
            ):
                raise ValueError(
                    f"{binding.display_name} is not sharded along its first dimension; "
                    'precision "stochastic" needs it, choose "split_master"'
                )
            if grad.device != local.device:
                raise ValueError(
                    f"{binding.display_name} is on {local.device}, its gradient on {grad.device}; "
                    "call zero_grad() after moving a model"
                )
            if state:
                self._validate_state(state, local, local_mask, binding, group)
            pending.append(PendingStep(param, local, grad, local_mask, binding))
        return pending

    def _step_group(self, group: dict[str, Any], pending: list[PendingStep], grad_scale: torch.Tensor | None) -> None:
        batches: defaultdict[torch.device, StepBatch] = defaultdict(StepBatch)
        counts = []
        for item in pending:
            state = self.state[item.param]
            is_first = self._init_state(state, item.local, item.local_mask, item.binding, group)
            counts.append(state["step"])
            if "group_steps" in state:
                counts.append(state["group_steps"])
            if item.local_mask.num_active:
                batches[item.local.device].add(item, state, is_first)
        for device, batch in batches.items():
            scale, clip = (
                None if factor is None else factor.to(device, torch.float32)
                for factor in (grad_scale, self._clip_factor)
            )
            scalars = batch.scalars(lambda steps: self._scalars(steps, group)).to(device)
            self._launch(batch, group, scalars, scale, clip)
            for local, weights in zip(batch.locals, batch.params, strict=True):
                if weights is not local:
                    local.copy_(weights)
        if counts:
            torch._foreach_add_(counts, 1)
        for item in pending:
            item.binding.last_step = item.local.dtype, item.local.device

    def _gathered(self, key: ParamKey, param: torch.Tensor) -> torch.Tensor | None:
        """The gathered gradient, fp32 [num_active], if it was gathered."""
        return param.grad.active if isinstance(param.grad, GatheredGrad) else self._gathered_grads.get(key)

    def _gradient(self, key: ParamKey, param: torch.Tensor) -> torch.Tensor | None:
        """The local gradient, contiguous: of the shape of the local parameter, or fp32 [num_active] where gathered."""
        gathered, grad = self._gathered(key, param), param.grad
        if grad is None:
            return gathered
        name = self._bindings_by_group[key[0]][key[1]].display_name
        if gathered is None:
            return local_gradient(param, grad, name)
        validate_gradient_shape(param, grad, name)
        return gathered

    def _active_gradient(self, key: ParamKey, param: torch.Tensor, binding: Binding) -> torch.Tensor | None:
        """The local gradient of the active coordinates, fp32 [num_active]."""
        gathered = self._gathered(key, param)
        grad = self._gradient(key, param)
        return grad if grad is None or gathered is not None else gather_active(grad, binding.local_mask(param))

    def _discard_gathered(self) -> None:
        """Discard gathered gradients."""
        self._gathered_grads.clear()
        for _, param, _ in self._bindings():
            if isinstance(param.grad, GatheredGrad):
                param.grad = None

    def _init_state(
        self, state: dict[str, Any], local: torch.Tensor, local_mask: LocalMask, binding: Binding, group: dict[str, Any]
    ) -> bool:
        """Create missing state. Returns whether moments were created: SGD then copies the gradient to its buffer."""
        missing = {name: dtype for name, dtype in self._state_dtypes(group, local.dtype).items() if name not in state}
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["mask"] = torch.tensor(binding.digest, dtype=torch.int64, device="cpu")
            if group["weight_decay_target"] == "init":
                state["init_value"] = gather_active(local, local_mask).to(local.dtype)
        for name, dtype in missing.items():
            if name != "init_value":
                state[name] = torch.zeros(local_mask.num_active, dtype=dtype, device=local.device)
        return not missing.keys().isdisjoint(self.moments)

    def _state_dtypes(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes of the [num_active] state of a parameter of this dtype."""
        dtypes = dict.fromkeys(self._moment_names(group), torch.float32)
        if dtype == torch.bfloat16 and group["precision"] in RESIDUALS:
            dtypes[RESIDUALS[group["precision"]]] = RESIDUAL_DTYPES[group["precision"]]
        if group["weight_decay_target"] == "init":
            dtypes["init_value"] = dtype
        return dtypes

    def _validate_state(
        self, state: dict[str, Any], local: torch.Tensor, local_mask: LocalMask, binding: Binding, group: dict[str, Any]
    ) -> None:
        """Raise InputError for state that does not fit the parameter, before anything changes."""
        validate_step(state, binding)
        dtypes = self._state_dtypes(group, local.dtype)
        if "init_value" in dtypes and "init_value" not in state:
            raise state_error(
                binding, 'lacks the initial weights, which weight_decay_target="init" needs from the first step on'
            )
        if "step_group" in state:
            dtypes["step_group"] = torch.uint8
        for name, dtype in dtypes.items():
            if name not in state:
                continue
            value = state[name]
            if not isinstance(value, torch.Tensor):
                raise state_error(binding, f"has a {type(value).__name__} as {name}, not a tensor")
            if (
                value.dtype != dtype
                or value.shape != (local_mask.num_active,)
                or value.device != local.device
                or not value.is_contiguous()
            ):
                raise state_error(
                    binding,
                    f"has {name} of {value.dtype} {list(value.shape)} on {value.device}, "
                    f"not {dtype} [{local_mask.num_active}] on {local.device}",
                )

    @abstractmethod
    def _moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the moments that a group keeps."""

    @abstractmethod
    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        """fp32 [len(steps), NUM_SCALARS]: the scalars of the operator at each step count."""

    @abstractmethod
    def _launch(
        self,
        batch: StepBatch,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        """Step the parameters of a batch."""

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Compute the norm of the active gradients and clip it to `max_norm` in the next step.

        Unlike `torch.nn.utils.clip_grad_norm_`, this leaves `.grad` unchanged: `step` multiplies by the clip factor.
        Frozen coordinates are excluded; the norm of the full gradient is larger, by about 1 / sqrt(density) if
        gradients are of similar size everywhere. With a GradScaler, call `scaler.unscale_` first. For DTensors, every
        rank of their mesh must call this.

        Args:
            max_norm: Maximum norm, not negative.
            norm_type: Must be 2 (default: 2).

        Returns:
            The norm of the active gradients before clipping, fp32, one element.

        Raises:
            ValueError: Another norm type, or `max_norm` is negative or no number.
        """
        if norm_type != 2.0:
            raise ValueError(f"the norm must be of type 2, not {norm_type}")
        if not is_number(max_norm) or not max_norm >= 0:
            raise ValueError(f"max_norm is {max_norm!r}; give a number that is not negative")
        # Sums of squares by mesh dimensions of the sharding and by device: one copy to the host each.
        sums: dict[tuple[Any, torch.device], torch.Tensor] = {}
        for key, param, binding in self._bindings():
            local_mask, device = binding.local_mask(param), local_part(param)[0].device
            total = sums.setdefault((sharded_dims(param), device), torch.zeros((), dtype=torch.float64, device=device))
            values = self._active_gradient(key, param, binding) if local_mask.num_active else None
            if values is not None:
                total += torch.linalg.vector_norm(values, dtype=torch.float64).square()
        for (dims, _), total in sums.items():
            for mesh, dim in dims:
                torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        norm = torch.stack([total.cpu() for total in sums.values()]).sum().sqrt()
        self._clip_factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        return norm.float()

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.Optimizer` gives it; for DTensors, compact state as DTensors of the parameter's
        shape."""
        result = super().state_dict()
        dense_states: dict[Any, dict[str, Any]] = {}
        keys = [key for group in result["param_groups"] for key in group["params"]]
        for key, (_, param, binding) in zip(keys, self._bindings(), strict=True):
            if key in result["state"] and is_dtensor(param):
                state = dict(result["state"][key])
                steps, step_group = state.pop("group_steps", state["step"].view(1)), state.pop("step_group", None)
                if step_group is not None:
                    state["steps"] = steps[step_group.long().cpu()].to(step_group.device)
                else:
                    state["steps"] = steps.to(local_part(param)[0].device).expand(binding.local_mask(param).num_active)
                dense_states[key] = {
                    name: to_dense(value, param, binding) if name in ("steps", *self._active_names) else value
                    for name, value in state.items()
                }
        return {**result, "state": {**result["state"], **dense_states}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`. Tensors may be compact, [num_active], or have the parameter's shape;
        they are copied to the parameter's device.

        Args:
            state_dict: What `state_dict` returned, for the same masks. Parameters are matched by their names where
                both sides have names, else by position. Options that it lacks keep their values, and entries that
                belong to no parameter are kept, as torch.optim keeps them.

        Raises:
            InputError: The state belongs to other masks or parameters or does not fit; nothing has changed.
        """
        saved = self._match_saved(state_dict)
        groups = [self._loaded_group(*both) for both in zip(self.param_groups, saved.groups, strict=True)]
        self._load(saved, groups)

    def _match_saved(self, state_dict: dict[str, Any]) -> SavedState:
        """A saved state in the order of the parameters, after the hooks of load_state_dict."""
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):  # type: ignore[attr-defined]
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return match_saved(state_dict, self.param_groups, ("mask", "step", *self.moments))

    def _load(self, saved: SavedState, groups: list[dict[str, Any]]) -> None:
        """Replace state and options by saved ones, after all of them are validated."""
        loaded = {}
        for entry, ((index, _), param, binding) in zip(saved.states, self._bindings(), strict=True):
            if entry:
                loaded[param] = self._loaded_state(entry, param, binding, groups[index])
        for group, new_group in zip(self.param_groups, groups, strict=True):
            group.update(new_group)
        self.state.clear()
        self.state.update(loaded)
        self.state.update(saved.others)
        for _, param, binding in self._bindings():
            local = local_part(param)[0]
            binding.last_step = (local.dtype, local.device) if param in loaded else None
        self._clip_factor = None
        for hook in list(self._optimizer_load_state_dict_post_hooks.values()):  # type: ignore[attr-defined]
            hook(self)

    def _loaded_group(self, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """A group with the options of a saved one; options that are newer than the state keep their values.

        Raises InputError for another optimizer's group and for options that are not valid.
        """
        if self.own_option not in saved:
            raise InputError(
                f"the optimizer state has no {self.own_option}: it is another optimizer's; "
                f"give one of {type(self).__name__}, or a dense one to load_dense_state_dict"
            )
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        merged = {**group, **saved, **names}
        try:
            validate_options(merged)
        except (TypeError, ValueError) as error:
            raise InputError(f"the optimizer state cannot be loaded: {error}") from None
        return merged

    def _loaded_state(
        self, saved: Mapping[str, Any], param: torch.Tensor, binding: Binding, group: dict[str, Any]
    ) -> dict[str, Any]:
        """The compact state of a parameter from a saved one, validated."""
        local_mask, local = binding.local_mask(param), local_part(param)[0]
        if "mask" not in saved:
            raise state_error(binding, "has no mask: it is a dense optimizer's, which load_dense_state_dict takes")
        if saved_digest(saved["mask"], binding) != binding.digest:
            raise state_error(binding, "belongs to another mask")
        if "step" not in saved:
            raise state_error(binding, "has no step count")
        lacking = [name for name in self.required_moments if name not in saved]
        if lacking:
            raise state_error(binding, f"has no {lacking[0]}")
        state: dict[str, Any] = {}
        for name, value in saved.items():
            if name not in ("step", "mask", "steps", "group_steps", *self._active_names):
                state[name] = value.to(local.device, copy=True) if isinstance(value, torch.Tensor) else value
                continue
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                raise state_error(binding, f"has a {type(value).__name__} as {name}, not a tensor") from None
            if value.layout != torch.strided or value.is_meta:
                raise state_error(binding, f"has a {'meta' if value.is_meta else 'sparse'} tensor as {name}")
            tensor = local_part(value)[0]
            if name in ("step", "mask", "group_steps"):
                state[name] = tensor.to("cpu", torch.int64 if name == "mask" else torch.float32, copy=True)
                continue
            if value.shape == param.shape and value.shape != (local_mask.num_active,):
                if tensor.shape != local.shape:
                    raise state_error(
                        binding,
                        f"is sharded differently from its parameter ({list(tensor.shape)} for {list(local.shape)})",
                    )
                tensor = tensor.reshape(-1)[active_indices(local_mask.payload, local.numel()).to(tensor.device)]
            if tensor.shape != (local_mask.num_active,):
                num_active = f"{local_mask.num_active} active coordinates"
                raise state_error(binding, f"has {list(tensor.shape)} values in {printable(name)} for {num_active}")
            widen = name in self.moments and tensor.is_floating_point()  # trainers may have cast them
            state[name] = tensor.to(local.device, torch.float32 if widen else tensor.dtype, copy=True).contiguous()
        validate_step_counts(state, binding)
        if "steps" in state:
            state |= step_groups_of(state.pop("steps"), state["step"], binding)
        if len(state.get("step_group", ())) and int(state["step_group"].max()) >= len(state.get("group_steps", ())):
            raise state_error(binding, "has step groups without a step count")
        self._validate_state(state, local, local_mask, binding, group)
        return state

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """The state as torch's own AdamW or SGD has it: moments of the parameters' shapes, zero where frozen.

        Raises:
            ValueError: The masks have changed, so that coordinates have different step counts.
        """
        result = super().state_dict()
        keys = [key for group in result["param_groups"] for key in group["params"]]
        dense_states = {}
        for key, (_, param, binding) in zip(keys, self._bindings(), strict=True):
            if key not in result["state"]:
                continue
            state = result["state"][key]
            if "step_group" in state:
                raise ValueError(
                    f"coordinates of {binding.display_name} have different step counts; a dense state has a single one"
                )
            moments = {name: to_dense(state[name], param, binding) for name in self.moments if name in state}
            dense_states[key] = {"step": state["step"].clone(), **moments}
        own_options = ("precision", "weight_decay_target", "seed")
        groups = [
            {**{key: value for key, value in group.items() if key not in own_options}, **self.dense_options}
            for group in result["param_groups"]
        ]
        others = {key: value for key, value in result["state"].items() if key not in keys}
        return {"state": {**dense_states, **others}, "param_groups": groups}

    @torch.no_grad()
    def load_dense_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the active part of the state of torch's own AdamW or SGD. bf16 weights start without a remainder.

        Args:
            state_dict: What `state_dict` of torch's optimizer returned; parameters are matched as in
                `load_state_dict`.

        Raises:
            InputError: The state does not fit; nothing has changed.
        """
        saved = self._match_saved(state_dict)
        options = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "maximize")
        for group in saved.groups:
            if group.get("decoupled_weight_decay") is False and self.dense_options and group.get("weight_decay"):
                raise InputError(
                    "the dense state is of Adam, whose weight decay is part of the gradient; give one of AdamW"
                )
        groups = [
            self._loaded_group(group, {key: value for key, value in dense_group.items() if key in options})
            for group, dense_group in zip(self.param_groups, saved.groups, strict=True)
        ]
        for position, ((index, _), param, binding) in enumerate(self._bindings()):
            dense = {name: value for name, value in saved.states[position].items() if value is not None}
            moment_names = self._moment_names(groups[index])
            lacking = [name for name in moment_names if name not in dense]
            if dense and lacking:
                raise state_error(binding, f"has no {lacking[0]}: it is another optimizer's")
            if not dense:
                continue
            state = {
                "step": dense.get("step", 1.0),
                "mask": binding.digest,
                **{name: dense[name] for name in moment_names},
            }
            if groups[index]["weight_decay_target"] == "init":
                state["init_value"] = gather_active(local_part(param)[0], binding.local_mask(param)).to(param.dtype)
            saved.states[position] = state
        self._load(saved, groups)

    @torch.no_grad()
    def set_masks(self, masks: Masks, *, on_drop: str = "keep") -> None:
        """Change the masks.

        Coordinates that stay active keep their moments and step count; new ones start at zero, with a step count of
        their own.

        Args:
            masks: As at construction.
            on_drop: What happens to coordinates that are no longer active: "keep" their value, or "restore" the initial
                one, which needs weight_decay_target="init" (default: "keep").

        Raises:
            ValueError: The masks or `on_drop` do not fit; nothing has changed.
            RuntimeError: Gradients have been gathered for the current masks.
        """
        if on_drop not in ("keep", "restore"):
            raise ValueError(f"on_drop must be keep or restore, not {on_drop}")
        if any(self._gathered(key, param) is not None for key, param, _ in self._bindings()):
            raise RuntimeError("gradients have been gathered for the current masks; step or zero_grad() first")
        bindings_by_group = bind_masks(masks, self.param_groups, self._unmasked)
        new_states: dict[torch.Tensor, dict[str, Any]] = {}
        for (index, j), param, old in self._bindings():
            new, state = bindings_by_group[index][j], self.state.get(param)
            if not state:
                continue
            new.last_step = old.last_step
            if on_drop == "restore" and "init_value" not in state:
                raise ValueError(
                    f'{old.display_name} has no initial values to restore; construct with weight_decay_target="init"'
                )
            group = self.param_groups[index]
            self._validate_state(state, local_part(param)[0], old.local_mask(param), old, group)
            new_states[param] = self._remapped_state(state, param, old, new, group)
        if on_drop == "restore":
            for (index, j), param, old in self._bindings():
                if param in new_states:
                    init_value, new = self.state[param]["init_value"], bindings_by_group[index][j]
                    restore_dropped(param, init_value, old.local_mask(param), new.local_mask(param))
        self._bindings_by_group = bindings_by_group
        self._clip_factor = None  # computed from gradients of the old masks
        self.state.update(new_states)

    def _remapped_state(
        self, state: dict[str, Any], param: torch.Tensor, old: Binding, new: Binding, group: dict[str, Any]
    ) -> dict[str, Any]:
        """The state of a parameter for a new mask."""
        local, old_mask, new_mask = local_part(param)[0], old.local_mask(param), new.local_mask(param)
        old_indices = active_indices(old_mask.payload, local.numel())
        new_indices = active_indices(new_mask.payload, local.numel())
        positions = torch.searchsorted(old_indices, new_indices).clamp(max=max(len(old_indices) - 1, 0))
        was_active = torch.zeros(len(new_indices), dtype=torch.bool, device=local.device)
        if len(old_indices):
            was_active = old_indices[positions] == new_indices
        old_positions = positions[was_active]  # new_indices[was_active] == old_indices[old_positions]
        new_state: dict[str, Any] = {}
        self._init_state(new_state, local, new_mask, new, group)
        for name, value in new_state.items():
            if name in state and name not in ("step", "mask"):
                value[was_active] = state[name][old_positions]
        group_steps = state.get("group_steps", state["step"].view(1))
        old_groups = state.get("step_group", torch.zeros(len(old_indices), dtype=torch.uint8, device=local.device))
        groups = torch.zeros(len(new_indices), dtype=torch.int64, device=local.device)  # 0: no step taken yet
        groups[was_active] = old_groups[old_positions].long() + 1
        steps = torch.cat([torch.zeros(1), group_steps]).to(local.device)[groups]
        others = {name: value for name, value in state.items() if name not in ("group_steps", *self._active_names)}
        return {**others, **new_state, "step": state["step"].clone(), **step_groups_of(steps, state["step"], old)}
