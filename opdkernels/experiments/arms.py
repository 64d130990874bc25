"""What the experiments run: their arms, and the masks and parts of a change that arms are made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkernels import masks
from opdkernels.checkpoint.base import open_source
from opdkernels.checkpoint.names import place, twins
from opdkernels.distillation.checkpointing import checkpoints
from opdkernels.errors import UsageError, printable
from opdkernels.masks import MaskSet
from opdkernels.patch.graft import chosen_names

MaskOf = Callable[["Made"], MaskSet]


@dataclass(frozen=True)
class Made:
    """What a mask is made from: a finished run's `folder`, a share of its steps, the `density` (0: all that had changed visibly), a seed,
    and the file of the mask of what had changed, where it has been made."""

    folder: Path
    at: float
    density: float
    seed: int
    found: Path | None = None

    @property
    def start(self) -> Path:
        return start_of(self.folder)

    @property
    def changed(self) -> MaskSet:
        return changed(self) if self.found is None else MaskSet.load(self.found)

    def size(self) -> float:
        """The density that the mask of what had changed has: less than what is asked for where less had changed."""
        return self.changed.density


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
        with contextlib.closing(open_source(start)) as source:
            names = list(source.tensors)
        where = self.where
        if self.third is not None:
            layers = 1 + max(place(name).layer for name in names)
            first, stop = ((layers * k + 1) // 3 for k in (self.third, self.third + 1))
            if first == stop:
                return None
            where = f"layers={first}-{stop - 1}"
        try:
            chosen_names(names, where.split(",") if where else [])
        except UsageError:
            return None
        return where


@dataclass(frozen=True)
class Arm:
    """One row of an experiment's table: a run with `options` over those that are asked for, or, with `part`, the finished run of `of`
    with that part of its change alone.

    mask: makes the active set from the finished run of `of`, as large as what the arm `size_of` trains, where that is named; subspace:
    whether LoRA's inputs are taken from it. `at`: after which share of its steps.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: MaskOf | None = None
    of: str = "full"
    at: float = 1.0
    size_of: str = ""
    subspace: bool = False
    part: Part | None = None

    @property
    def needs(self) -> set[str]:
        """The arms that it is made from."""
        made = self.mask is not None or self.part is not None or self.subspace
        return {name for name in (self.of if made else "", self.size_of) if name}

    @property
    def has_size(self) -> bool:
        """Whether it has a mask whose size is the experiment's density."""
        return bool(self.mask and not self.size_of) or bool(self.part and self.part.mask)


@dataclass(frozen=True)
class Experiment:
    """Arms, what they are measured against, and what the table is to show; `density` of masks, unless another is asked for; `null`:
    whether what rounding alone would show is beside what had changed."""

    about: str
    arms: Sequence[Arm]
    against: str = "full"
    density: float = 0.0
    null: bool = False

    def every(self, arm: Arm, steps: int) -> int:
        """Steps between the checkpoints and marks of an arm that others are made from before its end, a tenth of all; else 0."""
        early = any(arm.name in other.needs and other.at < 1 for other in self.arms)
        return steps // PIECES if early and steps % PIECES == 0 else 0


def start_of(folder: Path) -> Path:
    return folder / "checkpoint-0"


def end_checkpoint(folder: Path) -> tuple[int, Path]:
    """The step and the folder of a run's last checkpoint."""
    return checkpoints(folder)[-1]


def changed(made: Made) -> MaskSet:
    """What a run had changed: all that shows in bf16, or, given a density, at most that share of the model, with the largest |delta|."""
    if made.density:
        return masks.most_changed(made.start, checkpoint_at(made.folder, made.at), made.density, per="model")
    step = round(made.at * end_checkpoint(made.folder)[0])
    file = made.folder / "masks" / f"step-{step:06}.safetensors"
    if not file.exists():
        raise UsageError(
            f"{printable(os.fspath(made.folder))} has no mark at step {step}; run the experiment in another folder, or --overwrite this one"
        )
    seen = MaskSet.load(file)  # by the names of parameters, which may not be those of files
    with contextlib.closing(open_source(made.start)) as source:
        names = twins(seen, source.tensors)
    return MaskSet({names.get(name, name): mask for name, mask in seen.items()})


def checkpoint_at(folder: Path, at: float) -> Path:
    """A run's checkpoint after a share of its steps."""
    step = round(at * end_checkpoint(folder)[0])
    path = folder / f"checkpoint-{step}"
    if not path.exists():
        raise UsageError(
            f"{printable(os.fspath(folder))} has no checkpoint at step {step}; run the experiment in another folder, or --overwrite this one"
        )
    return path


def random(made: Made) -> MaskSet:
    """As many coordinates, anywhere."""
    return masks.random(made.start, made.size(), per="model", seed=made.seed)


def random_like(made: Made) -> MaskSet:
    """As many of each |W| in each tensor."""
    return masks.random_like(made.changed, made.start, seed=made.seed)


def near_zero(made: Made) -> MaskSet:
    """As many, those nearest to zero in each tensor."""
    return masks.near_zero(made.start, made.size())


