"""Options of a distillation run: one model, filled from a TOML file, the command line or Python."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from opdkernels.config import MAX_STEPS, MAX_TOKENS, DeviceOrAuto, option, validate_options
from opdkernels.errors import InputError, UsageError, printable
from opdkernels.untrusted import read_file

if TYPE_CHECKING:
    from opdkernels.ops.divergence import Divergence

SELF = "self"  # as a teacher: the student's own weights


def parse_pair(value: Any) -> Any:
    """Two numbers, from a pair or from a text such as "0.9,0.999"."""
    pair = value.split(",") if isinstance(value, str) else value
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError("give two numbers, such as 0.9,0.999")
    return tuple(pair)


DecayRate = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[DecayRate, DecayRate], BeforeValidator(parse_pair)]


model_option = functools.partial(option, "Models")
data_option = functools.partial(option, "Data")
objective_option = functools.partial(option, "Objective")
optimizer_option = functools.partial(option, "Optimizer")
run_option = functools.partial(option, "Run")


class DistillOptions(BaseModel):
    """Every option of `opdkernels distill`. Training options have the names of TRL and Hugging Face.

    Examples:
        >>> DistillOptions(student="Qwen2.5-0.5B", teacher="Qwen2.5-1.5B", prompts="sums", max_steps=200).learning_rate
        1e-06
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    student: str = model_option("Model to train: folder or hub id of a causal or image-text model of transformers.")
    teacher: str = model_option(
        "Teacher: folder or hub id. Several teachers, selected by the teacher_id of each prompt: math=A,code=B. "
        "self: the student's own weights, conditioned on the prompt's `teacher_context`. "
        "Empty if divergence_weight is 0.",
        "",
    )
    ema_decay: float = model_option(
        "EMA decay of the weights of teacher=self; 1 freezes them at the student's initial weights.", 1.0, ge=0, le=1
    )
    dtype: Literal["bfloat16", "float32"] = model_option("Storage dtype of the weights.", "bfloat16")
    device: DeviceOrAuto = model_option("Device: cpu, cuda or cuda:N; auto uses a GPU if there is one.", "auto")
    lora_rank: int = model_option(
        "Train LoRA factors of this rank (peft) instead of the weights; 0 trains the weights.", 0, ge=0, le=1 << 16
    )
    subspace: str = model_option(
        "Later checkpoint of the student that fixes LoRA's inputs (lora_rank > 0): the top right singular vectors of "
        "each matrix's update (the early subspace of arXiv 2606.07082); only the outputs are trained.",
        "",
    )
    gradient_checkpointing: bool = model_option(
        "Recompute activations in the backward pass: less memory, about a third more time.", False
    )

    prompts: str = data_option(
        "JSON lines with `prompt` (text or messages) and optionally `answer`, `teacher_id`, `teacher_context`, "
        "`images`, `completion`; or a task: addition, sums, reasoning_gym:NAME."
    )
    eval_prompts: str = data_option(
        "Held-out prompts for evaluation, as JSON lines; the tasks have their own held-out prompts.", ""
    )
    reward: str = data_option(
        "Reward of a completion: exact (its first line equals the answer), or package.module:function, called with "
        "(prompt, answer, completion).",
        "exact",
    )
    batch_size: int = data_option("Prompts per step, summed over all processes.", 16, ge=1, le=1 << 20)
    num_generations: int = data_option(
        "Completions per prompt; they form one GRPO group if reward_weight is not 0.", 1, ge=1, le=1 << 16
    )
    micro_batch_size: int = data_option(
        "Completions per forward and backward pass; 0 takes all completions of a step.", 0, ge=0, le=1 << 36
    )
    max_prompt_length: int = data_option(
        "Maximum length of a prompt, in tokens; longer prompts are truncated at their start before sampling.",
        512,
        ge=1,
        le=MAX_TOKENS,
    )
    max_completion_length: int = data_option("Maximum length of a completion, in tokens.", 128, ge=1, le=MAX_TOKENS)
    stop_token: str = data_option(
        "Text of one token that ends a completion, in addition to the model's end tokens.", ""
    )
    on_policy_fraction: float = data_option(
        "Fraction of steps that train on the student's own samples; the other steps use the `completion` of the "
        "prompts, or samples of the teacher.",
        1.0,
        ge=0,
        le=1,
    )
    sampling_temperature: float = data_option("Temperature of sampling.", 1.0, gt=0)

    divergence: str = objective_option(
        "Divergence from the teacher: forward_kl, reverse_kl, jsd, total_variation, topk_forward_kl, topk_reverse_kl, "
        "sampled_reverse_kl (policy gradient) or sampled_reverse_kl_k2.",
        "reverse_kl",
    )
    beta: float = objective_option(
        "Weight of the teacher in the mixture of jsd; 0 is forward KL, 1 is reverse KL.", 0.5, ge=0, le=1
    )
    k: int = objective_option(
        "Number of ids of the top-k divergences; all other ids form one tail category.", 0, ge=0, le=MAX_TOKENS
    )
    temperature: float = objective_option("Temperature of both distributions in the divergence.", 1.0, gt=0)
    divergence_weight: float = objective_option("Weight of the divergence in the loss.", 1.0, ge=0)
    reward_weight: float = objective_option(
        "Weight of the reward's policy gradient (GRPO) in the loss; with divergence_weight 0 this is RLVR.", 0.0, ge=0
    )
    sft_weight: float = objective_option(
        "Weight of the negative log-likelihood of completions that the student did not sample; with "
        "divergence_weight 0 and on_policy_fraction 0 this is offline distillation.",
        0.0,
        ge=0,
    )

    optimizer: Literal["adamw", "sgd"] = optimizer_option(
        "Optimizer: MaskedAdamW or MaskedSGD; without masks every coordinate is active.", "adamw"
    )
    masks: str = optimizer_option(
        "File of masks (opdkernels mask): only active coordinates are trained; empty trains all.", ""
    )
    learning_rate: float = optimizer_option("Learning rate after warm-up.", 1e-6, gt=0)
    warmup_steps: int = optimizer_option(
        "Steps over which the learning rate rises linearly from 0.", 0, ge=0, le=MAX_STEPS
    )
    betas: Pair = optimizer_option("Moment decay rates of adamw.", (0.9, 0.999))
    eps: float = optimizer_option("Denominator epsilon of adamw.", 1e-8, gt=0)
    momentum: float = optimizer_option("Momentum of sgd.", 0.0, ge=0, lt=1)
    weight_decay: float = optimizer_option("Weight decay towards zero; decoupled for adamw.", 0.0, ge=0)
    precision: Literal["split_master", "kahan", "stochastic", "nearest"] = optimizer_option(
        "How updates of bf16 weights are kept: split_master stores 16 more bits per active coordinate, which "
        "together with the weight form an fp32 master.",
        "split_master",
    )
    max_grad_norm: float = optimizer_option(
        "Maximum norm of the gradient of the active coordinates; 0 does not clip.", 1.0, ge=0
    )

    max_steps: int = run_option("Number of optimizer steps.", 100, ge=1, le=MAX_STEPS)
    seed: int = run_option(
        "Seed of the prompt order, the on-policy or off-policy choice and the samples.", 0, ge=0, lt=1 << 63
    )
    save_steps: int = run_option(
        "Steps between checkpoints; an interrupted run resumes from its last one. 0 saves only at the end and on "
        "SIGTERM or SIGINT; a run that is killed otherwise starts again.",
        0,
        ge=0,
        le=MAX_STEPS,
    )
    snapshot_every: int = run_option(
        "Steps between snapshots of which weights changed; 0 takes none.", 10, ge=0, le=MAX_STEPS
    )
    eval_steps: int = run_option(
        "Steps between evaluations by greedy decoding; 0 evaluates only before and after training.",
        0,
        ge=0,
        le=MAX_STEPS,
    )
    num_eval_prompts: int = run_option(
        "Number of held-out prompts to evaluate on; 0 does not evaluate.", 0, ge=0, le=10**6
    )
    tensorboard: bool = run_option("Also write TensorBoard event files (needs tensorboard).", False)
    wandb: str = run_option("Weights & Biases project to also log to (needs wandb); empty for none.", "")
    threads: int | None = run_option("Number of CPU threads; torch's default if not given.", None, ge=1, le=4096)
    overwrite: bool = run_option("Replace another run in the output folder.", False)

    @model_validator(mode="after")
    def validate_combination(self) -> DistillOptions:
        """Raises ValueError for options that contradict each other or have no effect together."""
        self.divergence_spec  # noqa: B018  raises for an ill-posed divergence
        if not (self.divergence_weight or self.reward_weight or self.sft_weight):
            raise ValueError(
                "all three weights are 0, so nothing is trained; set divergence_weight, reward_weight or sft_weight"
            )
        if self.divergence_weight and not self.teacher:
            raise ValueError("divergence_weight is not 0 and there is no teacher; name one or set divergence_weight=0")
        if self.reward_weight and self.num_generations < 2:
            raise ValueError(
                f"reward_weight compares completions of one prompt and num_generations is {self.num_generations}; "
                "set num_generations to 2 or more"
            )
        if self.reward_weight and self.on_policy_fraction < 1:
            raise ValueError("reward_weight needs the student's own samples; set on_policy_fraction=1")
        ids = [teacher_id for teacher_id, _ in self.teacher_pairs]
        if duplicate := next((teacher_id for teacher_id in ids if ids.count(teacher_id) > 1), None):
            raise ValueError(f"teacher gives the teacher_id {duplicate} twice; give each teacher_id once")
        if self.on_policy_fraction and not (self.divergence_weight or self.reward_weight):
            raise ValueError(
                "sft_weight trains only on completions that the student did not sample, and on_policy_fraction is "
                f"{self.on_policy_fraction:g}: on-policy steps would train nothing; set on_policy_fraction=0"
            )
        if self.sft_weight and self.on_policy_fraction == 1:
            raise ValueError(
                "sft_weight trains on completions that the student did not sample, and on_policy_fraction is 1: "
                "there are none; set on_policy_fraction below 1"
            )
        if (
            self.divergence_spec.sampled
            and self.divergence_weight
            and (self.on_policy_fraction < 1 or self.sampling_temperature != self.temperature)
        ):
            raise ValueError(
                f"{self.divergence} is valid only for tokens sampled from the student's own distribution; "
                "set on_policy_fraction=1 and sampling_temperature equal to temperature"
            )
        if self.reward_weight and self.sampling_temperature != 1:
            raise ValueError(
                "reward_weight is the policy gradient of samples at temperature 1; set sampling_temperature=1"
            )
        if self.masks and self.lora_rank:
            raise ValueError("masks and lora_rank both select what is trained; set only one of them")
        for name, has_effect, scope in self.conditional_options:
            if not has_effect and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect: it applies only to {scope}; remove it")
        return self

    @property
    def conditional_options(self) -> tuple[tuple[str, bool, str], ...]:
        """Options that need others: name, whether it has an effect in this run, what it applies to."""
        adamw, evaluates = self.optimizer == "adamw", self.num_eval_prompts > 0
        uses_divergence = self.divergence_weight > 0
        return (
            (
                "teacher",
                uses_divergence or self.on_policy_fraction < 1,
                "a divergence_weight above 0 or an on_policy_fraction below 1",
            ),
            ("ema_decay", SELF in self.teachers.values(), "teacher=self"),
            ("subspace", self.lora_rank > 0, "a lora_rank above 0"),
            (
                "reward",
                evaluates or self.reward_weight > 0,
                "a reward_weight above 0 or evaluations, and num_eval_prompts is 0",
            ),
            ("eval_prompts", evaluates, "evaluations, and num_eval_prompts is 0"),
            ("eval_steps", evaluates, "evaluations, and num_eval_prompts is 0"),
            ("divergence", uses_divergence, "a divergence_weight above 0"),
            ("beta", uses_divergence and self.divergence == "jsd", "the divergence jsd"),
            ("k", uses_divergence, "a divergence_weight above 0"),
            ("temperature", uses_divergence, "a divergence_weight above 0"),
            ("betas", adamw, "the optimizer adamw"),
            ("eps", adamw, "the optimizer adamw"),
            ("momentum", not adamw, "the optimizer sgd"),
            (
                "precision",
                self.dtype == "bfloat16" and not self.lora_rank,
                "bfloat16 weights (LoRA factors are fp32)",
            ),
        )

    @functools.cached_property  # cached: a beta near 0 or 1 warns only once
    def divergence_spec(self) -> Divergence:
        """The divergence as `linear_divergence` takes it."""
        from opdkernels.ops.divergence import Divergence

        return Divergence(self.divergence, beta=self.beta, k=self.k, temperature=self.temperature)

    @property
    def teachers(self) -> dict[str, str]:
        """Folder or hub id of each teacher by teacher_id; a single teacher has the empty teacher_id."""
        return dict(self.teacher_pairs)

    @property
    def teacher_pairs(self) -> list[tuple[str, str]]:
        """(teacher_id, folder or hub id) of each teacher, in the order given."""
        if not re.fullmatch(r"[\w.\- ]+=[^,]+(,[\w.\- ]+=[^,]+)*", self.teacher):
            return [("", self.teacher)] if self.teacher else []
        pairs = [pair.partition("=") for pair in self.teacher.split(",")]
        return [(teacher_id.strip(), path.strip()) for teacher_id, _, path in pairs]


