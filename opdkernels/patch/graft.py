"""`graft`: a checkpoint with a selected part of the update, or without it, to measure which part carries the gain."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.checkpoint import correspondence
from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.buffers import is_buffer
from opdkernels.checkpoint.conversions import model_types_of
from opdkernels.checkpoint.coverage import Coverage
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.checkpoint.sharded import ShardedCheckpoint
from opdkernels.checkpoint.tied import copies
from opdkernels.checkpoint.unsupported import validate_no_adapter
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.masks import MaskSet, map_masks
from opdkernels.metrics.distance import warn_if_unrelated
from opdkernels.outputs import new_folder
from opdkernels.patch import output, segments
from opdkernels.patch.create import (
    extra_file_names,
    headers_of,
    in_order,
    make_index,
    pair_of,
    small_file,
    weights_name,
)
from opdkernels.progress import Progress

LAYERS = re.compile(r"layers?=(\d{1,9})(?:-(\d{1,9}))?")


def graft(
    base: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    masks: MaskSet | None = None,
    select: str = "",
    invert: bool = False,
    io: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the base checkpoint with a selected part of the update; with `invert`, the trained one without that part.

    Each coordinate has its bits from one side or the other; there is no arithmetic. Tensors are matched by canonical
    name; tensors that the base lacks are copied from the trained checkpoint.

    Args:
        base: The checkpoint before training: folder, file or hub id.
        trained: The checkpoint after training, of the same model.
        out: Folder to write; must be new or empty.
        masks: Selected coordinates by tensor; none of the tensors that have no mask.
        select: Comma-separated terms: blocks (attention, mlp, embedding, lm_head, norm) and modules (q_proj, down_proj,
            bias), any of which must apply, and layers (layer=3, layers=0-7), one of which must apply. With `masks`,
            both must select a coordinate.
        invert: Takes the base's bits for the selected coordinates, and the trained bits for the others.
        io: How checkpoints are read: "auto", "mmap" or "read".
        progress: Called with bytes done, bytes in total and the name of the current tensor.

    Returns:
        `path`; `kept`, the number of coordinates that differ from the base; `changed`, the number of coordinates where
        trained and base differ; `files`; `coverage`, the fraction of each side's parameters that has a counterpart; and
        `unmatched`, the tensors that the base lacks.

    Warns:
        UserWarning: The checkpoints do not look like the start and the end of one run.

    Raises:
        InputError: An input cannot be read or does not fit, a selected tensor is missing from the base, or `out` is not
            new or empty.
        UsageError: Neither `masks` nor `select` is given, or `out` is empty.
        OSError: The output cannot be written; nothing is left of it.
    """
    terms = [term for term in map(str.strip, select.split(",")) if term]
    if masks is None and not terms:
        raise UsageError("graft needs a part of the update; give masks, or select, or both")
    with contextlib.ExitStack() as stack:
        base_checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(base, io=io, any_tensors=True)))
        trained_checkpoint = stack.enter_context(contextlib.closing(open_checkpoint(trained, io=io, any_tensors=True)))
        assert isinstance(base_checkpoint, ShardedCheckpoint)
        assert isinstance(trained_checkpoint, ShardedCheckpoint)
        for checkpoint in (base_checkpoint, trained_checkpoint):
            validate_no_adapter(checkpoint.tensors, checkpoint.path)
        infos = in_order(trained_checkpoint)
        repeated = {name: keeper for name, keeper in copies(trained_checkpoint).items() if keeper != name}
        base_names = match_tensors(base_checkpoint, trained_checkpoint, infos, repeated)
        coverage = coverage_of(base_checkpoint, infos, base_names, repeated)
        if masks is not None:
            masks = mapped_masks(masks, trained_checkpoint, infos)
        selected = select_names([info.name for info in infos], terms)
        validate_selection(infos, base_names, selected, masks)
        warn_if_unrelated(pair_of(base_checkpoint, trained_checkpoint, base_names))
        headers = headers_of(trained_checkpoint, infos)
        files = {
            name: name if header is not None else weights_name(name)
            for name, header in trained_checkpoint.headers().items()
        }
        report: Progress = progress or (lambda done, total, name: None)
        done, total = 0, sum(info.nbytes for info in infos)
        kept = changed = 0
        with new_folder(out, inputs={"BASE": base, "TRAINED": trained}) as temporary:
            for file, header in headers.items():
                file_infos = [info for info in infos if files[info.file] == file]
                size = len(header) + sum(info.nbytes for info in file_infos)
                shown = os.path.join(os.fspath(out), file)
                with contextlib.closing(output.Writer(temporary / file, shown, 2, size)) as writer:
                    writer([header])
                    for info in file_infos:
                        # A copy of another tensor is the same parameter and has that tensor's selection.
                        is_trained = selection_reader(repeated.get(info.name, info.name), masks, selected, invert)
                        for start, stop in segments.ranges(info.items, info.item_bytes):
                            trained_bits = trained_checkpoint.read_bits(info.name, start, stop)
                            base_bits = trained_bits
                            if info.name in base_names:
                                base_bits = base_checkpoint.read_bits(base_names[info.name], start, stop)
                            grafted = torch.where(is_trained(start, stop), trained_bits, base_bits)
                            changed += int((trained_bits != base_bits).sum())
                            kept += int((grafted != base_bits).sum())
                            writer([grafted.view(torch.uint8).numpy().data])
                            done += grafted.nbytes
                            report(done, total, info.name)
                    writer.finish()
                SafetensorsFile(str(temporary / file), "read").close()  # validates the header with the library
            write_extra_files(trained_checkpoint, temporary)
            base_checkpoint.check()
            trained_checkpoint.check()
    return {
        "path": os.fspath(out),
        "kept": kept,
        "changed": changed,
        "files": list(headers),
        "coverage": coverage.to_dict(),
        "unmatched": [info.name for info in infos if info.name not in base_names],
    }


