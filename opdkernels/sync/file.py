"""The file of a sync patch, `opds` 1: a manifest, and three entries of values, counts and positions.

The file has the layout of safetensors, and everything read from one is validated before it is used.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence

import torch

from opdkernels.checkpoint.base import MAX_HEADER_BYTES, MAX_TENSORS
from opdkernels.checkpoint.io import Buffer, choose_io
from opdkernels.checkpoint.safetensors import SafetensorsFile, stored_dtype
from opdkernels.checkpoint.torch_pickle import torch_dtype_name
from opdkernels.errors import InputError, printable
from opdkernels.ops.patch import BITS, Changes, check
from opdkernels.ops.patch.layout import blocks_of
from opdkernels.outputs import SYNC_PATCH, new_file
from opdkernels.patch.create import entry, header_bytes
from opdkernels.patch.output import Writer
from opdkernels.patch.segments import digest_of, padded
from opdkernels.sync.manifest import ENTRIES, NOT_A_PATCH, Manifest, Tensor, bad, metadata_of, read_manifest
from opdkernels.sync.tensor_patch import DTYPES, TensorPatch
from opdkernels.version import __version__


def write(
    path: str | os.PathLike[str],
    tensors: Sequence[TensorPatch],
    *,
    run: str,
    base_version: int,
    version: int,
    base_digest: str,
    digest: str,
    overwrite: bool,
) -> None:
    """Writes a patch atomically; see `sync.Patch.save`."""
    if len(tensors) > MAX_TENSORS:
        raise too_large(len(tensors))
    contents = {name: content_of(tensors, name) for name in ENTRIES}
    described, offsets = [], dict.fromkeys(ENTRIES, 0)
    for tensor in tensors:
        sizes = {
            "counts": len(tensor.changes.counts),
            "positions": len(tensor.changes.positions),
            "values": tensor.changes.values.nbytes,
        }
        begins = dict(offsets)
        ends = {name: begins[name] + size for name, size in sizes.items()}
        offsets = {name: end + (-end % 8 if name == "values" else 0) for name, end in ends.items()}
        described.append(
            Tensor(
                name=tensor.name,
                dtype=stored_dtype(torch_dtype_name(tensor.dtype)),
                shape=list(tensor.shape),
                aliases=list(tensor.aliases),
                mode=tensor.mode,
                changed=tensor.changed,
                blocks=[begins["counts"], ends["counts"]],
                positions=[begins["positions"], ends["positions"]],
                values=[begins["values"], ends["values"]],
                base_digest=f"{tensor.base_digest:016x}",
                digest=f"{tensor.digest:016x}",
            )
        )
    manifest = Manifest(
        run=run,
        base_version=base_version,
        version=version,
        base_digest=base_digest,
        digest=digest,
        parts=[1, 1],
        codec="plain",
        values="new",
        content_digest=digest_of(*contents.values()).hex(),
        tensors=described,
        producer=f"opdkernels {__version__}",
    )
    entries, offset = {}, 0
    for name, content in contents.items():
        entries[name] = entry(ENTRIES[name].upper(), [len(content)], offset, offset + content.nbytes)
        offset += content.nbytes
    header = header_bytes(metadata_of(manifest), entries)
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise too_large(len(tensors))
    with (
        new_file(path, SYNC_PATCH, overwrite=overwrite) as temporary,
        contextlib.closing(Writer(temporary, os.fspath(path))) as writer,
    ):
        writer([header, *(content.numpy().data for content in contents.values())])
        writer.finish()


def too_large(num_tensors: int) -> InputError:
    return InputError(
        f"a sync patch of {num_tensors} tensors would have a header larger than safetensors allows; track parts of the"
        " model, each with a tracker"
    )


def content_of(tensors: Sequence[TensorPatch], name: str) -> torch.Tensor:
    """Returns the content of an entry, on the CPU; each tensor's values are padded to a multiple of 8 bytes."""
    parts = [getattr(tensor.changes, name).cpu() for tensor in tensors]
    empty = torch.empty(0, dtype=torch.int32 if name == "counts" else torch.uint8)
    return torch.cat([empty, *map(padded, parts)] if name == "values" else [empty, *parts])


def read(path: str | os.PathLike[str]) -> tuple[Manifest, list[TensorPatch]]:
    """Returns the manifest and the tensors of a patch, in memory of their own.

    Raises:
        InputError: The file is anything but an undamaged patch of this version.
    """
    shown, buffer = os.fspath(path), Buffer()
    with contextlib.closing(SafetensorsFile(shown, choose_io("auto", shown), remedy=NOT_A_PATCH)) as file:
        manifest = read_manifest(file.metadata, shown)
        for name, dtype in ENTRIES.items():
            info = file.tensors.get(name)
            if info is None or info.dtype != dtype or len(info.shape) != 1:
                raise bad(shown, f"has no entry {name} of {dtype.upper()}")
        if len(file.tensors) != len(ENTRIES):
            raise bad(shown, "has an entry that is not one of a sync patch")
        contents = {name: file.read_bits(name, 0, file.tensors[name].items, buffer).clone() for name in ENTRIES}
        contents["counts"] = contents["counts"].view(torch.int32)  # bytes if there are none
        file.check()
    if digest_of(*contents.values()).hex() != manifest.content_digest:
        raise bad(shown, "has values, counts or positions with a wrong digest")
    return manifest, list(tensors_of(manifest, contents, shown))


def tensors_of(manifest: Manifest, contents: dict[str, torch.Tensor], path: str) -> Iterator[TensorPatch]:
    """Yields the tensors, views of the contents, each validated."""
    offsets = dict.fromkeys(ENTRIES, 0)
    for tensor in manifest.tensors:
        shown, dtype = printable(tensor.name), DTYPES.get(tensor.dtype)
        if dtype is None:
            raise bad(path, f"has {shown} of an unknown dtype {printable(tensor.dtype[:20])}")
        numel, width = math.prod(tensor.shape), dtype.itemsize
        ranges = {"counts": tensor.blocks, "positions": tensor.positions, "values": tensor.values}
        for name, (begin, end) in ranges.items():
            if begin != offsets[name] or not begin <= end <= len(contents[name]):
                raise bad(path, f"has {name} of {shown} that do not follow those of the tensor before")
            offsets[name] = end + (-end % 8 if name == "values" else 0)
        lengths = {name: end - begin for name, (begin, end) in ranges.items()}
        stored_blocks = blocks_of(numel) if tensor.mode == "sparse" else 0
        if lengths["counts"] != stored_blocks or lengths["values"] != tensor.changed * width:
            raise bad(path, f"has {shown} with other numbers of counts or values than its shape and changes need")
        counts, positions, values = (contents[name][slice(*ranges[name])] for name in ("counts", "positions", "values"))
        changes = Changes(counts, positions, values.view(BITS[width]))
        if tensor.mode == "sparse":
            try:
                check(changes, numel)
            except ValueError as error:
                raise bad(path, f"has {shown} with changes that are not valid: {error}") from None
        elif tensor.changed != numel or len(positions):
            raise bad(path, f"has {shown} whole, with other changes than all its coordinates")
        if dtype == torch.bool and bool((values > 1).any()):
            raise bad(path, f"has {shown} of bool with values other than 0 and 1")
        yield TensorPatch(
            tensor.name,
            dtype,
            tuple(tensor.shape),
            tuple(tensor.aliases),
            tensor.mode,
            changes,
            int(tensor.base_digest, 16),
            int(tensor.digest, 16),
        )
    if offsets != {name: len(content) for name, content in contents.items()}:
        raise bad(path, "has values, counts or positions beyond those of its tensors")
