"""On-policy distillation (arXiv 2306.13649, 2606.13657): the student samples completions, the teacher scores their
tokens, the student minimises a divergence from the teacher; snapshots record what that changes in the weights.

Read `train` first, then `train_loop` and `train_step`. The seed and the step number determine all random draws of a
step, so a resumed run is bit-identical to an uninterrupted one (single process). Every token of a step has the same
weight: the loss of a micro-batch is the sum over its tokens, divided by the number of tokens in the step.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opdkernels.distillation.checkpointing import open_run_dir, save, start_run
from opdkernels.distillation.evaluation import evaluate, reward_completions
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.logging import LogSink, MetricsLogger, log_sinks
from opdkernels.distillation.models import load_model
from opdkernels.distillation.objective import DistillLoss, distill_loss, grpo_advantages
from opdkernels.distillation.optimizers import lr_at
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.products import cpu_products
from opdkernels.distillation.result import RunResult
from opdkernels.distillation.rollout import Prompts, Rollout, load_completions
from opdkernels.distillation.state import (
    RunInputs,
    TrainState,
    build_state,
    build_task,
    load_training_state,
    setup_device,
    training_state,
    validate_chat_template,
    validate_world,
)
from opdkernels.distillation.tasks import validate_prompts
from opdkernels.distillation.teachers import Teacher
from opdkernels.distillation.tracker import SNAPSHOTS_FILE, Tracker, count_trainable, optimizer_stats
from opdkernels.distillation.world import Student, World
from opdkernels.errors import InputError

MAX_SKIPPED = 3  # consecutive steps that train nothing, after which a run stops
EMPTY = "every completion is empty"


def train(
    options: DistillOptions, output_dir: str | os.PathLike[str], *, inputs: RunInputs | None = None, quiet: bool = True
) -> RunResult:
    """Runs or resumes distillation. `checkpoint-0` in the output directory holds the initial weights.

    Args:
        options: Options of the run.
        output_dir: Output directory. If it holds a run with these options, that run resumes.
        inputs: Objects that replace files named in the options.
        quiet: If True, do not print progress.

    Returns:
        Where the run ended.

    Raises:
        InputError: Models, prompts, masks or rewards cannot be used.
        UsageError: Options contradict each other, or the output directory holds another run.
    """
    inputs = inputs or RunInputs()
    device = setup_device(options)
    world = World.join(device)
    validate_world(options, world)
    task = build_task(options, inputs.task)
    validate_prompts(options, task)
    with (
        cpu_products(device),
        open_run_dir(output_dir, options, world) as (run_dir, resume_point),
        contextlib.ExitStack() as cleanup,
    ):
        state = build_state(options, task, inputs, resume_point, device, world, cleanup)
        step = load_training_state(state, resume_point.path) if resume_point else 0
        with log_sinks(run_dir, step, world, tensorboard=options.tensorboard, wandb=options.wandb) as sinks:
            validate_chat_template(state)
            if not resume_point:  # all inputs have been validated: now files may change
                world.run_on_main(lambda: start_run(run_dir, options))
            result = train_loop(state, run_dir, step, quiet=quiet, sinks=sinks, callbacks=inputs.callbacks)
    del state
    gc.collect()  # the model and what is bound to its parameters refer to each other
    return result


def train_loop(
    state: TrainState, output_dir: Path, step: int, *, quiet: bool, sinks: Sequence[LogSink], callbacks: Sequence[Any]
) -> RunResult:
    """Takes steps until max_steps or a signal, with evaluations, snapshots, metrics and checkpoints.

    Args:
        state: The run; its student, optimizer and teachers change.
        output_dir: Where checkpoints, log.jsonl and the files of the tracker are written.
        step: Number of steps taken before.
        quiet: If True, do not print progress.
        sinks: Further receivers of the metrics, such as TensorBoard.
        callbacks: As in `RunInputs`.

    Returns:
        Where the run ended.

    Raises:
        InputError: MAX_SKIPPED consecutive steps trained nothing.
    """
    options, model, world = state.options, state.student.model, state.world
    logger = MetricsLogger(output_dir, step, options.max_steps, quiet=quiet, world=world, sinks=sinks)
    tracker = open_tracker(state, output_dir, step)
    if not step:
        save(output_dir, 0, model, state.sampler.text, None, world)
        if options.num_eval_prompts:
            logger.log({"step": 0, **evaluate(state.sampler, state.task, options)})
    skip_reasons: list[str] = []  # of the consecutive steps up to this one that trained nothing
    with catch_stop_signals() as signals:
        stopped = False
        while step < options.max_steps and not stopped:
            is_last = step + 1 == options.max_steps
            snapshot_due = tracker is not None and (is_last or (step + 1) % options.snapshot_every == 0)
            row = train_step(state, step, with_optimizer_stats=snapshot_due)
            step += 1
            skip_reasons = [*skip_reasons, row["skip_reason"]] if row["skip_reason"] else []
            if len(skip_reasons) == MAX_SKIPPED:
                raise skipped_steps_error(skip_reasons, state)
            stats = row.pop("optimizer_stats")
            if tracker and snapshot_due:
                with state.timer.phase("snapshot"):
                    snapshot = tracker.snapshot(step, model, stats or {})
                row["changed_fraction"] = changed_fraction(snapshot["views"], step)
                row["changed_fraction_since_snapshot"] = changed_fraction(snapshot["since_last"], step)
            if options.num_eval_prompts and (is_last or (options.eval_steps and step % options.eval_steps == 0)):
                with state.timer.phase("evaluate"):
                    row |= evaluate(state.sampler, state.task, options)
            # Log before saving: a run that resumes from an earlier checkpoint deletes this row and writes it again.
            row = {"step": step, **row, **state.timer.metrics()}
            logger.log(dict(row))
            notify(callbacks, world, "on_step_end", step, row)
            stopped = bool(world.all_reduce({"stop": len(signals)}, state.device)["stop"])
            if is_last or stopped or (options.save_steps and step % options.save_steps == 0):
                path = save(output_dir, step, model, state.sampler.text, training_state(state, step), world)
                if tracker:
                    tracker.on_save()
                notify(callbacks, world, "on_save", step, path)
    is_finished = step == options.max_steps
    snapshots = tracker.finish() if tracker and is_finished else read_rows(output_dir / SNAPSHOTS_FILE)
    result = RunResult(
        path=output_dir,
        step=step,
        max_steps=options.max_steps,
        signal=next(filter(None, world.all_gather(signals[0] if signals else 0)), 0),
        accuracy=logger.accuracies(),
        snapshots=snapshots,
        is_main=world.is_main,
    )
    notify(callbacks, world, "on_train_end", result)
    return result


def train_step(state: TrainState, step: int, *, with_optimizer_stats: bool = False) -> dict[str, Any]:
    """One optimizer step.

    Args:
        state: The run; its student, optimizer and teachers change.
        step: Number of steps taken before.
        with_optimizer_stats: Whether to compute statistics of the optimizer's moments.

    Returns:
        Metrics of the step; `skip_reason`, which is empty if the weights were updated; and `optimizer_stats`, which is
        None unless `with_optimizer_stats`.
    """
    options, student, optimizer, timer = state.options, state.student, state.optimizer, state.timer
    timer.reset()
    seed_step(options.seed, step, state.world)

    rollout, advantages, metrics = generate(state, step)
    num_tokens = metrics["tokens"]  # of the step, over all processes
    if not num_tokens:
        return {**metrics, "skip_reason": EMPTY}

    sums: defaultdict[str, float] = defaultdict(float)
    micro_batches = list(split_rows(rollout, state.teachers, options.micro_batch_size))
    tokens_per_rank = num_tokens / state.world.size  # FSDP averages gradients over processes
    for teacher_id, rows in micro_batches:
        micro_batch, teacher_out = rollout.select(rows), None
        if options.divergence_weight:
            with timer.phase("score"):
                teacher_out = state.teachers[teacher_id].score(micro_batch)
        with timer.phase("train"):
            outputs = distill_loss(
                student,
                micro_batch,
                teacher_out,
                None if advantages is None else advantages[rows],
                num_tokens=tokens_per_rank,
                vocab_size=state.sampler.vocab_size,
                options=options,
            )
            outputs.loss.backward()
        for name, value in sum_metrics(outputs, tokens_per_rank).items():
            sums[name] += value
    metrics |= {name: total / num_tokens for name, total in state.world.all_reduce(sums, state.device).items()}

    with timer.phase("step"):
        learning_rate = lr_at(options, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = optimizer.clip_grad_norm_(options.max_grad_norm or math.inf)
        metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
        if state.full_grad_norm is not None:
            full_grad_norm = state.full_grad_norm.pop(state.world, state.device)
            metrics |= {"grad_norm_full": full_grad_norm} if len(micro_batches) == 1 else {}
        if with_optimizer_stats:
            metrics["optimizer_stats"] = optimizer_stats(optimizer, state.world)
        if not (torch.isfinite(grad_norm) and math.isfinite(metrics["loss"])):
            metrics["skip_reason"] = f"loss {metrics['loss']}, gradient norm {float(grad_norm)}"
            optimizer.zero_grad()
            return metrics
        optimizer.step()
        optimizer.zero_grad()
        for teacher in set(state.teachers.values()):
            teacher.after_step()
    return metrics


def seed_step(seed: int, step: int, world: World) -> None:
    """Seeds torch for the draws of a step on this process."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{world.rank}").getrandbits(63))


