"""What a run of distillation is: one model of options, read from a TOML file, a command line or Python."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from opdkernels.config import DeviceOrAuto, validate_options
from opdkernels.errors import InputError, UsageError, printable

if TYPE_CHECKING:
    from opdkernels.ops.divergence import Divergence

SELF = "self"


def pair_of_numbers(given: Any) -> Any:
    """Two numbers, or a text of two with a comma between."""
    pair = given.split(",") if isinstance(given, str) else given
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise ValueError("give two numbers, such as 0.9,0.999")
    return tuple(pair)


Pair = Annotated[tuple[float, float], BeforeValidator(pair_of_numbers)]


class DistillOptions(BaseModel):
    """Every option of `opdkernels distill`; names and meanings are those of its `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # models
    student: str = Field(
        description="Folder or hub id of the model to train: a causal or an image-text model of transformers."
    )
    teacher: str = Field(
        "",
        description="Folder or hub id of the teacher; several by a prompt's tag as math=A,code=B; self: the student's own weights, with what a prompt's `privileged` adds to it; empty where kl_weight is 0.",
    )
    ema: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Of teacher=self: how much of its weights each step keeps; 1: those that the student began with.",
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="How weights are stored.")
    device: DeviceOrAuto = Field("auto", description="cpu, cuda, cuda:1; auto: a GPU if there is one.")
    lora_rank: int = Field(
        0, ge=0, description="Train LoRA factors of this rank (peft) in place of the weights; 0: the weights."
    )
    subspace: str = Field(
        "",
        description="Of lora_rank: a later checkpoint of this student; LoRA's inputs are the top right singular vectors of what had changed in each matrix there, and stay (the early subspace of arXiv 2606.07082); the outputs alone are trained.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in backward: less memory, a third more time."
    )

    # data
    prompts: str = Field(
        description="JSON lines with `prompt` (text or messages) and, where wanted, `answer`, `tag`, `privileged`, `images`, `completion`; or a task: addition, sums, reasoning_gym:NAME."
    )
    held_out: str = Field("", description="Prompts to evaluate on, as JSON lines; a task has its own.")
    reward: str = Field(
        "exact",
        description="What scores a completion: exact (its first line is the answer), or package.module:function of (prompt, answer, completion).",
    )
    batch_size: int = Field(16, ge=1, description="Prompts a step, over all processes.")
    samples: int = Field(1, ge=1, description="Completions a prompt; a group of GRPO's where reward_weight is not 0.")
    micro_batch: int = Field(0, ge=0, description="Completions scored at once; 0: all of a step.")
    max_prompt: int = Field(
        512,
        ge=1,
        description="Longest prompt, in tokens; longer ones lose their beginning, before anything is sampled.",
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest completion, in tokens.")
    stop: str = Field("", description="Text, of one token, that ends a completion beside the model's own end tokens.")
    on_policy: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the steps on the student's own samples; the others take `completion` of the prompts, or the teacher's samples.",
    )
    sampling_temperature: float = Field(1.0, gt=0, description="Temperature of sampling.")

    # objective
    divergence: str = Field(
        "reverse_kl",
        description="forward_kl, reverse_kl, jsd, total_variation, topk_forward_kl, topk_reverse_kl, sampled_reverse_kl (policy gradient) or sampled_reverse_kl_k2.",
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="Of jsd: the teacher's share of the mixture; 0 is forward KL, 1 reverse KL."
    )
    k: int = Field(0, ge=0, description="Of the top-k divergences: how many ids; the rest is one tail bucket.")
    temperature: float = Field(1.0, gt=0, description="Temperature of both distributions in the divergence.")
    kl_weight: float = Field(1.0, ge=0, description="Weight of the divergence.")
    reward_weight: float = Field(
        0.0, ge=0, description="Weight of the task's reward, as the policy gradient of GRPO: with kl_weight 0, RLVR."
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the log-likelihood of completions that are not the student's own: with kl_weight 0 and on_policy 0, offline distillation.",
    )

    # optimizer
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="MaskedAdamW or MaskedSGD; without masks every coordinate is active."
    )
    masks: str = Field(
        "", description="File of masks (opdkernels mask): only what is active there is trained; empty: everything."
    )
    lr: float = Field(1e-6, gt=0, description="Learning rate, after warm-up.")
    warmup: int = Field(0, ge=0, description="Steps over which the rate rises from 0.")
    betas: Pair = Field((0.9, 0.999), description="Of adamw.")
    eps: float = Field(1e-8, gt=0, description="Of adamw.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Of sgd.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled with adamw; towards zero.")
    precision: Literal["exact", "kahan", "stochastic", "nearest"] = Field(
        "exact",
        description="How steps of bf16 weights are kept: exact has 16 more bits an active coordinate, an fp32 master in all but name.",
    )
    clip: float = Field(1.0, ge=0, description="Largest norm of the active gradient; 0: any.")

    # run
    steps: int = Field(100, ge=1, description="Steps in all.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of prompts, coins and samples.")
    save_every: int = Field(
        0,
        ge=0,
        description="Steps between checkpoints; a run that was killed goes on from its last one. 0: at the end alone, and at SIGTERM or SIGINT; one that was killed otherwise begins anew.",
    )
    track_every: int = Field(10, ge=0, description="Steps between looks at what changed in the weights; 0: never.")
    eval_every: int = Field(
        0, ge=0, description="Steps between greedy evaluations on held-out prompts; 0: before and after alone."
    )
    eval_size: int = Field(0, ge=0, description="Held-out prompts to evaluate on; 0: no evaluation.")
    tensorboard: bool = Field(False, description="Also write TensorBoard's event files, where it is installed.")
    wandb: str = Field(
        "", description="Project of Weights & Biases to log to as well, where it is installed; empty: none."
    )
    threads: int | None = Field(None, ge=1, le=4096, description="Threads; torch's own number if not given.")
    overwrite: bool = Field(False, description="Replace another run in the output folder.")

    @model_validator(mode="after")
    def fit_together(self) -> DistillOptions:
        self.spec  # noqa: B018  refuses what is ill-posed
        if not (self.kl_weight or self.reward_weight or self.sft_weight):
            raise ValueError("all three weights are 0: nothing is trained; set kl_weight, reward_weight or sft_weight")
        if self.kl_weight and not self.teacher:
            raise ValueError("kl_weight is not 0 and there is no teacher; name one, or set kl_weight=0")
        if self.reward_weight and self.samples < 2:
            raise ValueError(
                f"reward_weight compares completions of one prompt and samples is {self.samples}; take 2 or more"
            )
        if self.reward_weight and self.on_policy < 1:
            raise ValueError("reward_weight needs the student's own samples; set on_policy=1")
        tags = [tag for tag, _ in self.tagged]
        if again := next((tag for tag in tags if tags.count(tag) > 1), None):
            raise ValueError(f"teacher gives the tag {again} twice; give each tag once")
        if self.on_policy and not (self.kl_weight or self.reward_weight):
            raise ValueError(
                f"sft_weight teaches completions that are not the student's, and on_policy is {self.on_policy:g}: steps on its own would train nothing; set on_policy=0"
            )
        if self.sft_weight and self.on_policy == 1:
            raise ValueError(
                "sft_weight teaches completions that are not the student's, and on_policy is 1: there are none; set on_policy below 1"
            )
        if (
            self.spec.sampled
            and self.kl_weight
            and (self.on_policy < 1 or self.sampling_temperature != self.temperature)
        ):
            raise ValueError(
                f"{self.divergence} holds for tokens of the student's own distribution alone; set on_policy=1 and sampling_temperature to temperature"
            )
        if self.reward_weight and self.sampling_temperature != 1:
            raise ValueError(
                "reward_weight is the policy gradient of samples at temperature 1; set sampling_temperature=1"
            )
        if self.masks and self.lora_rank:
            raise ValueError("masks and lora_rank are two ways to train a part; choose one")
        for name, used, why in self.uses:
            if not used and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} would change nothing: it is {why}; leave it out")
        return self

    @property
    def uses(self) -> tuple[tuple[str, bool, str], ...]:
        """Options that count only beside others: whether they do here, and of what they are."""
        adamw, kl, evaluated = self.optimizer == "adamw", self.kl_weight > 0, self.eval_size > 0
        return (
            ("teacher", kl or self.on_policy < 1, "what scores with kl_weight, or samples with on_policy below 1"),
            ("ema", SELF in self.teachers.values(), "of teacher=self"),
            ("subspace", self.lora_rank > 0, "of lora_rank"),
            (
                "reward",
                evaluated or self.reward_weight > 0,
                "what reward_weight and evaluations score by, and eval_size is 0",
            ),
            ("held_out", evaluated, "of evaluations, and eval_size is 0"),
            ("eval_every", evaluated, "of evaluations, and eval_size is 0"),
            ("divergence", kl, "of kl_weight"),
            ("beta", kl and self.divergence == "jsd", "of the divergence jsd"),
            ("k", kl, "of kl_weight"),
            ("temperature", kl, "of kl_weight"),
            ("betas", adamw, "of the optimizer adamw"),
            ("eps", adamw, "of the optimizer adamw"),
            ("momentum", not adamw, "of the optimizer sgd"),
            (
                "precision",
                self.dtype == "bfloat16" and not self.lora_rank,
                "of weights in bfloat16, which LoRA's factors are not",
            ),
        )

    @functools.cached_property  # it warns once
    def spec(self) -> Divergence:
        """The divergence that the options name."""
        from opdkernels.ops.divergence import Divergence

        return Divergence(self.divergence, beta=self.beta, k=self.k, temperature=self.temperature)

    @property
    def teachers(self) -> dict[str, str]:
        """Teachers' places by tag; one alone has the empty tag."""
        return dict(self.tagged)

    @property
    def tagged(self) -> list[tuple[str, str]]:
        """Tags and places of the teachers, as they are given."""
        if not re.fullmatch(r"[\w.\- ]+=[^,]+(,[\w.\- ]+=[^,]+)*", self.teacher):
            return [("", self.teacher)] if self.teacher else []
        pairs = [part.partition("=") for part in self.teacher.split(",")]
        return [(tag.strip(), place.strip()) for tag, _, place in pairs]


def options_from(path: str | os.PathLike[str] | None, given: dict[str, Any]) -> DistillOptions:
    """Options of a TOML file, and over them those that are `given`.

    Raises InputError for a file that cannot be read, UsageError for a field that does not exist or a value that makes no sense.
    """
    found: dict[str, Any] = {}
    if path is not None:
        found = read_toml(path)
    values = {**found, **given}
    missing = [
        name for name, field in DistillOptions.model_fields.items() if field.is_required() and name not in values
    ]
    if missing:
        raise UsageError(
            f"there is no {missing[0]}; give it in the configuration or as --{missing[0].replace('_', '-')}"
        )
    return validate_options(DistillOptions, values)


def shipped() -> dict[str, Any]:
    """Options of the addition task with the student (0.4 M parameters) and the teacher (3.2 M) that come with this package: some ten
    seconds a run on two cores."""
    folder = Path(__file__).parent / "addition"
    return {
        "student": os.fspath(folder / "student"),
        "teacher": os.fspath(folder / "teacher"),
        "prompts": "addition",
        "batch_size": 128,
        "max_new_tokens": 4,
        "steps": 60,
        "lr": 3e-4,
        "warmup": 10,
        "save_every": 10,
        "eval_size": 1000,
    }


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise InputError(f"{printable(os.fspath(path))} does not exist; give a TOML file of options") from None
    except OSError as error:
        raise InputError(
            f"{printable(os.fspath(path))} cannot be read ({error.strerror}); give a TOML file of options"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(os.fspath(path))} is not TOML ({printable(str(error))})") from None
