"""Experiments on what on-policy distillation does to weights (arXiv 2606.13657): each runs its arms, seed by seed, and makes a table.

An arm is the run that is asked for with other options, or with a mask that another arm's run gave. Scores are of greedy completions
of held-out prompts, the same for all arms; intervals are of 95 %, by resampling seeds, and prompts within them, all arms alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from opdkernels import masks
from opdkernels.analysis.records import write_json
from opdkernels.distill.loop import distill
from opdkernels.distill.options import DistillOptions
from opdkernels.distill.saving import checkpoints
from opdkernels.distill.track import read_rows
from opdkernels.errors import UsageError, printable
from opdkernels.masks import MaskSet

RESAMPLES = 10_000
START = "start"
MaskOf = Callable[[Path, float, int], MaskSet]  # an arm's folder, the density, the seed


@dataclass(frozen=True)
class Arm:
    """One row of an experiment's table. `options` go over the run's; `mask` makes the active set from the finished run of `of`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: MaskOf | None = None
    of: str = "full"


@dataclass(frozen=True)
class Experiment:
    """Arms, what they are measured against, and what the table is to show."""

    about: str
    arms: Sequence[Arm]
    against: str = "full"


def last_mask(folder: Path) -> MaskSet:
    """What a finished run had changed visibly at its end."""
    return MaskSet.load(sorted((folder / "masks").glob("step-*.safetensors"))[-1])


def start_of(folder: Path) -> Path:
    return folder / "checkpoint-0"


def found(folder: Path, density: float, seed: int) -> MaskSet:
    """What a run changed: all that shows in bf16, or, given a density, that share of the model with the largest |delta|."""
    if not density:
        return last_mask(folder)
    return largest_change(start_of(folder), checkpoints(folder)[-1][1], density)


def early(folder: Path, density: float, seed: int) -> MaskSet:
    """What had changed at the run's first mark; given a density, at its first checkpoint after the start."""
    if not density:
        return MaskSet.load(sorted((folder / "masks").glob("step-*.safetensors"))[0])
    if len(checkpoints(folder)) < 3:
        raise UsageError("the early mask is of the first checkpoint of several; set save_every")
    return largest_change(start_of(folder), checkpoints(folder)[1][1], density)


def random(folder: Path, density: float, seed: int) -> MaskSet:
    """As many coordinates, anywhere."""
    return masks.random(start_of(folder), found(folder, density, seed).density, per="model", seed=seed)


def random_like(folder: Path, density: float, seed: int) -> MaskSet:
    """As many of each |W| in each tensor."""
    return masks.random_like(found(folder, density, seed), start_of(folder), seed=seed)


def near_zero(folder: Path, density: float, seed: int) -> MaskSet:
    """As many, those nearest to zero in each tensor."""
    return masks.near_zero(start_of(folder), found(folder, density, seed).density)


