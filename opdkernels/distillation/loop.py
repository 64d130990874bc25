"""On-policy distillation (arXiv 2306.13649, 2606.13657): the student samples completions, the teacher scores their
tokens, the student minimises a divergence from the teacher; snapshots record what that changes in the weights.

Read `train_step` first. The seed and the step number determine all random draws of a step, so a resumed run is
bit-identical to an uninterrupted one (single process). Every token of a step has the same weight: the loss of a
micro-batch is the sum over its tokens, divided by the number of tokens in the step.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkernels.backends.devices import default_device, resolve_device
from opdkernels.distillation.checkpointing import ResumePoint, load_state, open_run_dir, save, start_run
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.logging import LogSink, MetricsLogger, PhaseTimer, log_sinks
from opdkernels.distillation.models import (
    DTYPES,
    common_vocab_size,
    end_token_ids,
    load_config,
    load_model,
    max_positions,
    validate_lm_head,
)
from opdkernels.distillation.objective import DistillLoss, distill_loss, grpo_advantages
from opdkernels.distillation.optimizers import FullGradNorm, build_optimizer, lr_at, with_lora
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.distillation.rollout import Prompts, Rollout, encode, load_completions
from opdkernels.distillation.sampling import sample
from opdkernels.distillation.tasks import (
    Task,
    open_task,
    validate_answers,
    validate_images,
    validate_prompts,
)
from opdkernels.distillation.teachers import Teacher, load_teachers
from opdkernels.distillation.text import TextProcessor, load_text_processor, transformers
from opdkernels.distillation.tracker import SNAPSHOTS_FILE, Tracker, count_trainable, optimizer_stats
from opdkernels.distillation.world import Student, World
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.optim import gather_active_grads
from opdkernels.optim.base import MaskedOptimizer

MAX_SKIPPED = 3  # consecutive steps without a finite loss, after which a run stops


@dataclass(frozen=True)
class RunInputs:
    """Objects that replace files named in the options.

    Attributes:
        models: Loaded models by name; student and teacher in the options refer to these names.
        text: Tokenizer of a student in `models`.
        task: Prompts and reward.
        callbacks: Objects with any of on_step_end(step, metrics), on_save(step, path), on_train_end(result).
    """

    models: Mapping[str, Any] = field(default_factory=dict)
    text: TextProcessor | None = None
    task: Task | None = None
    callbacks: Sequence[Any] = ()


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        path: The run's folder; None if it was temporary.
        step: Number of steps taken.
        max_steps: Number of steps asked for.
        signal: The signal that stopped the run, or 0.
        accuracy: (step, mean reward of greedy completions of held-out prompts) of each evaluation.
        snapshots: Rows of snapshots.jsonl.
        is_main: Whether this is the main process.
    """

    path: Path | None
    step: int
    max_steps: int
    signal: int
    accuracy: list[tuple[int, float]]
    snapshots: list[dict[str, Any]]
    is_main: bool = True

    @property
    def exit_status(self) -> int:
        """0, or 128 plus the number of the signal that stopped the run."""
        return 128 + self.signal if self.signal else 0


@dataclass
class Sampler:
    """The student, and what limits its completions."""

    student: Student
    text: TextProcessor
    end_ids: list[int]
    vocab_size: int
    max_prompt_length: int
    max_completion_length: int
    world: World

    def encode(self, examples: Sequence[Any]) -> Prompts:
        """Token ids of prompts, truncated to the maximum length."""
        return encode(self.text, examples, self.max_prompt_length)

    def sample(self, prompts: Prompts, temperature: float) -> Rollout:
        """Samples completions from the student, on all processes."""
        return self.student(
            sample,
            self.text,
            prompts,
            max_length=self.max_completion_length,
            end_ids=self.end_ids,
            vocab_size=self.vocab_size,
            temperature=temperature,
            on_policy=True,
            num_processes=self.world.size,
        )

    def sample_teacher(self, model: Any, prompts: Prompts, temperature: float) -> Rollout:
        """Samples completions from a teacher, which every process holds."""
        return sample(
            model,
            self.text,
            prompts,
            max_length=self.max_completion_length,
            end_ids=self.end_ids,
            vocab_size=self.vocab_size,
            temperature=temperature,
            on_policy=False,
        )


