"""A mask: the active coordinates of one tensor, stored as a bitmap or, where few are active, as sorted indices.

Bitmaps have one bit per coordinate, little-endian, as `ops.delta` writes them. `block_counts` goes with a bitmap: the
number of active coordinates before each block of 2,048, so that a kernel finds the values of any block in a compact
array, which has one element per active coordinate. Indices are flat: int32, or int64 for a tensor of 2^31 coordinates
or more. An int32 index takes as much memory as 32 bits, so indices are smaller below a density of 1/32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from opdkernels.bits import bit_counts, popcount
from opdkernels.formatting import percent

BLOCK = 2048  # coordinates per element of block_counts
DIGEST_STEP = 1 << 26  # coordinates that are hashed at a time; a multiple of 8
SPARSE = 1 / 32  # density below which indices are smaller than a bitmap


class Mask:
    """The active coordinates of a tensor of `shape`; immutable. Built by `from_bitmap`, `from_bool` or `from_indices`.

    Masks of one shape combine with `&`, `|`, `^`, `-` and `~`. Equality and `digest` do not depend on the layout.

    Examples:
        >>> mask = Mask.from_bool(torch.tensor([[True, False], [False, True]]))
        >>> mask.num_active, mask.density, mask.layout, mask.indices.tolist()
        (2, 0.5, 'bitmap', [0, 3])
    """

    def __init__(self, shape: Sequence[int], bitmap: torch.Tensor | None, indices: torch.Tensor | None):
        self.shape = tuple(int(n) for n in shape)
        self.numel = math.prod(self.shape)
        self._bitmap, self._indices = bitmap, indices

    @classmethod
    def from_bitmap(cls, bitmap: torch.Tensor, shape: Sequence[int]) -> Mask:
        """A mask from one bit per coordinate.

        Args:
            bitmap: uint8 [ceil(numel / 8)], little-endian; the bits beyond the last coordinate must be 0.
            shape: Shape of the tensor.

        Raises:
            ValueError: Another dtype or size, or a bit is set beyond the last coordinate.
        """
        validate_dense(bitmap, "the bitmap")
        numel = math.prod(shape)
        if bitmap.dtype != torch.uint8 or bitmap.shape != ((numel + 7) // 8,):
            raise ValueError(
                f"a bitmap for shape {list(shape)} is uint8 [{(numel + 7) // 8}], "
                f"not {bitmap.dtype} {list(bitmap.shape)}"
            )
        if numel % 8 and int(bitmap[-1]) >> numel % 8:
            raise ValueError(f"the bitmap has bits set beyond the last of {numel} coordinates")
        return cls(shape, bitmap.cpu().clone(memory_format=torch.contiguous_format), None).compact()

    @classmethod
    def from_bool(cls, active: torch.Tensor) -> Mask:
        """A mask from a bool tensor of the tensor's shape. Raises TypeError for another dtype or layout."""
        validate_dense(active, "the mask")
        if active.dtype != torch.bool:
            raise TypeError(f"the mask is {active.dtype}; give a bool tensor")
        bitmap = np.packbits(active.detach().cpu().contiguous().view(-1).numpy(), bitorder="little")
        return cls(active.shape, torch.from_numpy(bitmap), None).compact()

    @classmethod
    def from_indices(cls, indices: torch.Tensor, shape: Sequence[int]) -> Mask:
        """A mask from flat indices.

        Args:
            indices: int32 or int64 [num_active], strictly ascending.
            shape: Shape of the tensor.

        Raises:
            TypeError: Another dtype or more than one dimension.
            ValueError: An index is outside of the tensor, repeated, or not in ascending order.
        """
        validate_dense(indices, "the indices")
        numel = math.prod(shape)
        if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
            raise TypeError(f"indices are {indices.dtype} {list(indices.shape)}; give int32 or int64, one dimension")
        indices = indices.detach().cpu()
        if len(indices):
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= numel:
                raise ValueError(f"index {low if low < 0 else high} is outside of a tensor of {numel} coordinates")
            unsorted = torch.nonzero(indices[1:] <= indices[:-1])
            if len(unsorted):
                at = int(unsorted[0])
                what = "twice" if indices[at] == indices[at + 1] else f"after {int(indices[at])}"
                raise ValueError(f"index {int(indices[at + 1])} comes {what}; give sorted indices without duplicates")
        return cls(shape, None, indices.to(index_dtype(numel), copy=True).contiguous()).compact()

    def compact(self) -> Mask:
        """The same mask in the smaller layout."""
        sparse = self.num_active < SPARSE * self.numel
        return Mask(self.shape, None, self.indices) if sparse else Mask(self.shape, self.bitmap, None)

    @property
    def layout(self) -> str:
        """How the mask is stored: "bitmap" or "indices"."""
        return "bitmap" if self._bitmap is not None else "indices"

    @property
    def payload(self) -> torch.Tensor:
        """The stored tensor: `bitmap` or `indices`, according to `layout`."""
        payload = self._bitmap if self._bitmap is not None else self._indices
        assert payload is not None
        return payload

    @cached_property
    def bitmap(self) -> torch.Tensor:
        """uint8 [ceil(numel / 8)]: one bit per coordinate."""
        return self._packed()

    def _packed(self) -> torch.Tensor:
        """`bitmap`, not cached where the layout is "indices"."""
        if self._bitmap is not None:
            return self._bitmap
        bitmap = np.zeros((self.numel + 7) // 8, np.uint8)
        indices = self.payload.numpy()
        np.bitwise_or.at(bitmap, indices >> 3, (1 << (indices & 7)).astype(np.uint8))
        return torch.from_numpy(bitmap)

    @cached_property
    def indices(self) -> torch.Tensor:
        """Flat indices [num_active], ascending: int32, or int64 for a tensor of 2^31 coordinates or more."""
        if self._indices is not None:
            return self._indices
        bitmap, step = self.bitmap.numpy(), 1 << 20  # bytes unpacked at a time
        chunks = [
            np.flatnonzero(np.unpackbits(bitmap[i : i + step], bitorder="little")) + 8 * i
            for i in range(0, len(bitmap), step)
        ]
        indices = np.concatenate(chunks) if chunks else np.zeros(0, np.int64)
        return torch.from_numpy(indices).to(index_dtype(self.numel))

    @property
    def nbytes(self) -> int:
        """Bytes of `payload`, in memory and on disk."""
        return self.payload.nbytes

    @cached_property
    def num_active(self) -> int:
        """Number of active coordinates."""
        return len(self._indices) if self._indices is not None else popcount(self.bitmap.numpy())

    @property
    def density(self) -> float:
        """Fraction of the coordinates that is active; 0 for an empty tensor."""
        return self.num_active / self.numel if self.numel else 0.0

    @cached_property
    def block_counts(self) -> torch.Tensor:
        """int64 [blocks + 1]: active coordinates before each block of 2,048 coordinates, and in total."""
        bits = np.zeros(-(-self.numel // BLOCK) * (BLOCK // 8), np.uint8)
        bits[: len(self.bitmap)] = self.bitmap.numpy()
        counts = bit_counts(bits.reshape(-1, BLOCK // 8)).sum(1, dtype=np.int64) if len(bits) else np.zeros(0, np.int64)
        return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))))

    @cached_property
    def digest(self) -> str:
        """64 bits of a hash of the shape and the active coordinates, in hexadecimal; the same for both layouts."""
        digest = hashlib.blake2b(f"{list(self.shape)}".encode(), digest_size=8)
        if self._bitmap is not None:
            digest.update(self._bitmap.numpy().data)
        else:
            # In parts: the bitmap of the whole tensor would be larger than the mask.
            for start in range(0, self.numel, DIGEST_STEP):
                digest.update(self.flat(start, min(start + DIGEST_STEP, self.numel))._packed().numpy().data)
        return digest.hexdigest()

    def to_bool(self) -> torch.Tensor:
        """A bool tensor of `shape`."""
        flags = np.unpackbits(self.bitmap.numpy(), count=self.numel, bitorder="little").astype(bool)
        return torch.from_numpy(flags).view(self.shape)

    def flat(self, start: int, stop: int) -> Mask:
        """The mask of coordinates [start, stop) of the flattened tensor, with one dimension: a shard along dimension 0.

        Raises ValueError where the range is not inside of the tensor.
        """
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"[{start}, {stop}) is not a range of a tensor of {self.numel} coordinates")
        if self._indices is not None:
            bounds = torch.tensor([start, stop], dtype=self._indices.dtype)
            first, last = torch.searchsorted(self._indices, bounds).tolist()
            return Mask((stop - start,), None, self._indices[first:last] - start)
        unpacked = np.unpackbits(self.bitmap.numpy()[start // 8 : -(-stop // 8)], bitorder="little")
        bits = unpacked[start % 8 :][: stop - start]
        return Mask((stop - start,), torch.from_numpy(np.packbits(bits, bitorder="little")), None)

    def _combined(self, other: Mask, operation: np.ufunc) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"masks of shapes {list(self.shape)} and {list(other.shape)} do not combine; give masks of one shape"
            )
        return Mask(self.shape, torch.from_numpy(operation(self.bitmap.numpy(), other.bitmap.numpy())), None).compact()

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_xor)

    def __sub__(self, other: Mask) -> Mask:
        return self & ~other

    def __invert__(self) -> Mask:
        bitmap = np.bitwise_not(self.bitmap.numpy())
        if self.numel % 8:
            bitmap[-1] &= (1 << self.numel % 8) - 1
        return Mask(self.shape, torch.from_numpy(bitmap), None).compact()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.shape == other.shape and torch.equal(self.bitmap, other.bitmap)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mask({list(self.shape)}, {self.num_active:,} active, {percent(self.density)})"


def validate_dense(tensor: object, name: str) -> None:
    """Raise TypeError unless a value is a tensor with data, of the usual layout."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is of type {type(tensor).__name__}; give a tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device, without data" if tensor.is_meta else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is a tensor {kind}; give a dense tensor")


def index_dtype(numel: int) -> torch.dtype:
    """int32, or int64 where int32 cannot index so many coordinates."""
    return torch.int32 if numel < 1 << 31 else torch.int64
