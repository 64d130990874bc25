"""mask: create, combine and describe sets of masks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from opdkernels.checkpoint.coverage import coverage_sentence
from opdkernels.cli.exit_status import ExitStatus
from opdkernels.cli.options import Base, Json, OutFile, Trained, command
from opdkernels.cli.output import emit
from opdkernels.config import (
    ChangedMaskOptions,
    MagnitudeMatchedMaskOptions,
    MaskOptions,
    NearZeroMaskOptions,
    PrincipalMaskOptions,
    RandomMaskOptions,
    TopChangedMaskOptions,
    validate_options,
)
from opdkernels.errors import InputError, printable
from opdkernels.formatting import percent
from opdkernels.outputs import MASKS, Inputs, validate_file

if TYPE_CHECKING:
    from opdkernels.masks import MaskSet

Masks = Annotated[str, typer.Argument(metavar="MASKS", help="File of masks.", show_default=False)]
OtherMasks = Annotated[
    str, typer.Argument(metavar="OTHER", help="File of masks of the same tensors.", show_default=False)
]


@command(ChangedMaskOptions)
def changed(base: Base, trained: Trained, *, out: OutFile, **options: Any) -> None:
    """Activate the coordinates that training changed.

    Example: opdkernels mask changed Qwen2.5-0.5B my-run/step-200 -o changed.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(ChangedMaskOptions, options)
    validate_out(out, {"BASE": base, "TRAINED": trained})
    with warnings.catch_warnings():  # `save` prints the coverage
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("default", "unrelated: ", UserWarning)
        active = masks.changed(base, trained, atol=chosen.atol, view=chosen.view)
    save(active, out, chosen.overwrite)


@command(TopChangedMaskOptions)
def top_changed(base: Base, trained: Trained, *, out: OutFile, **options: Any) -> None:
    """Activate the fraction of the coordinates with the largest |delta|.

    Example: opdkernels mask top-changed Qwen2.5-0.5B my-run/step-200 --density 0.2 -o top.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(TopChangedMaskOptions, options)
    validate_out(out, {"BASE": base, "TRAINED": trained})
    with warnings.catch_warnings():  # `save` prints the coverage
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("default", "unrelated: ", UserWarning)
        active = masks.top_changed(base, trained, chosen.density, scope=chosen.scope)
    save(active, out, chosen.overwrite)


@command(NearZeroMaskOptions)
def near_zero(base: Base, *, out: OutFile, **options: Any) -> None:
    """Activate the fraction of the coordinates with the smallest |W|.

    Example: opdkernels mask near-zero Qwen2.5-0.5B --density 0.2 -o small.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(NearZeroMaskOptions, options)
    validate_out(out, {"BASE": base})
    save(masks.near_zero(base, chosen.density, scope=chosen.scope), out, chosen.overwrite)


@command(PrincipalMaskOptions)
def principal(base: Base, *, out: OutFile, **options: Any) -> None:
    """Activate the coordinates where the top singular vectors of each matrix are largest.

    Example: opdkernels mask principal Qwen2.5-0.5B -o principal.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(PrincipalMaskOptions, options)
    validate_out(out, {"BASE": base})
    save(masks.principal(base, chosen.density), out, chosen.overwrite)


@command(PrincipalMaskOptions)
def safe(base: Base, *, out: OutFile, **options: Any) -> None:
    """Activate the coordinates that are neither principal nor near zero.

    Example: opdkernels mask safe Qwen2.5-0.5B -o safe.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(PrincipalMaskOptions, options)
    validate_out(out, {"BASE": base})
    save(masks.safe(base, chosen.density), out, chosen.overwrite)


