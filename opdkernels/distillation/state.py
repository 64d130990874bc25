"""What the steps of a run share: models, sampler, optimizer, teachers and task. They are built from the options, and
their training state is saved and restored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opdkernels.backends.devices import default_device, resolve_device
from opdkernels.distillation.checkpointing import ResumePoint, copy_tensors, load_state, state_errors
from opdkernels.distillation.logging import PhaseTimer
from opdkernels.distillation.models import (
    DTYPES,
    common_vocab_size,
    end_token_ids,
    load_model,
    max_positions,
    validate_lm_head,
)
from opdkernels.distillation.optimizers import FullGradNorm, build_optimizer, with_lora
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.rollout import Prompts, Rollout, encode
from opdkernels.distillation.sampling import sample
from opdkernels.distillation.tasks import Task, open_task, validate_answers, validate_images
from opdkernels.distillation.teachers import Teacher, load_teachers, shared_vocab_size
from opdkernels.distillation.text import MODEL_REMEDY, TextProcessor, load_text_processor, transformers
from opdkernels.distillation.world import Student, World
from opdkernels.errors import InputError, UsageError
from opdkernels.optim import gather_active_grads
from opdkernels.optim.base import MaskedOptimizer


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


@dataclass
class Sampler:
    """Samples completions.

    Attributes:
        student: The trained model.
        text: Tokenizer, and image processor if the model has one.
        end_ids: Tokens that end a completion.
        vocab_size: Number of ids that student and teachers have; no others are sampled.
        max_prompt_length: In tokens; longer prompts are truncated.
        max_completion_length: In tokens.
        world: The processes that share the student.
    """

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


def setup_device(options: DistillOptions) -> torch.device:
    """Sets the number of threads and disables progress bars of transformers. Returns the device of the run."""
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers().utils.logging.disable_progress_bar()
    return default_device() if options.device == "auto" else resolve_device(options.device)


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


def build_task(options: DistillOptions, task: Task | None = None) -> Task:
    """The task of a run, with validated held-out prompts.

    Args:
        options: Options of the run.
        task: A task that replaces the files named in the options.

    Raises:
        InputError: Prompts, answers or images cannot be used.
        UsageError: There are fewer held-out prompts than `num_eval_prompts`.
    """
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


def validate_chat_template(state: TrainState) -> None:
    """Raises InputError if prompts are messages and the student's chat template does not take the first of these."""
    examples = state.task.representative_examples()
    messages = (example for example in examples if not isinstance(example.prompt, str) and not example.images)
    if (example := next(messages, None)) is not None:
        state.sampler.encode([example])


def build_state(
    options: DistillOptions,
    task: Task,
    inputs: RunInputs,
    resume_point: ResumePoint | None,
    device: torch.device,
    world: World,
    cleanup: contextlib.ExitStack,
) -> TrainState:
    """Loads models and builds the optimizer.

    The order of the calls matters: LoRA adds parameters, `Student` shards them, the optimizer and its hooks refer to
    the sharded ones, and the hooks of FullGradNorm read a gradient before those of `gather_active_grads` free it.

    Args:
        options: Options of the run.
        task: From `build_task`.
        inputs: Objects that replace files named in the options.
        resume_point: Checkpoint whose weights the student gets; None: those of `options.student`.
        device: Where the models are.
        world: The processes of the run.
        cleanup: Removes the hooks on the student's parameters when it closes.
    """
    model = load_student(options, inputs, resume_point, device)
    text = inputs.text or load_text_processor(options.student)
    shared = shared_vocab_size(options, text, inputs.models)
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
        sampler=build_sampler(options, student, text, teacher_models, shared, world),
        optimizer=optimizer,
        teachers=teachers,
        timer=PhaseTimer(device),
        full_grad_norm=full_grad_norm,
    )