def generate(state: TrainState, step: int) -> tuple[Rollout, torch.Tensor | None, dict[str, Any]]:
    """Completions of the prompts of a step, `num_generations` of each, on this process.

    Args:
        state: The run.
        step: Number of steps taken before; prompts and random draws follow from it.

    Returns:
        The rollout; advantages [num_rows], None without a reward; metrics of the completions of all processes.
    """
    options, world = state.options, state.world
    first = step * options.batch_size
    examples = [state.task.example(first + i) for i in range(world.rank, options.batch_size, world.size)]
    with state.timer.phase("generate"):
        prompts = state.sampler.encode(examples).repeat(options.num_generations)
        rollout = complete(state, prompts, step)
    rewards = advantages = None
    if options.reward_weight:
        rewards = reward_completions(state.task, state.sampler.text, rollout)  # [num_rows]
        advantages = grpo_advantages(rewards, options.num_generations).to(state.device)
    totals = world.all_reduce(
        {"prompts_truncated": prompts.num_truncated, **count_completions(rollout, rewards)}, state.device
    )
    metrics = {"skip_reason": "", "optimizer_stats": None, "on_policy": rollout.on_policy, **completion_metrics(totals)}
    return rollout, advantages, metrics


def complete(state: TrainState, prompts: Prompts, step: int) -> Rollout:
    """Completions of a step: sampled by the student with probability on_policy_fraction, else those of the data set,
    else sampled by the teacher."""
    options, sampler = state.options, state.sampler
    on_policy = random.Random(f"{options.seed}/{step}/coin").random() < options.on_policy_fraction
    if on_policy:
        return sampler.sample(prompts, options.sampling_temperature)
    if prompts.examples[0].completion is not None:  # then every prompt has one
        return load_completions(
            sampler.text,
            prompts,
            max_length=sampler.max_completion_length,
            end_ids=sampler.end_ids,
            device=state.device,
        )
    teacher = next(iter(state.teachers.values()))
    return sampler.sample_teacher(teacher.model, prompts, options.sampling_temperature)


