"""The commands. No logic: options come in, a function of the package is called, its result is printed."""

from __future__ import annotations

import inspect as inspection
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import typer
from pydantic import BaseModel

from opdkernels.distillation.options import DistillOptions, demo_options
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.formatting import percent

EXIT_STATUS = (
    "Exit status: 0 done, 2 usage, 3 done but some tensors were excluded, failed or hold NaN or Inf, 4 bad input."
)

app = typer.Typer(
    name="opdkernels",
    help="Measure what post-training changed in a model's weights, at the speed of memory.\n\n"
    "Checkpoints are folders, files (safetensors or PyTorch) or hub ids (org/name@revision).\n\n" + EXIT_STATUS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint before training.", show_default=False)]
Trained = Annotated[str, typer.Argument(metavar="TRAINED", help="Checkpoint after training.", show_default=False)]
Out = Annotated[
    str,
    typer.Option(
        "--out", "-o", metavar="OUT", help="Folder of the run; a killed run goes on from it.", show_default=False
    ),
]
Memory = Annotated[str, typer.Option(help="Most memory to use, such as 2GB; mapped files do not count.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads of the kernels; torch's own number if not given.", show_default=False)
]
Io = Annotated[
    str, typer.Option(help="auto, mmap or read: mapped files, positioned reads, or the better of the two for the disk.")
]
Revision = Annotated[Optional[str], typer.Option(help="Revision of hub ids.", show_default=False)]  # noqa: UP045
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Go on without shards that the index lists and the folder lacks.")
]
Csv = Annotated[bool, typer.Option("--csv", help="Also write the tables as CSV.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace another run in the output folder.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_options(
    command: Callable[..., None], model: type[BaseModel], without_config: Mapping[str, Any]
) -> Callable[..., None]:
    """A command whose keywords are the fields of a model, each an option that says what the field does and what it is by default, and
    what it is where no configuration is given."""
    signature = inspection.signature(command, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    fields = []
    for name, field in model.model_fields.items():
        if name in signature.parameters:
            continue
        flag = field.annotation is bool
        usual = [] if field.is_required() or field.default in ("", None) else [f"default: {shown(field.default)}"]
        usual += [f"without a configuration: {shown(without_config[name])}"] if name in without_config else []
        names = [f"--{name.replace('_', '-')}{f'/--no-{name}'.replace('_', '-') if flag else ''}"]
        option = typer.Option(
            *names,
            help=f"{field.description} [{'; '.join(usual)}]" if usual else field.description,
            metavar=None if flag else "VALUE",
            show_default=False,
        )
        kind = Optional[bool] if flag else Optional[str]  # noqa: UP045
        fields.append(
            inspection.Parameter(
                name, inspection.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
            )
        )
    command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in (*own, *fields)}
    return command


def shown(default: Any) -> str:
    return (
        ",".join(map(str, default))
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


@app.command()
def inspect(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    b: Annotated[str | None, typer.Argument(metavar="B", help="Another, to match with it.", show_default=False)] = None,
    io: Io = "auto",
    memory: Memory = "4GB",
    revision: Revision = None,
    allow_missing: AllowMissing = False,
    json: Json = False,
) -> None:
    """Read headers only: formats, dtypes, parameters, what matches, and what analyze would take.

    Example: opdkernels inspect Qwen2.5-0.5B my-run/step-200
    """
    from opdkernels.analysis.headers import inspect, lines

    found = inspect(a, b, io=io, memory=memory, revision=revision, allow_missing=allow_missing)
    show(found, lines(found), json)
    raise typer.Exit(3 if found.get("excluded") else 0)


@app.command()
def analyze(
    source: Source,
    trained: Trained,
    out: Out,
    memory: Memory = "4GB",
    threads: Threads = None,
    io: Io = "auto",
    revision: Revision = None,
    allow_missing: AllowMissing = False,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda or cuda:1: where coordinates are counted, to the same bits, and Gram matrices and their eigenvalues made. cuda alone is the GPU of LOCAL_RANK, else the first."
        ),
    ] = "cpu",
    spectra: Annotated[
        str,
        typer.Option(
            help="exact: spectra of every matrix, and where its update lies in the geometry of the source; topk: the top of the update's spectrum alone, with bounds; off."
        ),
    ] = "exact",
    csv: Csv = False,
    paper_csv: Annotated[
        bool,
        typer.Option(
            "--paper-csv", help="Also write the files of the paper's analysis script (tensor_metrics.csv and others)."
        ),
    ] = False,
    no_report: NoReport = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Analyse what training changed: sparsity, norms, near-zero coverage, what rounding alone would show; spectra, subspaces.

    Writes tensors.parquet, groups.parquet, spectra.parquet, geometry.parquet, summary.json and report.html to OUT. The same
    command again goes on where a killed run stopped. Coordinates take a second or two a billion; spectra take minutes and more:
    `inspect` says how long, and --spectra off leaves them out.

    With --device cuda files stream through pinned memory to the GPU: read, copied and counted side by side.

    Example: opdkernels analyze Qwen2.5-0.5B my-run/step-200 -o out
    """
    from opdkernels.analysis.text import lines
    from opdkernels.api import analyze
    from opdkernels.progress import reporting

    options = {
        "memory": memory,
        "threads": threads,
        "io": io,
        "revision": revision,
        "allow_missing": allow_missing,
        "device": device,
        "spectra": spectra,
        "csv": csv,
        "paper_csv": paper_csv,
        "report": not no_report,
        "overwrite": overwrite,
    }
    with reporting(quiet) as progress:
        result = analyze(source, trained, out, progress=progress, **options)
    if not quiet:
        show(result.summary, lines(result), json)
    raise typer.Exit(result.exit_status)


@app.command()
def overlap(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the runs were trained from.", show_default=False)
    ],
    runs: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="Two or more runs.", show_default=False)],
    out: Out,
    atol: Annotated[
        float, typer.Option(help="A coordinate changed where visible |delta| exceeds this (rounded to bf16).")
    ] = 1e-5,
    strata: Annotated[
        str, typer.Option(help="row, column or row,column: also condition chance on |W| within them.")
    ] = "",
    memory: Memory = "4GB",
    threads: Threads = None,
    io: Io = "auto",
    revision: Revision = None,
    allow_missing: AllowMissing = False,
    csv: Csv = False,
    no_report: NoReport = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare which coordinates several runs of one source changed: coverage, Jaccard, and chance, uniform and within |W|.

    Example: opdkernels overlap Qwen2.5-0.5B opd-run rl-run -o out --strata row,column
    """
    from opdkernels.analysis.overlap import lines
    from opdkernels.api import overlap
    from opdkernels.progress import reporting

    options = {
        "atol": atol,
        "strata": tuple(filter(None, strata.split(","))),
        "memory": memory,
        "threads": threads,
        "io": io,
        "revision": revision,
        "allow_missing": allow_missing,
        "csv": csv,
        "report": not no_report,
        "overwrite": overwrite,
    }
    with reporting(quiet) as progress:
        result = overlap(base, *runs, out=out, progress=progress, **options)
    if not quiet:
        show(result.summary, lines(result), json)
    raise typer.Exit(result.exit_status)


@app.command()
def trajectory(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the run was trained from.", show_default=False)
    ],
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="STEP [STEP ...]", help="Two or more checkpoints of the run.", show_default=False),
    ],
    out: Out,
    spectra: Annotated[str, typer.Option(help="exact, topk or off, as of analyze, for every checkpoint.")] = "exact",
    atol: Annotated[
        float, typer.Option(help="The changed set: coordinates whose visible |delta| exceeds this (rounded to bf16).")
    ] = 1e-5,
    memory: Memory = "4GB",
    threads: Threads = None,
    io: Io = "auto",
    revision: Revision = None,
    allow_missing: AllowMissing = False,
    csv: Csv = False,
    no_report: NoReport = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Follow a run over its checkpoints: sparsity, norm, stable rank, and when the final directions and coordinates are found.

    Checkpoints are taken in the order of the steps that their names end with (checkpoint-200, step_0040), those without one
    last. Each gets all that analyze gives, in OUT/steps; trajectory.parquet and report.html follow them. The same command with
    more checkpoints goes on. Factorisations of BASE are kept in OUT/factors for that; the folder may be deleted.

    Example: opdkernels trajectory Qwen2.5-0.5B my-run/checkpoint-* -o out
    """
    from opdkernels.analysis.trajectory import lines
    from opdkernels.api import trajectory
    from opdkernels.progress import reporting

    options = {
        "spectra": spectra,
        "atol": atol,
        "memory": memory,
        "threads": threads,
        "io": io,
        "revision": revision,
        "allow_missing": allow_missing,
        "csv": csv,
        "report": not no_report,
        "overwrite": overwrite,
    }
    with reporting(quiet) as progress:
        result = trajectory(base, *checkpoints, out=out, progress=progress, **options)
    if not quiet:
        show(result.summary, lines(result), json)
    raise typer.Exit(result.exit_status)


mask_app = typer.Typer(
    help="Make, show and combine masks: which coordinates of a model are active. Files are safetensors.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(mask_app, name="mask")
MaskOut = Annotated[
    str, typer.Option("--out", "-o", metavar="FILE", help="Where the masks go, as safetensors.", show_default=False)
]
MaskFile = Annotated[str, typer.Argument(metavar="FILE", help="Masks, from one of these commands.", show_default=False)]
Base = Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint to be trained.", show_default=False)]
Share = Annotated[float, typer.Option(help="Share of the coordinates, above 0 and at most 1.")]
Per = Annotated[str, typer.Option(help="tensor, module or model: of what it is the share.")]
Seed = Annotated[int, typer.Option(help="Another seed, another choice.")]


@mask_app.command("changed")
def mask_changed(
    base: Source,
    tuned: Trained,
    out: MaskOut,
    atol: Annotated[float, typer.Option(help="Active where |delta| exceeds this.")] = 0.0,
    view: Annotated[str, typer.Option(help="visible, both rounded to bf16, or stored.")] = "visible",
) -> None:
    """Active where a run changed the weights.

    Example: opdkernels mask changed Qwen2.5-0.5B my-run/step-200 -o changed.safetensors
    """
    from opdkernels import masks

    save_masks(masks.changed(base, tuned, atol=atol, view=view), out)


@mask_app.command("most-changed")
def mask_most_changed(base: Source, tuned: Trained, out: MaskOut, share: Share = 0.1, per: Per = "model") -> None:
    """Active is the share that a run changed most.

    Example: opdkernels mask most-changed Qwen2.5-0.5B my-run/step-200 --share 0.2 -o most.safetensors
    """
    from opdkernels import masks

    save_masks(masks.top_changed(base, tuned, share, scope=per), out)


@mask_app.command("near-zero")
def mask_near_zero(base: Base, out: MaskOut, share: Share = 0.1, per: Per = "tensor") -> None:
    """Active are the smallest |W|.

    Example: opdkernels mask near-zero Qwen2.5-0.5B --share 0.2 -o small.safetensors
    """
    from opdkernels import masks

    save_masks(masks.near_zero(base, share, scope=per), out)


@mask_app.command("principal")
def mask_principal(base: Base, out: MaskOut, share: Share = 0.1) -> None:
    """Active is where the top singular vectors of each matrix put its weight.

    Example: opdkernels mask principal Qwen2.5-0.5B -o principal.safetensors
    """
    from opdkernels import masks

    save_masks(masks.principal(base, share), out)


@mask_app.command("safe")
def mask_safe(base: Base, out: MaskOut, share: Share = 0.1) -> None:
    """Active is what is not principal or near zero.

    Example: opdkernels mask safe Qwen2.5-0.5B -o safe.safetensors
    """
    from opdkernels import masks

    save_masks(masks.safe(base, share), out)


@mask_app.command("random")
def mask_random(base: Base, out: MaskOut, share: Share = 0.1, per: Per = "tensor", seed: Seed = 0) -> None:
    """Active is a share chosen at random.

    Example: opdkernels mask random Qwen2.5-0.5B --share 0.175 -o random.safetensors
    """
    from opdkernels import masks

    save_masks(masks.random_subset(base, share, scope=per, seed=seed), out)


@mask_app.command("random-like")
def mask_random_like(masks_file: MaskFile, base: Base, out: MaskOut, seed: Seed = 0) -> None:
    """As many of each tensor as in FILE, at random among those of the same |W|: what magnitudes alone explain.

    Example: opdkernels mask random-like changed.safetensors Qwen2.5-0.5B -o control.safetensors
    """
    from opdkernels import masks

    save_masks(masks.magnitude_matched(masks.MaskSet.load(masks_file), base, seed=seed), out)


@mask_app.command("combine")
def mask_combine(
    a: MaskFile,
    how: Annotated[str, typer.Argument(metavar="and|or|xor|minus", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="FILE", help="Other masks of the same tensors.", show_default=False)],
    out: MaskOut,
) -> None:
    """Both, either, one of, or the first without the second.

    Example: opdkernels mask combine changed.safetensors minus principal.safetensors -o rest.safetensors
    """
    from operator import and_, or_, sub, xor

    from opdkernels.masks import MaskSet

    ways = {"and": and_, "or": or_, "xor": xor, "minus": sub}
    if how not in ways:
        raise UsageError(f"there is no way {how!r} to combine masks; it is one of {', '.join(ways)}")
    first, second = MaskSet.load(a), MaskSet.load(b)
    try:
        found = ways[how](first, second)
    except ValueError as error:
        raise InputError(str(error)) from None
    save_masks(found, out)


@mask_app.command("show")
def mask_show(masks_file: MaskFile, json: Json = False) -> None:
    """Density by block, module and layer, and the densest and sparsest tensors.

    Example: opdkernels mask show changed.safetensors
    """
    from opdkernels.masks import MaskSet
    from opdkernels.masks.stats import format_stats, mask_stats

    stats = mask_stats(MaskSet.load(masks_file))
    show(stats, format_stats(stats), json)


@mask_app.command("overlap")
def mask_overlap(
    a: MaskFile,
    b: Annotated[str, typer.Argument(metavar="FILE", help="Other masks of the same tensors.", show_default=False)],
    json: Json = False,
) -> None:
    """How much two masks share, beside chance.

    Example: opdkernels mask overlap changed.safetensors near-zero.safetensors
    """
    from opdkernels.masks import MaskSet
    from opdkernels.masks.stats import compare_masks, format_comparison

    first, second = MaskSet.load(a), MaskSet.load(b)
    try:
        comparison = compare_masks(first, second)
    except ValueError as error:
        raise InputError(str(error)) from None
    show(comparison, format_comparison(comparison), json)


def save_masks(masks: Any, out: str) -> None:
    masks.save(out)
    typer.echo(
        f"{masks.num_active:,} of {masks.numel:,} coordinates of {len(masks)} tensors ({percent(masks.density)}) are active; written to {printable(out)}"
    )


patches = typer.Typer(
    help="What training changed as one file, and the trained checkpoint back from it, bit for bit.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(patches, name="patch")
PatchFile = Annotated[str, typer.Argument(metavar="PATCH", help="File that patch create wrote.", show_default=False)]


@patches.command("create")
def patch_create(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint before training.", show_default=False)],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after training.", show_default=False)],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="File to write.", show_default=False)],
    zstd: Annotated[
        bool,
        typer.Option("--zstd", help="Store differences, compressed: less than half the size, several times slower."),
    ] = False,
    io: Io = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write what changed from BASE to TUNED: positions and values of the coordinates whose bits differ, and digests of both.

    Tensors with another shape or dtype, or without a match, are stored whole. Configuration and tokenizer come along.

    Example: opdkernels patch create Qwen2.5-0.5B my-run/step-200 -o step-200.patch
    """
    from opdkernels.patch import create, lines
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        found = create(base, tuned, out, zstd=zstd, io=io, overwrite=overwrite, progress=progress)
    if not quiet:
        show(found, lines(found), json)


