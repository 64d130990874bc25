"""The options of each command: one model per command, shared by the command line and the Python API.

The command line is generated from these models (opdkernels/cli/options.py): a field's type gives choices and range, its
description is the help, and its panel is the group of `--help` that lists it.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from opdkernels.errors import InputError, UsageError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
MIN_MEMORY, MAX_MEMORY = 64 * 10**6, 10**18
MAX_STEPS = 10**9  # more would take years
MAX_TOKENS = 1 << 24  # of a text or a vocabulary
MAX_SEEDS = 1000
NUMBERS = {int, float}


def parse_bytes(text: str | int) -> int:
    """A size in bytes from a number with a unit.

    >>> parse_bytes("2GB"), parse_bytes("512MiB")
    (2000000000, 536870912)
    """
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not parsed:
        raise ValueError(f"{text!r} is not a size; write it like 2GB or 512MiB")
    if len(parsed[1]) > 18:
        raise ValueError(f"{text!r} is too large; write it like 2GB or 512MiB")
    size = int(float(parsed[1]) * UNITS[parsed[2]])
    if size < MIN_MEMORY:
        raise ValueError(f"{text} is too little; the minimum is 64MB")
    if size > MAX_MEMORY:
        raise ValueError(f"{text} is too large; the maximum is {MAX_MEMORY // 10**12}TB")
    return size


def parse_device(text: str) -> str:
    """A device name: cpu, cuda or cuda:N."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", str(text)):
        raise ValueError("give cpu, cuda or cuda:1")
    return str(text)


def parse_device_or_auto(text: str) -> str:
    """A device name, or auto."""
    return text if text == "auto" else parse_device(text)


def split_commas(value: Any) -> Any:
    """The items of a text with commas between them, or of another iterable; anything else as it is.

    >>> split_commas("row, column"), split_commas(""), split_commas(range(2)), split_commas(5)
    (('row', 'column'), (), (0, 1), 5)
    """
    if isinstance(value, str):
        return tuple(filter(None, map(str.strip, value.split(","))))
    try:
        return tuple(value)
    except TypeError:
        return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
DeviceName = Annotated[str, BeforeValidator(parse_device)]
DeviceOrAuto = Annotated[str, BeforeValidator(parse_device_or_auto)]


def option(panel: str, description: str, default: Any = ..., *, metavar: str | None = None, **constraints: Any) -> Any:
    """A pydantic field with what the command line needs.

    Args:
        panel: The group of `--help` that lists the option.
        description: The help text.
        default: The default, which is validated like a value that a user gives; required if omitted.
        metavar: What `--help` shows for the value, where the type alone does not say it, such as FILE.
        constraints: Those of `pydantic.Field`, such as ge and le.

    Returns:
        The field.
    """
    extra: dict[str, Any] = {"panel": panel, **({"metavar": metavar} if metavar else {})}
    return Field(default, description=description, json_schema_extra=extra, validate_default=True, **constraints)


def io_option() -> Any:
    return option(
        "Input",
        "How files are read: memory-mapped, by positioned reads, or whichever is faster on the disk (auto).",
        "auto",
    )


def atol_option() -> Any:
    return option(
        "Computation",
        "A coordinate is changed if its visible |delta| exceeds this threshold, which is rounded to bf16.",
        1e-5,
        ge=0,
        le=1e30,
    )


def density_option() -> Any:
    return option("Mask", "Fraction of the coordinates that are active.", 0.1, gt=0, le=1)


