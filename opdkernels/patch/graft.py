"""Interventions: the trained checkpoint with a part of its change alone, or without that part, to see which part carries the gain."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.names import match_names, parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.checkpoint.sharded import ShardedCheckpoint
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks import MaskSet
from opdkernels.patch import output, segments
from opdkernels.patch.create import beside_names, headers_of, in_order, made_index, small_file, weights_name
from opdkernels.progress import Progress

LAYERS = re.compile(r"layers?=(\d{1,9})(?:-(\d{1,9}))?")


def graft(
    source: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    masks: MaskSet | None = None,
    where: str = "",
    revert: bool = False,
    io: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write source with a part of what training changed to the folder `out`, new or empty; with `revert`, trained without that part.

    source, trained: folders, files or hub ids of one model. The part is what both choose: `masks`, active coordinates by tensor
    (none of tensors it does not name); `where`, terms with commas between: blocks (attention, mlp, embedding, lm_head, norm) and
    modules (q_proj, down_proj, bias), which add up, and layers (layer=3, layers=0-7), which add up too; with both, both must hold.
    Each coordinate has its bits from one side or the other; no arithmetic is done. Tensors are matched by name, prefixes of wrappers
    apart; those that source lacks stay as trained has them.

    Returns `kept` and `changed`, coordinates whose bits are trained's and differ, and those that differ in all, `files`, and
    `unmatched`, the tensors that source lacks. Raises InputError for input that cannot be read or does not fit, or where the part
    has a tensor that source lacks; UsageError where nothing is chosen; OSError for a full disk, after which nothing is left.
    """
    terms = [term for term in map(str.strip, where.split(",")) if term]
    if masks is None and not terms:
        raise UsageError("an intervention needs a part of the change; give masks, or where, or both")
    if not os.fspath(out):
        raise InputError("the output folder has no name; give one to -o")
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(contextlib.closing(open_checkpoint(source, io=io, any_tensors=True)))
        after = stack.enter_context(contextlib.closing(open_checkpoint(trained, io=io, any_tensors=True)))
        assert isinstance(before, ShardedCheckpoint)
        assert isinstance(after, ShardedCheckpoint)
        infos = in_order(after)
        twins = twins_of(before, after, infos)
        names = chosen_names([info.name for info in infos], terms)
        refuse_others(after, infos, twins, names, masks)
        headers = headers_of(after, infos)
        files = {name: name if header is not None else weights_name(name) for name, header in after.headers().items()}
        show: Progress = progress or (lambda done, total, name: None)
        done, total = 0, sum(info.nbytes for info in infos)
        kept = changed = 0
        with output.new_folder(Path(out)) as temporary:
            for file, header in headers.items():
                own = [info for info in infos if files[info.file] == file]
                with contextlib.closing(
                    output.Writer(
                        temporary / file,
                        os.path.join(os.fspath(out), file),
                        2,
                        len(header) + sum(info.nbytes for info in own),
                    )
                ) as writer:
                    writer([header])
                    for info in own:
                        part = of_tensor(info, masks, names, revert)
                        for start, stop in segments.ranges(info.items, info.item_bytes):
                            ours = after.read_bits(info.name, start, stop)
                            theirs = before.read_bits(twins[info.name], start, stop) if info.name in twins else ours
                            taken = torch.where(part(start, stop), ours, theirs)
                            changed += int((ours != theirs).sum())
                            kept += int((taken != theirs).sum())
                            writer([taken.view(torch.uint8).numpy().data])
                            done += taken.nbytes
                            show(done, total, info.name)
                    writer.finish()
                SafetensorsFile(str(temporary / file), "read").close()  # whoever reads it next has the same library
            write_beside(after, temporary)
            before.check()
            after.check()
    return {
        "path": os.fspath(out),
        "kept": kept,
        "changed": changed,
        "files": list(headers),
        "unmatched": [info.name for info in infos if info.name not in twins],
    }