def options_from(path: str | os.PathLike[str] | None, overrides: dict[str, Any]) -> DistillOptions:
    """Reads options from a TOML file and applies overrides.

    Args:
        path: TOML file whose keys are fields of `DistillOptions`; None for no file.
        overrides: Values that replace those of the file.

    Returns:
        The validated options.

    Raises:
        InputError: The file cannot be read.
        UsageError: A field does not exist, is missing or has an invalid value.
    """
    values = {**(read_toml(path) if path is not None else {}), **overrides}
    fields = DistillOptions.model_fields
    missing = [name for name, field in fields.items() if field.is_required() and name not in values]
    if missing:
        flag = missing[0].replace("_", "-")
        raise UsageError(f"there is no {missing[0]}; set it in the configuration or as --{flag}")
    return validate_options(DistillOptions, values)


def demo_options() -> dict[str, Any]:
    """Options of the addition task with the student (0.4 M parameters) and the teacher (3.2 M) that are part of this
    package; a run takes about ten seconds on two cores."""
    folder = Path(__file__).parent / "addition"
    return {
        "student": os.fspath(folder / "student"),
        "teacher": os.fspath(folder / "teacher"),
        "prompts": "addition",
        "batch_size": 128,
        "max_completion_length": 4,
        "max_steps": 60,
        "learning_rate": 3e-4,
        "warmup_steps": 10,
        "save_steps": 10,
        "num_eval_prompts": 1000,
    }


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file. Raises InputError if it cannot be read."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    name = printable(os.fspath(path))
    try:
        content = read_file(path, remedy="give a TOML file of options")
        return tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not TOML ({printable(str(error)[:200])}); correct it") from None
