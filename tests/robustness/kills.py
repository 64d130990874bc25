"""Kills every command that writes at random points, and checks what is left.

`python -m tests.robustness.kills --kills 50` kills each command 50 times with SIGKILL: half of the times just before an
operation on the output's files (create, rename, remove, fsync), the others after a random part of the running time.
After each kill:

- no input has changed, and no file of somebody else in the output folder;
- what has a final name is complete: the file or checkpoint of an unkilled run, or a file that can be read;
- the same command then succeeds, gives the same bytes as an unkilled run, and leaves no temporary file.

Commands run in children that are forked from one process, which has imported everything and never runs a kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork of a process with a pool of threads would hang in its kernels

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from opdkernels import files
from opdkernels.cli import main
from opdkernels.distillation import checkpointing
from opdkernels.distillation.options import demo_options
from opdkernels.files import is_temporary

# "outputs" of run.json has digests of tables, which contain seconds; the next run validates them.
VOLATILE = {"seconds", "started", "machine", "resumed_tensors", "peak_bytes", "tokens_per_s", "outputs"}
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TRAIN = {
    "batch-size": 8,
    "max-steps": 4,
    "warmup-steps": 1,
    "save-steps": 1,
    "num-eval-prompts": 4,
    "snapshot-every": 2,
    "max-completion-length": 4,
}


@dataclass(frozen=True)
class Command:
    """A command line without the output, and what it writes.

    Attributes:
        arguments: The command and its inputs, relative to the folder of the inputs.
        kind: "file", "folder" (a new or empty one) or "run" (a folder in which runs resume).
        options: Options of every call.
        can_overwrite: Whether it has --overwrite.
        slow: Whether it takes seconds.
    """

    arguments: tuple[str, ...]
    kind: str
    options: tuple[str, ...] = ()
    can_overwrite: bool = True
    slow: bool = False


def training_options() -> tuple[str, ...]:
    options = demo_options()
    values = {**{name: options[name] for name in ("student", "teacher", "prompts")}, **TRAIN}
    return tuple(f"--{name}={value}" for name, value in values.items())


COMMANDS = {
    "mask changed": Command(("mask", "changed", "base", "trained"), "file"),
    "mask top-changed": Command(("mask", "top-changed", "base", "trained"), "file"),
    "mask near-zero": Command(("mask", "near-zero", "base"), "file"),
    "mask principal": Command(("mask", "principal", "base"), "file"),
    "mask safe": Command(("mask", "safe", "base"), "file"),
    "mask random": Command(("mask", "random", "base"), "file"),
    "mask magnitude-matched": Command(("mask", "magnitude-matched", "masks", "base"), "file"),
    "mask combine": Command(("mask", "combine", "masks", "xor", "masks"), "file"),
    "patch create": Command(("patch", "create", "base", "trained"), "file"),
    "patch apply": Command(("patch", "apply", "base", "patch"), "folder", can_overwrite=False),
    "graft": Command(("graft", "base", "trained", "--select", "mlp"), "folder", can_overwrite=False),
    "analyze": Command(("analyze", "base", "trained"), "run", ("--csv", "--paper-csv")),
    "overlap": Command(("overlap", "base", "trained", "third"), "run", ("--csv",)),
    "trajectory": Command(("trajectory", "base", "trained", "third"), "run", ("--csv",)),
    "distill": Command(("distill",), "run", training_options(), slow=True),
    "experiment": Command(
        ("experiment", "grafts"), "run", ("--arms=mlp alone", *training_options()), can_overwrite=False, slow=True
    ),
}


def make_inputs(folder: Path) -> None:
    """Checkpoints `base`, `trained` and `third`, masks `masks`, a patch `patch`, and others for outputs that exist."""
    generator = torch.Generator().manual_seed(0)
    base = {}
    for layer in range(3):
        for name in ("mlp.up_proj", "self_attn.q_proj"):
            base[f"model.layers.{layer}.{name}.weight"] = torch.randn(64, 64, generator=generator).bfloat16()
    for i, name in enumerate(("base", "trained", "third")):
        (folder / name).mkdir(parents=True)
        changes = {n: (torch.rand(64, 64, generator=generator) < 0.3) * 0.1 * i for n in base}
        save_file({n: w + changes[n].bfloat16() for n, w in base.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "llama"}\n')
    for arguments in (
        ("mask", "changed", "base", "trained", "-o", "masks"),
        ("mask", "changed", "base", "third", "-o", "other-masks"),
        ("patch", "create", "base", "trained", "-o", "patch"),
        ("patch", "create", "base", "third", "-o", "other-patch"),
    ):
        status, error = wait(start(folder, arguments))
        assert status == 0, error


def start(
    folder: Path,
    arguments: tuple[str, ...],
    prepare: Callable[[], None] = lambda: None,
    conclude: Callable[[], None] = lambda: None,
) -> tuple[int, io.IOBase]:
    """Starts a command in a forked child. Returns its process id and the file of its standard error."""
    error = tempfile.TemporaryFile()  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(error.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(folder)
            prepare()
            main(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            conclude()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return pid, error


def wait(child: tuple[int, io.IOBase]) -> tuple[int, str]:
    """Waits for a child. Returns its exit status, or minus a signal, and its standard error."""
    pid, error = child
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    error.seek(0)
    text = error.read().decode("utf-8", "replace")
    error.close()
    return status, text


class Points:
    """Counts operations on files under a folder in this process, and kills it just before the one of a given number."""

    def __init__(self, folder: Path, fatal: int, report: Path) -> None:
        self.folder, self.fatal, self.report, self.count = os.fspath(folder), fatal, report, 0

    def install(self) -> None:
        sys.addaudithook(self.audit)
        sync = files.sync

        def counted_sync(path: Path) -> None:
            self.reach(path)
            sync(path)

        files.sync = counted_sync
        checkpointing.sync = counted_sync

    def audit(self, event: str, arguments: tuple) -> None:
        if event not in EVENTS:
            return
        if event == "open" and not (
            (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
            or (isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS)
        ):
            return
        self.reach(arguments[0])

    def reach(self, path: object) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(
            self.folder
        ):
            return
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def write(self) -> None:
        """Writes how many operations there were, at the end of a run that is not killed."""
        count, self.folder = self.count, "\0"
        self.report.write_text(str(count))


def content_of(path: Path) -> object:
    """The content of a file without what says when and how fast it was made; raises ValueError for a partial file."""
    name = path.name
    if name.endswith(".jsonl"):  # appended to: a kill may cut the last line, and the next run removes it
        lines = path.read_text().splitlines(keepends=True)
        return [without_volatile(json.loads(line)) for line in lines if line.endswith("\n")]
    if name.endswith(".json"):
        content = json.loads(path.read_text())
        # The inputs of an experiment's analysis are files that the experiment has just written.
        if path.parent.name == "analysis":
            content = {key: value for key, value in content.items() if key not in ("inputs", "identity")}
        return without_volatile(content)
    if name.endswith(".parquet"):
        table = pq.read_table(path)
        return table.select([column for column in table.column_names if column not in VOLATILE]).to_pydict()
    if name.endswith(".csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return [without_volatile(row) for row in rows]
    if name.endswith(".arrow"):
        content = path.read_bytes()
        if hashlib.blake2b(content, digest_size=8).hexdigest() != name.split(".")[1]:
            raise ValueError("a partial fragment")
        return pa.ipc.open_file(content).read_all().num_rows
    if name.endswith(".html"):
        content = path.read_text()
        if not content.rstrip().endswith("</html>"):
            raise ValueError("a partial page")
        return None  # shows the time of the run
    if name == "training.pt":  # a pickle with the timing of nothing, but with objects in memory order
        return sorted(torch.load(path, weights_only=True))
    return path.read_bytes()


def without_volatile(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if key not in VOLATILE}
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def tree(path: Path) -> dict[str, object]:
    """The content of a file, or of every file in a folder, by name; without temporary files.

    Of records in Arrow files it has the total number of rows per folder: where one file ends depends on time.
    """
    if path.is_file():
        return {"": content_of(path)}
    result: dict[str, object] = {}
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        parts = file.relative_to(path).parts
        if file.is_dir() or any(is_temporary(part) for part in parts):
            continue
        if file.suffix == ".arrow":
            key = os.path.join(*parts[:-1], "*.arrow")
            result[key] = result.get(key, 0) + content_of(file)  # type: ignore[operator]
        else:
            result[os.path.join(*parts)] = content_of(file)
    return result


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Names of files that differ, at most three."""
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))[:3]


