"""Experiments on what on-policy distillation does to weights (arXiv 2606.13657): each runs its arms, seed by seed, and makes a table.

Scores are of greedy completions of held-out prompts, the same for all arms; intervals are of 95 %, by resampling prompts and, where
there are several, seeds, all arms alike.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdkernels.analysis.run import analyze
from opdkernels.config import AnalyzeOptions, validate_options
from opdkernels.distillation.loop import distill, score
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.tracker import finite, read_rows
from opdkernels.errors import UsageError, printable
from opdkernels.experiments.arms import (
    EXPERIMENTS,
    PIECES,
    Arm,
    Experiment,
    Made,
    MaskOf,
    changed,
    checkpoint_at,
    end_checkpoint,
    start_of,
)
from opdkernels.masks import MaskSet
from opdkernels.patch import graft
from opdkernels.runs.records import write_json

RESAMPLES = 10_000
START = "start"
Scored = tuple[list[float], dict[str, Any]]  # of each held-out prompt, and what changed


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
    """Runs an experiment's arms, `arms` alone where given, with as many seeds from that of `options` on, in OUT/seed-S/ARM; what is
    finished is not made again. Writes results.json and table.md. density: how large the masks are; 0: all that shows in bf16; None:
    the experiment's own.

    Raises UsageError for an experiment or an arm that does not exist, sizes that make no sense, and a folder with another's results,
    KeyboardInterrupt where a signal stopped a run, which is saved.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {printable(name)}; there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    chosen = needed(experiment, arms)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("an experiment runs in one process; leave torchrun out, or run its arms with distill")
    if not options.eval_size or not options.track_every:
        raise UsageError(
            "an experiment scores its arms on held-out prompts and says what changed; set eval_size and track_every"
        )
    if seeds < 1 or (density is not None and not 0 <= density <= 1):
        raise UsageError(
            f"an experiment has a seed or more and masks of a density in 0 .. 1, not {seeds} and {density}"
        )
    if density is not None and not any(arm.has_size for arm in experiment.arms):
        raise UsageError(f"density would change nothing: {name} has no masks of a size of their own; leave it out")
    folder, size = Path(out), experiment.density if density is None else density
    refuse_other(folder, name, options.overwrite)
    early = next((arm.name for arm in chosen if arm.at < 1), "")
    if early and options.steps % PIECES:
        raise UsageError(f"{early} looks at a share of {options.steps} steps; take a multiple of {PIECES}")
    for arm in chosen:
        if arm.part is None:
            options_of(
                arm,
                options,
                masks=START if arm.mask else options.masks,
                subspace=START if arm.subspace else options.subspace,
            )
    scores: dict[str, list[list[float]]] = {START: []}
    ends: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seed, options.seed + seeds):
        made = Seed(experiment, folder / f"seed-{seed}", seed, size, options, quiet, {})
        for arm in chosen:
            tell(f"{name}, seed {seed}: {arm.name}", quiet)
            scored = made.part(arm) if arm.part else made.run(arm)
            if scored is None:
                tell(
                    f"{arm.name} is left out: {'the model has no such part, or ' if arm.part else ''}nothing had changed",
                    quiet,
                )
                continue
            scores.setdefault(arm.name, []).append(scored[0])
            ends.setdefault(arm.name, []).append(scored[1])
        scores[START].append(read_rows(made.folder_of(chosen[0]) / "scores.jsonl")[0]["scores"])
    ends = {
        arm: of_seeds for arm, of_seeds in ends.items() if len(of_seeds) == seeds
    }  # what a seed has none of has no row
    result = {
        "experiment": name,
        "about": experiment.about,
        "seeds": seeds,
        "prompts": len(scores[START][0]),
        "steps": options.steps,
        "density": size,
        "against": experiment.against,
        "student": options.student,
        "teacher": options.teacher,
        "task": options.prompts,
        "options": changed_options(options),
        "rows": table_rows({arm: scores[arm] for arm in (START, *ends)}, ends, experiment.against),
        "snapshots": along(folder / f"seed-{options.seed}" / slug(experiment.against)),
    }
    write_json(folder / "results.json", result)
    (folder / "table.md").write_text(markdown(result))
    return result