def principal(made: Made) -> MaskSet:
    """As many of each matrix, those where its top singular vectors put its weight."""
    return masks.principal(made.start, made.size())


RLVR = {
    "kl_weight": 0.0,
    "reward_weight": 1.0,
    "teacher": "",
    "ema": 1.0,
    "samples": 4,
    "divergence": "reverse_kl",
    "beta": 0.5,
    "k": 0,
    "temperature": 1.0,
}
ADAMW = {"optimizer": "adamw", "momentum": 0.0}
SGD = {"optimizer": "sgd", "betas": (0.9, 0.999), "eps": 1e-8}
BF16 = {"dtype": "bfloat16", "precision": "exact"}
FULL = Arm("full")
MATCHED = "magnitude-matched"
LORA = "lora rank 8"
PIECES = 10  # of a run's steps: masks are taken after a tenth, a fifth, a half
EXPERIMENTS = {
    "masks": Experiment(
        "Does training only what a full run changed keep its gain, and is it the set that matters or its size and its |W|?",
        [
            FULL,
            Arm("changed", mask=changed),
            Arm("random", mask=random),
            Arm(MATCHED, mask=random_like),
            Arm("near zero", mask=near_zero),
            Arm("early-changed", mask=changed, at=0.1),
            Arm("rlvr", RLVR),
            Arm("changed by rlvr", mask=changed, of="rlvr"),
        ],
    ),
    "sgd": Experiment(
        "Is AdamW needed, or does SGD with a rate of its own do as well?",
        [
            *(Arm(f"adamw lr x {k}", {**ADAMW, "lr": k}) for k in (0.3, 1.0, 3.0, 10.0)),
            *(Arm(f"sgd lr {lr}", {**SGD, "lr": lr}) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
        ],
        against="adamw lr x 1.0",
    ),
    "on-policy": Experiment(
        "Does the share of the student's own samples make the update sparse?",
        [Arm(f"on-policy {share}", {"on_policy": share}) for share in (0.0, 0.25, 0.5, 1.0)],
        against="on-policy 1.0",
    ),
    "precision": Experiment(
        "How much of the sparsity is rounding? bf16 with an exact remainder, bf16 rounded at each step, fp32; and what rounding alone would show of updates of that size.",
        [
            Arm("bf16 split-master", BF16),
            Arm("bf16 nearest", {**BF16, "precision": "nearest"}),
            Arm("fp32", {"dtype": "float32", "precision": "exact"}),
        ],
        against="bf16 split-master",
        null=True,
    ),
    "trajectory": Experiment(
        "When is the mask known? The largest changes after a share of a full run's steps: how much of the final set they are, and what training them alone keeps.",
        [
            FULL,
            *(Arm(f"mask at {share:.0%} of the steps", mask=changed, at=share) for share in (0.1, 0.2, 0.5)),
            Arm("changed", mask=changed),
            Arm(MATCHED, mask=random_like),
        ],
        density=0.2,
    ),
    "subspace": Experiment(
        "LoRA, and the subspace of what had changed early, against masks of about as many trained numbers: LoRA's.",
        [
            FULL,
            *(Arm(f"{LORA} lr x {k}", {"lora_rank": 8, "precision": "exact", "lr": k}) for k in (3.0, 10.0, 30.0)),
            *(
                Arm(
                    f"early subspace rank 16 lr x {k}",
                    {"lora_rank": 16, "precision": "exact", "lr": k},
                    subspace=True,
                    at=0.2,
                )
                for k in (3.0, 10.0, 30.0)
            ),
            *(
                Arm(f"early-changed lr x {k}", {"lr": k}, mask=changed, at=0.2, size_of=f"{LORA} lr x 3.0")
                for k in (1.0, 3.0, 10.0)
            ),
            *(Arm(f"changed lr x {k}", {"lr": k}, mask=changed, size_of=f"{LORA} lr x 3.0") for k in (1.0, 3.0, 10.0)),
            *(Arm(f"random lr x {k}", {"lr": k}, mask=random, size_of=f"{LORA} lr x 3.0") for k in (1.0, 3.0, 10.0)),
        ],
    ),
    "grafts": Experiment(
        "Which part of the change carries the gain? A full run's last checkpoint with a part of its change alone, or without it.",
        [
            FULL,
            Arm("largest alone", part=Part(changed)),
            Arm("all but the largest", part=Part(changed, revert=True)),
            Arm("random alone", part=Part(random)),
            Arm("magnitude-matched alone", part=Part(random_like)),
            Arm("near zero alone", part=Part(near_zero)),
            Arm("principal alone", part=Part(principal)),
            *(Arm(f"{block} alone", part=Part(where=block)) for block in ("attention", "mlp")),
            *(
                Arm(f"without {block}", part=Part(where=block, revert=True))
                for block in ("attention", "mlp", "embedding", "lm_head", "norm")
            ),
            *(
                Arm(f"without the {third} third of layers", part=Part(third=i, revert=True))
                for i, third in enumerate(("first", "middle", "last"))
            ),
        ],
        density=0.2,
    ),
}