def seed_option() -> Any:
    return option("Mask", "Seed of the random choice.", 0, ge=-1 << 63, lt=1 << 63)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class CheckpointOptions(Options):
    """How checkpoints are opened."""

    io: Literal["auto", "mmap", "read"] = io_option()
    revision: str | None = option("Input", "Revision of hub ids.", None)
    allow_missing: bool = option(
        "Input", "Continue without shards that the index lists but the folder does not contain.", False
    )

    @property
    def open_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `open_checkpoint`."""
        return {"io": self.io, "revision": self.revision, "allow_missing": self.allow_missing}


class LineageOptions(CheckpointOptions):
    """Options of `lineage`."""


class InspectOptions(CheckpointOptions):
    memory: Bytes = option("Computation", "Memory limit that the plan assumes, such as 2GB.", "4GB", metavar="SIZE")


class RunOptions(CheckpointOptions):
    """What every command has that writes a run directory."""

    memory: Bytes = option(
        "Computation", "Memory limit, such as 2GB; memory-mapped files do not count.", "4GB", metavar="SIZE"
    )
    threads: int | None = option(
        "Computation", "Threads of the kernels; torch's own number if not given.", None, ge=1, le=4096
    )
    csv: bool = option("Output", "Also write the tables as CSV.", False)
    report: bool = option("Output", "Write report.html.", True)
    overwrite: bool = option("Output", "Replace another run in the output folder.", False)


class AnalyzeOptions(RunOptions):
    device: DeviceName = option(
        "Computation",
        "cpu, cuda or cuda:N: where coordinates are counted and Gram matrices are computed; results are bit-identical. "
        "cuda alone is the GPU of LOCAL_RANK, or the first one.",
        "cpu",
        metavar="DEVICE",
    )
    spectra: Literal["exact", "topk", "off"] = option(
        "Computation",
        "exact: spectra of every matrix, and where its update is in the geometry of the base; topk: only the top of "
        "the update's spectrum, with bounds and in less memory; off: no spectra.",
        "exact",
    )
    paper_csv: bool = option(
        "Output", "Also write the files of the paper's reference script (tensor_metrics.csv and others).", False
    )


class OverlapOptions(RunOptions):
    atol: float = atol_option()
    strata: Annotated[tuple[Literal["row", "column"], ...], BeforeValidator(split_commas)] = option(
        "Computation",
        "Also condition the chance level on |W| within the rows or columns of each matrix.",
        (),
        metavar="row|column|row,column",
    )


class TrajectoryOptions(RunOptions):
    steps: Annotated[tuple[Annotated[int, Field(ge=0, lt=10**15)], ...], BeforeValidator(split_commas)] = option(
        "Input",
        "Training steps of the checkpoints, in their order, separated by commas; if not given: from their names or "
        "trainer_state.json.",
        (),
        metavar="STEP,...",
    )
    spectra: Literal["exact", "topk", "off"] = option("Computation", "As in analyze, for every checkpoint.", "exact")
    atol: float = atol_option()


class MaskOptions(Options):
    """What every command has that writes a file of masks."""

    overwrite: bool = option("Output", "Replace an existing file of masks.", False)


class ChangedMaskOptions(MaskOptions):
    atol: float = option("Mask", "A coordinate is active if |delta| exceeds this threshold.", 0.0, ge=0, le=1e30)
    view: Literal["visible", "stored"] = option(
        "Mask", "Compare both checkpoints rounded to bf16 (visible) or as stored.", "visible"
    )


class TopChangedMaskOptions(MaskOptions):
    density: float = density_option()
    scope: Literal["tensor", "module", "model"] = option(
        "Mask", "Choose this fraction in each tensor, in each module type, or in the model.", "model"
    )


class NearZeroMaskOptions(MaskOptions):
    density: float = density_option()
    scope: Literal["tensor", "module", "model"] = option(
        "Mask", "Choose this fraction in each tensor, in each module type, or in the model.", "tensor"
    )


class PrincipalMaskOptions(MaskOptions):
    density: float = density_option()


class RandomMaskOptions(NearZeroMaskOptions):
    seed: int = seed_option()


class MagnitudeMatchedMaskOptions(MaskOptions):
    seed: int = seed_option()


class PatchCreateOptions(Options):
    zstd: bool = option(
        "Output", "Store compressed differences of values: less than half the size, but several times slower.", False
    )
    io: Literal["auto", "mmap", "read"] = io_option()
    overwrite: bool = option("Output", "Replace an existing patch.", False)


class PatchApplyOptions(Options):
    io: Literal["auto", "mmap", "read"] = io_option()


class GraftOptions(Options):
    masks: str | None = option(
        "Selection", "Select the coordinates that are active in this file of `opdkernels mask`.", None, metavar="FILE"
    )
    select: str = option(
        "Selection",
        "Select tensors by comma-separated terms: attention, mlp, embedding, lm_head, norm, q_proj, layers=0-7, ... "
        "Blocks and modules add up; with layers, both must match.",
        "",
        metavar="TERMS",
    )
    invert: bool = option("Selection", "Graft everything but the selection.", False)
    io: Literal["auto", "mmap", "read"] = io_option()


class PushOptions(Options):
    base_model: str | None = option("Card", "Id of the base model on the Hub, such as org/name.", None, metavar="ID")
    private: bool = option("Repository", "Create a private repository; otherwise its owner's settings decide.", False)
    repo_type: Literal["model", "dataset"] = option("Repository", "Type of the repository.", "model")
    revision: str | None = option(
        "Commit", "Branch to commit to, created if it does not exist; main if not given.", None, metavar="BRANCH"
    )
    commit_message: str | None = option(
        "Commit", 'Message of the commit; "Upload NAME with opdkernels" if not given.', None, metavar="TEXT"
    )
    create_pr: bool = option("Commit", "Open a pull request instead of committing.", False)


class ExperimentOptions(Options):
    seeds: int = option("Experiment", "Number of seeds, starting at --seed.", 1, ge=1, le=MAX_SEEDS)
    density: float | None = option(
        "Experiment",
        "Fraction of the coordinates in each mask; 0: all coordinates that a run changed visibly in bf16. If not "
        "given: 0.2 for trajectory and grafts, 0 for the others.",
        None,
        ge=0,
        le=1,
    )
    arms: Annotated[tuple[str, ...], BeforeValidator(split_commas)] = option(
        "Experiment", "Run only these arms, named as in the table and separated by commas.", (), metavar="ARM,..."
    )


Family = Literal["delta", "overlap", "quantile", "patch", "step", "gram", "divergence"]


class BenchOptions(Options):
    device: DeviceName = option(
        "Measurement", "cpu, cuda or cuda:N: the device that is measured.", "cpu", metavar="DEVICE"
    )
    against: Annotated[tuple[Literal["eager", "compile"], ...], BeforeValidator(split_commas)] = option(
        "Measurement",
        "What the kernels are compared with: plain PyTorch (eager), torch.compile (compile), or both; compiling adds "
        "minutes.",
        ("eager",),
        metavar="eager|compile|eager,compile",
    )
    family: Annotated[tuple[Family, ...], BeforeValidator(split_commas)] = option(
        "Measurement",
        f"Measure only these kernel families, separated by commas: {', '.join(get_args(Family))}.",
        (),
        metavar="FAMILY,...",
    )
    threads: int | None = option(
        "Measurement", "Threads of the kernels and of torch; torch's own number if not given.", None, ge=1, le=4096
    )
    quick: bool = option("Measurement", "Smaller sizes and fewer rounds: seconds, and less reliable numbers.", False)


Model = TypeVar("Model", bound=BaseModel)


def validate_options(model: type[Model], values: dict[str, Any]) -> Model:
    """An options model from values.

    Raises:
        UsageError: A value is not valid; one line names the option, its value and what is allowed.
    """
    from pydantic import ValidationError

    for name, value in values.items():  # which pydantic would take as the numbers 0 and 1
        field = model.model_fields.get(name)
        if isinstance(value, bool) and field is not None and {field.annotation, *get_args(field.annotation)} & NUMBERS:
            raise UsageError(f"option {name} is {value}: give a number")
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, (InputError, UsageError)):  # raised by a validator, wrapped by pydantic
            raise cause from None
        name = str(first["loc"][0]) if first["loc"] else "options"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, model.model_fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(model.model_fields)}"
            raise UsageError(f"there is no option {name!r}; {hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        rejected = first["input"]
        is_long = isinstance(rejected, int) and abs(rejected) >= 10**100  # Python refuses to print some of these
        shown = "an integer of more than 100 digits" if is_long else repr(rejected)
        raise UsageError(f"option {name} is {shown}: {message}" if first["loc"] else message) from None
