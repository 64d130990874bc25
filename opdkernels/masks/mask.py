"""A mask: the active coordinates of one tensor, as a bit each or, where few are active, as their sorted places.

Bits are little-endian, as `ops.delta` writes them; with them go the counts before each block of 2048 coordinates, so that the
active coordinates of any block are found in the compact arrays that hold one value an active coordinate. Places are flat,
int32, or int64 in a tensor of 2^31 coordinates or more. A place takes 32 times a bit, so that places are the smaller below
a density of one in 32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from opdkernels.bits import bit_counts, popcount

BLOCK = 2048
SPARSE = 1 / 32  # density below which places take less than bits


class Mask:
    """Active coordinates of a tensor of `shape`. Made by `from_bits`, `from_bool` or `from_indices`; never changed.

    Masks of one shape combine by `&`, `|`, `^`, `-` and `~`. Equal masks are equal whichever way they are held.
    """

    def __init__(self, shape: Sequence[int], bits: torch.Tensor | None, indices: torch.Tensor | None):
        self.shape = tuple(int(n) for n in shape)
        self.numel = math.prod(self.shape)
        self._bits, self._indices = bits, indices

    @classmethod
    def from_bits(cls, bits: torch.Tensor, shape: Sequence[int]) -> Mask:
        """From uint8 [ceil(numel / 8)], one bit a coordinate; what lies beyond the last coordinate must be 0."""
        numel = math.prod(shape)
        if bits.dtype != torch.uint8 or bits.shape != ((numel + 7) // 8,):
            raise ValueError(
                f"bits must be uint8 [{(numel + 7) // 8}] for shape {list(shape)}, not {bits.dtype} {list(bits.shape)}"
            )
        if numel % 8 and int(bits[-1]) >> numel % 8:
            raise ValueError(f"bits beyond the last of {numel} coordinates are set")
        return cls(shape, bits.cpu().clone(memory_format=torch.contiguous_format), None).compact()

    @classmethod
    def from_bool(cls, active: torch.Tensor) -> Mask:
        """From a bool tensor of the tensor's shape."""
        if active.dtype != torch.bool:
            raise TypeError(f"the mask is {active.dtype}; give a bool tensor")
        bits = np.packbits(active.detach().cpu().contiguous().view(-1).numpy(), bitorder="little")
        return cls(active.shape, torch.from_numpy(bits), None).compact()

    @classmethod
    def from_indices(cls, indices: torch.Tensor, shape: Sequence[int]) -> Mask:
        """From flat places, int32 or int64 [active], strictly ascending."""
        numel = math.prod(shape)
        if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
            raise TypeError(f"indices are {indices.dtype} {list(indices.shape)}; give int32 or int64, one dimension")
        indices = indices.detach().cpu()
        if len(indices):
            low, high = int(indices.min()), int(indices.max())
            if low < 0 or high >= numel:
                raise ValueError(f"index {low if low < 0 else high} lies outside a tensor of {numel} coordinates")
            wrong = torch.nonzero(indices[1:] <= indices[:-1])
            if len(wrong):
                at = int(wrong[0])
                what = "twice" if indices[at] == indices[at + 1] else f"after {int(indices[at])}"
                raise ValueError(f"index {int(indices[at + 1])} comes {what}; give sorted indices, each once")
        return cls(shape, None, indices.to(index_dtype(numel), copy=True).contiguous()).compact()

    def compact(self) -> Mask:
        """The same mask held the smaller way."""
        sparse = self.nnz < SPARSE * self.numel
        return Mask(self.shape, None, self.indices) if sparse else Mask(self.shape, self.bits, None)

    @cached_property
    def bits(self) -> torch.Tensor:
        """uint8 [ceil(numel / 8)]."""
        return self._packed()

    def _packed(self) -> torch.Tensor:
        """`bits`, which are not kept where they are not what is held."""
        if self._bits is not None:
            return self._bits
        assert self._indices is not None
        bits = np.zeros((self.numel + 7) // 8, np.uint8)
        places = self._indices.numpy()
        np.bitwise_or.at(bits, places >> 3, (1 << (places & 7)).astype(np.uint8))
        return torch.from_numpy(bits)

    @cached_property
    def indices(self) -> torch.Tensor:
        """Flat places, ascending: int32, or int64 where the tensor has 2^31 coordinates or more."""
        if self._indices is not None:
            return self._indices
        bits, step = self.bits.numpy(), 1 << 20  # bytes at a time
        parts = [
            np.flatnonzero(np.unpackbits(bits[i : i + step], bitorder="little")) + 8 * i
            for i in range(0, len(bits), step)
        ]
        places = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        return torch.from_numpy(places).to(index_dtype(self.numel))

    @property
    def held_as(self) -> str:
        """ "bits" or "indices"."""
        return "bits" if self._bits is not None else "indices"

    @property
    def nbytes(self) -> int:
        """Bytes it is held in, and stored in."""
        held = self._bits if self._bits is not None else self._indices
        assert held is not None
        return held.nbytes

    @cached_property
    def nnz(self) -> int:
        """Active coordinates."""
        return len(self._indices) if self._indices is not None else popcount(self.bits.numpy())

    @property
    def density(self) -> float:
        """Share of the coordinates that is active; 0 of an empty tensor."""
        return self.nnz / self.numel if self.numel else 0.0

    @cached_property
    def offsets(self) -> torch.Tensor:
        """int64 [blocks + 1]: active coordinates before each block of 2048, and of all."""
        bits = np.zeros(-(-self.numel // BLOCK) * (BLOCK // 8), np.uint8)
        bits[: len(self.bits)] = self.bits.numpy()
        counts = bit_counts(bits.reshape(-1, BLOCK // 8)).sum(1, dtype=np.int64) if len(bits) else np.zeros(0, np.int64)
        return torch.from_numpy(np.concatenate(([0], np.cumsum(counts))))

    @cached_property
    def digest(self) -> str:
        """64 bits of the shape and the active coordinates, in hexadecimal; the same whichever way they are held."""
        found = hashlib.blake2b(f"{list(self.shape)}".encode(), digest_size=8)
        found.update(self._packed().numpy().data)
        return found.hexdigest()

    def to_bool(self) -> torch.Tensor:
        """A bool tensor of the shape."""
        flags = np.unpackbits(self.bits.numpy(), count=self.numel, bitorder="little").astype(bool)
        return torch.from_numpy(flags).view(self.shape)

    def flat(self, start: int, stop: int) -> Mask:
        """The mask of coordinates [start, stop), as of a tensor of one dimension: a shard along the first."""
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"[{start}, {stop}) does not lie in a tensor of {self.numel} coordinates")
        if self._indices is not None:
            first, last = torch.searchsorted(
                self._indices, torch.tensor([start, stop], dtype=self._indices.dtype)
            ).tolist()
            return Mask((stop - start,), None, self._indices[first:last] - start)
        part = np.unpackbits(self.bits.numpy()[start // 8 : -(-stop // 8)], bitorder="little")[start % 8 :][
            : stop - start
        ]
        return Mask((stop - start,), torch.from_numpy(np.packbits(part, bitorder="little")), None)

    def _combined(self, other: Mask, how: np.ufunc) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"masks of shapes {list(self.shape)} and {list(other.shape)} do not combine")
        return Mask(self.shape, torch.from_numpy(how(self.bits.numpy(), other.bits.numpy())), None).compact()

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_and)

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_or)

    def __xor__(self, other: Mask) -> Mask:
        return self._combined(other, np.bitwise_xor)

    def __sub__(self, other: Mask) -> Mask:
        return self & ~other

    def __invert__(self) -> Mask:
        bits = np.bitwise_not(self.bits.numpy())
        if self.numel % 8:
            bits[-1] &= (1 << self.numel % 8) - 1
        return Mask(self.shape, torch.from_numpy(bits), None).compact()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.shape == other.shape and torch.equal(self.bits, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mask({list(self.shape)}, {self.nnz:,} active, {100 * self.density:.3g} %)"


def index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < 1 << 31 else torch.int64