def match_tensors(
    base: ShardedCheckpoint, trained: ShardedCheckpoint, infos: list[TensorInfo], repeated: Mapping[str, str]
) -> dict[str, str]:
    """Returns the base's name of each trained tensor that it has; `repeated` are the copies of trained tensors.

    Raises InputError for checkpoints of two models.
    """
    shapes = {info.name: info.shape for info in infos}
    base_shapes = {name: info.shape for name, info in base.tensors.items()}
    result = correspondence.match_tensors(shapes, base_shapes, model_types=model_types_of(trained.config, base.config))
    base_names = {name: base_name for name, base_name, _ in result.pairs}
    for name, keeper in repeated.items():
        if name not in base_names and keeper in base_names:
            base_names[name] = base_names[keeper]
    if not base_names:
        raise InputError(
            f"{printable(base.path)} and {printable(trained.path)} have no tensor name in common;"
            " give two checkpoints of one model"
        )
    for info in infos:
        base_info = base.tensors.get(base_names.get(info.name, ""))
        if base_info is not None and (base_info.dtype, base_info.shape) != (info.dtype, info.shape):
            raise InputError(
                f"{printable(info.name)} is {base_info.dtype} {list(base_info.shape)} in {printable(base.path)} and"
                f" {info.dtype} {list(info.shape)} in {printable(trained.path)}; save both in one dtype and shape"
            )
    return base_names


def coverage_of(
    base: ShardedCheckpoint, infos: list[TensorInfo], base_names: Mapping[str, str], repeated: Mapping[str, str]
) -> Coverage:
    """How much of the parameters of both sides has a counterpart."""
    trained = {
        info.name: info
        for info in infos
        if info.name not in repeated and not is_buffer(info.name, info.shape, info.dtype)
    }
    left = [info for name, info in trained.items() if name not in base_names]
    used = set(base_names.values()) | copies(base).keys()
    base_left = [
        info
        for name, info in base.tensors.items()
        if name not in used and not is_buffer(info.name, info.shape, info.dtype)
    ]
    compared = sum(info.numel for name, info in trained.items() if name in base_names)
    uncompared = {"base": base_left, "trained": left}
    return Coverage(
        compared,
        {side: compared + sum(info.numel for info in tensors) for side, tensors in uncompared.items()},
        [side for side, tensors in uncompared.items() if tensors],
    )


