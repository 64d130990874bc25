"""What the experiments run: their arms, and the masks and parts of a change that arms are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from opdkernels import masks
from opdkernels.checkpoint.names import place
from opdkernels.distill.saving import checkpoints
from opdkernels.errors import UsageError
from opdkernels.masks import MaskSet
from opdkernels.patch.intervene import chosen_names

MaskOf = Callable[[Path, float, int], MaskSet]  # a finished run's folder, the density, the seed; its name is that of its file


@dataclass(frozen=True)
class Part:
    """A part of the change of a finished run, as `patch.intervene` takes it: what `mask` and `where` both choose, alone or, with
    `revert`, all but it. `third` of the layers: 0, 1 or 2."""

    mask: MaskOf | None = None
    where: str = ""
    third: int | None = None
    revert: bool = False

    def chosen(self, start: Path) -> str | None:
        """`where` of a model; None if it has no such part."""
        names = names_of(start)
        where = self.where
        if self.third is not None:
            layers = 1 + max(place(name).layer for name in names)
            first, stop = ((layers * k + 1) // 3 for k in (self.third, self.third + 1))
            if first == stop:
                return None
            where = f"layers={first}-{stop - 1}"
        try:
            chosen_names(names, where)
        except UsageError:
            return None
        return where


@dataclass(frozen=True)
class Arm:
    """One row of an experiment's table: a run with `options` over those that are asked for, or, with `part`, the finished run of `of`
    with that part of its change alone.

    mask: makes the active set from the finished run of `of`, as large as what the arm `size_of` trains, where that is named;
    subspace: of LoRA, the share of that run's steps after which its inputs are taken.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: MaskOf | None = None
    of: str = "full"
    size_of: str = ""
    subspace: float = 0.0
    part: Part | None = None

    @property
    def needs(self) -> set[str]:
        """The arms that it is made from."""
        made = self.mask is not None or self.part is not None or self.subspace > 0
        return {name for name in (self.of if made else "", self.size_of) if name}


@dataclass(frozen=True)
class Experiment:
    """Arms, what they are measured against, and what the table is to show. `density` of masks, unless another is asked for; `saves`:
    how many checkpoints the arms that masks are made from need, at least."""

    about: str
    arms: Sequence[Arm]
    against: str = "full"
    density: float = 0.0
    saves: int = 1


def names_of(folder: Path) -> list[str]:
    """The tensors of a checkpoint, in files' order."""
    found: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found += opened.keys()
    return found


def start_of(folder: Path) -> Path:
    return folder / "checkpoint-0"


def end_checkpoint(folder: Path) -> tuple[int, Path]:
    """The step and the folder of a run's last checkpoint."""
    return checkpoints(folder)[-1]


def found(folder: Path, density: float, seed: int) -> MaskSet:
    """What a run changed: all that shows in bf16, or, given a density, that share of the model with the largest |delta|."""
    return early(1.0)(folder, density, seed)


def early(share: float) -> MaskOf:
    """What a run had changed after a share of its steps, at the first mark or, given a density, the first checkpoint from there on."""

    def made(folder: Path, density: float, seed: int) -> MaskSet:
        if not density:
            files = sorted((folder / "masks").glob("step-*.safetensors"))
            steps = [int(file.stem.removeprefix("step-")) for file in files]
            return MaskSet.load(next(file for file, step in zip(files, steps, strict=True) if step >= share * steps[-1]))
        return largest_change(start_of(folder), checkpoint_at(folder, share), density)

    made.__name__ = f"early-{share:g}"
    return made


def checkpoint_at(folder: Path, share: float) -> Path:
    """The first checkpoint of a run after a share of its steps, the start apart."""
    saved = checkpoints(folder)[1:]
    return next(path for step, path in saved if step >= share * saved[-1][0])


def random(folder: Path, density: float, seed: int) -> MaskSet:
    """As many coordinates, anywhere."""
    return masks.random(start_of(folder), found(folder, density, seed).density, per="model", seed=seed)


def random_like(folder: Path, density: float, seed: int) -> MaskSet:
    """As many of each |W| in each tensor."""
    return masks.random_like(found(folder, density, seed), start_of(folder), seed=seed)


def near_zero(folder: Path, density: float, seed: int) -> MaskSet:
    """As many, those nearest to zero in each tensor."""
    return masks.near_zero(start_of(folder), found(folder, density, seed).density)


def principal(folder: Path, density: float, seed: int) -> MaskSet:
    """As many of each matrix, those where its top singular vectors put its weight."""
    return masks.principal(start_of(folder), found(folder, density, seed).density)


