"""Checkpoints of a run: weights and tokenizer as transformers reads them, and the state that a killed run goes on from.

A checkpoint is a folder `checkpoint-N` after N steps; it is written beside and renamed, so that there is a whole one or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opdkernels.distillation.models import Text
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.tracker import effective, read_rows, step_of_mask
from opdkernels.distillation.world import Ranks, full_state
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import sync, write_json
from opdkernels.runs.run_dir import lock_dir, remove_path
from opdkernels.version import __version__

ABOUT = "run.json"
STATE = "training.pt"
OWN_FILES = (
    "checkpoint-[0-9]*",
    ".checkpoint-[0-9]*.part",
    "made-of-[0-9]*",
    "masks",
    "weights",
    "tensorboard",
    *(f"{name}.{kind}" for name in ("log", "scores", "track") for kind in ("jsonl", "part")),
)
OF_MODELS = {
    ".safetensors",
    ".bin",
    ".json",
    ".jinja",
    ".model",
    ".txt",
}  # of a checkpoint's folder; a run's own state comes and goes
PIECES, PIECE_BYTES = 256, 1 << 16  # of a large file that are looked at
FREE = {
    "max_steps",
    "save_steps",
    "eval_steps",
    "tensorboard",
    "wandb",
    "threads",
    "overwrite",
}  # may change when a run goes on


def identity(options: DistillOptions) -> str:
    """What two runs must share for one to go on from the other; options that are as by default count alike, known or not yet."""
    kept = {
        name: value
        for name, value in options.model_dump(mode="json", exclude_defaults=True).items()
        if name not in FREE
    }
    for name in ("prompts", "eval_prompts", "masks"):
        if kept.get(name) and Path(kept[name]).is_file():
            kept[name] = content_of(Path(kept[name]))
    if kept.get("subspace") and Path(kept["subspace"]).is_dir():
        kept["subspace"] = [content_of(path) for path in sorted(Path(kept["subspace"]).glob("*.safetensors"))]
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def content_of(path: Path) -> str:
    with open(path, "rb") as file:
        found = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def glimpse_of(path: Path) -> str:
    """A digest of a file's size and content; of a large one's, pieces from its beginning to its end: training changes nearly all of them."""
    size, found = path.stat().st_size, hashlib.blake2b(digest_size=16)
    found.update(str(size).encode())
    whole = size <= PIECES * PIECE_BYTES
    with open(path, "rb") as file:
        for start in (
            range(0, size, PIECE_BYTES) if whole else (i * (size - PIECE_BYTES) // (PIECES - 1) for i in range(PIECES))
        ):
            file.seek(start)
            found.update(file.read(PIECE_BYTES))
    return found.hexdigest()


@contextlib.contextmanager
def open_folder(
    out: str | os.PathLike[str], options: DistillOptions, ranks: Ranks
) -> Iterator[tuple[Path, tuple[int, Path] | None]]:
    """The folder of a run, locked for a while, and the checkpoint that the run goes on from, if any; nothing in it changes before
    `begin`. Raises InputError where another process writes to it, UsageError where another run is in it."""
    with contextlib.ExitStack() as held:
        yield ranks.told(lambda: standing(held.enter_context(lock_dir(out)), options))


def standing(folder: Path, options: DistillOptions) -> tuple[Path, tuple[int, Path] | None]:
    """A folder and the checkpoint that a run with these options goes on from there; None where it begins, and may clear the folder."""
    named, about = printable(os.fspath(folder)), folder / ABOUT
    if not about.exists():
        if any(
            not path.name.startswith(f".{ABOUT}.") for path in folder.iterdir()
        ):  # but for what a run that was killed at once left
            raise UsageError(f"{named} is not empty and holds no run of distill; choose another folder")
        return folder, None
    before, found = read_about(about), newest(folder)
    if before.get("command") != "distill":
        raise UsageError(
            f"{named} has a {ABOUT} that is not of distill, which replaces its own runs alone; choose another folder"
        )
    other = refusal(folder, options, before)
    if other is not None and not options.overwrite and begun(folder):
        raise other
    if found and other is None:
        if not (options.overwrite and lacks(folder, found[0], options.save_steps)):
            return folder, found
        warnings.warn(
            f"{named} has taken {found[0]} steps and lacks checkpoints that save_steps asks for; it is overwritten",
            stacklevel=2,
        )
    keep_apart(folder, options)
    return folder, None


def read_about(path: Path) -> dict[str, Any]:
    """What a folder says of its run; nothing where that cannot be read."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def refusal(folder: Path, options: DistillOptions, before: dict[str, Any]) -> Exception | None:
    """Why a run with these options cannot go on from the one in a folder, if it cannot."""
    named, found = printable(os.fspath(folder)), newest(folder)
    if before.get("identity") != identity(options):
        return UsageError(f"{named} holds another run; choose another folder, or --overwrite it")
    known = before.get("models", {})  # a run of earlier date did not look at them
    for place, files in models_of(options).items():
        other = next(
            (
                name
                for name in sorted({*known.get(place, files), *files})
                if known.get(place, files).get(name) != files.get(name)
            ),
            None,
        )
        if other is not None:
            return InputError(
                f"{printable(other)} in {printable(place)} is not what it was when the run in {named} began; put it back, choose another folder, or --overwrite the run"
            )
    if found and found[0] > options.max_steps:
        return UsageError(
            f"{named} has taken {found[0]} steps and steps is {options.max_steps}; give as many, or overwrite it"
        )
    return None


