"""Runs an experiment: its arms, seed by seed, each resumable, and the table of results.

Scores are those of greedy completions of the eval prompts, the same for all arms. Intervals are 95 % intervals from
resampling prompts and, with several seeds, seeds (bootstrap.py).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdkernels.analysis.analyze import run_analyze
from opdkernels.config import MAX_SEEDS, AnalyzeOptions, validate_options
from opdkernels.distillation.checkpointing import input_paths
from opdkernels.distillation.evaluation import evaluate_checkpoint
from opdkernels.distillation.jsonl import finite, read_rows
from opdkernels.distillation.loop import train
from opdkernels.distillation.options import DistillOptions
from opdkernels.errors import UsageError, printable
from opdkernels.experiments.arms import (
    PIECES,
    Arm,
    Experiment,
    MaskBuilder,
    MaskContext,
    changed,
    checkpoint_at,
    end_checkpoint,
    start_checkpoint,
)
from opdkernels.experiments.bootstrap import START, table_rows
from opdkernels.experiments.catalog import EXPERIMENTS
from opdkernels.experiments.results import PartScores
from opdkernels.experiments.table import markdown
from opdkernels.files import write_atomically, write_json
from opdkernels.masks import MaskSet
from opdkernels.models import validate
from opdkernels.outputs import EXPERIMENT, RUN_FILE, validate_run_folder
from opdkernels.patch import graft
from opdkernels.runs.run_dir import lock_dir
from opdkernels.untrusted import read_json
from opdkernels.version import __version__

ArmResult = tuple[list[float], dict[str, Any]]  # the score of each eval prompt, and the arm's final metrics


def run_experiment(
    name: str,
    options: DistillOptions,
    out: str | os.PathLike[str],
    *,
    seeds: int = 1,
    density: float | None = None,
    arms: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run an experiment's arms and write results.json and table.md.

    Each arm's run is in OUT/seed-S/ARM; finished runs are not repeated.

    Args:
        name: A key of `EXPERIMENTS`.
        options: Options of the runs; their seed is the first.
        out: Folder of the experiment.
        seeds: Number of seeds.
        density: Density of the masks; 0: all coordinates that a run changed visibly; None: the experiment's own.
        arms: Names of the arms to run; empty: all. Arms that these depend on run too.
        quiet: Print no progress to stderr.

    Returns:
        The content of results.json.

    Raises:
        UsageError: Unknown experiment or arm, sizes out of range, or a folder with another experiment's results.
        KeyboardInterrupt: A signal stopped a run; its state is saved.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {printable(name)}; there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    selected = resolve_arms(experiment, arms)
    validate_request(name, experiment, options, seeds, density)
    density = experiment.density if density is None else density
    for arm in selected:
        validate_arm(arm, options)
    with lock_dir(out) as folder:
        claim_folder(folder, name, options)
        return run_arms(name, options, folder, selected, seeds=seeds, density=density, quiet=quiet)


def run_arms(
    name: str,
    options: DistillOptions,
    folder: Path,
    selected: Sequence[Arm],
    *,
    seeds: int,
    density: float,
    quiet: bool,
) -> dict[str, Any]:
    """Run the selected arms in a locked folder, seed by seed; arguments and result as of `run_experiment`."""
    experiment = EXPERIMENTS[name]
    scores: dict[str, list[list[float]]] = {START: []}
    final: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seed, options.seed + seeds):
        runner = SeedRunner(experiment, folder / f"seed-{seed}", seed, density, options, quiet, {})
        for arm in selected:
            log(f"{name}, seed {seed}: {arm.name}", quiet)
            result = runner.evaluate_part(arm) if arm.part else runner.run(arm)
            if result is None:
                reason = f"{'the model has no such part, or ' if arm.part else ''}nothing had changed"
                log(f"{arm.name} is left out: {reason}", quiet)
                continue
            scores.setdefault(arm.name, []).append(result[0])
            final.setdefault(arm.name, []).append(result[1])
        scores[START].append(read_rows(runner.run_dir(selected[0]) / "scores.jsonl")[0]["scores"])
    final = {arm: metrics for arm, metrics in final.items() if len(metrics) == seeds}  # an arm needs every seed
    results = {
        "experiment": name,
        "about": experiment.about,
        "seeds": seeds,
        "prompts": len(scores[START][0]),
        "steps": options.max_steps,
        "density": density,
        "reference_arm": experiment.reference_arm,
        "student": options.student,
        "teacher": options.teacher,
        "task": options.prompts,
        "options": changed_options(options),
        "rows": table_rows({arm: scores[arm] for arm in (START, *final)}, final, experiment.reference_arm),
        "snapshots": snapshots(folder / f"seed-{options.seed}" / slug(experiment.reference_arm)),
    }
    write_json(folder / "results.json", results)
    write_atomically(folder / "table.md", markdown(results).encode())
    return results


def validate_request(
    name: str, experiment: Experiment, options: DistillOptions, seeds: int, density: float | None
) -> None:
    """Raise UsageError for options that no experiment can run with."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("an experiment runs in one process; leave torchrun out, or run its arms with distill")
    if not options.num_eval_prompts or not options.snapshot_every:
        raise UsageError(
            "an experiment evaluates its arms on held-out prompts and takes snapshots of the weights; "
            "set num_eval_prompts and snapshot_every"
        )
    if seeds > MAX_SEEDS or options.seed + seeds > 1 << 63:
        raise UsageError(
            f"an experiment has at most {MAX_SEEDS} seeds, from --seed up to {(1 << 63) - 1}; choose fewer, or a "
            "smaller seed"
        )
    if seeds < 1 or (density is not None and not 0 <= density <= 1):
        raise UsageError(
            f"an experiment has a seed or more and masks of a density in 0 .. 1, not {seeds} and {density}"
        )
    if density is not None and not any(arm.has_density for arm in experiment.arms):
        raise UsageError(f"density would change nothing: {name} has no masks of a size of their own; leave it out")


