"""MaskedAdamW and MaskedSGD: `torch.optim.Optimizer`s that step the active coordinates of a mask and keep state for these alone.

State of a parameter, all of it [active] unless said: `step`, how many were taken (fp32, one number);
`exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` or `momentum_buffer`, fp32; of bf16 parameters `remainder` (int16) or `compensation`
(bf16); `init_value`, where a weight began, of the parameter's dtype; after `set_masks`, `step_group` (uint8) and `group_steps`, how many steps each
cohort took; `mask`, the mask's digest (int64, one number). It is made at the first step, from the parameter that is live then.

Of DTensors `state_dict` gives all that is [active] as DTensors of the parameter's shape, zero where nothing is active, and
cohorts as the `steps` of each coordinate, so that torch.distributed.checkpoint saves and loads it at any world size. Both forms load.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from opdkernels.errors import InputError, printable
from opdkernels.ops.step import (
    COHORTS,
    FIRST,
    PRECISIONS,
    RESIDUAL_DTYPES,
    active_indices,
    adamw_scalars,
    sgd_scalars,
)
from opdkernels.optim.active import active_of, restore
from opdkernels.optim.binding import Binder, Binding, Masks, Shard, is_dtensor, local_gradient, local_part
from opdkernels.optim.call import EXTRAS, Call, Ready
from opdkernels.optim.options import is_number, refuse_options

Place = tuple[int, int]  # group, parameter


class MaskedOptimizer(torch.optim.Optimizer):
    """What the two share; not an optimizer of its own."""

    moments: tuple[str, ...] = ()
    dense_options: dict[str, Any] = {}  # noqa: RUF012  what torch's own groups have beside ours

    def __init__(self, params: Any, masks: Masks, unmasked: str, defaults: dict[str, Any]):
        refuse_options(defaults)
        self._binder = Binder(masks, unmasked)
        self._bound: list[list[Binding]] = []
        self._compact: dict[Place, torch.Tensor] = {}
        self._gathers = 0  # how often gather_active_grads is at work, which leaves no gradient on the parameters
        self._clip: torch.Tensor | None = None
        super().__init__(params, defaults)
        self._binder.check()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            refuse_options(group)
            self._bound.append(self._binder.bind(group["params"], group.get("param_names")))
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to `step`: where asked for, and, to be refused there, where it would find no gradient."""
        return bool(self.defaults["fused"] or self._gathers)

    def __getstate__(self) -> dict[str, Any]:
        ours = {key: self.__dict__[key] for key in ("_binder", "_bound")}
        return {**super().__getstate__(), **ours, "_compact": {}, "_gathers": 0, "_clip": None}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the parameters that have a gradient; of the others nothing moves. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._gathers and found_inf is not None:
            raise RuntimeError(
                "a GradScaler cannot see gradients that gather_active_grads gathers; train in bfloat16 without one, or use zero_frozen_grads"
            )
        try:
            if found_inf is None or not bool(found_inf):
                ready = [
                    self._ready(index, group) for index, group in enumerate(self.param_groups)
                ]  # refused before anything moves
                for group, given in zip(self.param_groups, ready, strict=True):
                    self._step_group(group, given, grad_scale)
        finally:
            self._clip = None
        self._compact.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, gathered ones too, and what the next step was to clip by."""
        super().zero_grad(set_to_none)
        self._compact.clear()
        self._clip = None

    def _live(self) -> Iterable[tuple[Place, torch.Tensor, Binding]]:
        for index, group in enumerate(self.param_groups):
            for j, (param, binding) in enumerate(zip(group["params"], self._bound[index], strict=True)):
                yield (index, j), param, binding

    def _ready(self, index: int, group: dict[str, Any]) -> list[Ready]:
        """What a group's step takes, looked at before anything moves."""
        refuse_options(group)
        found = []
        for j, (param, binding) in enumerate(zip(group["params"], self._bound[index], strict=True)):
            grad = self._gradient((index, j), param)
            if grad is None:
                continue
            shard, local = binding.shard(param), local_part(param)[0]
            if (
                shard.active
                and group["precision"] == "stochastic"
                and shard.start is None
                and param.dtype == torch.bfloat16
            ):
                raise ValueError(
                    f'{named(binding)} is not sharded along its first dimension; precision "stochastic" needs it, choose "split_master"'
                )
            if self.state.get(param):
                self._refuse_state(self.state[param], local, shard, binding, group)
            found.append(Ready(param, local, grad, shard, binding))
        return found

    def _step_group(self, group: dict[str, Any], ready: list[Ready], grad_scale: torch.Tensor | None) -> None:
        calls: defaultdict[torch.device, Call] = defaultdict(Call)
        for one in ready:
            state = self.state[one.param]
            fresh = self._begin(state, one.local, one.shard, one.binding, group)
            state["step"] += 1
            if "group_steps" in state:
                state["group_steps"] += 1
            if one.shard.active:
                calls[one.local.device].add(one, state, fresh)
        for device, call in calls.items():
            scale, clip = (None if one is None else one.to(device, torch.float32) for one in (grad_scale, self._clip))
            self._launch(call, group, call.scalars(lambda steps: self._scalars(steps, group)).to(device), scale, clip)
            for local, weights in zip(call.locals, call.params, strict=True):
                if weights.data_ptr() != local.data_ptr():
                    local.copy_(weights)

    def _gradient(self, place: Place, param: torch.Tensor) -> torch.Tensor | None:
        """The local gradient, dense or of the active coordinates, contiguous."""
        compact, binding = self._compact.get(place), self._bound[place[0]][place[1]]
        if compact is not None:
            return compact
        return None if param.grad is None else local_gradient(param, param.grad, named(binding))

    def _begin(
        self, state: dict[str, Any], local: torch.Tensor, shard: Shard, binding: Binding, group: dict[str, Any]
    ) -> bool:
        """Makes what of the state is not there yet. Returns whether moments were: SGD's first step takes the gradient for its buffer."""
        fresh = any(name not in state for name in self._moments_of(group))
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["mask"] = torch.tensor(binding.digest, dtype=torch.int64, device="cpu")
            if group["weight_decay_target"] == "init":
                state["init_value"] = active_of(local, shard).to(local.dtype)
        for name, dtype in self._kept(group, local.dtype).items():
            if name not in state and name != "init_value":
                state[name] = torch.zeros(shard.active, dtype=dtype, device=local.device)
        return fresh

    def _kept(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes of what a parameter's state holds of each active coordinate."""
        found = dict.fromkeys(self._moments_of(group), torch.float32)
        if dtype == torch.bfloat16 and group["precision"] in EXTRAS:
            found[EXTRAS[group["precision"]]] = RESIDUAL_DTYPES[group["precision"]]
        if group["weight_decay_target"] == "init":
            found["init_value"] = dtype
        return found

    def _refuse_state(
        self, state: dict[str, Any], local: torch.Tensor, shard: Shard, binding: Binding, group: dict[str, Any]
    ) -> None:
        """Kernels take pointers: raises InputError for a state that is not what they will read."""
        wanted = self._kept(group, local.dtype)
        if "init_value" in wanted and "init_value" not in state:
            raise refused(
                binding, 'lacks where the weights began, which weight_decay_target="init" needs from the first step on'
            )
        wanted |= {"step_group": torch.uint8} if "step_group" in state else {}
        for name, dtype in wanted.items():
            held = state.get(name)
            if held is not None and (
                held.dtype != dtype
                or held.shape != (shard.active,)
                or held.device != local.device
                or not held.is_contiguous()
            ):
                raise refused(
                    binding,
                    f"has {name} of {held.dtype} {list(held.shape)} on {held.device}, not {dtype} [{shard.active}] on {local.device}",
                )

    @abstractmethod
    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the moments that a group keeps."""

    @abstractmethod
    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        """fp32 [steps, 8]: what the operator multiplies with at each step count."""

    @abstractmethod
    def _launch(
        self,
        call: Call,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        """Steps what was collected."""

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Has the next step scale gradients so that the norm of the active ones is at most `max_norm`. Returns that norm, fp32.

        Frozen coordinates do not count: the whole gradient's norm, which trainers clip by, is some 1 / sqrt(density) larger. The
        gradients themselves stay as they are. With a GradScaler, call `scaler.unscale_` first. Of DTensors, every rank of their mesh
        must call this. Raises ValueError for another norm, and for a max_norm that is no number from 0 on.
        """
        if norm_type != 2.0:
            raise ValueError(f"the norm must be of type 2, not {norm_type}")
        if not is_number(max_norm) or not max_norm >= 0:
            raise ValueError(f"max_norm is {max_norm!r}; give a number from 0 on")
        total = torch.zeros((), dtype=torch.float64)
        sharded: dict[Any, torch.Tensor] = {}
        for place, param, binding in self._live():
            grad = self._gradient(place, param)
            meshes = (
                tuple((param.device_mesh, i) for i, p in enumerate(param.placements) if not p.is_replicate())
                if is_dtensor(param)
                else ()
            )  # type: ignore[attr-defined]
            shard = binding.shard(param)
            square = torch.zeros((), dtype=torch.float64)
            if grad is not None and shard.active:
                values = grad if place in self._compact else active_of(grad, shard)
                square = torch.linalg.vector_norm(values, dtype=torch.float64).square().cpu()
            if meshes:
                sharded[meshes] = sharded.get(meshes, torch.zeros((), dtype=torch.float64)) + square
            else:
                total += square
        for meshes, square in sharded.items():
            for mesh, dim in meshes:
                square = square.to(mesh.device_type)
                torch.distributed.all_reduce(square, group=mesh.get_group(dim))
            total += square.cpu()
        norm = total.sqrt()
        self._clip = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        return norm.float()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; of DTensors, compact state is spread out to DTensors of the parameter's shape."""
        found = super().state_dict()
        spread: dict[Any, dict[str, Any]] = {}
        keys = [key for group in found["param_groups"] for key in group["params"]]
        for key, (_, param, binding) in zip(keys, self._live(), strict=True):
            if key in found["state"] and is_dtensor(param):
                own = dict(found["state"][key])
                ages, cohort = own.pop("group_steps", own["step"].view(1)), own.pop("step_group", None)
                active = binding.shard(param).active
                own["steps"] = (
                    ages[cohort.long().cpu()].to(cohort.device)
                    if cohort is not None
                    else ages.to(local_part(param)[0].device).expand(active)
                )
                spread[key] = {name: self._spread(name, value, param, binding) for name, value in own.items()}
        return {**found, "state": {**found["state"], **spread}}

    def _spread(self, name: str, value: Any, param: torch.Tensor, binding: Binding) -> Any:
        """State of the active coordinates as a tensor or DTensor of the parameter's shape; other state as it is."""
        if name in ("step", "mask"):
            return value
        (local, _), shard = local_part(param), binding.shard(param)
        dense = torch.zeros(local.shape, dtype=value.dtype, device=value.device)
        dense.view(-1)[active_indices(shard.mask, dense.numel())] = value
        if not is_dtensor(param):
            return dense
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            dense, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )  # type: ignore[attr-defined]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes on a state of `state_dict`, compact or of the parameters' shapes, on the parameters' devices, no dtype changed.

        Raises InputError, with nothing changed, where the state is of another mask or does not fit.
        """
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):  # type: ignore[attr-defined]
            state_dict = hook(self, state_dict) or state_dict
        try:
            groups, given = copy.deepcopy(state_dict["param_groups"]), state_dict["state"]
            sizes = [len(group["params"]) for group in groups]
            keys = [key for group in groups for key in group["params"]]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"this is no optimizer state ({printable(repr(error))}); give what state_dict() returned"
            ) from None
        if sizes != [len(group["params"]) for group in self.param_groups]:
            raise InputError(
                f"the optimizer state has groups of {sizes} parameters, this optimizer of {[len(g['params']) for g in self.param_groups]}"
            )
        new_groups = []
        for ours, theirs in zip(self.param_groups, groups, strict=True):
            lacking = [name for name in self.defaults if name not in theirs]
            if lacking:
                raise InputError(
                    f"the optimizer state has no {lacking[0]}: it is another optimizer's; give one of {type(self).__name__}, or a dense one to load_dense_state_dict"
                )
            group = {**ours, **{key: value for key, value in theirs.items() if key not in ("params", "param_names")}}
            try:
                refuse_options(group)
            except (TypeError, ValueError) as error:
                raise InputError(f"the optimizer state cannot be taken on: {error}") from None
            new_groups.append(group)
        loaded = {}
        for key, (place, param, binding) in zip(keys, self._live(), strict=True):
            if given.get(key):
                loaded[param] = self._fitted(given[key], param, binding, new_groups[place[0]])
        for ours, group in zip(self.param_groups, new_groups, strict=True):
            ours.update(group)
        self.state.clear()
        self.state.update(loaded)
        self._clip = None
        for post in list(self._optimizer_load_state_dict_post_hooks.values()):  # type: ignore[attr-defined]
            post(self)

    def _fitted(
        self, given: dict[str, Any], param: torch.Tensor, binding: Binding, group: dict[str, Any]
    ) -> dict[str, Any]:
        shard, local = binding.shard(param), local_part(param)[0]
        if "mask" not in given:
            raise refused(binding, "has no mask: it is a dense optimizer's, which load_dense_state_dict takes")
        if int(given["mask"]) != binding.digest:
            raise refused(binding, "belongs to another mask")
        if "step" not in given:
            raise refused(binding, "has no step count")
        state: dict[str, Any] = {}
        for name, value in given.items():
            value = torch.as_tensor(value)
            own = local_part(value)[0]
            if name in ("step", "mask", "group_steps"):
                state[name] = own.to("cpu", torch.int64 if name == "mask" else torch.float32, copy=True)
                continue
            if value.shape == param.shape and value.shape != (shard.active,):
                if own.shape != local.shape:
                    raise refused(
                        binding, f"is sharded otherwise than its parameter ({list(own.shape)} for {list(local.shape)})"
                    )
                own = own.reshape(-1)[active_indices(shard.mask, local.numel()).to(own.device)]
            if own.shape != (shard.active,):
                raise refused(
                    binding, f"has {list(own.shape)} values in {printable(name)} for {shard.active} active coordinates"
                )
            wide = name in self.moments and own.is_floating_point()  # trainers may have cast them
            state[name] = own.to(local.device, torch.float32 if wide else own.dtype, copy=True).contiguous()
        if "steps" in state:
            state |= step_groups_of(state.pop("steps"), state["step"], binding)
        if len(state.get("step_group", ())) and int(state["step_group"].max()) >= len(state.get("group_steps", ())):
            raise refused(binding, "has cohorts without a step count")
        self._refuse_state(state, local, shard, binding, group)
        return state

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """The state as torch's own AdamW or SGD holds it: moments of the parameters' shapes, zero where nothing is active.

        Raises ValueError after a `set_masks`, where coordinates have counts of their own.
        """
        found = super().state_dict()
        keys = [key for group in found["param_groups"] for key in group["params"]]
        state = {}
        for key, (_, param, binding) in zip(keys, self._live(), strict=True):
            if key not in found["state"]:
                continue
            own = found["state"][key]
            if "step_group" in own:
                raise ValueError(
                    f"coordinates of {named(binding)} have been in the mask for different times; a dense state has one step count"
                )
            own = {name: value for name, value in own.items() if name in ("step", *self.moments)}
            state[key] = {name: self._spread(name, value, param, binding).clone() for name, value in own.items()}
        ours = ("precision", "weight_decay_target", "seed")
        groups = [
            {**{key: value for key, value in group.items() if key not in ours}, **self.dense_options}
            for group in found["param_groups"]
        ]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_dense_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes on the state of torch's own AdamW or SGD, of which only what is active is kept. A bf16 weight begins with no
        remainder. Raises InputError where it does not fit."""
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        sizes = [
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise InputError(f"the dense state has groups of {sizes[0]} parameters, this optimizer of {sizes[1]}")
        taken = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "amsgrad", "maximize")
        ours = super().state_dict()["param_groups"]
        groups = [
            {**one, **{key: value for key, value in given.items() if key in taken and key in one}}
            for one, given in zip(ours, state_dict["param_groups"], strict=True)
        ]
        state = {}
        for key, ((index, _), param, binding) in zip(keys, self._live(), strict=True):
            dense = {name: value for name, value in (state_dict["state"].get(key) or {}).items() if value is not None}
            if not dense:
                continue
            group = groups[index]
            moments = {name: dense[name] for name in self._moments_of(group) if name in dense}
            if not moments and self._moments_of(group):
                raise refused(binding, f"has no {self._moments_of(group)[0]}: it is another optimizer's")
            fresh: dict[str, Any] = {
                "step": torch.as_tensor(dense.get("step", 1.0)),
                "mask": torch.tensor(binding.digest),
                **moments,
            }
            if group["weight_decay_target"] == "init":
                fresh["init_value"] = active_of(local_part(param)[0], binding.shard(param)).to(param.dtype)
            state[key] = fresh
        self.load_state_dict({"state": state, "param_groups": groups})

    @torch.no_grad()
    def set_masks(self, masks: Masks, *, on_drop: str = "keep") -> None:
        """Changes the masks: coordinates that stay active keep their moments and age, new ones begin at zero with an age of their
        own, and those that leave keep their value or, where `on_drop` is "restore" and weight_decay_target is "init", go back to where
        they began.

        Masks bind as at construction. Raises ValueError, with nothing changed, where they do not fit.
        """
        if on_drop not in ("keep", "restore"):
            raise ValueError(f"on_drop must be keep or restore, not {on_drop}")
        if self._compact:
            raise RuntimeError("gradients have been gathered for the masks that are; step or zero_grad() first")
        binder = Binder(masks, self._binder.unmasked)
        bound = [binder.bind(group["params"], group.get("param_names")) for group in self.param_groups]
        binder.check()
        moved: dict[torch.Tensor, dict[str, Any]] = {}
        for (index, j), param, old in self._live():
            new, state = bound[index][j], self.state.get(param)
            if not state:
                continue
            if on_drop == "restore" and "init_value" not in state:
                raise ValueError(f'{named(old)} has no start to go back to; construct with weight_decay_target="init"')
            self._refuse_state(state, local_part(param)[0], old.shard(param), old, self.param_groups[index])
            moved[param] = self._remapped(state, param, old, new, self.param_groups[index])
        if on_drop == "restore":
            for (index, j), param, old in self._live():
                if param in moved:
                    restore(param, self.state[param]["init_value"], old.shard(param), bound[index][j].shard(param))
        self._binder, self._bound = binder, bound
        self.state.update(moved)

    def _remapped(
        self, state: dict[str, Any], param: torch.Tensor, old: Binding, new: Binding, group: dict[str, Any]
    ) -> dict[str, Any]:
        local, before, after = local_part(param)[0], old.shard(param), new.shard(param)
        was, now = (active_indices(shard.mask, local.numel()) for shard in (before, after))
        at = torch.searchsorted(was, now).clamp(max=max(len(was) - 1, 0))
        stays = was[at] == now if len(was) else torch.zeros(len(now), dtype=torch.bool, device=local.device)
        fresh: dict[str, Any] = {}
        self._begin(fresh, local, after, new, group)
        for name, value in fresh.items():
            if name in state and name not in ("step", "mask") and len(was):
                value[stays] = state[name][at[stays]]
        steps = state.get("group_steps", state["step"].view(1))
        cohort = state.get("step_group", torch.zeros(len(was), dtype=torch.uint8, device=local.device))
        of_each = torch.zeros(len(now), dtype=torch.int64, device=local.device)
        if len(was):
            of_each[stays] = cohort[at[stays]].long() + 1
        ages = torch.cat([torch.zeros(1), steps]).to(local.device)[of_each]  # new ones have none
        return {**fresh, "step": state["step"].clone(), **step_groups_of(ages, state["step"], old)}


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the active coordinates of `masks`; every other one keeps its bits, whatever its gradient or weight decay.

    params: as `torch.optim.AdamW` takes them, fp32 or bf16, best named (`model.named_parameters()`). masks: a MaskSet, the path of one, a
    mapping of names to Masks or bool tensors, or a list in parameter order. unmasked: what becomes of a parameter without a mask:
    "error" (the default), "freeze" or "train" it whole. precision, of bf16 parameters: "split_master" keeps 16 bits a coordinate, so
    that weight and remainder are an fp32 master; "kahan", "stochastic" (by `seed`) and "nearest" as `opdkernels.ops.step` says.
    decay: weight decay draws to "zero", or "init", to where a weight was when it last became active.

    lr, betas, eps, weight_decay, amsgrad and maximize as torch has them: fp32 parameters move bit for bit as
    `torch.optim.AdamW(foreach=False)` moves them, but for its square root, which on the CPU may be off by one unit. `fused=True`
    takes a GradScaler's scale in the step itself; `foreach` changes nothing. State takes 8 bytes an active coordinate (12 with
    amsgrad, 2 more for bf16 by "split_master" or "kahan") and a bit a coordinate for the mask, or 4 bytes an active one below 1 in 32.

    Raises ValueError or TypeError for parameters without a mask or with another shape's.

    >>> weight = torch.nn.Parameter(torch.zeros(4))
    >>> optimizer = MaskedAdamW([weight], masks=[torch.tensor([True, False, False, True])], lr=0.5)
    >>> weight.grad = torch.ones(4)
    >>> optimizer.step()
    >>> weight.data
    tensor([-0.5000,  0.0000,  0.0000, -0.5000])
    """

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    dense_options = {"decoupled_weight_decay": True}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["amsgrad"] else self.moments[:2]

    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        b1, b2 = group["betas"]
        return adamw_scalars(steps, float(group["lr"]), (float(b1), float(b2)), group["eps"], group["weight_decay"])

    def _launch(
        self,
        call: Call,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        masks, offsets, options = (
            [s.mask for s in call.shards],
            [s.block_counts for s in call.shards],
            call.common(group),
        )
        torch.ops.opdkernels.masked_adamw_(
            call.params,
            call.grads,
            masks,
            offsets,
            call.of_each("exp_avg"),
            call.of_each("exp_avg_sq"),
            call.of_each("max_exp_avg_sq"),
            *(options[name] for name in ("extras", "inits", "cohorts")),
            scalars,
            *(options[name] for name in ("rows", "starts", "ordinals")),
            grad_scale,
            clip,
            None,
            group["maximize"],
            PRECISIONS.index(group["precision"]),
            group["seed"],
        )


class MaskedSGD(MaskedOptimizer):
    """SGD on the active coordinates of `masks`; every other one keeps its bits.

    lr, momentum, dampening, weight_decay, nesterov and maximize as `torch.optim.SGD` has them, whose step fp32 parameters take bit
    for bit; masks and all else as `MaskedAdamW` has them. State takes 4 bytes an active coordinate with momentum, none without.

    Raises ValueError or TypeError as `MaskedAdamW`, and ValueError for nesterov without momentum or with dampening.
    """

    moments = ("momentum_buffer",)

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

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["momentum"] else ()

    def _scalars(self, steps: list[float], group: dict[str, Any]) -> torch.Tensor:
        return sgd_scalars(steps, float(group["lr"]), group["momentum"], group["dampening"], group["weight_decay"])

    def _launch(
        self,
        call: Call,
        group: dict[str, Any],
        scalars: torch.Tensor,
        grad_scale: torch.Tensor | None,
        clip: torch.Tensor | None,
    ) -> None:
        scalars[torch.tensor(call.fresh, device=scalars.device), FIRST] = (
            1.0  # a buffer that was made now, whatever the count
        )
        masks, offsets, options = (
            [s.mask for s in call.shards],
            [s.block_counts for s in call.shards],
            call.common(group),
        )
        torch.ops.opdkernels.masked_sgd_(
            call.params,
            call.grads,
            masks,
            offsets,
            call.of_each("momentum_buffer") if group["momentum"] else [],
            *(options[name] for name in ("extras", "inits", "cohorts")),
            scalars,
            *(options[name] for name in ("rows", "starts", "ordinals")),
            grad_scale,
            clip,
            None,
            group["maximize"],
            group["nesterov"],
            PRECISIONS.index(group["precision"]),
            group["seed"],
        )


def step_groups_of(steps: torch.Tensor, taken: torch.Tensor, binding: Binding) -> dict[str, torch.Tensor]:
    """Cohorts of coordinates that took so many steps each, fp32 [active]; none where all took what the parameter did."""
    if bool((steps == taken.to(steps.device)).all()):
        return {}
    counts, cohort = torch.unique(steps, return_inverse=True)
    if len(counts) > COHORTS:
        raise ValueError(
            f"the masks of {named(binding)} have changed too often: {len(counts)} step counts, of {COHORTS} at most; make the optimizer again"
        )
    return {"step_group": cohort.to(torch.uint8), "group_steps": counts.cpu()}


def named(binding: Binding) -> str:
    return printable(binding.name) or f"parameter {binding.ordinal}"


def refused(binding: Binding, why: str) -> InputError:
    return InputError(
        f"the optimizer state of {named(binding)} {why}; load the state that was saved with these masks, or start without one"
    )