@patches.command("apply")
def patch_apply(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Checkpoint that the patch was made from.", show_default=False)
    ],
    patch: PatchFile,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write, new or empty.", show_default=False)
    ],
    io: Io = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the trained checkpoint again from BASE and PATCH: the same safetensors files, byte for byte.

    BASE and PATCH are verified by their digests before anything is written.

    Example: opdkernels patch apply Qwen2.5-0.5B step-200.patch -o step-200
    """
    from opdkernels.patch import apply, lines
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        found = apply(base, patch, out, io=io, progress=progress)
    if not quiet:
        show(found, lines(found), json)
    raise typer.Exit(3 if found["left_out"] else 0)


@patches.command("info")
def patch_info(patch: PatchFile, json: Json = False) -> None:
    """Say what a patch holds: digests of both checkpoints, changed coordinates, sizes, files.

    Example: opdkernels patch info step-200.patch
    """
    from opdkernels.patch import info, lines

    found = info(patch)
    show(found, lines(found), json)


@app.command("graft")
def graft_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Checkpoint before training.", show_default=False)],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="Checkpoint after training, of the same model.", show_default=False)
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write, new or empty.", show_default=False)
    ],
    masks: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Masks (opdkernels mask): the part is what is active.", show_default=False),
    ] = None,
    where: Annotated[
        str,
        typer.Option(
            metavar="TERMS",
            help="Only in some tensors: attention, mlp, embedding, lm_head, norm, q_proj, layers=0-7, ..., with commas between; blocks and modules add up, with layers both must hold.",
            show_default=False,
        ),
    ] = "",
    revert: Annotated[bool, typer.Option("--revert", help="All of the change but the part.")] = False,
    io: Io = "auto",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write BASE with a part of the change to TUNED alone, or TUNED without it, to score: which part carries the gain?

    Every coordinate has its bits from one side; files are those of TUNED. `opdkernels experiment grafts` does so for many
    parts, and scores them.

    Example: opdkernels graft Qwen2.5-0.5B my-run/step-200 --where mlp,layers=0-7 --revert -o without
    """
    from opdkernels.masks import MaskSet
    from opdkernels.patch import graft
    from opdkernels.progress import reporting

    with reporting(quiet) as progress:
        found = graft(
            base,
            tuned,
            out,
            masks=MaskSet.load(masks) if masks else None,
            where=where,
            revert=revert,
            io=io,
            progress=progress,
        )
    if not quiet:
        share = found["kept"] / found["changed"] if found["changed"] else 0.0
        text = [
            f"{printable(out)}: {found['kept']:,} of the {found['changed']:,} changed coordinates are TUNED's ({percent(share)})"
        ]
        show(
            found,
            text + [f"BASE lacks {printable(name)}, which is as TUNED has it" for name in found["unmatched"]],
            json,
        )