def raw(folder: Path) -> dict[str, bytes]:
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Outcome:
    """What came of the kills of one command."""

    kills: int = 0
    finished: int = 0
    problems: list[str] = field(default_factory=list)


class Harness:
    """Kills one command, in a separate folder."""

    def __init__(self, name: str, inputs: Path, work: Path, seed: int) -> None:
        self.name, self.command, self.inputs, self.work = name, COMMANDS[name], inputs, work
        self.random = random.Random(f"{seed} {name}")
        self.before = raw(inputs)
        self.outcome = Outcome()
        self.expected: dict[str, object] = {}
        self.points: dict[bool, int] = {}
        self.seconds = 0.0

    def arguments(self, out: Path, overwrite: bool) -> tuple[str, ...]:
        more = ("--overwrite",) if overwrite else ()
        return (*self.command.arguments, *self.command.options, *more, "-o", os.fspath(out))

    def prepare(self, out: Path, existing: bool) -> None:
        """The output before the command: absent; or, if `existing`, of the same kind with other content, an empty
        folder, or a folder with a file of somebody else."""
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        if not existing:
            return
        if self.command.kind == "file":
            shutil.copy(self.inputs / ("other-patch" if self.name == "patch create" else "other-masks"), out)
            return
        out.mkdir()
        if self.command.kind == "run":
            (out / "notes.txt").write_text("mine")

    def measure(self) -> None:
        """Runs the command unkilled: the expected output, the number of operations, and the time."""
        for existing in (False, True):
            out, report = self.work / "output" / "out", self.work / "points"
            self.prepare(out, existing)
            points = Points(out.parent, -1, report)
            started = time.monotonic()

            arguments = self.arguments(out, self.overwrites(existing))
            status, error = wait(start(self.inputs, arguments, points.install, points.write))
            self.seconds = time.monotonic() - started
            assert status == 0, f"{self.name}: {status} {error}"
            self.points[existing] = int(report.read_text())
            content = tree(out)
            content.pop("notes.txt", None)
            assert not self.expected or content == self.expected, (
                f"{self.name}: {differences(content, self.expected)} differ"
            )
            self.expected = content

    def overwrites(self, existing: bool) -> bool:
        return existing and self.command.can_overwrite and self.command.kind == "file"

    def kill(self, number: int) -> None:
        """Kills the command once and checks what is left."""
        existing = self.random.random() < 0.5
        out = self.work / "output" / "out"
        self.prepare(out, existing)
        old = tree(out)
        arguments = self.arguments(out, self.overwrites(existing))
        if number % 2:
            fatal = self.random.randrange(self.points[existing])
            where = f"at operation {fatal} of {self.points[existing]}"
            status, error = wait(start(self.inputs, arguments, Points(out.parent, fatal, out).install))
        else:
            delay = self.random.uniform(0, self.seconds)
            where = f"after {delay:.3f} s of {self.seconds:.3f} s"
            child = start(self.inputs, arguments)
            deadline = time.monotonic() + delay
            while time.monotonic() < deadline and not os.waitid(
                os.P_PID, child[0], os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child[0], signal.SIGKILL)
            status, error = wait(child)
        where = f"{self.name}, kill {number} {where}, output {'existed' if existing else 'absent'}"
        if status == -signal.SIGKILL:
            self.outcome.kills += 1
        else:
            self.outcome.finished += 1
            if status != 0:
                self.problem(where, f"exit {status}: {error}")
        complete = self.check_left(where, out, old)
        status, error = wait(start(self.inputs, arguments))
        if status == 4 and complete and "exists" in error:
            status = 0  # the kill came after the rename: the output is complete, and is not written again
        if status != 0:
            self.problem(where, f"the next run exits with {status}: {error}")
        content = tree(out)
        if existing and self.command.kind == "run" and content.pop("notes.txt", None) != b"mine":
            self.problem(where, "a file of somebody else was changed or removed")
        if content != self.expected:
            self.problem(where, f"the next run gives other bytes: {differences(content, self.expected)}")
        leftovers = [path for path in out.parent.rglob("*") if is_temporary(path.name)]
        if leftovers:
            self.problem(where, f"the next run leaves {leftovers[0]}")

    def check_left(self, where: str, out: Path, old: dict[str, object]) -> bool:
        """Checks what a kill left; returns whether the output is complete."""
        if raw(self.inputs) != self.before:
            self.problem(where, "an input has changed")
        try:
            left = tree(out)
        except (ValueError, pa.ArrowInvalid, OSError) as error:
            self.problem(where, f"a partial file under its final name: {error}")
            return False
        if self.command.kind == "file" and left not in ({}, old, self.expected):
            self.problem(where, "a partial file under its final name")
        moving = any(is_temporary(path.name) for path in out.glob(".*")) if out.is_dir() else False
        if self.command.kind == "folder" and left not in ({}, self.expected) and not moving:
            self.problem(where, f"a partial folder under its final name: {sorted(left)}")
        for checkpoint in out.glob("**/checkpoint-*") if self.name in ("distill", "experiment") else ():
            relative = os.fspath(checkpoint.relative_to(out))
            names = {name for name in self.expected if name.startswith(f"{relative}{os.sep}")}
            lacking = [name for name in names if name not in left and not name.endswith("training.pt")]
            if lacking and not any(is_temporary(part) for part in checkpoint.parts):
                self.problem(where, f"a partial checkpoint: {lacking[0]} is missing")
        return left == self.expected

    def problem(self, where: str, what: str) -> None:
        self.outcome.problems.append(f"{where}: {what}")


