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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opdkernels.analysis.records import write_json
from opdkernels.distill.models import Text
from opdkernels.distill.options import DistillOptions
from opdkernels.distill.ranks import Ranks, full_state
from opdkernels.distill.track import effective
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.version import __version__

STATE = "training.pt"
FREE = {"steps", "save_every", "eval_every", "tensorboard", "threads", "overwrite"}  # may change when a run goes on


def identity(options: DistillOptions) -> str:
    """What two runs must share for one to go on from the other; options that are as by default count alike, known or not yet."""
    kept = {name: value for name, value in options.model_dump(mode="json", exclude_defaults=True).items() if name not in FREE}
    for name in ("prompts", "held_out", "masks"):
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


def open_folder(out: str | os.PathLike[str], options: DistillOptions, ranks: Ranks) -> Path:
    """The folder of a run, new or to go on in. Raises UsageError where another run is in it."""
    folder = Path(out)
    if not ranks.first:
        ranks.wait()
        return folder
    make_folder(folder, options)
    ranks.wait()
    return folder


def make_folder(folder: Path, options: DistillOptions) -> None:
    about = folder / "run.json"
    if about.exists():
        try:
            before = json.loads(about.read_text())
        except ValueError:
            before = {}
        if before.get("command") == "distill" and before.get("identity") == identity(options):
            return
        if not options.overwrite:
            raise UsageError(f"{printable(os.fspath(folder))} holds another run; choose another folder, or --overwrite it")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{printable(os.fspath(folder))} is not empty and holds no run of distill; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(about, {"command": "distill", "version": __version__, "identity": identity(options), "options": options.model_dump(mode="json")})


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
    """A folder to write in that takes its place when all is written, and is gone where that fails."""
    part = partial(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save(folder: Path, step: int, model: Any, text: Text, state: dict[str, Any] | None, ranks: Ranks) -> None:
    """Writes a checkpoint; states of earlier ones, which no run needs now, are let go. With LoRA the factors are beside the merged
    weights. Every process must call this; each keeps its own part of the state."""
    place, whole = folder / f"checkpoint-{step}", full_state(model, ranks)
    if not ranks.first:
        ranks.wait()
        if state is not None:
            torch.save(state, partial(place) / state_name(ranks))
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
            raise UsageError(f"the run was of {state['processes']} processes and is now of {ranks.size}; go on with as many as before")
        return state
    except UsageError:
        raise
    except Exception as error:
        raise InputError(f"{printable(os.fspath(path / STATE))} cannot be read ({printable(str(error).splitlines()[0])[:200]}); delete {printable(path.name)}, and run the same command again") from None