def count_completions(rollout: Rollout, rewards: torch.Tensor | None) -> dict[str, float]:
    """Counts and sums over the completions of this process, by the names of the metrics they become."""
    counts: dict[str, float] = {
        "rows": len(rollout.examples),
        "tokens": int(rollout.lengths.sum()),
        "finished_fraction": int(rollout.finished.sum()),
    }
    return counts if rewards is None else {**counts, "reward": float(rewards.double().sum())}


def completion_metrics(totals: dict[str, float]) -> dict[str, Any]:
    """Metrics from the sums of `count_completions` over all processes: totals of tokens and of truncated prompts, and
    means per completion."""
    metrics = {
        "tokens": int(totals["tokens"]),
        "prompts_truncated": int(totals["prompts_truncated"]),
        "completion_length": totals["tokens"] / totals["rows"],
    }
    return metrics | {name: totals[name] / totals["rows"] for name in ("finished_fraction", "reward") if name in totals}


def split_rows(
    rollout: Rollout, teachers: Mapping[str, Teacher], micro_batch_size: int
) -> Iterator[tuple[str, list[int]]]:
    """Splits a rollout into micro-batches with one teacher each.

    Args:
        rollout: Prompts and completions of the step.
        teachers: Teachers by id. The teacher "" scores prompts whose teacher_id is not a key.
        micro_batch_size: Maximum number of rows; 0: all rows of a teacher.

    Yields:
        The teacher_id and the rows of a micro-batch.
    """
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(rollout.examples):
        rows_of[example.teacher_id if example.teacher_id in teachers else ""].append(row)
    for teacher_id, rows in rows_of.items():
        size = micro_batch_size or len(rows)
        for first in range(0, len(rows), size):
            yield teacher_id, rows[first : first + size]