def load_training_libraries() -> None:
    """Imports in this process what a training run imports when it loads its models."""
    from opdkernels.distillation.models import load_model
    from opdkernels.distillation.text import load_text_processor

    options = demo_options()
    for name in ("student", "teacher"):
        load_model(options[name], "bfloat16", torch.device("cpu"))
    load_text_processor(options["student"])


def run(names: list[str], kills: int, seed: int, time_limit: float) -> int:
    """Kills the commands and prints a line for each. Returns the number of problems."""
    torch.set_num_threads(1)
    for module in ("api", "cli.mask", "compat.paper_csv", "experiments.runner", "masks", "patch", "report"):
        importlib.import_module(f"opdkernels.{module}")
    if any(COMMANDS[name].slow for name in names):
        load_training_libraries()
    started, num_problems = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="opdkernels-kills-") as folder:
        inputs = Path(folder) / "inputs"
        make_inputs(inputs)
        for name in names:
            harness = Harness(name, inputs, Path(folder) / "work", seed)
            harness.measure()
            outcome, number = harness.outcome, 0
            while outcome.kills < kills and number < 3 * kills and time.monotonic() - started < time_limit:
                harness.kill(number)
                number += 1
            print(
                f"{name}: {outcome.kills} killed, {outcome.finished} finished before the kill, "
                f"{len(outcome.problems)} problems; {harness.points[False]} operations on files"
                + ("; stopped before the number of kills" if outcome.kills < kills else ""),
                flush=True,
            )
            for problem in outcome.problems:
                print(f"  {problem}", flush=True)
            num_problems += len(outcome.problems)
    print(f"{time.monotonic() - started:.0f} s, {num_problems} problems")
    return num_problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds")
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(COMMANDS)}; all by default")
    options = parser.parse_args()
    unknown = [name for name in options.commands if name not in COMMANDS]
    if unknown:
        parser.error(f"there is no command {unknown[0]}")
    sys.exit(bool(run(options.commands or list(COMMANDS), options.kills, options.seed, options.time_limit)))
