"""Mask sets: one mask per tensor, in the model's order, stored as safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter, model_validator
from safetensors.torch import save

from opdkernels.checkpoint.base import MAX_DIMS
from opdkernels.checkpoint.coverage import Coverage
from opdkernels.checkpoint.io import Buffer
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.errors import InputError, printable
from opdkernels.formatting import percent
from opdkernels.masks.mask import Mask
from opdkernels.models import Strict, validate
from opdkernels.outputs import MASKS, new_file, validate_file
from opdkernels.untrusted import parse_json

FORMAT, VERSION = MASKS.format, "1"
COMPARED_BYTES = 1 << 24
MAX_NUMEL = 2**34
"""Coordinates of one tensor, more than any stack of experts has. A file of few bytes can describe a mask without active
coordinates of any size, and a bitmap of this many has 2 GiB."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Entry(Strict):
    """One mask in the metadata of a file."""

    name: str
    shape: list[Annotated[int, Field(ge=0, le=MAX_NUMEL)]] = Field(max_length=MAX_DIMS)
    numel: int = Field(ge=0, le=MAX_NUMEL)
    num_active: int = Field(ge=0, le=MAX_NUMEL)
    digest: Digest

    @model_validator(mode="after")
    def _check_counts(self) -> Entry:
        if self.numel != math.prod(self.shape) or self.num_active > self.numel:
            raise ValueError(f"{self.num_active} of {self.numel} coordinates do not fit the shape {self.shape}")
        return self


class Metadata(Strict):
    """The metadata of a file of masks; `masks` is a list of `Entry` as JSON."""

    format: str
    version: str
    digest: Digest
    masks: str
    order: Literal["model"] | None = None


ENTRIES = TypeAdapter(list[Entry])


