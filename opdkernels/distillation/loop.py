"""On-policy distillation (arXiv 2306.13649, 2606.13657): prompts, completions of the student, the teacher's view of the same tokens,
a divergence, a step; and, on the way, what that does to the weights.

    for each step:  entries -> rollout -> [taught -> objective -> backward] for each micro-batch -> step -> log, mark, save

All that is drawn at a step follows from the seed and the step's number, so that a run which was killed ends with the weights of one
that was not, bit for bit on one process. Every token counts alike: losses are sums over a micro-batch's tokens divided by the
tokens of the whole step.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdkernels.backends.devices import resolve_device
from opdkernels.distillation.checkpointing import begin, load_state, open_folder, save
from opdkernels.distillation.logging import Board, Clock, Log, boards
from opdkernels.distillation.models import (
    Text,
    end_tokens,
    load_config,
    load_model,
    load_text,
    positions,
    shared_ids,
    transformers,
)
from opdkernels.distillation.objective import Objective, advantages, objective
from opdkernels.distillation.optimizers import WholeNorm, optimizer_of, rate, with_lora
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.rollout import Prompts, Rollout, encode, recorded, sample
from opdkernels.distillation.tasks import Entry, Task, open_task, refuse_answers, refuse_images, refuse_prompts
from opdkernels.distillation.teachers import Teacher, scored, teachers_of
from opdkernels.distillation.tracker import Tracker, moments_of, read_rows, trained_by
from opdkernels.distillation.world import Ranks, bind
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.optim import gather_active_grads
from opdkernels.optim.masked import MaskedOptimizer

MOST_SKIPPED = 3  # steps in a row without a finite loss, after which a run stops


@dataclass
class Outcome:
    """Where a run stands: `step` of `steps`; the signal that `stopped` it, or 0; steps and accuracies of its evaluations; rows of its
    marks; whether this is the `first` process."""

    folder: Path
    step: int
    steps: int
    stopped: int
    accuracy: list[tuple[int, float]]
    marks: list[dict[str, Any]]
    first: bool = True

    @property
    def exit_status(self) -> int:
        """0, or 128 and the number of the signal that stopped it."""
        return 128 + self.stopped if self.stopped else 0


@dataclass
class Player:
    """A model that completes a task's prompts."""

    options: DistillOptions
    task: Task
    text: Text
    model: Any
    ends: list[int]
    vocab: int
    longest_prompt: int
    ranks: Ranks


@dataclass
class Run(Player):
    """What the steps share."""

    optimizer: MaskedOptimizer
    teachers: dict[str, Teacher]
    device: torch.device
    clock: Clock
    whole: WholeNorm | None


def distill(options: DistillOptions, out: str | os.PathLike[str], *, quiet: bool = True) -> Outcome:
    """Trains a student from a teacher, in a folder from which a killed run goes on; the start is its `checkpoint-0`.

    Raises InputError for models, prompts, masks and rewards that cannot be used, UsageError for options that make no sense.
    """
    device = prepared(options)
    ranks = Ranks.join(device)
    refuse_processes(options, ranks)
    task = task_of(options)
    refuse_prompts(options, task)
    with open_folder(out, options, ranks) as (folder, found):
        run = loaded(options, task, found[1] if found else None, device, ranks)
        step = resume(run, found[1]) if found else 0
        with boards(folder, step, ranks, tensorboard=options.tensorboard, wandb=options.wandb) as opened:
            if not found:  # all that is given can be used: now something may be written
                ranks.told(lambda: begin(folder, options))
            outcome = take_steps(run, folder, step, quiet, opened)
    del run
    gc.collect()  # the model and what was bound to it hold each other
    return outcome


