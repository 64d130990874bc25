"""patch create, patch apply, patch info and graft."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opdkernels.cli.exit_status import ExitStatus
from opdkernels.cli.options import Base, Json, NewFolder, OutFile, Quiet, Trained, command
from opdkernels.cli.output import emit
from opdkernels.config import GraftOptions, PatchApplyOptions, PatchCreateOptions, validate_options
from opdkernels.errors import printable
from opdkernels.formatting import percent

Patch = Annotated[str, typer.Argument(metavar="PATCH", help="File that patch create wrote.", show_default=False)]


@command(PatchCreateOptions)
def create(
    base: Base, trained: Trained, *, out: OutFile, quiet: Quiet = False, json: Json = False, **options: Any
) -> None:
    """Write what changed from BASE to TRAINED: positions and values of coordinates whose bits differ, and digests.

    Tensors with another shape or dtype, or without a match, are stored completely. The patch also contains the
    configuration and the tokenizer.

    Example: opdkernels patch create Qwen2.5-0.5B my-run/step-200 -o step-200.patch
    """
    from opdkernels.patch import create, format_text
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        result = create(base, trained, out, progress=progress, **options)
    emit(result, format_text(result), as_json=json, quiet=quiet)


@command(PatchApplyOptions)
def apply(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the patch was made from.", show_default=False)
    ],
    patch: Patch,
    *,
    out: NewFolder,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Restore the trained checkpoint from BASE and PATCH: the same safetensors files, byte for byte.

    BASE, PATCH and the result are verified by their digests; if one is wrong, nothing is left of the output.

    Example: opdkernels patch apply Qwen2.5-0.5B step-200.patch -o step-200
    """
    from opdkernels.patch import apply, format_applied
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        result = apply(base, patch, out, progress=progress, **options)
    emit(result, format_applied(result, out), as_json=json, quiet=quiet)
    raise typer.Exit(ExitStatus.PARTIAL if result["left_out"] else ExitStatus.DONE)


@command()
def info(patch: Patch, *, json: Json = False) -> None:
    """Print what a patch contains: digests of both checkpoints, changed coordinates, sizes, files.

    Example: opdkernels patch info step-200.patch
    """
    from opdkernels.patch import format_text, info

    result = info(patch)
    emit(result, format_text(result), as_json=json)


@command(GraftOptions)
def graft(
    base: Base, trained: Trained, *, out: NewFolder, quiet: Quiet = False, json: Json = False, **options: Any
) -> None:
    """Write BASE with a selected part of the update of TRAINED, or TRAINED without it: which part carries the gain?

    Each coordinate has its bits from one of the two; the files are those of TRAINED. `opdkernels experiment grafts`
    does this for many parts, and evaluates them.

    Example: opdkernels graft Qwen2.5-0.5B my-run/step-200 --select mlp,layers=0-7 --invert -o without
    """
    from opdkernels.checkpoint.coverage import coverage_sentence
    from opdkernels.masks import MaskSet
    from opdkernels.patch import graft
    from opdkernels.progress import reporting

    chosen = validate_options(GraftOptions, options)
    with reporting(quiet) as progress:
        result = graft(
            base,
            trained,
            out,
            masks=MaskSet.load(chosen.masks) if chosen.masks else None,
            select=chosen.select,
            invert=chosen.invert,
            io=chosen.io,
            progress=progress,
        )
    fraction = result["kept"] / result["changed"] if result["changed"] else 0.0
    sufficient = result["coverage"]["sufficient"]
    text = [
        *([] if sufficient else [coverage_sentence(result["coverage"])]),
        f"{printable(out)}: {result['kept']:,} of the {result['changed']:,} changed coordinates are from TRAINED "
        f"({percent(fraction)})",
        *(f"BASE has no {printable(name)}; it is copied from TRAINED" for name in result["unmatched"]),
    ]
    emit(result, text, as_json=json, quiet=quiet)
    raise typer.Exit(ExitStatus.DONE if sufficient else ExitStatus.PARTIAL)