def models_of(options: DistillOptions) -> dict[str, dict[str, Any]]:
    """What tells one state of the models' folders from another, by place and file."""
    found: dict[str, dict[str, Any]] = {}
    for place in (options.student, *options.teachers.values()):
        if place != SELF and Path(place).is_dir():
            files = sorted(path for path in Path(place).iterdir() if path.suffix in OF_MODELS and path.is_file())
            found[place] = {path.name: glimpse_of(path) for path in files}
    return found


def begun(folder: Path) -> bool:
    """Whether the run in a folder has taken a step: until then nothing is lost with it."""
    return newest(folder) is not None or any(row["step"] for row in read_rows(folder / "log.jsonl"))


def lacks(folder: Path, step: int, save_steps: int) -> bool:
    """Whether a run up to a step has not all the checkpoints that it is asked for."""
    return bool(save_steps) and not all(
        (folder / f"checkpoint-{one}").exists() for one in range(save_steps, step + 1, save_steps)
    )


def keep_apart(folder: Path, options: DistillOptions) -> None:
    """Raises UsageError where what a run reads lies in the folder that it would clear."""
    own = os.path.realpath(folder)
    given = [
        ("student", options.student),
        *(("teacher", place) for place in options.teachers.values() if place != SELF),
        *((name, getattr(options, name)) for name in ("prompts", "eval_prompts", "masks", "subspace")),
    ]
    for name, place in given:
        if place and os.path.exists(place) and (os.path.realpath(place) + os.sep).startswith(own + os.sep):
            raise UsageError(
                f"the {name} {printable(place)} lies in {printable(os.fspath(folder))}, which the run would clear; choose another folder"
            )


def begin(folder: Path, options: DistillOptions) -> None:
    """Makes a folder that of a new run. Until all that another left is gone it says that it is of no run in particular."""
    about = {"command": "distill", "version": __version__}
    write_json(folder / ABOUT, about)
    for pattern in OWN_FILES:
        for path in list(folder.glob(pattern)):
            remove_path(path)
    write_json(
        folder / ABOUT,
        {
            **about,
            "identity": identity(options),
            "models": models_of(options),
            "options": options.model_dump(mode="json"),
        },
    )


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints, in order."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(folder: Path) -> tuple[int, Path] | None:
    """The last checkpoint that a run can go on from."""
    whole = [(step, path) for step, path in checkpoints(folder) if (path / STATE).exists()]
    return whole[-1] if whole else None


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A folder to write in that takes its place when all is written and on the disk, and is gone where that fails."""
    part = partial(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for one in (*part.rglob("*"), part):
            sync(one)
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save(folder: Path, step: int, model: Any, text: Text, state: dict[str, Any] | None, ranks: Ranks) -> None:
    """Writes a checkpoint; states of earlier ones, which no run needs once this and what was logged and marked are on the disk, are let
    go. With LoRA the factors are beside the merged weights. Every process must call this; each keeps its own part of the state."""
    sync_marks(folder, ranks)
    place, whole = folder / f"checkpoint-{step}", full_state(model, ranks)
    if not ranks.first:
        ranks.wait()
        if state is not None:
            torch.save(state, partial(place) / state_name(ranks))
            sync(partial(place) / state_name(ranks))
        ranks.wait()
        return
    with written(place) as part:
        ranks.wait()
        if hasattr(model, "get_base_model"):
            save_merged(model, part)
        else:
            model.save_pretrained(part, state_dict=whole)
        (text.processor or text.tokenizer).save_pretrained(part)
        if state is not None:
            torch.save(state, part / state_name(ranks))
        ranks.wait()
    for other, path in checkpoints(folder):
        if other != step and state is not None:
            for old in path.glob("training*.pt"):
                old.unlink()


def sync_marks(folder: Path, ranks: Ranks) -> None:
    """Has the disk hold what this process logged and marked since the last checkpoint."""
    before = max((one for one, _ in checkpoints(folder)), default=0)
    written = [*folder.glob(f"weights/*-{ranks.rank}.bin"), folder / "weights"]
    if ranks.first:
        masks = [path for path in (folder / "masks").glob("step-*.safetensors") if step_of_mask(path) > before]
        written += [*folder.glob("*.jsonl"), *masks, folder / "masks"]
    for path in written:
        if path.exists():
            sync(path)


def partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.part")


def state_name(ranks: Ranks) -> str:
    return STATE if ranks.first else f"training-{ranks.rank}.pt"


def save_merged(model: Any, part: Path) -> None:
    """A peft model's factors in `adapter`, and the plain model with them multiplied out."""
    model.save_pretrained(part / "adapter")
    model.get_base_model().save_pretrained(part, state_dict=dict(effective(model)))


def load_state(path: Path, ranks: Ranks) -> dict[str, Any]:
    """This process's part of a checkpoint's state."""
    try:
        state = torch.load(path / state_name(ranks), weights_only=True)
        if state["processes"] != ranks.size:
            raise UsageError(
                f"the run was of {state['processes']} processes and is now of {ranks.size}; go on with as many as before"
            )
        return state
    except UsageError:
        raise
    except Exception as error:
        raise InputError(
            f"{printable(os.fspath(path / STATE))} cannot be read ({printable(str(error).splitlines()[0])[:200]}); delete {printable(path.name)}, and run the same command again"
        ) from None
