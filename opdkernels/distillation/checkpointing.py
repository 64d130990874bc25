"""The run directory: whose run it holds, what a run resumes from, and its checkpoints.

A checkpoint is a folder `checkpoint-N` after N steps, with weights and tokenizer as transformers reads them and the
state that a run resumes from. It is written under a temporary name and renamed, so that it is complete or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdkernels.checkpoint.torch_pickle import load_plain
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.text import TextProcessor
from opdkernels.distillation.tracker import effective_weights, step_of_mask
from opdkernels.distillation.world import World, full_state
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.files import atomic_folder, sync, write_json
from opdkernels.masks import MaskSet
from opdkernels.ops.patch import digest as xxh3_digest
from opdkernels.outputs import DISTILLATION, RUN_FILE, remove_outputs, validate_run_folder
from opdkernels.runs.run_dir import lock_dir
from opdkernels.version import __version__

STATE_FILE = "training.pt"
# files that make up a model; a checkpoint's training state may appear and disappear
MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"}
BLOCK_BYTES = 1 << 24  # bytes of a model that are read at a time
# options that may change when a run resumes
MUTABLE_OPTIONS = {"max_steps", "save_steps", "eval_steps", "tensorboard", "wandb", "threads", "overwrite"}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from."""

    step: int
    path: Path


def identity(options: DistillOptions) -> str:
    """Digest of what two runs must share for one to resume the other; options with default values do not count, so that
    a new option changes no digest."""
    values = {
        name: value
        for name, value in options.model_dump(mode="json", exclude_defaults=True).items()
        if name not in MUTABLE_OPTIONS
    }
    for name in ("prompts", "eval_prompts"):
        if values.get(name) and Path(values[name]).is_file():
            values[name] = file_digest(Path(values[name]))
    if values.get("masks") and Path(values["masks"]).is_file():
        values["masks"] = MaskSet.load(values["masks"]).digest
    if values.get("subspace") and Path(values["subspace"]).is_dir():
        values["subspace"] = [file_digest(path) for path in sorted(Path(values["subspace"]).glob("*.safetensors"))]
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def model_digest(path: Path) -> str:
    """Digest of all bytes of a file of a model, by XXH3-128 of its blocks: as fast as memory, so that no part is left
    out. Times do not count: a copy, or a file that was restored, is the same."""
    combined = hashlib.blake2b(digest_size=16)
    block = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
    with open(path, "rb") as file:
        while size := file.readinto(block.numpy().data):
            combined.update(size.to_bytes(8, "little"))  # blocks are padded with zeros before they are digested
            combined.update(xxh3_digest(block[:size]).numpy().tobytes())
    return combined.hexdigest()


@contextlib.contextmanager
def open_run_dir(
    out: str | os.PathLike[str], options: DistillOptions, world: World
) -> Iterator[tuple[Path, ResumePoint | None]]:
    """Locks the folder of a run and finds what to resume; nothing in it changes before `start_run`.

    Raises InputError if another process writes to the folder, UsageError if it holds another run."""
    with contextlib.ExitStack() as stack:
        yield world.run_on_main(lambda: find_resume_point(stack.enter_context(lock_dir(out)), options))


def find_resume_point(folder: Path, options: DistillOptions) -> tuple[Path, ResumePoint | None]:
    """The folder, and the checkpoint in it that a run with these options resumes from; None if the run starts from the
    beginning, where it may remove what another run wrote."""
    name = printable(os.fspath(folder))
    previous = validate_run_folder(folder, DISTILLATION, inputs=input_paths(options))
    if previous is None:
        return folder, None
    latest = latest_checkpoint(folder)
    conflict = resume_conflict(folder, options, previous)
    if conflict is not None and not options.overwrite and has_progress(folder):
        raise conflict
    if latest and conflict is None:
        if not (options.overwrite and missing_checkpoints(folder, latest.step, options.save_steps)):
            return folder, latest
        warnings.warn(
            f"{name} has taken {latest.step} steps and lacks checkpoints that save_steps asks for; it is overwritten",
            stacklevel=2,
        )
    if not options.overwrite and any(step for step, _ in checkpoints(folder)):
        raise UsageError(
            f"{name} has checkpoints but no {STATE_FILE} in any of them, so the run cannot resume; choose another "
            "folder, or --overwrite it"
        )
    return folder, None


