"""Where prompts come from, what scores a completion: JSON lines, two tasks of sums, and reasoning_gym's.

A task is a sequence without end: entry i is the same on every machine, so that a run goes on from a step's number alone.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.errors import InputError, UsageError, printable

Score = Callable[[Any, str | None, str], float]
SHOTS = "12+13+20=45\n41+29+11=81\n"
LARGEST = torch.finfo(torch.float32).max
PAIRS, TRAINED_PAIRS = 10_000, 8_000  # of two-digit numbers, 00 to 99


@dataclass(frozen=True)
class Entry:
    """One prompt. `prompt`: text, or messages as chat templates take them; `teacher_context`: what a teacher that is the student itself
    sees before it; `completion`: a recorded answer, for steps that are not on-policy."""

    prompt: Any
    answer: str | None = None
    teacher_id: str = ""
    teacher_context: str | None = None
    images: tuple[str, ...] = ()
    completion: str | None = None


class Task(ABC):
    """Prompts to train on and to evaluate on."""

    def __init__(self, reward: str = "exact"):
        self.reward, self._score = reward, scorer(reward)

    @abstractmethod
    def entry(self, i: int) -> Entry:
        """Training prompt i, from 0 on, without end."""

    @abstractmethod
    def held_out(self, n: int) -> list[Entry]:
        """The first n prompts that training does not see, or as many as there are."""

    def examples(self) -> list[Entry]:
        """Training prompts that say what all are like: those of a file, or the first that is drawn."""
        return [self.entry(0)]

    def score(self, entry: Entry, completion: str) -> float:
        """What a completion is worth, 0 to 1 of the tasks here. Raises InputError where the reward itself fails."""
        try:
            value = float(self._score(entry.prompt, entry.answer, completion))
        except (Exception, SystemExit) as error:
            raise InputError(
                f"the reward {self.reward} failed on {printable(str(entry.prompt))[:80]} ({type(error).__name__}: {printable(str(error))[:200]}); mend it, and run the same command again"
            ) from None
        if not abs(value) <= LARGEST:
            raise InputError(
                f"the reward {self.reward} gave {value} on {printable(str(entry.prompt))[:80]}; it must be a finite number in fp32's range"
            )
        return value


class Lines(Task):
    """JSON lines, in an order that each pass over them draws anew."""

    def __init__(self, path: str, eval_prompts: str, seed: int, reward: str):
        super().__init__(reward)
        self.entries, self.seed = read_lines(path), seed
        self.others = read_lines(eval_prompts) if eval_prompts else []

    def entry(self, i: int) -> Entry:
        epoch, place = divmod(i, len(self.entries))
        return self.entries[permuted(place, len(self.entries), f"{self.seed}/{epoch}")]

    def held_out(self, n: int) -> list[Entry]:
        return self.others[:n]

    def examples(self) -> list[Entry]:
        return self.entries


class Addition(Task):
    """Two numbers of two digits, "07+45=", whose sum has three, "052": 8,000 pairs to train on, 2,000 held out."""

    def __init__(self, seed: int, reward: str):
        super().__init__(reward)
        self.seed = seed

    @staticmethod
    def of(pair: int) -> Entry:
        a, b = divmod(pair, 100)
        return Entry(f"{a:02}+{b:02}=", f"{a + b:03}")

    def entry(self, i: int) -> Entry:
        epoch, place = divmod(i, TRAINED_PAIRS)
        return self.of(permuted(permuted(place, TRAINED_PAIRS, f"{self.seed}/{epoch}"), PAIRS, "pairs"))

    def held_out(self, n: int) -> list[Entry]:
        return [
            self.of(permuted(place, PAIRS, "pairs")) for place in range(TRAINED_PAIRS, min(PAIRS, TRAINED_PAIRS + n))
        ]


class Sums(Task):
    """Three numbers from 10 to 99 after two worked lines; a ninth of all triples is held out."""

    def __init__(self, seed: int, reward: str):
        super().__init__(reward)
        self.seed = seed

    @staticmethod
    def draw(key: str, held_out: bool) -> Entry:
        drawn = random.Random(key)
        while True:
            a, b, c = (drawn.randrange(10, 100) for _ in range(3))
            if ((a + 7 * b + 31 * c) % 9 == 0) == held_out:
                return Entry(f"{SHOTS}{a}+{b}+{c}=", str(a + b + c))

    def entry(self, i: int) -> Entry:
        return self.draw(f"{self.seed}/{i}", False)

    def held_out(self, n: int) -> list[Entry]:
        return [self.draw(f"held out/{i}", True) for i in range(n)]


class ReasoningGym(Task):
    """A task of reasoning_gym, drawn and scored by it, which makes item i of a dataset from its seed + i: each seed of a run has items
    of its own, the held-out ones are others again and the same for all."""

    SIZE = 1 << 20
    SEEDS = (1 << 32) // SIZE - 1  # below what NumPy takes

    def __init__(self, name: str, seed: int):
        super().__init__()
        try:
            from reasoning_gym import create_dataset  # type: ignore[import-not-found]
        except ImportError:
            raise UsageError(
                f"reasoning_gym:{printable(name)} needs reasoning-gym; pip install reasoning-gym"
            ) from None
        if seed >= self.SEEDS:
            raise UsageError(f"reasoning_gym takes seeds below {self.SEEDS} here, not {seed}")
        try:
            self.data = create_dataset(name, size=self.SIZE, seed=(seed + 1) * self.SIZE)
            self.others = create_dataset(name, size=self.SIZE, seed=0)
        except ValueError as error:
            raise UsageError(f"reasoning_gym has no task {printable(name)} ({printable(str(error))[:200]})") from None
        self.reward, self._score = (
            f"reasoning_gym:{name}",
            lambda prompt, answer, text: self.data.score_answer(text.strip(), json.loads(answer or "{}")),
        )

    @staticmethod
    def of(found: dict[str, Any]) -> Entry:
        return Entry([{"role": "user", "content": found["question"]}], json.dumps(found, default=str))

    def entry(self, i: int) -> Entry:
        return self.of(self.data[i % len(self.data)])

    def held_out(self, n: int) -> list[Entry]:
        return [self.of(self.others[i]) for i in range(n)]


def open_task(prompts: str, eval_prompts: str = "", seed: int = 0, reward: str = "exact") -> Task:
    """The task that `prompts` names. Raises InputError for a file that cannot be read, UsageError for a task that does not exist."""
    kind, _, name = prompts.partition(":")
    if eval_prompts and (prompts in ("addition", "sums") or kind == "reasoning_gym"):
        raise UsageError(f"the task {prompts} has held-out prompts of its own; leave eval_prompts out")
    if reward != "exact" and kind == "reasoning_gym":
        raise UsageError(f"the task {prompts} scores by itself; leave reward out")
    if prompts in ("addition", "sums"):
        return (Addition if prompts == "addition" else Sums)(seed, reward)
    if kind == "reasoning_gym":
        return ReasoningGym(name, seed)
    return Lines(prompts, eval_prompts, seed, reward)


def read_lines(path: str) -> list[Entry]:
    named = printable(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{named} does not exist; give JSON lines, or a task: addition, sums, reasoning_gym:NAME"
        ) from None
    except (OSError, ValueError) as error:  # no text, or a path with a NUL
        raise InputError(f"{named} cannot be read as JSON lines ({printable(str(error))})") from None
    found = [
        parse(line, f"{named} line {number}", Path(path).parent)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{named} holds no prompt")
    return found


def parse(line: str, place: str, folder: Path) -> Entry:
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} has half of a surrogate pair, {printable(error.object[error.start])}, which is no text"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({printable(str(error))})") from None
    prompt = given.get("prompt") if isinstance(given, dict) else None
    if not (isinstance(prompt, str) and prompt) and not (
        isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    ):
        raise InputError(f"{place} has no prompt; it takes a text, or messages with role and content")
    texts = {name: given.get(name) for name in ("answer", "teacher_id", "teacher_context", "completion")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place} has {name} of {type(value).__name__}; it takes text")
    images = given.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError(f"{place} has images that are no list of files")
    places = tuple(os.fspath(folder / image) for image in images)
    return Entry(
        prompt, texts["answer"], texts["teacher_id"] or "", texts["teacher_context"], places, texts["completion"]
    )


def refuse_prompts(options: DistillOptions, task: Task) -> None:
    """Raises InputError for training prompts that would end a run on its way, or be answered now from here, now from there."""
    entries, teachers = task.examples(), options.teachers
    for entry in entries:
        if teachers and not teachers.keys() & {entry.teacher_id, ""}:
            raise InputError(
                f"{called(entry)} has the teacher_id {printable(entry.teacher_id)!r} and no teacher has it; the teachers are {', '.join(map(printable, teachers))}"
            )
    if options.on_policy_fraction < 1:
        lacking = [entry for entry in entries if entry.completion is None]
        if lacking and len(lacking) < len(entries):
            raise InputError(
                f"{called(lacking[0])} has no `completion` and others have one; give every prompt one, or none"
            )
        if lacking and (len(teachers) != 1 or SELF in teachers.values()):
            raise InputError(
                "a step that is not on-policy needs `completion` in every prompt, or one teacher that is a model of its own"
            )
    refuse_images(entries)
    if options.reward_weight:
        refuse_answers(entries, task.reward)


def refuse_images(entries: Sequence[Entry]) -> None:
    """Raises InputError for an image that is not there."""
    for place in dict.fromkeys(place for entry in entries for place in entry.images):
        if not os.path.isfile(place):
            raise InputError(f"an image of a prompt cannot be read ({printable(place)} is no file)")


def refuse_answers(entries: Sequence[Entry], reward: str) -> None:
    """Raises InputError for a prompt that `exact` cannot find answered."""
    for entry in entries if reward == "exact" else ():
        if entry.answer is None:
            raise InputError(
                f"{called(entry)} has no `answer`, which the reward exact compares with; give it one, or another reward"
            )
        if "\n" in entry.answer.strip():
            raise InputError(
                f"{called(entry)} has an `answer` of several lines, and the reward exact looks at one line; give one, or another reward"
            )


def called(entry: Entry) -> str:
    return f"the prompt {printable(str(entry.prompt))[:80]!r}"


def permuted(place: int, n: int, key: str) -> int:
    """Where a permutation of n, drawn by a key, puts a place: a Feistel network over the next square, walked until it is inside.

    >>> sorted(permuted(i, 10, "a") for i in range(10)) == list(range(10))
    True
    """
    half = max(1, math.ceil(math.sqrt(n)))
    while True:
        left, right = divmod(place, half)
        for turn in turns(key):
            left, right = right, (left + mix(right ^ turn)) % half
        place = left * half + right
        if place < n:
            return place


@functools.lru_cache(maxsize=64)
def turns(key: str) -> tuple[int, ...]:
    """The numbers that a key puts into each turn of `permuted`."""
    return tuple(random.Random(f"{key}/{turn}").getrandbits(64) for turn in range(4))


def mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ x >> 31


def scorer(name: str) -> Score:
    """The function that a reward's name stands for. Raises UsageError where there is none."""
    if name == "exact":
        return exact
    module, _, function = name.partition(":")
    if not all(module.split(".")):
        raise UsageError(f"there is no reward {printable(name)}; it is exact or package.module:function")
    here = os.getcwd()
    sys.path.insert(0, here)  # which an installed command does not look into
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"there is no reward {printable(name)} ({printable(str(error))}); it is exact or package.module:function"
        ) from None
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the reward {printable(name)} cannot be imported ({type(error).__name__}: {printable(str(error))[:200]}); mend {printable(module)}, and run the same command again"
        ) from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"the reward {printable(name)} is not a function")
    return found


def exact(prompt: Any, answer: str | None, completion: str) -> float:
    """1 where the completion's first line is the answer.

    >>> exact("1+1=", "2", " 2\\n3+4=7"), exact("1+1=", "2", "23")
    (1.0, 0.0)
    """
    if answer is None:
        raise ValueError("the prompt has no answer")
    return float(completion.strip().partition("\n")[0].strip() == answer.strip())
