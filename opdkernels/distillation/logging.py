"""Metrics of a run: one JSON line per step, TensorBoard and Weights & Biases on request, and a line on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opdkernels.backends.devices import peak_memory_bytes, reset_peak_memory, synchronize
from opdkernels.distillation.jsonl import append_row, finite, read_rows, write_rows
from opdkernels.distillation.world import World
from opdkernels.errors import UsageError, printable

CONSOLE_INTERVAL_S = 2.0
CONSOLE_METRICS = (
    ("loss", "loss {:.4f}"),
    ("reverse_kl", "KL {:.4f}"),
    ("top1_agreement", "top-1 agreement {:.2f}"),
    ("reward", "reward {:.2f}"),
    ("accuracy", "accuracy {:.3f}"),
)


class LogSink(NamedTuple):
    """A receiver of a step's metrics, in addition to log.jsonl."""

    write: Callable[[dict[str, float], int], None]  # (metrics, step)
    close: Callable[[], Any]


class MetricsLogger:
    """Writes a row of metrics per step to log.jsonl, scores.jsonl, the sinks and the terminal.

    Rows after `step`, which the run resumes from, are removed; if `step` is 0, all rows are.
    """

    def __init__(
        self, folder: Path, step: int, max_steps: int, *, quiet: bool, world: World, sinks: Sequence[LogSink] = ()
    ):
        self.log_path, self.scores_path = folder / "log.jsonl", folder / "scores.jsonl"
        self.first_step, self.max_steps, self.quiet, self.sinks = step, max_steps, quiet, sinks
        self.is_main = world.is_main
        self.start_time, self.last_printed = time.monotonic(), 0.0
        if self.is_main:
            for path in (self.log_path, self.scores_path):
                write_rows(path, [row for row in read_rows(path) if step and row["step"] <= step])

    def log(self, row: dict[str, Any]) -> None:
        """Writes the metrics of a step; `scores` of an evaluation go to scores.jsonl."""
        if not self.is_main:
            return
        scores, row = row.pop("scores", None), row | tokens_per_second(row)
        append_row(self.log_path, finite(row))
        if scores is not None:
            append_row(self.scores_path, {"step": row["step"], "scores": scores})
        for sink in self.sinks:
            sink.write(dict(flatten(row)), row["step"])
        self.print_progress(row)

    def accuracies(self) -> list[tuple[int, float]]:
        """Step and accuracy of each evaluation so far."""
        return [(row["step"], row["accuracy"]) for row in read_rows(self.log_path) if "accuracy" in row]

    def print_progress(self, row: dict[str, Any]) -> None:
        """Prints a progress line to stderr; on a terminal the next line replaces it."""
        now, is_terminal = time.monotonic(), sys.stderr.isatty()
        keep_line = row["step"] == self.max_steps or "accuracy" in row
        if self.quiet or not (is_terminal or keep_line or now - self.last_printed >= CONSOLE_INTERVAL_S):
            return
        self.last_printed = now
        steps_done = row["step"] - self.first_step
        seconds_left = (now - self.start_time) / steps_done * (self.max_steps - row["step"]) if steps_done else 0
        metrics = [text.format(row[name]) for name, text in CONSOLE_METRICS if row.get(name) is not None]
        line = f"step {row['step']} of {self.max_steps}: {', '.join(metrics)}, {seconds_left:.0f} s left"
        end = "\n" if keep_line or not is_terminal else ""
        print(f"\r\x1b[K{line}" if is_terminal else line, end=end, file=sys.stderr, flush=True)


def tokens_per_second(row: dict[str, Any]) -> dict[str, Any]:
    """Completion tokens per second of a step, by phase and in total (`all`)."""
    rates = {
        name: row["tokens"] / seconds
        for name, seconds in row.get("seconds", {}).items()
        if name in ("generate", "score", "train", "all") and seconds
    }
    return {"tokens_per_s": rates} if rates else {}


def flatten(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested row, with names such as seconds/train."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value


@contextmanager
def log_sinks(
    folder: Path, step: int, world: World, *, tensorboard: bool = False, wandb: str = ""
) -> Iterator[list[LogSink]]:
    """Opens TensorBoard and Weights & Biases on the main process and closes them at the end. Opening them writes
    nothing to the run's folder.

    Raises UsageError on every process for a package that is not installed or cannot start."""
    sinks: list[LogSink] = []
    if tensorboard:
        world.run_on_main(lambda: sinks.append(tensorboard_sink(folder, step)))
    if wandb:
        world.run_on_main(lambda: sinks.append(wandb_sink(folder, wandb)))
    try:
        yield sinks
    finally:
        for sink in sinks:
            sink.close()


def tensorboard_sink(folder: Path, step: int) -> LogSink:
    """TensorBoard event files in the run's folder; events after `step` are purged. Created with the first metrics."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "the option tensorboard needs tensorboard, which is not installed; pip install tensorboard, or remove it"
        ) from None
    writers: list[Any] = []

    def write(metrics: dict[str, float], step_number: int) -> None:
        if not writers:
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))
        for name, value in metrics.items():
            writers[0].add_scalar(name, value, step_number)
        writers[0].flush()

    return LogSink(write, lambda: [writer.close() for writer in writers])


def wandb_sink(folder: Path, project: str) -> LogSink:
    """A run of Weights & Biases; a resumed run is another run of the same group."""
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            "the option wandb needs wandb, which is not installed; pip install wandb, or remove it"
        ) from None
    try:
        run = wandb.init(project=project, group=folder.resolve().name, dir=str(folder))
    except Exception as error:  # server, key or settings
        reason = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]
        raise UsageError(f"wandb cannot start a run ({reason}); set WANDB_MODE=offline, or remove it") from None
    return LogSink(lambda metrics, step_number: run.log(metrics, step=step_number), run.finish)


class PhaseTimer:
    """Seconds and peak memory of each phase of a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.start_time = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        reset_peak_memory(self.device)
        start_time = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_time
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_memory_bytes(self.device))

    def metrics(self) -> dict[str, Any]:
        """`seconds` by phase and in total (`all`), and, where known, `peak_bytes` by phase: memory of the GPU, or
        resident memory of the process."""
        peak_bytes = {name: size for name, size in self.peak_bytes.items() if size}
        return {
            "seconds": {**self.seconds, "all": time.perf_counter() - self.start_time},
            **({"peak_bytes": peak_bytes} if peak_bytes else {}),
        }