def largest_change(start: Path, end: Path, density: float) -> MaskSet:
    """The share of a model's coordinates with the largest |delta| between two checkpoints."""
    change = {}
    for file in sorted(start.glob("*.safetensors")):  # both were saved alike
        with safe_open(file, "pt") as before, safe_open(end / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                change[name] = (after.get_tensor(name).float() - before.get_tensor(name).float()).abs()
    return masks.largest(change, density, per="model")


RLVR = {"kl_weight": 0.0, "reward_weight": 1.0, "teacher": "", "samples": 4}
EXPERIMENTS = {
    "masks": Experiment(
        "Does training only what a full run changed keep its gain, and is it the set that matters or its size and its |W|?",
        [Arm("full"), Arm("found", mask=found), Arm("random", mask=random), Arm("random matched on |W|", mask=random_like), Arm("near zero", mask=near_zero),
         Arm("early", mask=early), Arm("rlvr", RLVR), Arm("found by rlvr", mask=found, of="rlvr")],
    ),
    "sgd": Experiment(
        "Is AdamW needed, or does SGD with a rate of its own do as well?",
        [*(Arm(f"adamw, lr x {k}", {"lr": k}) for k in (0.3, 1.0, 3.0)), *(Arm(f"sgd, lr {lr}", {"optimizer": "sgd", "lr": lr}) for lr in (1e-2, 1e-1, 1.0, 3.0))],
        against="adamw, lr x 1.0",
    ),
    "on-policy": Experiment(
        "Does the share of the student's own samples make the update sparse?",
        [Arm(f"on_policy {share}", {"on_policy": share}) for share in (0.0, 0.25, 0.5, 1.0)],
        against="on_policy 1.0",
    ),
    "precision": Experiment(
        "How much of the sparsity is rounding? bf16 with an exact remainder, bf16 rounded at each step, fp32.",
        [Arm("bf16, exact"), Arm("bf16, nearest", {"precision": "nearest"}), Arm("fp32", {"dtype": "float32"})],
        against="bf16, exact",
    ),
}  # fmt: skip


def run_experiment(
    name: str, options: DistillOptions, out: str | os.PathLike[str], *, seeds: int = 1, density: float = 0.0, arms: Sequence[str] = (), quiet: bool = True
) -> dict[str, Any]:
    """Runs an experiment's arms, `arms` alone where given, with seeds 0, 1, …, in OUT/seed-S/ARM; runs that are finished are not made
    again. Writes results.json and table.md. density: how large the masks are; 0: all that shows in bf16.

    Raises UsageError for an experiment or an arm that does not exist, KeyboardInterrupt where a signal stopped a run, which is saved.
    """
    if name not in EXPERIMENTS:
        raise UsageError(f"there is no experiment {printable(name)}; there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    chosen = needed(experiment, arms)
    if not options.eval_size or not options.track_every:
        raise UsageError("an experiment scores its arms on held-out prompts and says what changed; set eval_size and track_every")
    folder = Path(out)
    scores: dict[str, list[list[float]]] = {START: [], **{arm.name: [] for arm in chosen}}
    ends: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in chosen}
    for seed in range(seeds):
        for arm in chosen:
            place = folder / f"seed-{seed}" / folder_of(arm, density)
            given = {**options.model_dump(), "seed": seed, **own_options(arm, options)}
            if arm.mask is not None:
                file = place.with_name(f"{place.name}.masks.safetensors")
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    arm.mask(folder / f"seed-{seed}" / slug(arm.of), density, seed).save(file)
                given["masks"] = os.fspath(file)
            if not quiet:
                print(f"{name}, seed {seed}: {arm.name}", flush=True)
            if distill(DistillOptions(**given), place, quiet=quiet).stopped:
                raise KeyboardInterrupt
            rows = read_rows(place / "scores.jsonl")
            if arm is chosen[0]:
                scores[START].append(rows[0]["scores"])
            scores[arm.name].append(rows[-1]["scores"])
            ends[arm.name].append(end_of(place, given))
    result = {"experiment": name, "about": experiment.about, "seeds": seeds, "prompts": len(scores[START][0]), "steps": options.steps,
              "density": density, "against": experiment.against, "student": options.student, "teacher": options.teacher, "task": options.prompts,
              "options": changed_options(options), "rows": table_rows(scores, ends, experiment.against),
              "along": along(folder / "seed-0" / slug(experiment.against))}  # fmt: skip
    write_json(folder / "results.json", result)
    (folder / "table.md").write_text(markdown(result))
    return result


def changed_options(options: DistillOptions) -> dict[str, Any]:
    """What a run has other than by default, its models and prompts apart."""
    fields = DistillOptions.model_fields
    return {name: value for name, value in options.model_dump().items() if value != fields[name].default and not fields[name].is_required() and name != "teacher"}


def along(place: Path) -> list[dict[str, Any]]:
    """What had changed at each mark of a run."""
    rows = read_rows(place / "track.jsonl")
    kept = ("coverage_of_final", "stays_changed", "changed_ever", "sqrt_v_cv", "gradient_momentum_cosine")
    return [{"step": row["step"], **{f"changed_{view}": 1 - row["views"][view]["frac_zero"] for view in ("visible", "stored")}, **{key: row.get(key) for key in kept}} for row in rows]


def pair_of(folder: Path, result: Mapping[str, Any]) -> tuple[Path, Path]:
    """The first and the last checkpoint of the arm that all are measured against, of seed 0."""
    place = folder / "seed-0" / slug(result["against"])
    return start_of(place), checkpoints(place)[-1][1]


def own_options(arm: Arm, options: DistillOptions) -> dict[str, Any]:
    """An arm's options; a rate below those of SGD is a multiple of the run's."""
    own = dict(arm.options)
    if "lr" in own and own.get("optimizer") != "sgd":
        own["lr"] *= options.lr
    return own


def needed(experiment: Experiment, names: Sequence[str]) -> list[Arm]:
    """The arms that are asked for and those that they are made from, in order."""
    by_name = {arm.name: arm for arm in experiment.arms}
    wanted = set(names or by_name)
    for name in sorted(wanted):
        if name not in by_name:
            raise UsageError(f"there is no arm {printable(name)}; there are {', '.join(by_name)}")
    wanted |= {by_name[name].of for name in wanted if by_name[name].mask} | {experiment.against}
    return [arm for arm in experiment.arms if arm.name in wanted]


def folder_of(arm: Arm, density: float) -> str:
    """The name of an arm's folder; masks of another size are other runs."""
    return slug(arm.name) + (f"-{density:g}" if arm.mask and density else "")


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def end_of(place: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What changed in the weights by the end of a run, and how much of them was trained."""
    views = read_rows(place / "track.jsonl")[-1]["views"]
    trained = MaskSet.load(options["masks"]).density if options["masks"] else 1.0
    visible, stored = views["visible"], views["stored"]
    return {"trained": trained, "changed_visible": 1 - visible["frac_zero"], "changed_stored": 1 - stored["frac_zero"], "frac_le_1e-5": visible["frac_le_1e-5"],
            "relative_norm": stored["relative_norm"], "near_zero_coverage_10pct": visible["near_zero_coverage_10pct"]}  # fmt: skip


def table_rows(scores: Mapping[str, list[list[float]]], ends: Mapping[str, list[dict[str, Any]]], against: str) -> list[dict[str, Any]]:
    """One row an arm: mean score with its interval, the share of the gain of `against` that it keeps with its interval, and what
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
            row |= spread("gain_kept", (held[name].mean() - held[START].mean()) / base, (means[name] - means[START]) / np.where(gain > 0, gain, np.nan))
        rows.append(row | {key: float(np.mean([end[key] for end in arm_ends])) for key in arm_ends[0]})
    return rows


def resampled(held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean scores [resamples] of each arm: seeds drawn anew, then prompts, the same draws for all arms."""
    seeds, prompts = next(iter(held.values())).shape
    drawn = np.random.default_rng(0)
    means = {name: np.empty(RESAMPLES) for name in held}
    for i in range(RESAMPLES):
        chosen = drawn.integers(seeds, size=seeds)
        weights = drawn.multinomial(prompts, np.full(prompts, 1 / prompts)) / prompts
        for name, values in held.items():
            means[name][i] = (values[chosen] @ weights).mean()
    return means


def spread(name: str, value: float, draws: np.ndarray) -> dict[str, Any]:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}


COLUMNS = (("trained", "trained", "{:.1%}"), ("changed_visible", "changed, visible", "{:.1%}"), ("changed_stored", "changed, stored", "{:.1%}"),
           ("relative_norm", "relative norm", "{:.2e}"), ("near_zero_coverage_10pct", "near-zero coverage, 10 %", "{:.1%}"))  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """The table of an experiment, as text."""
    lines = [result["about"], "", f"{result['seeds']} seed(s), {result['prompts']:,} held-out prompts, {result['steps']} steps; 95 % intervals", "",
             "| arm | score | gain kept | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]  # fmt: skip
    for row in result["rows"]:
        cells = [row["arm"], with_interval(row, "score", "{:.3f}"), with_interval(row, "gain_kept", "{:.0%}")]
        lines.append(f"| {' | '.join(cells + [text.format(row[key]) if row.get(key) is not None else '' for key, _, text in COLUMNS])} |")
    return "\n".join(lines) + "\n"


def with_interval(row: Mapping[str, Any], name: str, text: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{text.format(row[name])} ({text.format(row[f'{name}_low'])} to {text.format(row[f'{name}_high'])})"