def mapped_masks(masks: MaskSet, trained: ShardedCheckpoint, infos: list[TensorInfo]) -> MaskSet:
    """The masks by the names of the trained tensors. Raises InputError for a mask of no tensor."""
    shapes = {info.name: info.shape for info in infos}
    mapped = map_masks(masks, shapes, model_types=model_types_of(trained.config))
    for name in mapped.unbound:
        raise InputError(
            f"there is a mask for {printable(name)}, which {printable(trained.path)} does not have;"
            " make the masks from this model"
        )
    return mapped.masks


def validate_selection(
    infos: list[TensorInfo],
    base_names: Mapping[str, str],
    selected: set[str],
    masks: MaskSet | None,
) -> None:
    """Raises InputError for masks of another model, and for a selected tensor that the base lacks."""
    by_name = {info.name: info for info in infos}
    for name, shape in (masks.shapes if masks is not None else {}).items():
        info = by_name[name]
        if info.shape != shape or info.items != info.numel:
            raise InputError(
                f"the mask of {printable(name)} has shape {list(shape)} and the tensor {list(info.shape)};"
                " make the masks from this model"
            )
    for name in sorted(selected):
        if name not in base_names and (masks is None or name in masks):
            raise InputError(
                f"the base lacks {printable(name)}, which is selected; select other tensors, or give a base that has it"
            )


def select_names(names: list[str], terms: Sequence[str]) -> set[str]:
    """Returns the tensors that the terms select; all of them if there are no terms.

    A tensor is selected if it is in one of the named blocks or modules and in one of the named layers; a group without
    terms does not restrict. Raises UsageError if a term, or all terms together, select nothing.

    >>> names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    >>> sorted(select_names(names, ["mlp", "layers=1-5"]))
    ['model.layers.1.mlp.up_proj.weight']
    """
    roles = {name: parse_tensor_name(name) for name in names}
    blocks, modules = {role.block for role in roles.values()}, {role.module for role in roles.values()}
    groups: dict[str, set[str]] = {}
    for term in terms:
        if layers := LAYERS.fullmatch(term):
            first, last = int(layers[1]), int(layers[2] or layers[1])
            matching = {name for name, role in roles.items() if first <= role.layer <= last}
        elif term in blocks:
            matching = {name for name, role in roles.items() if role.block == term}
        elif term in modules:
            matching = {name for name, role in roles.items() if role.module == term}
        else:
            matching = set()
        if not matching:
            last_layer = max(role.layer for role in roles.values())
            raise UsageError(
                f"no tensor is {printable(term)!r}; give one of {', '.join(sorted(blocks | modules))}"
                + (f", layers=0-{last_layer}" if last_layer >= 0 else "")
            )
        groups.setdefault("layer" if layers else "module", set()).update(matching)
    selected = set(names)
    for matching in groups.values():
        selected &= matching
    if not selected:
        raise UsageError(f"no tensor is all of {printable(', '.join(terms))!r}; give other layers or modules")
    return selected


def selection_reader(
    name: str, masks: MaskSet | None, selected: set[str], invert: bool
) -> Callable[[int, int], torch.Tensor]:
    """Returns a function that reads which items [start, stop) of a tensor are trained; `start` is a multiple of 8.

    Its result is bool, [stop - start] or a scalar for all items.
    """
    if name not in selected or (masks is not None and name not in masks):
        return lambda start, stop: torch.tensor(invert)
    if masks is None:
        return lambda start, stop: torch.tensor(not invert)
    bitmap = masks[name].bitmap.numpy()

    def read(start: int, stop: int) -> torch.Tensor:
        bits = np.unpackbits(bitmap[start // 8 : (stop + 7) // 8], count=stop - start, bitorder="little")
        active = torch.from_numpy(bits).bool()
        return ~active if invert else active

    return read


def write_extra_files(trained: ShardedCheckpoint, folder: Path) -> None:
    """Writes configuration, tokenizer and index next to the weights."""
    for name in extra_file_names(trained):
        content = small_file(trained.folder, name)
        if content is not None and not (folder / name).exists():
            (folder / name).write_bytes(content)
    if trained.kind == "torch" and trained.index is not None:
        (folder / "model.safetensors.index.json").write_bytes(make_index(trained))
