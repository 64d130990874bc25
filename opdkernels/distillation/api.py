"""`distill`: on-policy distillation whose models, prompts and reward may be objects or files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from opdkernels.config import validate_options
from opdkernels.distillation.examples import Example, example_of, read_examples
from opdkernels.distillation.loop import train
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.result import RunResult
from opdkernels.distillation.state import RunInputs
from opdkernels.distillation.tasks import ExamplesTask, Reward, Task, open_task
from opdkernels.distillation.text import TextProcessor, load_text_processor
from opdkernels.errors import InputError, UsageError

Model = Any  # a PreTrainedModel of transformers
Rows = Iterable[Any]  # texts, dictionaries with the fields of Example, or Examples; a datasets.Dataset is one
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def distill(
    student: str | os.PathLike[str] | Model | None = None,
    teacher: str | os.PathLike[str] | Model | Mapping[str, Any] | None = None,
    prompts: str | os.PathLike[str] | Rows | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    config: DistillOptions | None = None,
    processing_class: Any = None,
    reward: str | Callable[[Any, str | None, str], float] | None = None,
    eval_prompts: str | os.PathLike[str] | Rows | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = True,
    ema_decay: float | None = None,
    dtype: Literal["bfloat16", "float32"] | None = None,
    device: str | None = None,
    lora_rank: int | None = None,
    subspace: str | None = None,
    gradient_checkpointing: bool | None = None,
    batch_size: int | None = None,
    num_generations: int | None = None,
    micro_batch_size: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    stop_token: str | None = None,
    on_policy_fraction: float | None = None,
    sampling_temperature: float | None = None,
    divergence: str | None = None,
    beta: float | None = None,
    k: int | None = None,
    temperature: float | None = None,
    divergence_weight: float | None = None,
    reward_weight: float | None = None,
    sft_weight: float | None = None,
    optimizer: Literal["adamw", "sgd"] | None = None,
    masks: str | None = None,
    learning_rate: float | None = None,
    warmup_steps: int | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    precision: Literal["split_master", "kahan", "stochastic", "nearest"] | None = None,
    max_grad_norm: float | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    save_steps: int | None = None,
    snapshot_every: int | None = None,
    eval_steps: int | None = None,
    num_eval_prompts: int | None = None,
    tensorboard: bool | None = None,
    wandb: str | None = None,
    threads: int | None = None,
    overwrite: bool | None = None,
) -> RunResult:
    """Trains a student on its own samples from a teacher's view of every token, and records what that changes.

    If `out` holds an interrupted run with the same inputs and options, that run resumes. An object is the same input if
    its content is the same: for a model a digest of its configuration and weights before training, for prompts a digest
    of the rows, for a reward function its qualified name. Callbacks are not compared.

    The arguments that are not listed here are fields of `DistillOptions`, which documents them and their defaults; None
    is the default. For a loaded student the default of `dtype` is its own dtype.

    Args:
        student: Model to train: folder, hub id, or a loaded PreTrainedModel, which is trained in place and left in
            evaluation mode (with lora_rank, adapter layers are added to it).
        teacher: Folder, hub id, loaded model, "self", or a dictionary of these by the teacher_id of prompts. A loaded
            teacher must have the student's token ids, and its parameters no longer require a gradient.
        prompts: File of JSON lines, a task (addition, sums, reasoning_gym:NAME), or rows: texts or dictionaries with
            `prompt` and optionally `answer`, `teacher_id`, `teacher_context`, `images`, `completion`, such as a
            datasets.Dataset.
        out: Folder of the run; None keeps no files.
        config: Options; keyword arguments override them.
        processing_class: Tokenizer or processor of a loaded student; None loads the one that belongs to it.
        reward: "exact", "package.module:function", or a function of (prompt, answer, completion) that returns a number.
        eval_prompts: Held-out prompts, like `prompts`. Rows are all evaluated on unless num_eval_prompts says
            otherwise.
        callbacks: Objects with any of the methods on_step_end(step, metrics), on_save(step, path) and
            on_train_end(result); called on the main process.
        quiet: Whether to print no progress.

    Returns:
        Folder, last step, accuracies and snapshots.

    Raises:
        InputError: Models, prompts, masks or rewards cannot be used.
        UsageError: Options contradict each other, or `out` holds another run.

    Examples:
        >>> from opdkernels.distillation.options import demo_options
        >>> demo = demo_options()
        >>> rows = [{"prompt": "12+34=", "answer": "046"}, {"prompt": "70+05=", "answer": "075"}]
        >>> distill(demo["student"], demo["teacher"], rows, max_steps=2, max_completion_length=4, device="cpu").step
        2
    """
    keywords = {name: value for name, value in locals().items() if name in DistillOptions.model_fields}
    values = config.model_dump() if config else {}
    values |= {name: value for name, value in keywords.items() if value is not None}

    models: dict[str, Any] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            values[name] = name_models(model, models)
    if values.get("student") in models and dtype is None and config is None:
        values["dtype"] = dtype_of(models[values["student"]])
    reward_fn = None
    if callable(reward):
        values["reward"], reward_fn = qualified_name(reward), reward
    rows: dict[str, Any] = {}
    for name, value in (("prompts", prompts), ("eval_prompts", eval_prompts)):
        if value is not None:
            values[name], rows[name] = name_rows(value, name)
    if rows.get("eval_prompts") and "num_eval_prompts" not in values:
        values["num_eval_prompts"] = len(rows["eval_prompts"])
    missing = [name for name in ("student", "prompts") if name not in values]
    if missing:
        raise UsageError(f"there is no {missing[0]}; pass it to distill, or set it in config")

    options = validate_options(DistillOptions, values)
    inputs = RunInputs(
        models=models,
        text=text_of(models.get(options.student), processing_class),
        task=task_from_rows(options, rows.get("prompts"), rows.get("eval_prompts"), reward_fn),
        callbacks=callbacks,
    )
    if out is not None:
        return train(options, out, inputs=inputs, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="opdkernels-") as folder:
        return replace(train(options, Path(folder) / "run", inputs=inputs, quiet=quiet), path=None)


def name_models(model: Any, models: dict[str, Any]) -> str:
    """The value of `student` or `teacher` in the options; loaded models are added to `models` by a name that contains a
    digest of their weights."""
    if isinstance(model, Mapping):
        return ",".join(f"{teacher_id}={name_models(value, models)}" for teacher_id, value in model.items())
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a model is a {type(model).__name__}; pass a folder, a hub id or a loaded PreTrainedModel")
    name = f"object:{type(model).__name__}:{model_digest(model)}"
    models[name] = model
    return name


def model_digest(model: Any) -> str:
    """Digest of a model's configuration, and of the names, dtypes, shapes and bytes of its weights."""
    digest = hashlib.blake2b(model.config.to_json_string(use_diff=False).encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_of(model: Any) -> str:
    """The name of a model's dtype in the options. Raises UsageError for a dtype that cannot be trained."""
    dtype = next(model.parameters()).dtype
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"the student has weights of {dtype}; convert it to bfloat16 or float32, or pass dtype")
    return DTYPE_NAMES[dtype]