def largest_change(start: Path, end: Path, density: float) -> MaskSet:
    """The share of a model's coordinates with the largest |delta| between two checkpoints."""
    change = {}
    for file in sorted(start.glob("*.safetensors")):  # both were saved alike
        with safe_open(file, "pt") as before, safe_open(end / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                change[name] = (after.get_tensor(name).float() - before.get_tensor(name).float()).abs()
    return masks.largest(change, density, per="model")


RLVR = {"kl_weight": 0.0, "reward_weight": 1.0, "teacher": "", "ema": 1.0, "samples": 4}
ADAMW = {"optimizer": "adamw", "momentum": 0.0}
SGD = {"optimizer": "sgd", "betas": (0.9, 0.999), "eps": 1e-8}
BF16 = {"dtype": "bfloat16", "precision": "exact"}
FULL = Arm("full")
MATCHED = "random matched on |W|"
EXPERIMENTS = {
    "masks": Experiment(
        "Does training only what a full run changed keep its gain, and is it the set that matters or its size and its |W|?",
        [FULL, Arm("found", mask=found), Arm("random", mask=random), Arm(MATCHED, mask=random_like), Arm("near zero", mask=near_zero),
         Arm("early", mask=early(0.1)), Arm("rlvr", RLVR), Arm("found by rlvr", mask=found, of="rlvr")],
        saves=10,
    ),
    "sgd": Experiment(
        "Is AdamW needed, or does SGD with a rate of its own do as well?",
        [*(Arm(f"adamw, lr x {k}", {**ADAMW, "lr": k}) for k in (0.3, 1.0, 3.0)), *(Arm(f"sgd, lr {lr}", {**SGD, "lr": lr}) for lr in (1e-2, 1e-1, 1.0, 3.0))],
        against="adamw, lr x 1.0",
    ),
    "on-policy": Experiment(
        "Does the share of the student's own samples make the update sparse?",
        [Arm(f"on_policy {share}", {"on_policy": share}) for share in (0.0, 0.25, 0.5, 1.0)],
        against="on_policy 1.0",
    ),
    "precision": Experiment(
        "How much of the sparsity is rounding? bf16 with an exact remainder, bf16 rounded at each step, fp32.",
        [Arm("bf16, exact", BF16), Arm("bf16, nearest", {**BF16, "precision": "nearest"}), Arm("fp32", {"dtype": "float32", "precision": "exact"})],
        against="bf16, exact",
    ),
    "trajectory": Experiment(
        "When is the mask known? The largest changes after a share of a full run's steps: how much of the final set they are, and what training them alone keeps.",
        [FULL, *(Arm(f"mask at {share:.0%} of the steps", mask=early(share)) for share in (0.1, 0.2, 0.5)), Arm("found", mask=found), Arm(MATCHED, mask=random_like)],
        density=0.2,
        saves=10,
    ),
    "subspace": Experiment(
        "LoRA, and the subspace of what had changed early, against masks with as many trained numbers.",
        [FULL, *(Arm(f"lora of rank 8, lr x {k}", {"lora_rank": 8, "lr": k}) for k in (3.0, 10.0, 30.0)),
         *(Arm(f"early subspace of rank 16, lr x {k}", {"lora_rank": 16, "lr": k}, subspace=0.2) for k in (3.0, 10.0, 30.0)),
         *(Arm(f"early mask, lr x {k}", {"lr": k}, mask=early(0.2), size_of="lora of rank 8, lr x 3.0") for k in (1.0, 3.0)),
         *(Arm(f"found, lr x {k}", {"lr": k}, mask=found, size_of="lora of rank 8, lr x 3.0") for k in (1.0, 3.0))],
        saves=10,
    ),
    "interventions": Experiment(
        "Which part of the change carries the gain? A full run's last checkpoint with a part of its change alone, or without it.",
        [FULL, Arm("largest alone", part=Part(found)), Arm("all but the largest", part=Part(found, revert=True)), Arm("random alone", part=Part(random)),
         Arm("matched on |W| alone", part=Part(random_like)), Arm("near zero alone", part=Part(near_zero)), Arm("principal alone", part=Part(principal)),
         *(Arm(f"{block} alone", part=Part(where=block)) for block in ("attention", "mlp")),
         *(Arm(f"without {block}", part=Part(where=block, revert=True)) for block in ("attention", "mlp", "embedding", "lm_head", "norm")),
         *(Arm(f"without the {third} third of layers", part=Part(third=i, revert=True)) for i, third in enumerate(("first", "middle", "last")))],
        density=0.2,
    ),
}  # fmt: skip