@command(RandomMaskOptions)
def random(base: Base, *, out: OutFile, **options: Any) -> None:
    """Activate a random fraction of the coordinates.

    Example: opdkernels mask random Qwen2.5-0.5B --density 0.175 -o random.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(RandomMaskOptions, options)
    validate_out(out, {"BASE": base})
    save(masks.random_subset(base, chosen.density, scope=chosen.scope, seed=chosen.seed), out, chosen.overwrite)


@command(MagnitudeMatchedMaskOptions)
def magnitude_matched(masks_file: Masks, base: Base, *, out: OutFile, **options: Any) -> None:
    """Activate random coordinates with the same distribution of |W| as MASKS: a control for the effect of magnitude.

    Every tensor has as many active coordinates at each bf16 value of |W| as in MASKS.

    Example: opdkernels mask magnitude-matched changed.safetensors Qwen2.5-0.5B -o control.safetensors
    """
    from opdkernels import masks

    chosen = validate_options(MagnitudeMatchedMaskOptions, options)
    validate_out(out, {"MASKS": masks_file, "BASE": base})
    save(masks.magnitude_matched(masks.MaskSet.load(masks_file), base, seed=chosen.seed), out, chosen.overwrite)


@command(MaskOptions)
def combine(
    masks_file: Masks,
    how: Annotated[
        str,
        typer.Argument(
            metavar="and|or|xor|minus",
            click_type=click.Choice(["and", "or", "xor", "minus"]),
            help="How to combine the masks.",
            show_default=False,
        ),
    ],
    other_file: OtherMasks,
    *,
    out: OutFile,
    **options: Any,
) -> None:
    """Combine two sets of masks: and, or, xor, minus.

    Example: opdkernels mask combine changed.safetensors minus principal.safetensors -o rest.safetensors
    """
    from operator import and_, or_, sub, xor

    from opdkernels.masks import MaskSet

    chosen = validate_options(MaskOptions, options)
    validate_out(out, {"MASKS": masks_file, "OTHER": other_file})
    masks, other = MaskSet.load(masks_file), MaskSet.load(other_file)
    try:
        combined = {"and": and_, "or": or_, "xor": xor, "minus": sub}[how](masks, other)
    except ValueError as error:
        raise InputError(str(error)) from None
    save(combined, out, chosen.overwrite)


@command()
def stats(masks_file: Masks, *, json: Json = False) -> None:
    """Print the density by block, module and layer, and the densest and sparsest tensors.

    Example: opdkernels mask stats changed.safetensors
    """
    from opdkernels.masks import MaskSet
    from opdkernels.masks.stats import format_stats, mask_stats

    result = mask_stats(MaskSet.load(masks_file))
    emit(result, format_stats(result), as_json=json)


@command()
def compare(masks_file: Masks, other_file: OtherMasks, *, json: Json = False) -> None:
    """Print how two sets of masks overlap, compared with chance.

    Example: opdkernels mask compare changed.safetensors near-zero.safetensors
    """
    from opdkernels.masks import MaskSet
    from opdkernels.masks.stats import compare_masks, format_comparison

    masks, other = MaskSet.load(masks_file), MaskSet.load(other_file)
    try:
        result = compare_masks(masks, other)
    except ValueError as error:
        raise InputError(str(error)) from None
    emit(result, format_comparison(result), as_json=json)


def validate_out(out: str, inputs: Inputs) -> None:
    """Raises InputError, before anything is computed, for an output that no option allows to write."""
    validate_file(out, MASKS, inputs=inputs, overwrite=True)


def save(masks: MaskSet, out: str, overwrite: bool) -> None:
    """Writes masks and prints how many coordinates are active; exit status 3 if they do not cover their whole pair."""
    from opdkernels.masks.build import nonfinite_sentence

    masks.save(out, overwrite=overwrite)
    partial = masks.nonfinite > 0 or (masks.coverage is not None and not masks.coverage.sufficient)
    if masks.coverage is not None and not masks.coverage.complete:
        typer.echo(coverage_sentence(masks.coverage.to_dict()))
    if masks.nonfinite:
        typer.echo(nonfinite_sentence(masks.nonfinite))
    typer.echo(
        f"{masks.num_active:,} of {masks.numel:,} coordinates of {len(masks)} tensors ({percent(masks.density)}) are "
        f"active; written to {printable(out)}"
    )
    if partial:
        raise typer.Exit(ExitStatus.PARTIAL)