def distill(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml]", help="Options as TOML; those on the command line go before it.", show_default=False
        ),
    ] = None,
    *,
    out: Out,
    quiet: Quiet = False,
    json: Json = False,
    **given: str | None,
) -> None:
    """Train a student on its own samples from a teacher's view of every token, and follow what that does to the weights.

    OUT gets checkpoint-N folders (transformers' format, checkpoint-0 the start), log.jsonl with a line a step, snapshots.jsonl with a
    line per snapshot, and masks of what had changed at each snapshot. A run that was killed goes on from its last
    checkpoint (--save-steps) with the same command.

    Example: opdkernels distill --student Qwen2.5-0.5B --teacher Qwen2.5-1.5B --prompts prompts.jsonl --max-steps 200 -o run
    """
    from opdkernels.distillation.loop import format_text, summary, train
    from opdkernels.distillation.options import options_from
    from opdkernels.distillation.world import shutdown

    options = options_from(config, {name: value for name, value in given.items() if value is not None})
    result = train(options, out, quiet=quiet)
    if not quiet and result.is_main:
        show(summary(result), format_text(result), json)
    shutdown(result.exit_status)
    raise typer.Exit(result.exit_status)


app.command("distill")(with_options(distill, DistillOptions, {}))


def experiment(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="masks, sgd, on-policy, precision, trajectory, subspace or grafts.",
            show_default=False,
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG.toml]",
            help="Options of distill as TOML; without any, the addition task with the models that ship.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    density: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the coordinates in each mask; 0: all that a run changed visibly to bf16. [default: 0; 0.2 of trajectory and grafts]",
            show_default=False,
        ),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="Some of the arms, with commas between, as the table names them; all if empty.")
    ] = "",
    quiet: Quiet = False,
    json: Json = False,
    **given: str | None,
) -> None:
    """Run an experiment on what on-policy distillation does to weights: its arms, seed by seed, and one table with intervals.

    masks: the set that a full run changed, against random, |W|-matched, near-zero, early and RLVR's sets. sgd: rates of AdamW and
    SGD. on-policy: shares of the student's own samples. precision: bf16 exact, bf16 rounded, fp32. trajectory: masks of a tenth,
    a fifth and half of the steps. subspace: LoRA and the early subspace, against masks of their size. grafts: parts of a
    run's change alone, or taken back. OUT gets every arm's run, of which finished ones are not made again, results.json,
    table.md, report.html, and the analysis of what one run changed.

    Example: opdkernels experiment masks -o masks --seeds 3 --density 0.2
    """
    from opdkernels.api import experiment
    from opdkernels.distillation.options import options_from
    from opdkernels.experiments.table import markdown

    options = options_from(
        config,
        {**({} if config else demo_options()), **{name: value for name, value in given.items() if value is not None}},
    )
    result = experiment(
        name,
        options,
        out,
        seeds=seeds,
        density=density,
        arms=[arm.strip() for arm in arms.split(",") if arm.strip()],
        quiet=quiet,
    )
    if not quiet:
        show(result, [*markdown(result).splitlines(), f"report: {printable(out)}/report.html"], json)


