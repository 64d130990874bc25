"""The changes of one tensor: which coordinates, their new values, and the digests before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from opdkernels.checkpoint.safetensors import stored_dtype
from opdkernels.checkpoint.torch_pickle import torch_dtype_name
from opdkernels.errors import InputError, printable
from opdkernels.ops.patch import Changes, decode_blocks, gather
from opdkernels.ops.patch.layout import BLOCK, blocks_of
from opdkernels.patch.segments import ranges

FLOAT_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
)
INTEGER_DTYPES = (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
UNSIGNED_DTYPES = (torch.uint16, torch.uint32, torch.uint64)
DTYPES = {stored_dtype(torch_dtype_name(dtype)): dtype for dtype in FLOAT_DTYPES + INTEGER_DTYPES + UNSIGNED_DTYPES}
"""The dtypes that a patch may hold, by their names in safetensors."""

SMALL = 4096  # coordinates: a tensor with fewer is stored whole
WHOLE_FRACTION = 0.8  # of the tensor's bytes: changes that take more are stored as the whole tensor


@dataclass(frozen=True)
class TensorPatch:
    """The changes of one tensor.

    Attributes:
        name: The tensor's name; of a tied tensor, the first one.
        dtype: Its dtype.
        shape: Its shape.
        aliases: Other names of the same memory.
        mode: "sparse": some coordinates; "whole": all of them, without counts and positions.
        changes: Counts per block, positions and values as defined by `ops.patch`; values are the new bits. Coordinates
            that did not change may be among them.
        base_digest: Additive digest before the changes.
        digest: Additive digest after the changes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    aliases: tuple[str, ...]
    mode: Literal["sparse", "whole"]
    changes: Changes
    base_digest: int
    digest: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def changed(self) -> int:
        """The number of stored coordinates."""
        return self.changes.changed

    @property
    def nbytes(self) -> int:
        return changes_bytes(self.changes)

    def positions(self) -> torch.Tensor | None:
        """Returns the flat positions of the values, increasing, int64 [changed]; None for all coordinates."""
        return None if self.mode == "whole" else flat_positions(self.changes, self.numel)


def changes_bytes(changes: Changes) -> int:
    """Returns the bytes of counts, positions and values."""
    return changes.counts.nbytes + changes.positions.nbytes + changes.values.nbytes


def flat_positions(changes: Changes, numel: int) -> torch.Tensor:
    """Decodes positions. Memory is proportional to the changes and blocks, not to `numel`.

    Returns:
        int64 [changed], increasing.

    Raises:
        ValueError: The positions are not valid.
    """
    status, blocks = decode_blocks(changes.counts, changes.positions, numel, changes.changed)
    if status >= 0:
        raise ValueError("the positions of a patch are not valid; check them when they are read")
    offsets = torch.cat([changes.positions.new_empty(0, dtype=torch.int64), *blocks])
    starts = torch.arange(len(changes.counts), device=offsets.device) * BLOCK
    return offsets + starts.repeat_interleave(changes.counts)


def encode_positions(positions: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns counts and positions as `ops.patch.gather` gives them for changes at flat positions.

    Args:
        positions: int64 [changed], increasing.
        numel: Number of coordinates of the tensor.
    """
    counts, coded = [positions.new_empty(0, dtype=torch.int32)], [positions.new_empty(0, dtype=torch.uint8)]
    for start, stop in ranges(numel, 1):
        first, last = torch.searchsorted(positions, positions.new_tensor([start, stop])).tolist()
        if first == last:
            counts.append(counts[0].new_zeros(blocks_of(stop - start)))
            continue
        unchanged = coded[0].new_zeros(stop - start)
        changed = unchanged.clone()
        changed[positions[first:last] - start] = 1
        changes, _ = gather(unchanged, changed)
        counts.append(changes.counts)
        coded.append(changes.positions)
    return torch.cat(counts), torch.cat(coded)


def whole_changes(values: torch.Tensor) -> Changes:
    """Returns the changes of a tensor stored whole, from all its bits."""
    return Changes(values.new_empty(0, dtype=torch.int32), values.new_empty(0, dtype=torch.uint8), values)


def is_stored_whole(changes: Changes, numel: int) -> bool:
    """Whether a tensor is stored whole: it is small, or its changes take nearly as many bytes."""
    nbytes = numel * changes.values.element_size()
    return numel < SMALL or changes_bytes(changes) >= WHOLE_FRACTION * nbytes


def merge_tensor(first: TensorPatch, second: TensorPatch) -> TensorPatch:
    """Returns the changes of `first` and then `second`; where both change a coordinate, the value of `second` remains.

    Raises:
        InputError: They are not changes of one tensor, or `second` does not begin where `first` ends.
    """
    shown = printable(first.name)
    if (first.dtype, first.shape, first.aliases) != (second.dtype, second.shape, second.aliases):
        raise InputError(
            f"{shown} has another dtype, shape or aliases in the second patch; merge patches of one model only"
        )
    if first.digest != second.base_digest:
        raise InputError(
            f"{shown} ends with digest {first.digest:016x} in the first patch and begins with"
            f" {second.base_digest:016x} in the second; merge consecutive patches in their order"
        )
    merged = replace(second, base_digest=first.base_digest)
    if second.mode == "whole":
        return merged
    positions, values = flat_positions(second.changes, second.numel), second.changes.values
    if first.mode == "whole":
        all_values = first.changes.values.clone()
        all_values[positions] = values
        return replace(merged, mode="whole", changes=whole_changes(all_values))
    positions, order = torch.cat([flat_positions(first.changes, first.numel), positions]).sort(stable=True)
    values = torch.cat([first.changes.values, values])[order]
    is_last = torch.ones_like(positions, dtype=torch.bool)
    is_last[:-1] = positions[1:] != positions[:-1]
    changes = Changes(*encode_positions(positions[is_last], first.numel), values[is_last])
    return replace(merged, changes=changes)