def claim_folder(folder: Path, name: str, options: DistillOptions) -> None:
    """Writes run.json, by which the folder of an experiment is recognised.

    Raises InputError if the folder may not be written, UsageError if it holds the results of another experiment.
    """
    previous = validate_run_folder(folder, EXPERIMENT, inputs=input_paths(options))
    if previous is not None and previous.get("experiment") != name and not options.overwrite:
        other = printable(str(previous.get("experiment")))
        raise UsageError(
            f"{printable(os.fspath(folder))} holds results of the experiment {other}; "
            "choose another folder, or --overwrite them"
        )
    write_json(folder / RUN_FILE, {"format": EXPERIMENT.format, "experiment": name, "version": __version__})


def validate_arm(arm: Arm, options: DistillOptions) -> None:
    """Raise UsageError if the arm cannot run with these options, before any arm runs."""
    if arm.at < 1 and options.max_steps % PIECES:
        raise UsageError(
            f"{arm.name} is derived from a fraction of {options.max_steps} steps; take a multiple of {PIECES}"
        )
    if arm.part is None:
        placeholder = START  # the file does not exist yet
        options_of(
            arm,
            options,
            masks=placeholder if arm.mask else options.masks,
            subspace=placeholder if arm.subspace else options.subspace,
        )


def log(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


@dataclass
class SeedRunner:
    """Runs the arms of one seed.

    Attributes:
        trained: Fraction of the parameters that each arm trained, by the name of the arm.
    """

    experiment: Experiment
    folder: Path
    seed: int
    density: float
    options: DistillOptions
    quiet: bool
    trained: dict[str, float]

    def run_dir(self, arm: Arm) -> Path:
        """The folder of an arm's run; a mask of another density is another run."""
        has_own_density = arm.mask and self.density and not arm.size_of
        return self.folder / (slug(arm.name) + (f"-{self.density:g}" if has_own_density else ""))

    def run(self, arm: Arm) -> ArmResult | None:
        """Train the arm; None if its mask would be empty because the run that it is built from changed nothing."""
        run, derived_from = self.run_dir(arm), self.folder / slug(arm.of)
        overrides: dict[str, Any] = {"seed": self.seed}
        if interval := self.experiment.checkpoint_interval(arm, self.options.max_steps):
            overrides |= {"save_steps": interval, "snapshot_every": interval}
        density = self.trained[arm.size_of] if arm.size_of else self.density
        if arm.mask is not None:
            if not MaskSet.load(self.mask_file(changed, derived_from, arm.at, density)).num_active:
                return None
            overrides["masks"] = os.fspath(self.mask_file(arm.mask, derived_from, arm.at, density))
        if arm.subspace:
            overrides["subspace"] = os.fspath(checkpoint_at(derived_from, arm.at))
        if train(options_of(arm, self.options, **overrides), run, quiet=self.quiet).signal:
            raise KeyboardInterrupt
        metrics = final_metrics(run)
        self.trained[arm.name] = metrics["trained"]
        reference_run = self.folder / slug(self.experiment.reference_arm)
        if arm.mask is not None:
            final_set = MaskSet.load(self.mask_file(changed, reference_run, 1.0, density))
            metrics["mask_recall"] = count_common(MaskSet.load(overrides["masks"]), final_set) / max(
                final_set.num_active, 1
            )
        if self.experiment.null:
            metrics["changed_null"] = expected_from_rounding(run, reference_run)
        return read_rows(run / "scores.jsonl")[-1]["scores"], metrics

    def mask_file(self, mask: MaskBuilder, run: Path, at: float, density: float) -> Path:
        """The file of a mask that is built from a finished run; it is written once and kept with the run."""
        folder = derived_dir(run)
        folder.mkdir(exist_ok=True)
        suffix = (f"-at-{at:g}" if at < 1 else "") + (f"-{density:g}" if density > 0 else "")
        file = folder / f"{slug(mask.__name__)}{suffix}.masks.safetensors"
        if not file.exists():
            changed_file = None if mask is changed else self.mask_file(changed, run, at, density)
            mask(MaskContext(run, at, density, self.seed, changed_file)).save(file)
        return file

    def evaluate_part(self, arm: Arm) -> ArmResult | None:
        """Score a checkpoint with a part of a finished run's update; None if the model has no such part."""
        assert arm.part is not None
        run, part = self.folder / slug(arm.of), arm.part
        select = part.resolve(start_checkpoint(run))
        if select is None:
            return None
        if part.mask and not MaskSet.load(self.mask_file(changed, run, 1.0, self.density)).num_active:
            return None
        suffix = f"-{self.density:g}" if part.mask is not None else ""
        file = derived_dir(run) / f"{slug(arm.name)}{suffix}.json"
        scratch = derived_dir(run) / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # from an interrupted evaluation
        if not file.exists():
            mask = MaskSet.load(self.mask_file(part.mask, run, 1.0, self.density)) if part.mask else None
            start, end = start_checkpoint(run), end_checkpoint(run)[1]
            grafted = graft(start, end, scratch / "part", masks=mask, select=select, invert=part.invert)
            fraction = grafted["kept"] / max(grafted["changed"], 1)
            prompt_scores = evaluate_checkpoint(self.options.model_copy(update={"seed": self.seed}), scratch / "part")
            write_json(file, {"update_fraction": fraction, "scores": prompt_scores})
            shutil.rmtree(scratch)
        remedy = "delete it and run the same command again"
        part_scores = validate(PartScores, read_json(file, remedy=remedy), printable(str(file)), remedy=remedy)
        return part_scores.scores, {"update_fraction": part_scores.update_fraction}


def options_of(arm: Arm, options: DistillOptions, **overrides: Any) -> DistillOptions:
    """An arm's options. Its learning rate multiplies the experiment's, except with SGD, where it is absolute.

    Raises UsageError if they do not fit together.
    """
    arm_options = dict(arm.options)
    if "learning_rate" in arm_options and arm_options.get("optimizer") != "sgd":
        arm_options["learning_rate"] *= options.learning_rate
    try:
        return validate_options(DistillOptions, {**options.model_dump(), **arm_options, **overrides})
    except UsageError as error:
        raise UsageError(f"arm {arm.name}: {error}") from None


def count_common(a: MaskSet, b: MaskSet) -> int:
    """Number of coordinates that are active in both sets, whatever the order of their tensors."""
    return sum((mask & b[name]).num_active for name, mask in a.items() if name in b)


def derived_dir(run: Path) -> Path:
    """Where masks and scores derived from a finished run are kept; a run that continues gets another folder."""
    return run / f"derived-at-{end_checkpoint(run)[0]}"


def changed_options(options: DistillOptions) -> dict[str, Any]:
    """The options of a run that differ from their defaults, without models and prompts."""
    fields = DistillOptions.model_fields
    return {
        name: value
        for name, value in options.model_dump().items()
        if value != fields[name].default and not fields[name].is_required() and name != "teacher"
    }


def snapshots(run: Path) -> list[dict[str, Any]]:
    """What had changed at each snapshot of a run."""
    metrics = ("recall_vs_final", "precision_vs_final", "changed_any", "sqrt_v_cv", "gradient_momentum_cosine")
    return [
        {
            "step": row["step"],
            **{f"changed_{view}": 1 - row["views"][view]["frac_zero"] for view in ("visible", "stored")},
            **finite({name: row.get(name) for name in metrics}),
        }
        for row in read_rows(run / "snapshots.jsonl")
    ]


def reference_pair(folder: Path, results: Mapping[str, Any]) -> tuple[Path, Path]:
    """The first and the last checkpoint of the reference arm, of the first seed."""
    run = folder / f"seed-{results['options'].get('seed', 0)}" / slug(results["reference_arm"])
    return start_checkpoint(run), end_checkpoint(run)[1]


def resolve_arms(experiment: Experiment, names: Sequence[str]) -> list[Arm]:
    """The named arms, the arms that they depend on and the reference arm, in the experiment's order.

    Raises UsageError for a name that is not an arm.
    """
    by_name = {arm.name: arm for arm in experiment.arms}
    required = set(names or by_name)
    for name in sorted(required):
        if name not in by_name:
            raise UsageError(f"there is no arm {printable(name)}; there are {', '.join(by_name)}")
    for name in list(required):
        required |= by_name[name].needs
    required.add(experiment.reference_arm)
    return [arm for arm in experiment.arms if arm.name in required]


def slug(name: str) -> str:
    """A name as a file name.

    >>> slug("adamw lr x 0.3")
    'adamw-lr-x-0-3'
    """
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def final_metrics(run: Path) -> dict[str, Any]:
    """What changed in the weights by the end of a run, and the fraction of them that was trained."""
    row = read_rows(run / "snapshots.jsonl")[-1]
    visible, stored = row["views"]["visible"], row["views"]["stored"]
    return {
        "trained": row["trained"],
        "changed_visible": 1 - visible["frac_zero"],
        "changed_stored": 1 - stored["frac_zero"],
        "frac_le_1e-5": visible["frac_le_1e-5"],
        "relative_norm": stored["relative_norm"],
        "near_zero_coverage_10pct": visible["near_zero_coverage_10pct"],
    }


def expected_from_rounding(run: Path, reference_run: Path) -> float | None:
    """Fraction of coordinates expected to change in bf16 under the null: an update of the run's norm, blind to W.

    Args:
        run: A finished run.
        reference_run: A run from the same weights, stored in bf16.

    Returns:
        The fraction, or None if no null could be fitted (docs/outputs.md).
    """
    start, end, bf16_start = start_checkpoint(run), end_checkpoint(run)[1], start_checkpoint(reference_run)
    if not compare(bf16_start, start)["stored"]["changed"]:
        start = bf16_start  # the null assumes that weights stored in fp32 lie between bf16 values; these do not
    visible = compare(start, end)["visible"]
    return visible["changed_null"] and visible["changed_null"] / (visible["numel"] - visible["nonfinite"])


def compare(base: Path, trained: Path) -> dict[str, Any]:
    """The summary of what changed between two checkpoints, by view."""
    options = validate_options(AnalyzeOptions, {"spectra": "off"})
    return run_analyze(base, trained, None, options, lambda done, total, name: None).summary["views"]