app.command("experiment")(
    with_options(
        experiment, DistillOptions, {**demo_options(), "student": "the one that ships", "teacher": "the one that ships"}
    )
)


@app.command()
def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a finished run.", show_default=False)],
) -> None:
    """Write report.html again from the tables of a finished run.

    Example: opdkernels report out
    """
    from opdkernels.api import write_report

    typer.echo(write_report(out))


@app.command()
def doctor(json: Json = False) -> None:
    """Say which kernels run here and why: compiler, instruction sets, threads, torch, triton, CUDA.

    Example: opdkernels doctor
    """
    from opdkernels.doctor import examine, lines

    found = examine()
    show(found, lines(found), json)


def show(content: dict[str, Any], text: list[str], as_json: bool) -> None:
    if as_json:
        from json import dumps

        typer.echo(dumps(content, indent=1))
    else:
        for line in text:
            typer.echo(line)


def main() -> None:
    """Runs a command; bad input and bad usage get one line on the error stream and their exit status, warnings one line."""
    warnings.formatwarning = lambda message, *where: f"opdkernels: warning: {printable(str(message))}\n"
    try:
        app()
    except InputError as error:
        fail(str(error), 4)
    except UsageError as error:
        fail(str(error), 2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a full disk, a folder where a file should go
        where = f" at {error.filename}" if error.filename else ""
        fail(f"{error.strerror or error}{where}; make room or choose another folder, and run the same command again", 4)
    except KeyboardInterrupt:
        fail("interrupted; the same command again goes on from here", 130)


def fail(message: str, status: int) -> None:
    print(f"opdkernels: {printable(message)}", file=sys.stderr)
    sys.exit(status)