def qualified_name(function: Callable[..., Any]) -> str:
    """package.module:function, by which the identity of a run knows a function."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}:{name}"


def name_rows(prompts: Any, name: str) -> tuple[str, list[Example] | None]:
    """The value of `prompts` or `eval_prompts` in the options, and its examples if it is not a file or a task."""
    if isinstance(prompts, (str, os.PathLike)):
        return os.fspath(prompts), None
    examples = [to_example(row, f"row {i} of {name}") for i, row in enumerate(prompts)]
    if not examples:
        raise InputError(f"{name} holds no prompt")
    rows = [{field: value for field, value in asdict(example).items() if field != "source"} for example in examples]
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16)
    return f"object:{digest.hexdigest()}", examples


def to_example(row: Any, where: str) -> Example:
    """The example of a text or a dictionary; columns with None count as absent."""
    if isinstance(row, Example):
        return row
    if isinstance(row, str):
        row = {"prompt": row}
    if isinstance(row, Mapping):
        row = {name: value for name, value in row.items() if value is not None}
    return example_of(row, where, Path())


def task_from_rows(
    options: DistillOptions,
    examples: list[Example] | None,
    eval_examples: list[Example] | None,
    reward_fn: Reward | None,
) -> Task:
    """The task of prompts that are given as rows, as files, or both."""
    if examples is None and eval_examples is None:
        return open_task(
            options.prompts, options.eval_prompts, seed=options.seed, reward=options.reward, reward_fn=reward_fn
        )
    if examples is None:
        if options.prompts in ("addition", "sums") or options.prompts.startswith("reasoning_gym:"):
            raise UsageError(f"the task {options.prompts} has its own held-out prompts; remove eval_prompts")
        examples = read_examples(options.prompts)
    if eval_examples is None:
        eval_examples = read_examples(options.eval_prompts) if options.eval_prompts else []
    return ExamplesTask(examples, eval_examples, seed=options.seed, reward=options.reward, reward_fn=reward_fn)


def text_of(student: Any, processing_class: Any) -> TextProcessor | None:
    """The tokenizer of a loaded student, or the one that is passed; None if it is loaded with the student."""
    if processing_class is not None:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        return TextProcessor.of(tokenizer, processing_class)
    if student is None:
        return None
    path = getattr(student.config, "_name_or_path", "")
    if not path:
        raise UsageError("the student is a loaded model without a tokenizer; pass it as processing_class")
    return load_text_processor(path)