def refuse_other(folder: Path, name: str, overwrite: bool) -> None:
    """Raises UsageError where the results of another experiment are in the folder."""
    file = folder / "results.json"
    if overwrite or not file.exists():
        return
    try:
        other = f"the experiment {printable(json.loads(file.read_text())['experiment'])}"
    except (OSError, ValueError, KeyError, TypeError):
        other = "something else"
    if other != f"the experiment {name}":
        raise UsageError(
            f"{printable(os.fspath(folder))} holds results of {other}; choose another folder, or --overwrite them"
        )


def tell(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


@dataclass
class Seed:
    """The arms of one seed; `trained`: how many numbers each, by name, trains, as a share of the coordinates."""

    experiment: Experiment
    folder: Path
    seed: int
    density: float
    options: DistillOptions
    quiet: bool
    trained: dict[str, float]

    def folder_of(self, arm: Arm) -> Path:
        """An arm's run; masks of another size are other runs."""
        return self.folder / (
            slug(arm.name) + (f"-{self.density:g}" if arm.mask and self.density and not arm.size_of else "")
        )

    def run(self, arm: Arm) -> Scored | None:
        """The arm's run; None where its mask is made from what another had changed, and that had changed nothing."""
        place, source = self.folder_of(arm), self.folder / slug(arm.of)
        given: dict[str, Any] = {"seed": self.seed}
        if every := self.experiment.every(arm, self.options.steps):
            given |= {"save_every": every, "track_every": every}
        density = self.trained[arm.size_of] if arm.size_of else self.density
        if arm.mask is not None:
            if not MaskSet.load(self.mask_file(changed, source, arm.at, density)).nnz:
                return None
            given["masks"] = os.fspath(self.mask_file(arm.mask, source, arm.at, density))
        if arm.subspace:
            given["subspace"] = os.fspath(checkpoint_at(source, arm.at))
        if distill(options_of(arm, self.options, **given), place, quiet=self.quiet).stopped:
            raise KeyboardInterrupt
        end = end_of(place)
        self.trained[arm.name] = end["trained"]
        if arm.mask is not None:
            last = MaskSet.load(self.mask_file(changed, self.folder / slug(self.experiment.against), 1.0, density))
            end["mask_recall"] = in_both(MaskSet.load(given["masks"]), last) / max(last.nnz, 1)
        if self.experiment.null:
            end["changed_null"] = by_rounding(place, self.folder / slug(self.experiment.against))
        return read_rows(place / "scores.jsonl")[-1]["scores"], end

    def mask_file(self, mask: MaskOf, source: Path, at: float, density: float) -> Path:
        """The file of a mask that is made from a finished run, kept with it."""
        folder = made_of(source)
        folder.mkdir(exist_ok=True)
        file = (
            folder
            / f"{slug(mask.__name__)}{f'-at-{at:g}' * (at < 1)}{f'-{density:g}' * (density > 0)}.masks.safetensors"
        )
        if not file.exists():
            found = None if mask is changed else self.mask_file(changed, source, at, density)
            mask(Made(source, at, density, self.seed, found)).save(file)
        return file

    def part(self, arm: Arm) -> Scored | None:
        """The score of a checkpoint with a part of a finished run's change; None where the model has no such part."""
        assert arm.part is not None
        source, part = self.folder / slug(arm.of), arm.part
        where = part.chosen(start_of(source))
        if where is None or (part.mask and not MaskSet.load(self.mask_file(changed, source, 1.0, self.density)).nnz):
            return None
        file = made_of(source) / f"{slug(arm.name)}{f'-{self.density:g}' * (part.mask is not None)}.json"
        scratch = made_of(source) / "scratch"  # of this part, or of one that was killed
        shutil.rmtree(scratch, ignore_errors=True)
        if not file.exists():
            mask = MaskSet.load(self.mask_file(part.mask, source, 1.0, self.density)) if part.mask else None
            done = graft(
                start_of(source),
                end_checkpoint(source)[1],
                scratch / "part",
                masks=mask,
                where=where,
                revert=part.revert,
            )
            write_json(
                file,
                {
                    "update_fraction": done["kept"] / max(done["changed"], 1),
                    "scores": score(self.options.model_copy(update={"seed": self.seed}), scratch / "part"),
                },
            )
            shutil.rmtree(scratch)
        row = json.loads(file.read_text())
        return row["scores"], {"update_fraction": row["update_fraction"]}


def options_of(arm: Arm, options: DistillOptions, **given: Any) -> DistillOptions:
    """An arm's options; a rate below those of SGD is a multiple of the run's. Raises UsageError where they do not fit together."""
    own = dict(arm.options)
    if "lr" in own and own.get("optimizer") != "sgd":
        own["lr"] *= options.lr
    try:
        return validate_options(DistillOptions, {**options.model_dump(), **own, **given})
    except UsageError as error:
        raise UsageError(f"of the arm {arm.name}: {error}") from None


def in_both(a: MaskSet, b: MaskSet) -> int:
    """How many coordinates two sets share, whatever the order of their tensors: that of a checkpoint's files, or of a model."""
    return sum((mask & b[name]).nnz for name, mask in a.items() if name in b)


def made_of(source: Path) -> Path:
    """Where what is made from a finished run is kept: gone with the run, and made again when it goes on."""
    return source / f"made-of-{end_checkpoint(source)[0]}"


def changed_options(options: DistillOptions) -> dict[str, Any]:
    """What a run has other than by default, its models and prompts apart."""
    fields = DistillOptions.model_fields
    return {
        name: value
        for name, value in options.model_dump().items()
        if value != fields[name].default and not fields[name].is_required() and name != "teacher"
    }


def along(place: Path) -> list[dict[str, Any]]:
    """What had changed at each mark of a run."""
    rows = read_rows(place / "track.jsonl")
    kept = ("recall_vs_final", "precision_vs_final", "changed_any", "sqrt_v_cv", "gradient_momentum_cosine")
    return [
        {
            "step": row["step"],
            **{f"changed_{view}": 1 - row["views"][view]["frac_zero"] for view in ("visible", "stored")},
            **finite({key: row.get(key) for key in kept}),
        }
        for row in rows
    ]


def pair_of(folder: Path, result: Mapping[str, Any]) -> tuple[Path, Path]:
    """The first and the last checkpoint of the arm that all are measured against, of the first seed."""
    place = folder / f"seed-{result['options'].get('seed', 0)}" / slug(result["against"])
    return start_of(place), end_checkpoint(place)[1]


def needed(experiment: Experiment, names: Sequence[str]) -> list[Arm]:
    """The arms that are asked for and those that they are made from, in order."""
    by_name = {arm.name: arm for arm in experiment.arms}
    wanted = set(names or by_name)
    for name in sorted(wanted):
        if name not in by_name:
            raise UsageError(f"there is no arm {printable(name)}; there are {', '.join(by_name)}")
    for name in list(wanted):
        wanted |= by_name[name].needs
    wanted.add(experiment.against)
    return [arm for arm in experiment.arms if arm.name in wanted]


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def end_of(place: Path) -> dict[str, Any]:
    """What changed in the weights by the end of a run, and how much of them was trained."""
    row = read_rows(place / "track.jsonl")[-1]
    visible, stored = row["views"]["visible"], row["views"]["stored"]
    return {
        "trained": row["trained"],
        "changed_visible": 1 - visible["frac_zero"],
        "changed_stored": 1 - stored["frac_zero"],
        "frac_le_1e-5": visible["frac_le_1e-5"],
        "relative_norm": stored["relative_norm"],
        "near_zero_coverage_10pct": visible["near_zero_coverage_10pct"],
    }


def by_rounding(place: Path, against: Path) -> float | None:
    """The share of the coordinates that an update as large as a run's would change in bf16 if it knew nothing of the weights; None
    where no null fits (docs/outputs.md). against: a run that began with the same weights, stored in bf16."""
    start, end, in_bf16 = start_of(place), end_checkpoint(place)[1], start_of(against)
    if not views(in_bf16, start)["stored"]["changed"]:
        start = in_bf16  # stored in fp32 they would be taken to lie between the values of bf16
    visible = views(start, end)["visible"]
    return visible["changed_null"] and visible["changed_null"] / (visible["numel"] - visible["nonfinite"])


def views(source: Path, trained: Path) -> dict[str, Any]:
    """What changed between two checkpoints, in both views."""
    return analyze(
        source, trained, None, validate_options(AnalyzeOptions, {"spectra": "off"}), lambda done, total, name: None
    ).summary["views"]


def table_rows(
    scores: Mapping[str, list[list[float]]], ends: Mapping[str, list[dict[str, Any]]], against: str
) -> list[dict[str, Any]]:
    """One row an arm: mean score with its interval, the gain retained of `against` that it keeps with its interval, and what
    changed, means over seeds. A share whose gain's own interval reaches 0 says nothing, and has none."""
    held = {name: np.array(values) for name, values in scores.items()}  # [seeds, prompts]
    means = resampled(held)
    gain = means[against] - means[START]
    base = held[against].mean() - held[START].mean()
    known = np.quantile(gain, 0.025) > 0
    rows = [{"arm": START, **spread("score", held[START].mean(), means[START])}]
    for name, arm_ends in ends.items():
        row = {"arm": name, **spread("score", held[name].mean(), means[name])}
        if known:
            row |= spread(
                "gain_retained",
                (held[name].mean() - held[START].mean()) / base,
                (means[name] - means[START]) / np.where(gain > 0, gain, np.nan),
            )
        rows.append(row | {key: mean_of([end[key] for end in arm_ends]) for key in arm_ends[0]})
    return rows


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def resampled(held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean scores [resamples] of each arm: prompts drawn anew, the same for all seeds as they are in the runs, and seeds; the same draws
    for all arms. What seeds are drawn of varies less than seeds do, by (n - 1) / n of the variance: their deviations are stretched by
    its inverse (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8)."""
    seeds, prompts = next(iter(held.values())).shape
    stretch = (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else 0.0
    drawn = np.random.default_rng(0)
    means = {name: np.empty(RESAMPLES) for name in held}
    for i in range(RESAMPLES):
        chosen = drawn.integers(seeds, size=seeds)
        weights = drawn.multinomial(prompts, np.full(prompts, 1 / prompts)) / prompts
        for name, values in held.items():
            of_seeds = values @ weights
            means[name][i] = of_seeds.mean() + stretch * (of_seeds[chosen].mean() - of_seeds.mean())
    return means


def spread(name: str, value: float, draws: np.ndarray) -> dict[str, Any]:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


COLUMNS = {
    "update_fraction": "update fraction",
    "trained": "trained",
    "mask_recall": "mask recall",
    "changed_visible": "changed in bf16",
    "changed_null": "expected from bf16 rounding alone",
    "changed_stored": "changed as stored",
    "relative_norm": "relative norm",
    "near_zero_coverage_10pct": "near-zero coverage at 10 %",
}


def markdown(result: Mapping[str, Any]) -> str:
    """The table of an experiment, as text."""
    several = result["seeds"] > 1
    lines = [
        result["about"],
        "",
        f"{result['seeds']} seed{'s' * several}, {result['prompts']:,} held-out prompts, {result['steps']} steps; 95 % intervals{'' if several else ', of the prompts alone'}",
        "",
    ]
    return "\n".join([*lines, *table(result["rows"])]) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown. Columns that tell nothing are left out: what one arm alone says of itself (but what only arms that are made
    from others have), shares of 100 % trained, what is stored as it shows."""
    idle = {
        "trained": all(row.get("trained") in (1, None) for row in rows),
        "changed_stored": all(row.get("changed_stored") == row.get("changed_visible") for row in rows),
    }
    least = dict.fromkeys(COLUMNS, min(2, len(rows) - 1)) | {"update_fraction": 1, "mask_recall": 1}
    columns = [
        key for key in COLUMNS if sum(row.get(key) is not None for row in rows) >= least[key] and not idle.get(key)
    ]
    lines = [
        f"| {' | '.join(['arm', 'score', 'gain retained', *(COLUMNS[key] for key in columns)])} |",
        "|---|---|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = [
            row["arm"].replace("|", r"\|"),
            with_interval(row, "score", "{:.3f}".format),
            with_interval(row, "gain_retained", percent),
        ]
        cells += [
            ""
            if row.get(key) is None
            else f"{100 * row[key]:.2g} %"
            if key == "relative_norm"
            else percent(row[key], 1)
            for key in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def percent(share: float, digits: int = 0) -> str:
    """
    >>> percent(0.1234), percent(-0.004), percent(1, 1)
    ('12 %', '0 %', '100.0 %')
    """
    return f"{round(100 * share, digits) + 0.0:.{digits}f} %"


def with_interval(row: Mapping[str, Any], name: str, text: Callable[[float], str]) -> str:
    if row.get(name) is None:
        return ""
    value, low, high = (text(row[name + end]) for end in ("", "_low", "_high"))
    return f"{value} ({low.removesuffix(' %')} to {high.removesuffix(' %')})"
