"""A run's log: one JSON line a step, TensorBoard and Weights & Biases where asked for, and a line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opdkernels.distillation.tracker import finite, read_rows, write_rows
from opdkernels.distillation.world import Ranks
from opdkernels.errors import UsageError, printable

LINE_EVERY_S = 2.0
SHOWN = (
    ("loss", "loss {:.4f}"),
    ("reverse_kl", "KL {:.4f}"),
    ("agreement", "agreement {:.2f}"),
    ("reward", "reward {:.2f}"),
    ("accuracy", "accuracy {:.3f}"),
)


class Board(NamedTuple):
    """Where a step's figures go beside the log."""

    write: Callable[[dict[str, float], int], None]
    close: Callable[[], Any]


class Log:
    """Writes rows of figures; rows after `step`, of a run that was killed there, are let go, and from 0 on all."""

    def __init__(self, folder: Path, step: int, total: int, quiet: bool, ranks: Ranks, boards: Sequence[Board] = ()):
        self.path, self.scores, self.total, self.quiet = folder / "log.jsonl", folder / "scores.jsonl", total, quiet
        self.first_rank = ranks.first
        if ranks.first:
            for path in (self.path, self.scores):
                write_rows(path, [row for row in read_rows(path) if step and row["step"] <= step])
        self.shown, self.began, self.first = 0.0, time.monotonic(), step
        self.boards = boards

    def row(self, row: dict[str, Any]) -> None:
        if not self.first_rank:
            return
        scores, row = row.pop("scores", None), row | rates(row)
        for path, content in ((self.path, row), (self.scores, {"step": row["step"], "scores": scores})):
            if content.get("scores", ()) is not None:
                with open(path, "a") as file:
                    file.write(json.dumps(finite(content), allow_nan=False) + "\n")
        for board in self.boards:
            board.write(dict(flat(row)), row["step"])
        self.show(row)

    def accuracies(self) -> list[tuple[int, float]]:
        """Steps and accuracies of the evaluations so far."""
        return [(row["step"], row["accuracy"]) for row in read_rows(self.path) if "accuracy" in row]

    def show(self, row: dict[str, Any]) -> None:
        now, live = time.monotonic(), sys.stderr.isatty()
        last = row["step"] == self.total or "accuracy" in row
        if self.quiet or not (live or last or now - self.shown >= LINE_EVERY_S):
            return
        self.shown = now
        done = row["step"] - self.first
        left = (now - self.began) / done * (self.total - row["step"]) if done else 0
        facts = [text.format(row[name]) for name, text in SHOWN if row.get(name) is not None]
        line = f"step {row['step']} of {self.total}: {', '.join(facts)}, {left:.0f} s left"
        print(f"\r\x1b[K{line}" if live else line, end="\n" if last or not live else "", file=sys.stderr, flush=True)


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """A step's tokens a second: of completions, by the phase that makes, scores or learns them, and in all."""
    known = {
        name: row["tokens"] / seconds
        for name, seconds in row.get("seconds", {}).items()
        if name in ("generate", "score", "train", "all") and seconds
    }
    return {"tokens_per_s": known} if known else {}


@contextmanager
def boards(
    folder: Path, step: int, ranks: Ranks, *, tensorboard: bool = False, wandb: str = ""
) -> Iterator[list[Board]]:
    """TensorBoard's and Weights & Biases's, of the first process, for a while; nothing in the folder of a run is touched by opening them.

    Raises UsageError on every process for what is not installed or cannot begin."""
    opened: list[Board] = []
    if tensorboard:
        ranks.told(lambda: opened.append(tensorboard_of(folder, step)))
    if wandb:
        ranks.told(lambda: opened.append(wandb_of(folder, wandb)))
    try:
        yield opened
    finally:
        for board in opened:
            board.close()


def tensorboard_of(folder: Path, step: int) -> Board:
    """TensorBoard's event files in the folder, of steps after `step` anew; made with the first figures."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "tensorboard is asked for and not installed; pip install tensorboard, or leave it out"
        ) from None
    made: list[Any] = []

    def write(figures: dict[str, float], at: int) -> None:
        if not made:
            made.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1))
        for name, value in figures.items():
            made[0].add_scalar(name, value, at)
        made[0].flush()

    return Board(write, lambda: [writer.close() for writer in made])


def wandb_of(folder: Path, project: str) -> Board:
    """A run of Weights & Biases; what goes on from a checkpoint is another of the same group."""
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("wandb is asked for and not installed; pip install wandb, or leave it out") from None
    try:
        run = wandb.init(project=project, group=folder.resolve().name, dir=str(folder))
    except Exception as error:  # of its server, its key, its settings
        raise UsageError(
            f"wandb cannot begin a run ({printable(str(error).splitlines()[0] if str(error) else type(error).__name__)[:200]}); set WANDB_MODE=offline, or leave it out"
        ) from None
    return Board(lambda figures, at: run.log(figures, step=at), run.finish)


def flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}{name}", value


class Clock:
    """Seconds and peak memory of a step's phases."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_peak(self.device)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.peak[name] = max(self.peak.get(name, 0), peak_bytes(self.device))

    def row(self) -> dict[str, Any]:
        """Seconds by phase and in all, and, where it is known, the peak of memory by phase, in bytes: the device's, or the process's."""
        known = {name: size for name, size in self.peak.items() if size}
        return {
            "seconds": {**self.seconds, "all": time.perf_counter() - self.began},
            **({"peak_bytes": known} if known else {}),
        }


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM begins anew


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024