@dataclass
class TrainState:
    """Everything that the steps of a run share."""

    options: DistillOptions
    world: World
    device: torch.device
    task: Task
    student: Student
    sampler: Sampler
    optimizer: MaskedOptimizer
    teachers: dict[str, Teacher]
    timer: PhaseTimer
    full_grad_norm: FullGradNorm | None  # with masks: norm of the gradient with the frozen coordinates


def train_step(state: TrainState, step: int, *, with_optimizer_stats: bool = False) -> dict[str, Any]:
    """One optimizer step.

    Args:
        state: The run; its student, optimizer and teachers change.
        step: Number of steps taken before.
        with_optimizer_stats: Whether to compute statistics of the optimizer's moments.

    Returns:
        Metrics of the step, and `optimizer_stats` (None unless asked for).
    """
    options, student, optimizer, timer = state.options, state.student, state.optimizer, state.timer
    timer.reset()
    seed_step(options.seed, step, state.world)

    rollout, advantages, metrics = generate(state, step)
    num_tokens = metrics["tokens"]  # of the step, over all processes
    if not num_tokens:
        return {**metrics, "skipped": "every completion is empty"}

    sums: defaultdict[str, float] = defaultdict(float)
    micro_batches = list(split_rows(rollout, state.teachers, options.micro_batch_size))
    tokens_per_rank = num_tokens / state.world.size  # FSDP averages gradients over processes
    for teacher_id, rows in micro_batches:
        micro_batch, teacher_out = rollout.select(rows), None
        if options.divergence_weight:
            with timer.phase("score"):
                teacher_out = state.teachers[teacher_id].score(micro_batch)
        with timer.phase("train"):
            out = distill_loss(
                student,
                micro_batch,
                teacher_out,
                None if advantages is None else advantages[rows],
                num_tokens=tokens_per_rank,
                vocab_size=state.sampler.vocab_size,
                options=options,
            )
            out.loss.backward()
        for name, value in sum_metrics(out, tokens_per_rank).items():
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
            metrics["skipped"] = f"loss {metrics['loss']}, gradient norm {float(grad_norm)}"
            optimizer.zero_grad()
            return metrics
        optimizer.step()
        optimizer.zero_grad()
        for teacher in set(state.teachers.values()):
            teacher.after_step()
    return metrics


def generate(state: TrainState, step: int) -> tuple[Rollout, torch.Tensor | None, dict[str, Any]]:
    """The rollout of a step, advantages [num_rows] if there is a reward, and metrics of the completions."""
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
    metrics = {"skipped": "", "optimizer_stats": None, "on_policy": rollout.on_policy, **completion_metrics(totals)}
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


def split_rows(
    rollout: Rollout, teachers: Mapping[str, Teacher], micro_batch_size: int
) -> Iterator[tuple[str, list[int]]]:
    """(teacher_id, rows) of each micro-batch: the rows of one teacher, at most `micro_batch_size` (0: all) of them."""
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, example in enumerate(rollout.examples):
        rows_of[example.teacher_id if example.teacher_id in teachers else ""].append(row)
    for teacher_id, rows in rows_of.items():
        size = micro_batch_size or len(rows)
        for first in range(0, len(rows), size):
            yield teacher_id, rows[first : first + size]


def sum_metrics(out: DistillLoss, num_tokens: float) -> dict[str, float]:
    """Sums over the tokens of a micro-batch of the loss and of the metrics per token."""
    sums = {"loss": float(out.loss.detach()) * num_tokens}
    if out.scores is not None:
        for name, values in out.scores._asdict().items():
            if name != "loss" and values is not None:
                sums[name] = float(values.double().sum())
    if out.log_prob is not None:
        sums["log_prob"] = float(out.log_prob.double().sum())
    return sums