def _key_of(entry: Entry, position: int, file: SafetensorsFile) -> str | None:
    """The tensor in a file that stores a mask; None if there is none of the layout's dtype and size."""
    layouts = (("bitmap", ("u8",), (entry.numel + 7) // 8), ("indices", ("i32", "i64"), entry.num_active))
    for layout, dtypes, size in layouts:
        info = file.tensors.get(f"{position}.{layout}")
        if info is not None and info.dtype in dtypes and info.shape == (size,):
            return info.name
    return None


class MaskSet(Mapping[str, Mask]):
    """Masks by the names of their tensors, in the model's order. After `load`, each is read at its first access.

    Sets of the same names and shapes combine with `&`, `|`, `^`, `-` and `~`, mask by mask.

    Examples:
        >>> masks = MaskSet({"w": Mask.from_bool(torch.tensor([True, False]))})
        >>> masks.num_active, masks.density, (~masks)["w"].indices.tolist()
        (1, 0.5, [1])
    """

    # Whether the order is that of a model's parameters (`optim.in_model_order`), else a checkpoint's.
    in_model_order = False
    # How much of two checkpoints the masks cover, where they were made from a pair; not saved.
    coverage: Coverage | None = None
    # Coordinates that are NaN or Inf in one of the two checkpoints, and not active; not saved.
    nonfinite = 0

    def __init__(self, masks: Mapping[str, Mask]):
        self._masks: dict[str, Mask | None] = dict(masks)
        for name, mask in self._masks.items():
            if not isinstance(mask, Mask):
                raise TypeError(
                    f"the mask of {printable(str(name))} is of type {type(mask).__name__}; give a Mask, or bool "
                    "tensors to from_bools"
                )
        self._file: Any = None
        self._entries: dict[str, Entry] = {}
        self._keys: dict[str, str] = {}

    def __getitem__(self, name: str) -> Mask:
        result = self._masks[name]
        if result is None:
            result = self._masks[name] = self._read(name)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"_masks": dict(self.items()), "_file": None, "_entries": {}, "_keys": {}} | {
            "in_model_order": self.in_model_order
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name. Does not read masks."""
        return {name: tuple(self._entries[name].shape) if name in self._entries else self[name].shape for name in self}

    def counts(self) -> dict[str, tuple[int, int]]:
        """(active coordinates, coordinates) by name. Does not read masks."""
        known = ((name, self._entries.get(name)) for name in self)
        return {
            name: (entry.num_active, entry.numel) if entry else (self[name].num_active, self[name].numel)
            for name, entry in known
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
        """Fraction of all coordinates that is active; 0 without coordinates."""
        return self.num_active / self.numel if self.numel else 0.0

    @property
    def digest(self) -> str:
        """64 bits of a hash of the names, their order, the shapes and the active coordinates, in hexadecimal."""
        parts = [[name, self._entries[name].digest if name in self._entries else self[name].digest] for name in self]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the set to one safetensors file, atomically. Equal sets give equal bytes.

        Args:
            path: File to write. A file with the same bytes is left as it is.
            overwrite: Whether another file of masks is replaced.

        Raises:
            InputError: The file cannot be written, exists and is no file of masks, or exists and `overwrite` is False.

        Examples:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/masks.safetensors"
            >>> MaskSet({"w": Mask.from_bool(torch.tensor([True, False]))}).save(path)
            >>> MaskSet.load(path).density
            0.5
        """
        resolved = validate_file(path, MASKS, overwrite=True)
        header, tensors = self._encode()
        if not overwrite and has_content(resolved, header, tensors):
            return
        try:
            with new_file(path, MASKS, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
                file.write(header)
                file.write(tensors)
        except OSError as error:
            raise InputError(f"cannot write {printable(str(path))}: {error.strerror}; choose another path") from None

    def _encode(self) -> tuple[bytes, memoryview]:
        """The header of the file and the bytes of its tensors."""
        payloads, entries = {}, []
        for i, (name, mask) in enumerate(self.items()):
            payloads[f"{i}.{mask.layout}"] = mask.payload
            entries.append(
                {
                    "name": name,
                    "shape": list(mask.shape),
                    "numel": mask.numel,
                    "num_active": mask.num_active,
                    "digest": mask.digest,
                }
            )
        metadata = {"format": FORMAT, "version": VERSION, "digest": self.digest, "masks": json.dumps(entries)}
        if self.in_model_order:
            metadata["order"] = "model"
        content = memoryview(save(payloads))
        start = 8 + int.from_bytes(content[:8], "little")
        # safetensors writes metadata in a random order; the first key is what `outputs.file_format` reads.
        header = {"__metadata__": metadata, **json.loads(bytes(content[8:start]))}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust((len(text) + 7) // 8 * 8)
        return len(text).to_bytes(8, "little") + text, content[start:]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """A set from a file of `save`. Each mask is validated when it is read.

        Raises:
            InputError: The file is missing, damaged or no mask set.
        """
        display_name = printable(os.fspath(path))
        remedy = "give a file of `opdkernels mask`"
        # Read, not mapped: each mask is copied once and verified by its digest, and a truncated file is an error.
        file = SafetensorsFile(os.fspath(path), "read", remedy=remedy)
        try:
            if file.metadata.get("format") != FORMAT:
                raise InputError(f"{display_name} holds no masks; {remedy}")
            version = file.metadata.get("version")
            if version != VERSION:
                raise InputError(
                    f"{display_name} has version {printable(str(version)[:20])} of the format, not {VERSION}; "
                    "create it again"
                )
            metadata = validate(Metadata, file.metadata, f"{display_name}: its metadata", remedy="create it again")
            shown = f"{display_name}: its list of masks"
            listed = parse_json(metadata.masks, shown, remedy="create it again")
            entries = validate(ENTRIES, listed, shown, remedy="create it again")
            result = cls({})
            result._file = file, display_name
            result._entries = {entry.name: entry for entry in entries}
            keys = [_key_of(entry, i, file) for i, entry in enumerate(entries)]
            result._keys = {entry.name: key for entry, key in zip(entries, keys, strict=True) if key is not None}
            result._masks = dict.fromkeys(result._entries)
            result.in_model_order = metadata.order == "model"
            if len(result) != len(entries) or result.digest != metadata.digest:
                raise InputError(f"{display_name}: its list of masks has a wrong digest; create it again")
            if not len(result._keys) == len(result) == len(file.tensors):
                raise InputError(f"{display_name} holds other masks than it lists; create it again")
        except BaseException:
            file.close()
            raise
        weakref.finalize(result, file.close)
        return result

    def _read(self, name: str) -> Mask:
        file, display_name = self._file
        entry, key = self._entries[name], self._keys[name]
        constructor = Mask.from_bitmap if key.endswith(".bitmap") else Mask.from_indices
        stored = file.read(key, 0, file.tensors[key].numel, Buffer())
        try:
            mask = constructor(stored, entry.shape)
            if (mask.digest, mask.num_active) != (entry.digest, entry.num_active):
                raise ValueError("its bits are not those that were written")
        except (ValueError, TypeError) as error:
            raise InputError(
                f"the mask of {printable(name)} in {display_name} is damaged ({printable(str(error))}); "
                "create the file again"
            ) from None
        return mask

    def _combined(self, other: MaskSet, operation: Callable[[Mask, Mask], Mask]) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        if list(self) != list(other):
            lacking = [(name, "second") for name in self if name not in other]
            lacking += [(name, "first") for name in other if name not in self]
            what = (
                f"different tensors: {printable(lacking[0][0])} is not in the {lacking[0][1]} one"
                if lacking
                else "their tensors in different orders"
            )
            raise ValueError(f"the sets have {what}; give masks that were made from one checkpoint")
        shapes, other_shapes = self.shapes, other.shapes
        for name, shape in shapes.items():
            if other_shapes[name] != shape:
                raise ValueError(
                    f"the masks of {printable(name)} have shapes {list(shape)} and {list(other_shapes[name])}; give "
                    "masks that were made from one checkpoint"
                )
        return MaskSet({name: operation(self[name], other[name]) for name in self})

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


def has_content(path: Path, header: bytes, tensors: memoryview) -> bool:
    """Whether a file exists and has these bytes."""
    if not path.is_file() or path.stat().st_size != len(header) + len(tensors):
        return False
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            return False
        pieces = (tensors[start : start + COMPARED_BYTES] for start in range(0, len(tensors), COMPARED_BYTES))
        return all(file.read(len(piece)) == piece for piece in pieces)


def from_bools(active: Mapping[str, torch.Tensor]) -> MaskSet:
    """A set from bool tensors by name.

    Examples:
        >>> from_bools({"w": torch.tensor([True, False])}).num_active
        1
    """
    return MaskSet({name: Mask.from_bool(tensor) for name, tensor in active.items()})
