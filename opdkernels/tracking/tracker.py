"""`UpdateTracker`: a callback that logs how much of a model an update has changed, while the model is trained."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist

from opdkernels.bits import popcount
from opdkernels.errors import UsageError, printable
from opdkernels.ops.delta import Tally, delta, exact_float
from opdkernels.optim.bind_masks import Masks
from opdkernels.optim.binding import is_dtensor
from opdkernels.tracking.weights import TrackedWeight, flat_local, start_weights, trainable_parameters

SLICE = 1 << 24  # coordinates compared at a time: a multiple of 8
DEFAULT_STEPS = 50  # where a trainer does not log by steps
VISIBLE_THRESHOLD = (0,)  # bf16 bits: every visible change counts


class UpdateTracker:
    """Logs which part of the weights training has changed since its start, every `logging_steps` steps.

    It is a callback of Hugging Face's Trainer, of TRL's trainers and of Lightning, and has two methods for any other
    loop: `start(model)` and `measure(model)`. Values go through the trainer's own log, so that W&B, TensorBoard and
    other receivers get them. Per measurement:

    | name | value |
    |---|---|
    | `changed_visible` | fraction of the coordinates whose bf16 value differs from that at the start |
    | `changed_any` | fraction that differed at this or any earlier measurement |
    | `recall_vs_changed_any` | fraction of these that differ now |
    | `mask_recall` | fraction of the active coordinates of the masks that differ now |
    | `mask_precision` | fraction of the coordinates that differ now that are active in the masks |
    | `update_norm` | L2 norm of the update, in the dtype of the parameters |
    | `relative_norm` | `update_norm` over the norm of the weights at the start |
    | `nonfinite` | fraction that is NaN or Inf, only if there is any; these count as not changed |
    | `tracker_seconds` | time of the measurement |

    Trainable parameters count, a tied weight once; with LoRA these are the adapters. Of a DTensor (FSDP2, tensor
    parallelism) each process counts its own shard, and the counts are added up; with DDP the first process counts.

    Memory: per trainable coordinate its size at the start (2 bytes in bf16, 4 in fp32), and one bit, or two with masks;
    with FSDP2 on each process for its shard. `stride` divides this, and the time. A measurement reads every weight and
    its copy once, in slices of 16 M coordinates.

    Examples:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> tracker = UpdateTracker(prefix="")
        >>> tracker.start(model)
        >>> with torch.no_grad():
        ...     model.weight[0] += 1
        >>> tracker.measure(model)["changed_visible"]
        0.5
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> UpdateTracker:
        bases = callback_bases()
        return object.__new__(with_bases(cls, bases) if bases else cls)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        """For Lightning's strategies that start processes: pickle does not find a class that was made here."""
        return new_instance, (getattr(type(self), "_original", type(self)),), self.__dict__

    def __init__(
        self,
        trainer: Any = None,
        *,
        masks: Masks | None = None,
        base: str | os.PathLike[str] | None = None,
        logging_steps: int | None = None,
        stride: int = 1,
        offload: bool = True,
        prefix: str = "opdkernels/",
    ):
        """Creates the callback; nothing is read or copied before the training starts.

        Args:
            trainer: The transformers or TRL trainer whose log is used: `trainer.add_callback(UpdateTracker(trainer))`.
                None for Lightning and for other loops.
            masks: Masks of which the recall is logged, such as what an earlier run changed; as for `MaskedAdamW`, by
                the names of the model or of its checkpoint.
            base: Checkpoint that the run started from: a folder, a file or a hub id. None: the weights at the start of
                the training. A run that resumes needs it, since its first weights are not those of the start.
            logging_steps: Optimizer steps between two measurements, >= 1 (default: as often as the trainer logs).
            stride: Compare about every stride-th coordinate, >= 1; fractions and norms are then estimates.
            offload: Keep the weights at the start in CPU memory; otherwise on the device of the parameters.
            prefix: Beginning of the logged names.

        Raises:
            UsageError: `trainer` is not a trainer of transformers, or a number is out of range.
        """
        if trainer is not None and not is_hugging_face_trainer(trainer):
            raise UsageError(
                f"trainer is a {type(trainer).__name__}; give a Trainer of transformers or TRL, or none for Lightning "
                "and other loops"
            )
        for name, value in (("logging_steps", logging_steps), ("stride", stride)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} is {printable(repr(value))}; give an integer of at least 1")
        self.trainer, self.masks, self.base = trainer, masks, base
        self.logging_steps, self.stride, self.offload, self.prefix = logging_steps, stride, offload, prefix
        self._weights: dict[str, TrackedWeight] | None = None
        self._last_step = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the copies and bits that this process holds."""
        return sum(weight.nbytes for weight in (self._weights or {}).values())

    @torch.no_grad()
    def start(self, model: torch.nn.Module) -> None:
        """Takes the weights of a model, or those of `base`, as the start.

        Every process calls it, after the model was sharded.

        Args:
            model: The model.

        Raises:
            UsageError: The model has no trainable parameter, is sharded in a way that cannot be compared, or no mask is
                of one of its parameters.
            InputError: `base` or the masks cannot be read, or `base` is of another model.
            ValueError: A mask has another shape than its parameter.
        """
        self._weights = start_weights(model, masks=self.masks, base=self.base, stride=self.stride, offload=self.offload)
        self._last_step = -1

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        """Compares the weights of a model with those at the start.

        Every process calls it. Where the model is a copy on each process (DDP), only the first one measures.

        Args:
            model: The model that was given to `start`, with the same sharding.

        Returns:
            The values by name, with the prefix; empty on processes that do not measure. A ratio whose denominator is 0
            is absent.

        Raises:
            UsageError: `start` was not called, or a parameter is missing or has another size.
        """
        if self._weights is None:
            raise UsageError("UpdateTracker has no weights to compare with; call start(model) before the first step")
        began = time.perf_counter()
        params = trainable_parameters(model)
        counts = self._count(params)
        if any(is_dtensor(param) for param in params.values()):
            counts = summed_over_processes(counts)
        elif not self._weights:
            return {}
        values = metrics_of(counts, has_masks=self.masks is not None)
        values["tracker_seconds"] = time.perf_counter() - began
        return {f"{self.prefix}{name}": value for name, value in values.items()}

    def _count(self, params: dict[str, torch.nn.Parameter]) -> dict[str, int]:
        """Counts and exact sums over the coordinates of this process."""
        assert self._weights is not None
        tally = Tally.empty(VISIBLE_THRESHOLD)
        counts = dict.fromkeys(("numel", "changed", "changed_any", "masked", "masked_changed"), 0)
        for name, weight in self._weights.items():
            local = flat_local(params[name]) if name in params else None
            if local is None or local.numel() != weight.numel:
                what = "is not trainable any more" if local is None else f"has {local.numel()} coordinates here"
                raise UsageError(
                    f"{printable(name)} {what}, and {weight.numel} at the start; call start(model) after such a change"
                )
            counts["numel"] += weight.numel
            for first in range(0, len(weight.start), SLICE):
                start = weight.start[first : first + SLICE]
                now = local[first * weight.stride :: weight.stride][: len(start)]
                bits = torch.zeros((len(start) + 7) // 8, dtype=torch.uint8, device=local.device)
                delta(start.to(local.device), now, threshold_bits=VISIBLE_THRESHOLD, out=tally, mask=bits)
                changed, place = bits.cpu().numpy(), slice(first // 8, first // 8 + len(bits))
                weight.changed_any[place] |= changed
                counts["changed"] += popcount(changed)
                counts["changed_any"] += popcount(weight.changed_any[place])
                if weight.mask is not None:
                    counts["masked"] += popcount(weight.mask[place])
                    counts["masked_changed"] += popcount(weight.mask[place] & changed)
        return counts | {
            "sampled": tally.numel,
            "nonfinite": tally.nonfinite,
            "delta_sq": tally.sum_delta_sq,
            "base_sq": tally.sum_base_sq,
        }

    # Hugging Face's Trainer and TRL

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises UsageError where the callback was given to a trainer that it does not know."""
        if self.trainer is None:
            raise UsageError(
                "UpdateTracker logs through its trainer: leave it out of callbacks=[...], and call "
                "trainer.add_callback(UpdateTracker(trainer)) after the trainer was created"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the start of the training."""
        self.on_init_end(args, state, control)
        self._begin(self.trainer.model, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures and logs, where the trainer logs by epochs."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures and logs, if it is time to."""
        if self._weights is None:
            return
        is_due = control.should_log if self.logging_steps is None else state.global_step % self.logging_steps == 0
        if not is_due and not control.should_training_stop:
            return
        values = self._measure_once(self.trainer.model, state.global_step)
        if values:
            from transformers import Trainer

            should_log = control.should_log
            # Not that of a subclass: those of TRL add the means since the last log to every call, and reset them.
            Trainer.log(self.trainer, values)
            control.should_log = should_log  # which a log resets, and the trainer's own is still to come

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing; the callbacks of both libraries have a method of this name, with other arguments."""

    # Lightning

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Takes the start of the training."""
        if type(trainer.model).__name__ == "FullyShardedDataParallel":
            trainable_parameters(trainer.model)  # raises
        self._begin(pl_module, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures and logs, if it is time to."""
        step, every = trainer.global_step, self.logging_steps or trainer.log_every_n_steps or DEFAULT_STEPS
        if self._weights is None or not step or step % every:
            return
        values = self._measure_once(pl_module, step)
        if values:
            # Lightning would send logged values again at each of its logging steps, and at no other step.
            pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False, rank_zero_only=True)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step - 1)  # Lightning counts from 0 there

    def _begin(self, model: torch.nn.Module, step: int) -> None:
        """Takes the start of a training that may be the continuation of another one."""
        if step and self.base is None:
            warnings.warn(
                f"the training resumes at step {step}, so that UpdateTracker measures from there; give the checkpoint "
                "that the run started from as base",
                stacklevel=2,
            )
        self.start(model)
        self._last_step = step

    def _measure_once(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """The values of a step; empty if they were measured before, as after a batch that only adds to the gradient."""
        if step == self._last_step:
            return {}
        self._last_step = step
        return self.measure(model)


def callback_bases() -> tuple[type, ...]:
    """The callback classes of the libraries that are loaded: Lightning accepts instances of its own only."""
    bases = []
    if "transformers" in sys.modules:
        from transformers import TrainerCallback

        bases.append(TrainerCallback)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if hasattr(sys.modules.get(name), "Callback"):
            bases.append(sys.modules[name].Callback)
    return tuple(bases)


@functools.cache
def with_bases(cls: type, bases: tuple[type, ...]) -> type:
    """A subclass of `cls` and of callback classes, under the same name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_original": cls}
    return type(cls.__name__, (cls, *bases), names)


def new_instance(cls: type[UpdateTracker]) -> UpdateTracker:
    """An instance without content, of a subclass for the libraries that are loaded."""
    return cls.__new__(cls)


def is_hugging_face_trainer(trainer: Any) -> bool:
    """Whether an object is a Trainer of transformers, as those of TRL are."""
    if "transformers" not in sys.modules:
        return False
    from transformers import Trainer

    return isinstance(trainer, Trainer)


def summed_over_processes(counts: dict[str, int]) -> dict[str, int]:
    """The sums over all processes, exact."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, counts)
    return {name: sum(part[name] for part in gathered) for name in counts}


def metrics_of(counts: dict[str, int], *, has_masks: bool) -> dict[str, float]:
    """What is logged, from counts and exact sums."""
    sampled, changed = counts["sampled"], counts["changed"]
    scale = counts["numel"] / sampled if sampled else 0.0
    norms = [math.sqrt(exact_float(counts[name]) * scale) for name in ("delta_sq", "base_sq")]
    ratios = {
        "changed_visible": (changed, sampled),
        "changed_any": (counts["changed_any"], sampled),
        "recall_vs_changed_any": (changed, counts["changed_any"]),
        "relative_norm": (norms[0], norms[1]),
    }
    if has_masks:
        ratios["mask_recall"] = (counts["masked_changed"], counts["masked"])
        ratios["mask_precision"] = (counts["masked_changed"], changed)
    if counts["nonfinite"]:
        ratios["nonfinite"] = (counts["nonfinite"], sampled)
    return {"update_norm": norms[0]} | {name: a / b for name, (a, b) in ratios.items() if b}