def count_completions(rollout: Rollout, rewards: torch.Tensor | None) -> dict[str, float]:
    """Counts and sums over the completions of this process."""
    counts: dict[str, float] = {
        "rows": len(rollout.examples),
        "tokens": int(rollout.lengths.sum()),
        "finished": int(rollout.finished.sum()),
    }
    return counts if rewards is None else {**counts, "reward": float(rewards.double().sum())}


def completion_metrics(totals: dict[str, float]) -> dict[str, Any]:
    """Total tokens and truncated prompts; means per completion of the others."""
    metrics = {
        "tokens": int(totals["tokens"]),
        "prompts_truncated": int(totals["prompts_truncated"]),
        "completion_length": totals["tokens"] / totals["rows"],
    }
    return metrics | {name: totals[name] / totals["rows"] for name in ("finished", "reward") if name in totals}


def reward_completions(task: Task, text: TextProcessor, rollout: Rollout) -> torch.Tensor:
    """Rewards [num_rows]."""
    completions = [text.decode(ids) for ids in rollout.completions()]
    pairs = zip(rollout.examples, completions, strict=True)
    return torch.tensor([task.score(example, completion) for example, completion in pairs])


def train_loop(
    state: TrainState, folder: Path, step: int, *, quiet: bool, sinks: Sequence[LogSink], callbacks: Sequence[Any]
) -> RunResult:
    """Takes steps from `step` to max_steps, or until a signal, with evaluations, snapshots, metrics and checkpoints."""
    options, model, world = state.options, state.student.model, state.world
    logger = MetricsLogger(folder, step, options.max_steps, quiet=quiet, world=world, sinks=sinks)
    tracker = open_tracker(state, folder, step)
    if not step:
        save(folder, 0, model, state.sampler.text, None, world)
        if options.num_eval_prompts:
            logger.log({"step": 0, **evaluate(state.sampler, state.task, options)})
    num_skipped = 0
    with catch_stop_signals() as signals:
        stopped = False
        while step < options.max_steps and not stopped:
            snapshot_due = tracker is not None and (step + 1) % options.snapshot_every == 0
            row = train_step(state, step, with_optimizer_stats=snapshot_due)
            step += 1
            num_skipped = num_skipped + 1 if row["skipped"] else 0
            if num_skipped == MAX_SKIPPED:
                causes = "check the teacher, or " if state.teachers else ""
                raise InputError(
                    f"{MAX_SKIPPED} consecutive steps had no finite loss ({row['skipped']}); "
                    f"{causes}reduce learning_rate"
                )
            is_last, stats = step == options.max_steps, row.pop("optimizer_stats")
            if tracker and (snapshot_due or is_last):
                with state.timer.phase("snapshot"):
                    snapshot = tracker.snapshot(step, model, stats or {})
                row["changed"] = 1 - snapshot["views"]["visible"]["frac_zero"]
                row["changed_since_snapshot"] = 1 - snapshot["since_last"]["visible"]["frac_zero"]
            if options.num_eval_prompts and (is_last or (options.eval_steps and step % options.eval_steps == 0)):
                with state.timer.phase("evaluate"):
                    row |= evaluate(state.sampler, state.task, options)
            # Log before saving: a run that resumes from an earlier checkpoint deletes this row and writes it again.
            row = {"step": step, **row, **state.timer.metrics()}
            logger.log(dict(row))
            notify(callbacks, world, "on_step_end", step, row)
            stopped = bool(world.all_reduce({"stop": len(signals)}, state.device)["stop"])
            if is_last or stopped or (options.save_steps and step % options.save_steps == 0):
                path = save(folder, step, model, state.sampler.text, training_state(state, step), world)
                if tracker:
                    tracker.on_save()
                notify(callbacks, world, "on_save", step, path)
    finished = tracker is not None and step == options.max_steps
    snapshots = tracker.finish() if tracker and finished else read_rows(folder / SNAPSHOTS_FILE)
    result = RunResult(
        path=folder,
        step=step,
        max_steps=options.max_steps,
        signal=signals[0] if signals else 0,
        accuracy=logger.accuracies(),
        snapshots=snapshots,
        is_main=world.is_main,
    )
    notify(callbacks, world, "on_train_end", result)
    return result