def loaded(options: DistillOptions, task: Task, checkpoint: Path | None, device: torch.device, ranks: Ranks) -> Run:
    """All that a run needs, with the weights of a checkpoint where it goes on from one."""
    model = load_model(
        os.fspath(checkpoint) if checkpoint and not options.lora_rank else options.student, options.dtype, device
    )
    text = load_text(options.student)
    if options.lora_rank:
        torch.manual_seed(options.seed)
        model = with_lora(options, model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    bind(model, ranks, {"objective": objective, "scored": scored})
    optimizer = optimizer_of(options, model)
    whole = WholeNorm(model) if options.masks else None
    gather_active_grads(model, optimizer)
    teachers = teachers_of(options, model, optimizer, text, device)
    scorers = [teacher.model for teacher in teachers.values()]
    return Run(
        **player(options, task, text, model, scorers, ranks),
        optimizer=optimizer,
        teachers=teachers,
        device=device,
        clock=Clock(device),
        whole=whole,
    )


def take_steps(run: Run, folder: Path, step: int, quiet: bool, opened: Sequence[Board]) -> Outcome:
    """Takes a run from a step to its end, or to a signal, with what is logged, marked and saved on the way."""
    options, model, text, ranks, device = run.options, run.model, run.text, run.ranks, run.device
    log = Log(folder, step, options.max_steps, quiet, ranks, opened)
    tracker = None
    if options.snapshot_every and (step < options.max_steps or any((folder / "weights").glob("*.bin"))):
        place = device if ranks.size > 1 else torch.device("cpu")
        tracker = Tracker(
            folder,
            model,
            step,
            lambda: bind(load_model(os.fspath(folder / "checkpoint-0"), options.dtype, place), ranks, {}),
            trained_by(run.optimizer, ranks, device),
            ranks,
        )
    if not step:
        save(folder, 0, model, text, None, ranks)
        if options.num_eval_prompts:
            log.row({"step": 0, **evaluate(run)})
    skipped = 0
    with stopping() as stop:
        stopped = False
        while step < options.max_steps and not stopped:
            look = tracker is not None and (step + 1) % options.snapshot_every == 0
            row = train(run, step, look)
            step += 1
            skipped = skipped + 1 if row["skipped"] else 0
            if skipped == MOST_SKIPPED:
                raise InputError(
                    f"{MOST_SKIPPED} steps in a row had no finite loss ({row['skipped']}); {'look at the teacher, or ' if run.teachers else ''}take a smaller lr"
                )
            last, moments = step == options.max_steps, row.pop("moments")
            if tracker and (look or last):
                with run.clock.phase("track"):
                    mark = tracker.mark(step, model, moments or {})
                row["changed"] = 1 - mark["views"]["visible"]["frac_zero"]
                row["changed_since_mark"] = 1 - mark["since_last"]["visible"]["frac_zero"]
            if options.num_eval_prompts and (last or (options.eval_steps and step % options.eval_steps == 0)):
                with run.clock.phase("evaluate"):
                    row |= evaluate(run)
            log.row(
                {"step": step, **row, **run.clock.row()}
            )  # first: a run that goes on from before the checkpoint lets it go
            stopped = bool(ranks.total({"stop": len(stop)}, device)["stop"])
            if last or stopped or (options.save_steps and step % options.save_steps == 0):
                save(folder, step, model, text, state_of(run, step), ranks)
                if tracker:
                    tracker.saved()
    marks = tracker.finish() if tracker and step == options.max_steps else read_rows(folder / "track.jsonl")
    return Outcome(folder, step, options.max_steps, stop[0] if stop else 0, log.accuracies(), marks, ranks.first)


def prepared(options: DistillOptions) -> torch.device:
    """Sets threads and keeps transformers' bars away. Returns the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers().utils.logging.disable_progress_bar()
    return resolve_device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )


def task_of(options: DistillOptions) -> Task:
    task = open_task(options.prompts, options.eval_prompts, options.seed, options.reward)
    held_out = task.held_out(options.num_eval_prompts)
    found = len(held_out)
    if options.num_eval_prompts and not found:
        raise UsageError(
            "num_eval_prompts is not 0 and there are no held-out prompts; name a file of them as eval_prompts, or set num_eval_prompts=0"
        )
    if found < options.num_eval_prompts:
        raise UsageError(
            f"num_eval_prompts is {options.num_eval_prompts} and there are {found} held-out prompts; set num_eval_prompts={found}"
        )
    refuse_images(held_out)
    refuse_answers(held_out, task.reward)
    return task


def player(
    options: DistillOptions, task: Task, text: Text, model: Any, teachers: Sequence[Any], ranks: Ranks
) -> dict[str, Any]:
    """The fields of a Player, whose completions can be scored by models `teachers`, or by their configurations."""
    return {
        "options": options,
        "task": task,
        "text": text,
        "model": model,
        "ends": end_tokens(model, text, options.stop_token),
        "vocab": shared_ids(model, teachers),
        "longest_prompt": longest_prompt(options, [model, *teachers]),
        "ranks": ranks,
    }


def score(options: DistillOptions, place: str | os.PathLike[str]) -> list[float]:
    """The reward of each held-out prompt, for a checkpoint's greedy completions: as a run with these options evaluates it.

    Raises InputError for a model, prompts and rewards that cannot be used.
    """
    device = prepared(options)
    model, text = load_model(os.fspath(place), options.dtype, device), load_text(os.fspath(place))
    teachers = [load_config(one) for one in options.teachers.values() if one != SELF]
    return evaluate(Player(**player(options, task_of(options), text, model, teachers, Ranks())))["scores"]


def train(run: Run, step: int, look: bool) -> dict[str, Any]:
    """One step. Returns its figures; with `look` also what the optimizer's moments say, as `moments`."""
    options, clock = run.options, run.clock
    clock.clear()
    set_seed(options.seed, step, run.ranks)
    entries = [
        run.task.entry(step * options.batch_size + i) for i in range(run.ranks.rank, options.batch_size, run.ranks.size)
    ]
    with clock.phase("generate"):
        rollout, facts = completions(run, entries, step)
    rewards, advantage = None, None
    if options.reward_weight:
        rewards = scores_of(run, rollout)
        advantage = advantages(rewards, options.num_generations).to(run.device)
    found = run.ranks.total(facts | counts(rollout, rewards), run.device)
    row = {"skipped": "", "moments": None, "on_policy": rollout.own, **means(found)}
    tokens = row["tokens"]
    if not tokens:
        return row | {"skipped": "every completion is empty"}
    sums: defaultdict[str, float] = defaultdict(float)
    scored_at_once = list(parts(run, rollout))
    for teacher, rows in scored_at_once:
        part = rollout.rows(rows)
        taught = None
        if teacher is not None and options.divergence_weight:
            with clock.phase("score"):
                taught = teacher.score(part)
        with clock.phase("train"):
            share = tokens / run.ranks.size  # FSDP takes the mean over processes
            loss = run.model.objective(
                part, taught, None if advantage is None else advantage[rows], share, run.vocab, options
            )
            loss.loss.backward()
        for name, value in figures(loss, share).items():
            sums[name] += value
    row |= {name: value / tokens for name, value in run.ranks.total(sums, run.device).items()}
    with clock.phase("step"):
        for group in run.optimizer.param_groups:
            group["lr"] = rate(options, step)
        norm = run.optimizer.clip_grad_norm_(options.max_grad_norm or float("inf"))
        row |= {"grad_norm": float(norm), "lr": rate(options, step)}
        if run.whole is not None:
            norm_of_all = run.whole.take(run.ranks, run.device)
            row |= {"grad_norm_full": norm_of_all} if len(scored_at_once) == 1 else {}
        if look:
            row["moments"] = moments_of(run.optimizer, run.ranks)
        if not (torch.isfinite(norm) and math.isfinite(row["loss"])):
            row["skipped"] = f"loss {row['loss']}, norm of the gradient {float(norm)}"
            run.optimizer.zero_grad()
            return row
        run.optimizer.step()
        run.optimizer.zero_grad()
        for teacher in set(run.teachers.values()):
            teacher.after_step()
    return row


def completions(run: Run, entries: list[Entry], step: int) -> tuple[Rollout, dict[str, float]]:
    """The step's completions: the student's own, or, by the coin that the share on-policy weighs, recorded or the teacher's ones."""
    options = run.options
    own = random.Random(f"{options.seed}/{step}/coin").random() < options.on_policy_fraction
    prompts = encode(run.text, entries, run.longest_prompt).repeated(options.num_generations)
    facts: dict[str, float] = {"prompts_cut": prompts.cut}
    if own:
        return sampled(run, run.model, prompts, options.sampling_temperature, own), facts
    if prompts.entries[0].completion is not None:  # as of all
        return recorded(run.text, prompts, most=options.max_completion_length, ends=run.ends, device=run.device), facts
    teacher = next(iter(run.teachers.values()))
    return sampled(run, teacher.model, prompts, options.sampling_temperature, own), facts


def sampled(run: Player, model: Any, prompts: Prompts, temperature: float, own: bool) -> Rollout:
    return sample(
        model,
        run.text,
        prompts,
        most=run.options.max_completion_length,
        ends=run.ends,
        vocab=run.vocab,
        temperature=temperature,
        own=own,
        together_with=run.ranks.size if own else 1,
    )


def parts(run: Run, rollout: Rollout) -> Iterator[tuple[Teacher | None, list[int]]]:
    """Rows to score at once, each part with the teacher that its prompts' teacher_id names."""
    by_teacher: defaultdict[str, list[int]] = defaultdict(list)
    for i, entry in enumerate(rollout.entries):
        by_teacher[entry.teacher_id if entry.teacher_id in run.teachers else ""].append(i)
    for teacher_id, rows in by_teacher.items():
        size = run.options.micro_batch_size or len(rows)
        for first in range(0, len(rows), size):
            yield run.teachers.get(teacher_id), rows[first : first + size]


def figures(found: Objective, tokens: float) -> dict[str, float]:
    """Sums over a part's tokens of the loss and of what is logged."""
    sums = {"loss": float(found.loss.detach()) * tokens}
    if found.scores is not None:
        for name, values in found.scores._asdict().items():
            if name != "loss" and values is not None:
                sums[name] = float(values.double().sum())
    if found.log_prob is not None:
        sums["log_prob"] = float(found.log_prob.double().sum())
    return sums


def counts(rollout: Rollout, rewards: torch.Tensor | None) -> dict[str, float]:
    """What of a step's completions adds up over processes."""
    found: dict[str, float] = {
        "rows": len(rollout.entries),
        "tokens": int(rollout.sizes.sum()),
        "ended": int(rollout.ended.sum()),
    }
    return found if rewards is None else {**found, "reward": float(rewards.double().sum())}


def means(found: dict[str, float]) -> dict[str, Any]:
    """`counts` as they are logged: tokens in all, the rest a completion."""
    row = {
        "tokens": int(found["tokens"]),
        "prompts_cut": int(found["prompts_cut"]),
        "length": found["tokens"] / found["rows"],
    }
    return row | {name: found[name] / found["rows"] for name in ("ended", "reward") if name in found}


def scores_of(run: Player, rollout: Rollout) -> torch.Tensor:
    """Rewards [rows]."""
    texts = [run.text.decode(row) for row in rollout.completions()]
    return torch.tensor([run.task.score(entry, text) for entry, text in zip(rollout.entries, texts, strict=True)])


def evaluate(run: Player) -> dict[str, Any]:
    """Rewards of greedy completions of the held-out prompts, in order, and their mean."""
    entries = run.task.held_out(run.options.num_eval_prompts)
    ours = entries[run.ranks.rank :: run.ranks.size]
    filled = ours + entries[:1] * (-(-len(entries) // run.ranks.size) - len(ours))  # every process samples as often
    size, scores = run.options.micro_batch_size or run.options.batch_size, []
    for first in range(0, len(filled), size):
        prompts = encode(run.text, filled[first : first + size], run.longest_prompt)
        scores += scores_of(run, sampled(run, run.model, prompts, 0.0, True)).tolist()
    every = run.ranks.all(scores)
    ordered = [every[i % run.ranks.size][i // run.ranks.size] for i in range(len(entries))]
    return {"accuracy": sum(ordered) / len(entries), "scores": ordered}


def set_seed(seed: int, step: int, ranks: Ranks) -> None:
    """Everything that torch draws at a step follows from these."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{ranks.rank}").getrandbits(63))


def longest_prompt(options: DistillOptions, models: Sequence[Any]) -> int:
    """How long a prompt may be, in tokens, that a completion finds places after it in every model."""
    places = min(map(positions, models))
    if options.max_completion_length >= places:
        raise UsageError(
            f"max_completion_length is {options.max_completion_length} and the models have {places} positions in all; take fewer"
        )
    return min(options.max_prompt_length, places - options.max_completion_length)


def refuse_processes(options: DistillOptions, ranks: Ranks) -> None:
    """Raises UsageError for what several processes cannot do together."""
    if ranks.size == 1:
        return
    if options.batch_size % ranks.size:
        raise UsageError(f"batch_size is {options.batch_size} over {ranks.size} processes; take a multiple")
    if len(options.teachers) > 1:
        raise UsageError(
            "several teachers are chosen row by row, which several processes cannot do in step; run one process, or one teacher"
        )
    if options.lora_rank:
        raise UsageError(
            "lora_rank is for one process; the factors are small enough for it, or train a mask on several"
        )


def state_of(run: Run, step: int) -> dict[str, Any]:
    """What, beside the weights, a run goes on from."""
    trained = (
        {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
        if run.options.lora_rank
        else {}
    )
    optimizer = torch.optim.Optimizer.state_dict(run.optimizer)  # what lives here, compact
    return {
        "step": step,
        "processes": run.ranks.size,
        "optimizer": optimizer,
        "trained": trained,
        "teachers": {teacher_id: t.state_dict() for teacher_id, t in run.teachers.items()},
    }


def resume(run: Run, path: Path) -> int:
    """Takes on a checkpoint's state, its weights being loaded. Returns its step."""
    state = load_state(path, run.ranks)
    run.optimizer.load_state_dict(state["optimizer"])
    params = dict(run.model.named_parameters())
    with torch.no_grad():
        for name, value in state["trained"].items():
            params[name].copy_(value)
    for teacher_id, teacher in run.teachers.items():
        teacher.load_state_dict(state["teachers"][teacher_id])
    return int(state["step"])


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT put their number into: a step that is under way ends, then the run saves and stops."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(outcome: Outcome) -> dict[str, Any]:
    """The outcome as data."""
    return {
        "folder": os.fspath(outcome.folder),
        "step": outcome.step,
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "accuracy": outcome.accuracy,
        "marks": outcome.marks,
    }


def lines(outcome: Outcome) -> list[str]:
    """The outcome for people."""
    where = printable(os.fspath(outcome.folder))
    text = [
        f"step {outcome.step} of {outcome.steps}{': stopped by a signal; the same command goes on' if outcome.stopped else ''}; {where}"
    ]
    if outcome.accuracy:
        text.append(
            "accuracy on held-out prompts: "
            + ", ".join(f"{value:.3f} at step {step}" for step, value in outcome.accuracy)
        )
    for mark in outcome.marks[-1:]:
        visible, stored = (mark["views"][view] for view in ("visible", "stored"))
        text.append(
            f"changed: {100 * (1 - visible['frac_zero']):.2f} % of the weights visibly to bf16, {100 * (1 - stored['frac_zero']):.2f} % as stored, {100 * mark['changed_any']:.2f} % at any mark"
        )
    if outcome.step == outcome.steps:
        text.append(f"next: opdkernels trajectory {where}/checkpoint-0 {where}/checkpoint-[1-9]* -o {where}/trajectory")
    return text