def twins_of(before: ShardedCheckpoint, after: ShardedCheckpoint, infos: list[TensorInfo]) -> dict[str, str]:
    """The source's name of each trained tensor that it has too. Raises InputError where the two are not of one model."""
    found = match_names([info.name for info in infos], before.tensors)
    if not found:
        raise InputError(
            f"{printable(before.path)} and {printable(after.path)} have no tensor of one name; give two checkpoints of one model"
        )
    for info in infos:
        twin = before.tensors.get(found.get(info.name, ""))
        if twin is not None and (twin.dtype, twin.shape) != (info.dtype, info.shape):
            raise InputError(
                f"{printable(info.name)} is {twin.dtype} {list(twin.shape)} in {printable(before.path)} and {info.dtype} {list(info.shape)} in {printable(after.path)};"
                " save both alike"
            )
    return found


def refuse_others(
    after: ShardedCheckpoint, infos: list[TensorInfo], twins: Mapping[str, str], names: set[str], masks: MaskSet | None
) -> None:
    """Raises InputError for masks of another model, and for a part with a tensor that the source lacks."""
    held = {info.name: info for info in infos}
    for name, shape in (masks.shapes if masks is not None else {}).items():
        if name not in held:
            raise InputError(
                f"there is a mask of {printable(name)}, which {printable(after.path)} does not hold; make the masks from this model"
            )
        if held[name].shape != shape or held[name].items != held[name].numel:
            raise InputError(
                f"the mask of {printable(name)} is of shape {list(shape)} and the tensor of {list(held[name].shape)}; make the masks from this model"
            )
    for name in sorted(names):
        if name not in twins and (masks is None or name in masks):
            raise InputError(
                f"the source lacks {printable(name)}, which is in the part; choose another, or a source that has it"
            )


def chosen_names(names: list[str], terms: Sequence[str]) -> set[str]:
    """The tensors that terms choose: of any block or module that is named and, where layers are, of one of them; all if there are none.

    >>> names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    >>> sorted(chosen_names(names, ["mlp", "layers=1-5"]))
    ['model.layers.1.mlp.up_proj.weight']
    """
    places = {name: parse_tensor_name(name) for name in names}
    blocks, modules = {one.block for one in places.values()}, {one.module for one in places.values()}
    kinds: dict[str, set[str]] = {}
    for term in terms:
        if layers := LAYERS.fullmatch(term):
            first, last = int(layers[1]), int(layers[2] or layers[1])
            found = {name for name, one in places.items() if first <= one.layer <= last}
        elif term in blocks:
            found = {name for name, one in places.items() if one.block == term}
        elif term in modules:
            found = {name for name, one in places.items() if one.module == term}
        else:
            found = set()
        if not found:
            last_layer = max(one.layer for one in places.values())
            raise UsageError(
                f"nothing is {printable(term)!r} here; there are {', '.join(sorted(blocks | modules))}"
                + (f", layers=0-{last_layer}" if last_layer >= 0 else "")
            )
        kinds.setdefault("layer" if layers else "module", set()).update(found)
    chosen = set(names)
    for found in kinds.values():
        chosen &= found
    if not chosen:
        raise UsageError(f"no tensor is all of {printable(', '.join(terms))!r}; name other layers or modules")
    return chosen


def of_tensor(
    info: TensorInfo, masks: MaskSet | None, names: set[str], revert: bool
) -> Callable[[int, int], torch.Tensor]:
    """Reads which items [start, stop) of a tensor are to be the trained ones, bool; `start` is a multiple of 8."""
    if info.name not in names or (masks is not None and info.name not in masks):
        return lambda start, stop: torch.tensor(revert)
    if masks is None:
        return lambda start, stop: torch.tensor(not revert)
    bits = masks[info.name].bitmap.numpy()

    def read(start: int, stop: int) -> torch.Tensor:
        part = torch.from_numpy(
            np.unpackbits(bits[start // 8 : (stop + 7) // 8], count=stop - start, bitorder="little")
        ).bool()
        return ~part if revert else part

    return read


def write_beside(trained: ShardedCheckpoint, folder: Path) -> None:
    """Configuration, tokenizer and index go with the weights."""
    for name in beside_names(trained):
        content = small_file(trained.folder, name)
        if content is not None and not (folder / name).exists():
            (folder / name).write_bytes(content)
    if trained.kind == "torch" and trained.index is not None:
        (folder / "model.safetensors.index.json").write_bytes(made_index(trained))
