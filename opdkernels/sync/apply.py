"""Applies changes to live tensors: everything is verified first, then all of it is written or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from opdkernels.checkpoint.safetensors import stored_dtype
from opdkernels.checkpoint.torch_pickle import torch_dtype_name
from opdkernels.errors import InputError, printable
from opdkernels.sync.digest import additive_digest, update_digest
from opdkernels.sync.live import Model, live_tensors, names_by_storage, read_at, write_at
from opdkernels.sync.tensor_patch import TensorPatch


@dataclass(frozen=True)
class StagedWrite:
    """New and current bits of one live tensor at some positions (None: all); the current ones restore it."""

    tensor: torch.Tensor
    positions: torch.Tensor | None
    new: torch.Tensor
    current: torch.Tensor


@torch.no_grad()
def apply_to_model(model: Model, patches: Sequence[TensorPatch], digests: Mapping[str, int] | None = None) -> None:
    """Verifies and writes changes; see `sync.Patch.apply_`."""
    live = live_tensors(model)
    targets = targets_of(live, patches)
    base_digests = {
        name: additive_digest(live[name]) if digests is None else digests.get(patch.name)
        for name, patch in targets.items()
    }
    if all(base_digests[name] == patch.digest for name, patch in targets.items()):
        return  # applied before, or nothing to change
    commit([stage(name, live[name], patch, base_digests[name]) for name, patch in targets.items()])


def targets_of(live: Mapping[str, torch.Tensor], patches: Sequence[TensorPatch]) -> dict[str, TensorPatch]:
    """Returns the live tensors to change, each storage once: name to changes. Raises InputError if one does not fit."""
    first_names = {name: first for first, aliases in names_by_storage(live).items() for name in (first, *aliases)}
    sharing: dict[str, list[str]] = {}
    for name, first in first_names.items():
        sharing.setdefault(first, []).append(name)
    targets: dict[str, TensorPatch] = {}
    for patch in patches:
        names = (patch.name, *patch.aliases)
        present = [name for name in names if name in live]
        if not present:
            raise InputError(
                f"the model has no tensor {printable(patch.name)}, which the patch changes; give the model that the"
                " patch is for"
            )
        for name in present:
            tensor = live[name]
            if (tensor.dtype, tuple(tensor.shape)) != (patch.dtype, patch.shape):
                raise InputError(
                    f"{printable(name)} is {shown(tensor.dtype, tensor.shape)} in the model and"
                    f" {shown(patch.dtype, patch.shape)} in the patch; load the model with the dtype and shapes of the"
                    " patch"
                )
            other = next((other for other in sharing[first_names[name]] if other not in names), None)
            if other is not None:
                raise InputError(
                    f"{printable(name)} and {printable(other)} are one tensor in the model and two in the patch's"
                    " model; untie them"
                )
            targets[first_names[name]] = patch
    return targets


def shown(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{stored_dtype(torch_dtype_name(dtype))} {list(shape)}"


def stage(name: str, tensor: torch.Tensor, patch: TensorPatch, base_digest: int | None) -> StagedWrite:
    """Gathers the current bits and verifies both digests. Raises InputError if the tensor is not the patch's base."""
    if base_digest != patch.base_digest:
        held = "an unknown digest" if base_digest is None else f"digest {base_digest:016x}"
        raise InputError(
            f"{printable(name)} has {held}, the base of the patch {patch.base_digest:016x}: the model holds other"
            " weights; apply the patches in between, or load the full weights"
        )
    new, positions = patch.changes.values.to(tensor.device), patch.positions()
    if positions is not None:
        positions = positions.to(tensor.device)
    current = read_at(tensor, positions)
    digest = additive_digest(new) if positions is None else update_digest(base_digest, positions, current, new)
    if digest != patch.digest:
        raise InputError(
            f"{printable(name)} would get digest {digest:016x}, not {patch.digest:016x}: the model or the patch was"
            " altered; load the full weights, or copy the patch again"
        )
    return StagedWrite(tensor, positions, new, current)


def commit(staged: Sequence[StagedWrite]) -> None:
    """Writes everything; if a write fails, restores what was there and raises."""
    begun: list[StagedWrite] = []
    try:
        for write in staged:
            begun.append(write)
            write_at(write.tensor, write.positions, write.new)
    except BaseException:
        for write in reversed(begun):
            write_at(write.tensor, write.positions, write.current)
        raise