def input_paths(options: DistillOptions) -> dict[str, str]:
    """The files and folders that a run reads, by name of the option."""
    paths = {"student": options.student}
    for teacher_id, path in options.teachers.items():
        if path != SELF:
            paths["teacher" if len(options.teachers) == 1 else f"teacher {teacher_id}"] = path
    return paths | {name: getattr(options, name) for name in ("prompts", "eval_prompts", "masks", "subspace")}


def resume_conflict(folder: Path, options: DistillOptions, previous: dict[str, Any]) -> Exception | None:
    """Why a run with these options cannot resume the run in a folder; None if it can."""
    name, latest = printable(os.fspath(folder)), latest_checkpoint(folder)
    if previous.get("identity") != identity(options):
        return UsageError(f"{name} holds another run; choose another folder, or --overwrite it")
    known = previous.get("model_digests", {})  # absent in runs of early versions
    for path, files in model_fingerprints(options).items():
        before = known.get(path, files)
        changed = next((file for file in sorted({*before, *files}) if before.get(file) != files.get(file)), None)
        if changed is not None:
            return InputError(
                f"{printable(changed)} in {printable(path)} has changed since the run in {name} started; "
                "restore it, choose another folder, or --overwrite the run"
            )
    if latest and latest.step > options.max_steps:
        return UsageError(
            f"{name} has taken {latest.step} steps and max_steps is {options.max_steps}; "
            "set it to at least as many, or overwrite the run"
        )
    return None


def model_fingerprints(options: DistillOptions) -> dict[str, dict[str, Any]]:
    """Digests of the files of each model folder, by folder and file name."""
    fingerprints: dict[str, dict[str, Any]] = {}
    for path in (options.student, *options.teachers.values()):
        if path != SELF and Path(path).is_dir():
            files = sorted(file for file in Path(path).iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file())
            fingerprints[path] = {file.name: model_digest(file) for file in files}
    return fingerprints


def has_progress(folder: Path) -> bool:
    """Whether the run in a folder has taken a step; otherwise nothing is lost if it is replaced."""
    return latest_checkpoint(folder) is not None or any(row["step"] for row in read_rows(folder / "log.jsonl"))


def missing_checkpoints(folder: Path, step: int, save_steps: int) -> bool:
    """Whether a run up to `step` lacks a checkpoint that save_steps asks for."""
    return bool(save_steps) and not all(
        (folder / f"checkpoint-{saved}").exists() for saved in range(save_steps, step + 1, save_steps)
    )