def notify(callbacks: Sequence[Any], world: World, method: str, *args: Any) -> None:
    """Calls a method of each callback that has it, on the main process."""
    for callback in callbacks if world.is_main else ():
        if (call := getattr(callback, method, None)) is not None:
            call(*args)


def open_tracker(state: TrainState, folder: Path, step: int) -> Tracker | None:
    """The tracker of a run; None without snapshots, and for a finished run whose copies are gone."""
    options, world = state.options, state.world
    unfinished = step < options.max_steps or any((folder / "weights").glob("*.bin"))
    if not (options.snapshot_every and unfinished):
        return None
    device = state.device if world.size > 1 else torch.device("cpu")

    def load_start() -> Any:
        return Student(load_model(os.fspath(folder / "checkpoint-0"), options.dtype, device), world).model

    return Tracker(
        folder,
        state.student.model,
        step=step,
        load_start=load_start,
        num_trainable=count_trainable(state.optimizer, world, state.device),
        world=world,
    )


def evaluate(sampler: Sampler, task: Task, options: DistillOptions) -> dict[str, Any]:
    """Rewards of greedy completions of the held-out prompts (`scores`), and their mean (`accuracy`)."""
    world, examples = sampler.world, task.eval_examples(options.num_eval_prompts)
    local = examples[world.rank :: world.size]
    per_rank = -(-len(examples) // world.size)
    local = local + examples[:1] * (per_rank - len(local))  # every process samples equally often
    size, scores = options.micro_batch_size or options.batch_size, []
    for first in range(0, len(local), size):
        rollout = sampler.sample(sampler.encode(local[first : first + size]), temperature=0.0)
        scores += reward_completions(task, sampler.text, rollout).tolist()
    gathered = world.all_gather(scores)
    ordered = [gathered[i % world.size][i // world.size] for i in range(len(examples))]
    return {"accuracy": sum(ordered) / len(examples), "scores": ordered}


def evaluate_checkpoint(options: DistillOptions, path: str | os.PathLike[str]) -> list[float]:
    """The reward of each held-out prompt for greedy completions of a checkpoint, as a run with these options evaluates
    it.

    Raises InputError for a model, prompts or a reward that cannot be used.
    """
    device, world = setup_device(options), World()
    model, text = load_model(os.fspath(path), options.dtype, device), load_text_processor(os.fspath(path))
    teachers = [load_config(teacher) for teacher in options.teachers.values() if teacher != SELF]
    sampler = build_sampler(options, Student(model, world), text, teachers, world)
    return evaluate(sampler, build_task(options), options)["scores"]


def train(
    options: DistillOptions, out: str | os.PathLike[str], *, inputs: RunInputs | None = None, quiet: bool = True
) -> RunResult:
    """Runs or resumes distillation. `checkpoint-0` in the run's folder holds the initial weights.

    Args:
        options: Options of the run.
        out: The run's folder. If it holds a run with these options, that run resumes.
        inputs: Objects that replace files named in the options.
        quiet: If True, do not print progress.

    Returns:
        Where the run ended.

    Raises:
        InputError: Models, prompts, masks or rewards cannot be used.
        UsageError: Options contradict each other, or the folder holds another run.
    """
    inputs = inputs or RunInputs()
    device = setup_device(options)
    world = World.join(device)
    validate_world(options, world)
    task = build_task(options, inputs.task)
    validate_prompts(options, task)
    with open_run_dir(out, options, world) as (folder, resume_point), contextlib.ExitStack() as cleanup:
        state = build_state(options, task, inputs, resume_point, device, world, cleanup)
        step = load_training_state(state, resume_point.path) if resume_point else 0
        with log_sinks(folder, step, world, tensorboard=options.tensorboard, wandb=options.wandb) as sinks:
            if not resume_point:  # all inputs have been validated: now the folder may change
                world.run_on_main(lambda: start_run(folder, options))
            result = train_loop(state, folder, step, quiet=quiet, sinks=sinks, callbacks=inputs.callbacks)
    del state
    gc.collect()  # the model and what is bound to its parameters refer to each other
    return result


def build_state(
    options: DistillOptions,
    task: Task,
    inputs: RunInputs,
    resume_point: ResumePoint | None,
    device: torch.device,
    world: World,
    cleanup: contextlib.ExitStack,
) -> TrainState:
    """Loads models and builds the optimizer; the student has the weights of `resume_point`. `cleanup` removes hooks
    from the student's parameters."""
    model = load_student(options, inputs, resume_point, device)
    text = inputs.text or load_text_processor(options.student)
    if options.lora_rank:
        torch.manual_seed(options.seed)
        model = with_lora(options, model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = Student(model, world)
    optimizer = build_optimizer(options, model)
    full_grad_norm = FullGradNorm(model) if options.masks else None
    if full_grad_norm:
        cleanup.callback(full_grad_norm.remove)
    cleanup.callback(gather_active_grads(model, optimizer).remove)
    teachers = load_teachers(options, student, optimizer, text, device, inputs.models)
    teacher_models = [teacher.model for teacher in teachers.values()]
    return TrainState(
        options=options,
        world=world,
        device=device,
        task=task,
        student=student,
        sampler=build_sampler(options, student, text, teacher_models, world),
        optimizer=optimizer,
        teachers=teachers,
        timer=PhaseTimer(device),
        full_grad_norm=full_grad_norm,
    )


def load_student(
    options: DistillOptions, inputs: RunInputs, resume_point: ResumePoint | None, device: torch.device
) -> Any:
    """The student with the weights of a checkpoint. With LoRA the weights are those of the start: the factors are part
    of the training state."""
    checkpoint = os.fspath(resume_point.path) if resume_point and not options.lora_rank else None
    if options.student not in inputs.models:
        return load_model(checkpoint or options.student, options.dtype, device)
    model = inputs.models[options.student].to(device).eval()
    for param in model.parameters():  # not buffers: rotary frequencies stay in fp32
        param.data = param.data.to(DTYPES[options.dtype])
    validate_lm_head(model, options.student)
    if checkpoint:
        model.load_state_dict(load_model(checkpoint, options.dtype, device).state_dict())
    return model


def build_sampler(
    options: DistillOptions, student: Student, text: TextProcessor, teachers: Sequence[Any], world: World
) -> Sampler:
    """A sampler whose completions `teachers` (models or configurations) can score."""
    return Sampler(
        student=student,
        text=text,
        end_ids=end_token_ids(student.model, text, options.stop_token),
        vocab_size=common_vocab_size(student.model, teachers),
        max_prompt_length=max_prompt_length(options, [student.model, *teachers]),
        max_completion_length=options.max_completion_length,
        world=world,
    )


def build_task(options: DistillOptions, task: Task | None = None) -> Task:
    """The task of a run, with validated held-out prompts. Raises InputError or UsageError if they cannot be used."""
    if task is None:
        task = open_task(options.prompts, options.eval_prompts, seed=options.seed, reward=options.reward)
    examples = task.eval_examples(options.num_eval_prompts)
    if options.num_eval_prompts and not examples:
        raise UsageError(
            "num_eval_prompts is not 0 and there are no held-out prompts; name a file of them as eval_prompts, or set "
            "num_eval_prompts=0"
        )
    if len(examples) < options.num_eval_prompts:
        raise UsageError(
            f"num_eval_prompts is {options.num_eval_prompts} and there are {len(examples)} held-out prompts; "
            f"set num_eval_prompts={len(examples)}"
        )
    validate_images(examples)
    validate_answers(examples, task.reward)
    return task


def setup_device(options: DistillOptions) -> torch.device:
    """Sets the number of threads and disables progress bars of transformers. Returns the device of the run."""
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers().utils.logging.disable_progress_bar()
    return default_device() if options.device == "auto" else resolve_device(options.device)


def seed_step(seed: int, step: int, world: World) -> None:
    """Seeds torch for the draws of a step on this process."""
    torch.manual_seed(random.Random(f"{seed}/{step}/{world.rank}").getrandbits(63))


def max_prompt_length(options: DistillOptions, models: Sequence[Any]) -> int:
    """Maximum length of a prompt, in tokens, that leaves room for a completion in every model."""
    num_positions = min(map(max_positions, models))
    if options.max_completion_length >= num_positions:
        raise UsageError(
            f"max_completion_length is {options.max_completion_length} and the models have {num_positions} positions; "
            "reduce it"
        )
    return min(options.max_prompt_length, num_positions - options.max_completion_length)


def validate_world(options: DistillOptions, world: World) -> None:
    """Raises UsageError for options that this number of processes does not support."""
    if world.size == 1:
        return
    if options.batch_size % world.size:
        raise UsageError(f"batch_size is {options.batch_size} with {world.size} processes; use a multiple")
    if len(options.teachers) > 1:
        raise UsageError(
            "several teachers split a batch by prompt, so that processes would gather layers a different number of "
            "times; use one process, or one teacher"
        )
    if options.lora_rank:
        raise UsageError("lora_rank works on one process only; use one process, or train a mask on several")


def training_state(state: TrainState, step: int) -> dict[str, Any]:
    """What a run resumes from, besides the weights; this process's part."""
    lora = {}
    if state.options.lora_rank:
        lora = {name: p.detach() for name, p in state.student.model.named_parameters() if p.requires_grad}
    return {
        "step": step,
        "processes": state.world.size,
        "optimizer": torch.optim.Optimizer.state_dict(state.optimizer),  # local and compact
        "lora": lora,
        "teachers": {teacher_id: teacher.state_dict() for teacher_id, teacher in state.teachers.items()},
    }


def load_training_state(state: TrainState, path: Path) -> int:
    """Restores the training state of a checkpoint, whose weights are loaded already. Returns its step."""
    saved = load_state(path, state.world)
    state.optimizer.load_state_dict(saved["optimizer"])
    params = dict(state.student.model.named_parameters())
    with torch.no_grad():
        for name, value in saved["lora"].items():
            params[name].copy_(value)
    for teacher_id, teacher in state.teachers.items():
        teacher.load_state_dict(saved["teachers"][teacher_id])
    return int(saved["step"])


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


def summary(result: RunResult) -> dict[str, Any]:
    """The result as data."""
    return {
        "path": None if result.path is None else os.fspath(result.path),
        "step": result.step,
        "max_steps": result.max_steps,
        "signal": result.signal,
        "accuracy": result.accuracy,
        "snapshots": result.snapshots,
    }


def format_text(result: RunResult) -> list[str]:
    """The result as lines of text."""
    path = printable(os.fspath(result.path or ""))
    interrupted = ": stopped by a signal; rerun the same command to resume" if result.signal else ""
    text = [f"step {result.step} of {result.max_steps}{interrupted}; {path}"]
    if result.accuracy:
        evaluations = ", ".join(f"{value:.3f} at step {step}" for step, value in result.accuracy)
        text.append(f"accuracy on held-out prompts: {evaluations}")
    for snapshot in result.snapshots[-1:]:
        visible, stored = (1 - snapshot["views"][view]["frac_zero"] for view in ("visible", "stored"))
        text.append(
            f"changed weights: {100 * visible:.2f} % visible in bf16, {100 * stored:.2f} % as stored, "
            f"{100 * snapshot['changed_any']:.2f} % in any snapshot"
        )
    if result.step == result.max_steps:
        text.append(f"next: opdkernels trajectory {path}/checkpoint-0 {path}/checkpoint-[1-9]* -o {path}/trajectory")
    return text
