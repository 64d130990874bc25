"""Finds the coordinates of a model's tensors that changed since the last call, and their digests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.ops.patch import Changes, bits, gather
from opdkernels.sync.digest import additive_digest, update_digest
from opdkernels.sync.live import Model, live_tensors, names_by_storage, write_at
from opdkernels.sync.patch import Patch, model_digest
from opdkernels.sync.tensor_patch import TensorPatch, flat_positions, is_stored_whole, whole_changes


class ChangeTracker:
    """Finds which coordinates changed, whatever changed them, by comparison with a copy of the model's bits.

    The copy takes as much memory as the tensors, on their devices. Tied weights are compared and stored once, under
    their first name. Digests are computed from all coordinates at the start, and then from the changed ones.

    Args:
        model: A module, or a state dict whose tensors share memory with the model's.
        source: How changes are found; only "snapshot", comparison with a copy, is available.

    Raises:
        InputError: A tensor is a shard, has no memory of its own, or is of an unsupported dtype or layout.
        UsageError: `model` is neither a module nor a mapping, or `source` is unknown.
    """

    def __init__(self, model: Model, *, source: Literal["snapshot"] = "snapshot") -> None:
        if source != "snapshot":
            raise UsageError(f"source {source!r} is not available; give source='snapshot'")
        self.model = model
        tensors = live_tensors(model)
        self._aliases = names_by_storage(tensors)
        self._layout = layout_of(tensors)
        self._snapshot = {name: bits(tensors[name]).clone() for name in self._aliases}
        self._digests = {name: additive_digest(tensors[name]) for name in self._aliases}
        self._touched: set[str] = set()

    @property
    def digests(self) -> dict[str, int]:
        """Additive digest of each tensor at the last `take`, by its first name."""
        return dict(self._digests)

    def touch(self, name: str | None = None) -> None:
        """Makes the next patch hold all coordinates of a tensor, changed or not.

        Args:
            name: Any name of the tensor; None for all tensors.

        Raises:
            UsageError: No tensor has this name.
        """
        if name is None:
            self._touched |= self._aliases.keys()
            return
        first = next((first for first, aliases in self._aliases.items() if name in (first, *aliases)), None)
        if first is None:
            raise UsageError(f"the tracker has no tensor {printable(name)}; give a name of the model's state dict")
        self._touched.add(first)

    @torch.no_grad()
    def take(self) -> Patch:
        """Returns the changes since the last call, or since the tracker was made; no tensors if nothing changed.

        If it raises, the next call returns these changes.

        Raises:
            InputError: Names, shapes, dtypes or tied tensors of the model are no longer the same.
        """
        tensors = live_tensors(self.model)
        self._validate_layout(tensors)
        patches = [patch for name in self._aliases if (patch := self._compare(name, tensors[name])) is not None]
        digests = self._digests | {patch.name: patch.digest for patch in patches}
        result = Patch(tuple(patches), model_digest(self._digests), model_digest(digests))
        for patch in patches:
            write_at(self._snapshot[patch.name], patch.positions(), patch.changes.values)
        self._digests = digests
        self._touched.clear()
        return result

    def _compare(self, name: str, tensor: torch.Tensor) -> TensorPatch | None:
        """Returns the changes of a tensor; None if there are none to store."""
        snapshot, current = self._snapshot[name], bits(tensor)
        changes, _ = gather(snapshot, current)
        is_touched = name in self._touched
        if not changes.changed and not is_touched:
            return None
        base_digest = self._digests[name]
        mode: Literal["sparse", "whole"]
        if is_touched or is_stored_whole(changes, len(current)):
            mode, changes, digest = "whole", whole_changes(current.clone()), additive_digest(current)
        else:
            # Copied: they are views of buffers of the tensor's size.
            changes = Changes(changes.counts, changes.positions.clone(), changes.values.clone())
            positions = flat_positions(changes, len(current))
            digest = update_digest(base_digest, positions, snapshot[positions], changes.values)
            mode = "sparse"
        return TensorPatch(
            name, tensor.dtype, tuple(tensor.shape), self._aliases[name], mode, changes, base_digest, digest
        )

    def _validate_layout(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises InputError if the model's tensors are other ones than at the start."""
        layout = layout_of(tensors)
        for name in self._layout.keys() | layout.keys():
            before, now = self._layout.get(name, "absent"), layout.get(name, "absent")
            if before != now:
                raise InputError(f"{printable(name)} was {before} and is {now}; make a new tracker")
        if names_by_storage(tensors) != self._aliases:
            raise InputError("other tensors of the model are tied than when the tracker was made; make a new tracker")


def layout_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns dtype and shape of each tensor, as messages show them."""
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