def sum_metrics(outputs: DistillLoss, num_tokens: float) -> dict[str, float]:
    """Sums over the tokens of a micro-batch.

    Args:
        outputs: Result of the micro-batch; its loss is a sum over tokens divided by `num_tokens`.
        num_tokens: That divisor.

    Returns:
        Sums of the loss and of each metric per token.
    """
    sums = {"loss": float(outputs.loss.detach()) * num_tokens}
    if outputs.scores is not None:
        for name, values in outputs.scores._asdict().items():
            if name != "loss" and values is not None:
                sums[name] = float(values.double().sum())
    if outputs.log_prob is not None:
        sums["log_prob"] = float(outputs.log_prob.double().sum())
    return sums


def open_tracker(state: TrainState, output_dir: Path, step: int) -> Tracker | None:
    """The tracker of the weights.

    Args:
        state: The run.
        output_dir: Where the tracker keeps its files; checkpoint-0 in it has the initial weights.
        step: Number of steps taken before.

    Returns:
        The tracker; None without snapshots, and for a finished run, whose copies of the weights have been deleted.
    """
    options, world = state.options, state.world
    has_copies = step < options.max_steps or any((output_dir / "weights").glob("*.bin"))
    if not (options.snapshot_every and has_copies):
        return None
    device = state.device if world.size > 1 else torch.device("cpu")

    def load_start() -> Any:
        return Student(load_model(os.fspath(output_dir / "checkpoint-0"), options.dtype, device), world).model

    return Tracker(
        output_dir,
        state.student.model,
        step=step,
        load_start=load_start,
        num_trainable=count_trainable(state.optimizer, world, state.device),
        world=world,
    )


def changed_fraction(views: dict[str, Any], step: int) -> float:
    """Fraction of the finite weights that changed visibly. Raises InputError if no weight is finite."""
    unchanged = views["visible"]["frac_zero"]
    if unchanged is None:
        raise InputError(f"no weight of the student is finite after step {step}; reduce learning_rate or weight_decay")
    return 1 - unchanged


def skipped_steps_error(reasons: Sequence[str], state: TrainState) -> InputError:
    """The error of a run whose last steps trained nothing, for the reason of each step."""
    if set(reasons) == {EMPTY}:
        return InputError(
            f"every completion of {len(reasons)} consecutive steps is empty, so there is nothing to train on; "
            "check that the prompts have the student's format, or give other completions"
        )
    reason = next(reason for reason in reversed(reasons) if reason != EMPTY)
    causes = "check the teacher, or " if state.teachers else ""
    return InputError(f"{len(reasons)} consecutive steps had no finite loss ({reason}); {causes}reduce learning_rate")


def notify(callbacks: Sequence[Any], world: World, method: str, *args: Any) -> None:
    """Calls a method of each callback that has it, on the main process."""
    for callback in callbacks if world.is_main else ():
        if (call := getattr(callback, method, None)) is not None:
            call(*args)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list: the current step ends, and then the run saves and stops."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
