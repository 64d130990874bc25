"""What an experiment consists of: arms, the masks that they train, and the parts of an update that are grafted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkernels import masks
from opdkernels.checkpoint.conversions import model_types_of
from opdkernels.checkpoint.names import parse_tensor_name
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.distillation.checkpointing import checkpoints
from opdkernels.errors import UsageError, printable
from opdkernels.masks import MaskSet
from opdkernels.patch.graft import select_names

MaskBuilder = Callable[["MaskContext"], MaskSet]
PIECES = 10  # a run that masks are taken from before its end saves a checkpoint after each tenth of its steps


@dataclass(frozen=True)
class MaskContext:
    """What a mask is built from.

    Attributes:
        run: Folder of a finished run.
        at: Fraction of the run's steps after which its change is taken.
        density: Density of the mask; 0: all coordinates that are visibly changed.
        seed: Seed of random masks.
        changed_file: The mask of changed coordinates, if it has been written.
    """

    run: Path
    at: float
    density: float
    seed: int
    changed_file: Path | None = None

    @property
    def start(self) -> Path:
        return start_checkpoint(self.run)

    @property
    def changed(self) -> MaskSet:
        return changed(self) if self.changed_file is None else MaskSet.load(self.changed_file)

    def size(self) -> float:
        """The density of the mask of changed coordinates: below `density` if fewer changed."""
        return self.changed.density


@dataclass(frozen=True)
class UpdateSlice:
    """A part of a finished run's update, as `opdkernels.patch.graft` takes it.

    Attributes:
        mask: Builds the mask of the part; None: all coordinates.
        select: Terms that select tensors, such as "mlp"; empty: all tensors.
        third: Only this third of the layers: 0, 1 or 2.
        invert: The update without the part.
    """

    mask: MaskBuilder | None = None
    select: str = ""
    third: int | None = None
    invert: bool = False

    def resolve(self, start: Path) -> str | None:
        """The terms that select the part in a model; None if the model has no such part."""
        with contextlib.closing(open_checkpoint(start)) as checkpoint:
            names = list(checkpoint.tensors)
        select = self.select
        if self.third is not None:
            num_layers = 1 + max(parse_tensor_name(name).layer for name in names)
            first, stop = ((num_layers * k + 1) // 3 for k in (self.third, self.third + 1))
            if first == stop:
                return None
            select = f"layers={first}-{stop - 1}"
        try:
            select_names(names, select.split(",") if select else [])
        except UsageError:
            return None
        return select


@dataclass(frozen=True)
class Arm:
    """One row of an experiment's table: a distillation run, or the evaluation of a part of another arm's update.

    Attributes:
        name: Name of the row.
        options: Options of the run that differ from the experiment's.
        mask: Builds the mask to train from the finished run of the arm `of`.
        of: The arm whose run the mask, the subspace or the part is taken from.
        at: Fraction of that run's steps after which it is taken.
        size_of: The mask is as large as what this arm trains; empty: the experiment's density.
        subspace: LoRA's input directions are taken from the run.
        part: Evaluate this part of the run's update; nothing is trained.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: MaskBuilder | None = None
    of: str = "full"
    at: float = 1.0
    size_of: str = ""
    subspace: bool = False
    part: UpdateSlice | None = None

    @property
    def needs(self) -> set[str]:
        """Names of the arms that must have finished before this one."""
        is_derived = self.mask is not None or self.part is not None or self.subspace
        return {name for name in (self.of if is_derived else "", self.size_of) if name}

    @property
    def has_density(self) -> bool:
        """Whether the experiment's density decides the size of its mask."""
        return bool(self.mask and not self.size_of) or bool(self.part and self.part.mask)


@dataclass(frozen=True)
class Experiment:
    """A question and the arms that answer it.

    Attributes:
        about: The question.
        arms: The arms, in the order of the table.
        reference_arm: The arm whose gain the others are compared with.
        density: Density of the masks unless another is given; 0: all coordinates that are visibly changed.
        null: Report the change expected from bf16 rounding alone.
    """

    about: str
    arms: Sequence[Arm]
    reference_arm: str = "full"
    density: float = 0.0
    null: bool = False

    def checkpoint_interval(self, arm: Arm, steps: int) -> int:
        """Steps between checkpoints of an arm that others are derived from before its end; 0 for any other arm."""
        is_taken_early = any(arm.name in other.needs and other.at < 1 for other in self.arms)
        return steps // PIECES if is_taken_early and steps % PIECES == 0 else 0


def start_checkpoint(run: Path) -> Path:
    return run / "checkpoint-0"


def end_checkpoint(run: Path) -> tuple[int, Path]:
    """Step and folder of a run's last checkpoint."""
    return checkpoints(run)[-1]


def checkpoint_at(run: Path, at: float) -> Path:
    """The checkpoint of a run after a fraction of its steps."""
    step = round(at * end_checkpoint(run)[0])
    path = run / f"checkpoint-{step}"
    if not path.exists():
        raise UsageError(f"{printable(os.fspath(run))} has no checkpoint at step {step}; {RERUN}")
    return path


RERUN = "run the experiment in another folder, or --overwrite this one"


def changed(context: MaskContext) -> MaskSet:
    """The coordinates that a run changed visibly; with a density, at most that fraction, by largest |delta|."""
    if context.density:
        trained = checkpoint_at(context.run, context.at)
        return masks.top_changed(context.start, trained, context.density, scope="model")
    step = round(context.at * end_checkpoint(context.run)[0])
    file = context.run / "masks" / f"step-{step:06}.safetensors"
    if not file.exists():
        raise UsageError(f"{printable(os.fspath(context.run))} has no snapshot at step {step}; {RERUN}")
    by_parameter = MaskSet.load(file)  # parameters may have other names than the tensors of the files
    with contextlib.closing(open_checkpoint(context.start)) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        mapped = masks.map_masks(by_parameter, shapes, model_types=model_types_of(checkpoint.config))
    unbound = next((name for name in mapped.unbound if by_parameter[name].num_active), None)
    if unbound is not None:
        raise UsageError(
            f"{printable(unbound)} was trained and {printable(os.fspath(context.start))} has no such tensor"
        )
    return mapped.masks


def random(context: MaskContext) -> MaskSet:
    """As many coordinates of the model, drawn uniformly."""
    return masks.random_subset(context.start, context.size(), scope="model", seed=context.seed)


def magnitude_matched(context: MaskContext) -> MaskSet:
    """As many coordinates of each magnitude in each tensor, drawn uniformly."""
    return masks.magnitude_matched(context.changed, context.start, seed=context.seed)


def near_zero(context: MaskContext) -> MaskSet:
    """As many coordinates of each tensor, those nearest to zero."""
    return masks.near_zero(context.start, context.size())


def principal(context: MaskContext) -> MaskSet:
    """As many coordinates of each matrix, those that are largest in its projection on the top singular vectors."""
    return masks.principal(context.start, context.size())
