"""distill and experiment."""

from __future__ import annotations

from typing import Annotated, Any

import click
import typer

from opdkernels.cli.options import Json, Out, Quiet, command
from opdkernels.cli.output import emit
from opdkernels.config import ExperimentOptions, validate_options
from opdkernels.distillation.options import DistillOptions, demo_options
from opdkernels.errors import printable

EXPERIMENTS = ("masks", "sgd", "on-policy", "precision", "trajectory", "subspace", "grafts")


@command(DistillOptions, config_file=True)
def distill(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml]",
            help="Options as TOML; options on the command line override them.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Out,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Train a student on its own samples by on-policy distillation from a teacher, and track the weight changes.

    The output folder gets checkpoint-N folders in the format of transformers (checkpoint-0 is the start), log.jsonl
    with a line per step, snapshots.jsonl with a line per snapshot, and masks of what had changed at each snapshot. Run
    the same command again to resume an interrupted run from its last checkpoint.

    Example: opdkernels distill --student Qwen2.5-0.5B --teacher Qwen2.5-1.5B --prompts prompts.jsonl -o run
    """
    from opdkernels.distillation.loop import train
    from opdkernels.distillation.options import options_from
    from opdkernels.distillation.result import format_text, summary
    from opdkernels.distillation.world import shutdown

    result = train(options_from(config, options), out, quiet=quiet)
    if result.is_main:
        emit(summary(result), format_text(result), as_json=json, quiet=quiet)
    shutdown(result.exit_status)
    raise typer.Exit(result.exit_status)


@command(
    ExperimentOptions,
    DistillOptions,
    config_file=True,
    demo={**demo_options(), "student": "the one in this package", "teacher": "the one in this package"},
)
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            metavar="|".join(EXPERIMENTS),
            click_type=click.Choice(EXPERIMENTS),
            help="Name of the experiment.",
            show_default=False,
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml]",
            help="Options of distill as TOML; without it, the addition task with the models in this package.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Out,
    quiet: Quiet = False,
    json: Json = False,
    **options: Any,
) -> None:
    """Run an experiment on how on-policy distillation changes weights: all arms and seeds, and a table with intervals.

    masks: coordinates that a full run changed, against random, magnitude-matched, near-zero, early and RLVR masks. sgd:
    learning rates of AdamW and SGD. on-policy: fractions of on-policy steps. precision: split_master, nearest and fp32.
    trajectory: masks from a tenth, a fifth and half of the steps. subspace: LoRA and the early subspace, against masks
    of the same size. grafts: parts of a run's update on their own, or removed.

    The output folder gets a run per arm and seed, results.json, table.md, report.html and an analysis of the update of
    one run. Finished runs are reused.

    Example: opdkernels experiment masks -o masks --seeds 3 --density 0.2
    """
    from opdkernels.api import experiment
    from opdkernels.distillation.options import options_from
    from opdkernels.experiments.table import markdown

    chosen = validate_options(
        ExperimentOptions, {key: options.pop(key) for key in ExperimentOptions.model_fields if key in options}
    )
    result = experiment(
        name,
        options_from(config, options if config else {**demo_options(), **options}),
        out,
        seeds=chosen.seeds,
        density=chosen.density,
        arms=chosen.arms,
        quiet=quiet,
    )
    text = [*markdown(result).splitlines(), f"report: {printable(out)}/report.html"]
    emit(result, text, as_json=json, quiet=quiet)
