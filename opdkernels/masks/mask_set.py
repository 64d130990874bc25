"""Sets of masks: one a tensor, in the model's order, on disk as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from opdkernels.errors import InputError, printable
from opdkernels.files import write_atomically
from opdkernels.formatting import percent
from opdkernels.masks.mask import Mask

FORMAT, VERSION = "opdkernels masks", "1"


class MaskSet(Mapping[str, Mask]):
    """Masks by the names of their tensors, in the model's order. From `load`, each is read when it is asked for.

    Sets of the same names and shapes combine by `&`, `|`, `^`, `-` and `~`, mask by mask.
    """

    in_model_order = (
        False  # of `optim.in_model_order`: whether the order is that of a model's parameters, else a checkpoint's
    )

    def __init__(self, masks: Mapping[str, Mask]):
        self._masks: dict[str, Mask | None] = dict(masks)
        self._file: Any = None
        self._facts: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> Mask:
        found = self._masks[name]
        if found is None:
            found = self._masks[name] = self._read(name)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_masks": dict(self.items()), "_file": None, "_facts": {}, "in_model_order": self.in_model_order}

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name; nothing is read for it."""
        return {name: tuple(self._facts[name]["shape"]) if name in self._facts else self[name].shape for name in self}

    def counts(self) -> dict[str, tuple[int, int]]:
        """Active coordinates and all of them, by name; nothing is read for it."""
        known = ((name, self._facts.get(name)) for name in self)
        return {
            name: (fact["num_active"], fact["numel"]) if fact else (self[name].num_active, self[name].numel)
            for name, fact in known
        }

    @property
    def num_active(self) -> int:
        """Active coordinates of all tensors."""
        return sum(active for active, _ in self.counts().values())

    @property
    def numel(self) -> int:
        """Coordinates of all tensors."""
        return sum(numel for _, numel in self.counts().values())

    @property
    def density(self) -> float:
        """Share of all coordinates that is active."""
        return self.num_active / self.numel if self.numel else 0.0

    @property
    def digest(self) -> str:
        """64 bits of the names, their order, the shapes and the active coordinates, in hexadecimal."""
        parts = [[name, self._facts[name]["digest"] if name in self._facts else self[name].digest] for name in self]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the set as one safetensors file, whole or not at all."""
        tensors, facts = {}, []
        for i, (name, mask) in enumerate(self.items()):
            tensors[f"{i}.{mask.layout}"] = mask.payload
            facts.append(
                {
                    "name": name,
                    "shape": list(mask.shape),
                    "numel": mask.numel,
                    "num_active": mask.num_active,
                    "digest": mask.digest,
                }
            )
        metadata = {"format": FORMAT, "version": VERSION, "digest": self.digest, "masks": json.dumps(facts)}
        if self.in_model_order:
            metadata["order"] = "model"
        try:
            write_atomically(Path(path), save(tensors, metadata))
        except OSError as error:
            raise InputError(f"cannot write {printable(str(path))}: {error.strerror}; choose another place") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """A set from a file of `save`. Raises InputError where it is none, or damaged; a mask's bits are checked when it is read."""
        named = printable(os.fspath(path))
        try:
            file = safe_open(os.fspath(path), "pt")
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{named} holds no masks; give a file of `opdkernels mask create`")
            if metadata["version"] != VERSION:
                raise InputError(
                    f"{named} is of version {printable(metadata['version'])} of the format, not {VERSION}; make it again"
                )
            facts = json.loads(metadata["masks"])
            found = cls({})
            found._file, found._facts = (
                (file, named),
                {fact["name"]: {**fact, "place": i} for i, fact in enumerate(facts)},
            )
            found._masks = dict.fromkeys(found._facts)
            found.in_model_order = metadata.get("order") == "model"
            if len(found) != len(facts) or found.digest != metadata["digest"]:
                raise ValueError("digest")
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{named} does not exist; give a file of masks") from None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{named} cannot be read as masks ({printable(str(error).splitlines()[0][:200])}); make it again"
            ) from None
        return found

    def _read(self, name: str) -> Mask:
        file, named = self._file
        fact = self._facts[name]
        try:
            key = next(
                f"{fact['place']}.{kind}"
                for kind in ("bitmap", "indices")
                if f"{fact['place']}.{kind}" in file.keys()  # noqa: SIM118
            )
            make = Mask.from_bitmap if key.endswith("bitmap") else Mask.from_indices
            mask = make(file.get_tensor(key), fact["shape"])
            if (mask.digest, mask.num_active, mask.numel) != (fact["digest"], fact["num_active"], fact["numel"]):
                raise ValueError("its bits are not those that were written")
        except (SafetensorError, StopIteration, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"the mask of {printable(name)} in {named} is damaged ({printable(str(error))}); make the file again"
            ) from None
        return mask

    def _combined(self, other: MaskSet, how: Callable[[Mask, Mask], Mask]) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        if list(self) != list(other):
            lacking = [name for name in self if name not in other] + [name for name in other if name not in self]
            raise ValueError(
                f"the sets name other tensors: {printable(lacking[0])}, …"
                if lacking
                else "the sets name their tensors in another order"
            )
        return MaskSet({name: how(self[name], other[name]) for name in self})

    def __and__(self, other: MaskSet) -> MaskSet:
        return self._combined(other, lambda a, b: a & b)

    def __or__(self, other: MaskSet) -> MaskSet:
        return self._combined(other, lambda a, b: a | b)

    def __xor__(self, other: MaskSet) -> MaskSet:
        return self._combined(other, lambda a, b: a ^ b)

    def __sub__(self, other: MaskSet) -> MaskSet:
        return self._combined(other, lambda a, b: a - b)

    def __invert__(self) -> MaskSet:
        return MaskSet({name: ~self[name] for name in self})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and list(self) == list(other) and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.num_active:,} of {self.numel:,} active, {percent(self.density)})"


def from_bools(active: Mapping[str, torch.Tensor]) -> MaskSet:
    """A set from bool tensors by name."""
    return MaskSet({name: Mask.from_bool(tensor) for name, tensor in active.items()})