def start_run(folder: Path, options: DistillOptions) -> None:
    """Removes what an earlier run wrote and writes run.json. Until the removal is complete, run.json has no identity
    and matches no run."""
    header = {"format": DISTILLATION.format, "command": "distill", "version": __version__}
    write_json(folder / RUN_FILE, header)
    remove_outputs(folder, DISTILLATION)
    write_json(
        folder / RUN_FILE,
        {
            **header,
            "identity": identity(options),
            "model_digests": model_fingerprints(options),
            "options": options.model_dump(mode="json"),
        },
    )


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, in order."""
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(folder: Path) -> ResumePoint | None:
    """The last checkpoint with a training state."""
    resumable = [ResumePoint(step, path) for step, path in checkpoints(folder) if (path / STATE_FILE).exists()]
    return resumable[-1] if resumable else None


def save(folder: Path, step: int, model: Any, text: TextProcessor, state: dict[str, Any] | None, world: World) -> Path:
    """Writes a checkpoint and deletes the training state of earlier ones. Every process must call this.

    Args:
        folder: The run's folder.
        step: Number of steps taken.
        model: Model of transformers; with LoRA the merged weights are saved, and the factors in `adapter`.
        text: Tokenizer, saved with the model.
        state: This process's training state; None for the start of a run, which nothing resumes from.
        world: Processes of the run.

    Returns:
        The folder of the checkpoint.
    """
    sync_metrics(folder, world)
    path, weights = folder / f"checkpoint-{step}", full_state(model, world)
    with contextlib.ExitStack() as stack:
        temporary = world.run_on_main(lambda: stack.enter_context(atomic_folder(path)))
        if world.is_main:
            if hasattr(model, "get_base_model"):
                save_merged(model, temporary)
            else:
                model.save_pretrained(temporary, state_dict=weights)
            (text.processor or text.tokenizer).save_pretrained(temporary)
        if state is not None:
            torch.save(state, temporary / state_file(world))
            sync(temporary / state_file(world))
        world.barrier()
    if not world.is_main:
        return path
    # The new checkpoint, and the metrics up to it, are on disk: no run needs earlier states.
    for other_step, other in checkpoints(folder):
        if other_step != step and state is not None:
            for old_state in other.glob("training*.pt"):
                old_state.unlink()
    return path


def sync_metrics(folder: Path, world: World) -> None:
    """Syncs to disk what this process has logged since the last checkpoint."""
    previous_step = max((step for step, _ in checkpoints(folder)), default=0)
    paths = [*folder.glob(f"weights/*-{world.rank}.bin"), folder / "weights"]
    if world.is_main:
        masks = [path for path in (folder / "masks").glob("step-*.safetensors") if step_of_mask(path) > previous_step]
        paths += [*folder.glob("*.jsonl"), *masks, folder / "masks"]
    for path in paths:
        if path.exists():
            sync(path)


def state_file(world: World) -> str:
    return STATE_FILE if world.is_main else f"training-{world.rank}.pt"


def save_merged(model: Any, folder: Path) -> None:
    """Saves a peft model with its factors multiplied out, and the factors in `adapter`."""
    model.save_pretrained(folder / "adapter")
    model.get_base_model().save_pretrained(folder, state_dict=dict(effective_weights(model)))


@contextlib.contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Raises InputError that names the training state of a checkpoint for every error but a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{printable(os.fspath(path / STATE_FILE))} cannot be read ({printable(lines[0])[:200]}); "
            "restore it from a copy, or start again with --overwrite"
        ) from None


def load_state(path: Path, world: World) -> dict[str, Any]:
    """This process's training state of a checkpoint: `step`, `processes`, `optimizer`, `lora` and `teachers`. Raises
    InputError if it cannot be read or is not of this checkpoint, UsageError for another number of processes."""
    with state_errors(path):
        state = load_plain(str(path / state_file(world)))
        types = {"step": int, "processes": int, "optimizer": dict, "lora": dict, "teachers": dict}
        for name, kind in types.items():
            if not isinstance(state, dict) or type(state.get(name)) is not kind:
                raise InputError(f"it is no training state: it has no {name} of type {kind.__name__}")
        if path.name != f"checkpoint-{state['step']}":
            raise InputError(f"it is of step {state['step']}, in the folder {path.name}")
        if state["processes"] != world.size:
            raise UsageError(
                f"the run used {state['processes']} processes and has {world.size} now; "
                f"resume it with {state['processes']}"
            )
        return state


def copy_tensors(what: str, targets: Mapping[str, torch.Tensor], saved: Any) -> None:
    """Copies saved tensors to tensors of the same names and shapes. Raises InputError for others; `what` names them."""
    if not isinstance(saved, dict) or saved.keys() != targets.keys():
        count = f"{len(saved)} tensors" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise InputError(f"it has {count} as {what}, and the run {len(targets)} tensors of other names")
    for name, target in targets.items():
        value = saved[name]
        if not isinstance(value, torch.Tensor) or value.shape != target.shape or value.dtype != target.dtype:
            actual = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(f"{name} of {what} is {actual}, not {target.dtype} {list(target.shape)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])