def load_student(
    options: DistillOptions, inputs: RunInputs, resume_point: ResumePoint | None, device: torch.device
) -> Any:
    """The student, with the weights of `resume_point` if the run resumes.

    With LoRA the weights are those of the start: the factors are part of the training state.
    """
    checkpoint = os.fspath(resume_point.path) if resume_point and not options.lora_rank else None
    if options.student not in inputs.models:
        return (
            load_checkpoint(checkpoint, options, device)
            if checkpoint
            else load_model(options.student, options.dtype, device)
        )
    model = inputs.models[options.student].to(device).eval()
    for param in model.parameters():  # not buffers: rotary frequencies stay in fp32
        param.data = param.data.to(DTYPES[options.dtype])
    validate_lm_head(model, options.student)
    if checkpoint:
        model.load_state_dict(load_checkpoint(checkpoint, options, device).state_dict())
    return model


def load_checkpoint(path: str, options: DistillOptions, device: torch.device) -> Any:
    """The model of a checkpoint of the run. Raises InputError if it cannot be loaded."""
    try:
        return load_model(path, options.dtype, device)
    except InputError as error:
        problem = str(error).removesuffix(f"; {MODEL_REMEDY}")
        raise InputError(f"{problem}; restore this checkpoint from a copy, or start again with --overwrite") from None


def build_sampler(
    options: DistillOptions,
    student: Student,
    text: TextProcessor,
    teachers: Sequence[Any],
    num_shared_ids: int,
    world: World,
) -> Sampler:
    """A sampler whose completions `teachers` (models or configurations) can score: it samples from the ids that all
    heads have and, where the teachers' tokenizers have more tokens, that mean the same to all."""
    return Sampler(
        student=student,
        text=text,
        end_ids=end_token_ids(student.model, text, options.stop_token),
        vocab_size=min(common_vocab_size(student.model, teachers), num_shared_ids),
        max_prompt_length=max_prompt_length(options, [student.model, *teachers]),
        max_completion_length=options.max_completion_length,
        world=world,
    )


def max_prompt_length(options: DistillOptions, models: Sequence[Any]) -> int:
    """Maximum length of a prompt, in tokens, that leaves room for a completion in every model."""
    num_positions = min(map(max_positions, models))
    if options.max_completion_length >= num_positions:
        raise UsageError(
            f"max_completion_length is {options.max_completion_length} and the models have {num_positions} positions; "
            "reduce it"
        )
    return min(options.max_prompt_length, num_positions - options.max_completion_length)


def lora_factors(state: TrainState) -> dict[str, torch.Tensor]:
    """The factors of LoRA by name; {} without LoRA."""
    if not state.options.lora_rank:
        return {}
    return {name: p.detach() for name, p in state.student.model.named_parameters() if p.requires_grad}


def training_state(state: TrainState, step: int) -> dict[str, Any]:
    """What a run needs to resume, besides the weights; this process's part.

    Args:
        state: The run.
        step: Number of steps taken.
    """
    return {
        "step": step,
        "processes": state.world.size,
        "optimizer": torch.optim.Optimizer.state_dict(state.optimizer),  # local and compact
        "lora": lora_factors(state),
        "teachers": {teacher_id: teacher.state_dict() for teacher_id, teacher in state.teachers.items()},
    }


def load_training_state(state: TrainState, path: Path) -> int:
    """Restores the training state of a checkpoint, whose weights are loaded already. Returns its step.

    Raises:
        InputError: The file cannot be read, is damaged, or does not fit the run.
        UsageError: The run used another number of processes.
    """
    saved = load_state(path, state.world)
    with state_errors(path):
        state.optimizer.load_state_dict(saved["optimizer"])
        copy_tensors("lora", lora_factors(state), saved["lora"])
        if saved["teachers"].keys() != state.teachers.keys():
            raise InputError(f"it has {len(saved['teachers'])} teachers, not those of the run")
        for teacher_id, teacher in state.teachers.items():
            copy_tensors(f"teacher {teacher_id}".strip(), teacher.state_dict(), saved["teachers"][teacher_id])
    return saved["step"]
