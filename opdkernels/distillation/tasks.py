"""Sources of prompts and rewards: JSON lines, examples in memory, two addition tasks, and the tasks of reasoning_gym.

A task is an endless sequence of examples: example i is the same on every machine, so that a run resumes from the number
of its step alone.
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
from typing import Any

import torch

from opdkernels.distillation.examples import Example, describe, read_examples
from opdkernels.distillation.options import SELF, DistillOptions
from opdkernels.errors import InputError, UsageError, printable

Reward = Callable[[Any, str | None, str], float]  # (prompt, answer, completion) -> reward
WORKED_LINES = "12+13+20=45\n41+29+11=81\n"
MAX_REWARD = torch.finfo(torch.float32).max
NUM_PAIRS, NUM_TRAIN_PAIRS = 10_000, 8_000  # pairs of two-digit numbers, 00 to 99


class Task(ABC):
    """Prompts to train on, held-out prompts, and the reward of a completion."""

    def __init__(self, reward: str = "exact", reward_fn: Reward | None = None):
        """`reward` is the name of the reward, `reward_fn` the function if it is not found by its name."""
        self.reward, self._score = reward, reward_fn or find_reward(reward)

    @abstractmethod
    def example(self, i: int) -> Example:
        """Training example i = 0, 1, ..., without end."""

    @abstractmethod
    def eval_examples(self, n: int) -> list[Example]:
        """The first n held-out examples, or as many as there are."""

    def representative_examples(self) -> list[Example]:
        """Training examples to validate: all examples of a file, the first one of a generated task."""
        return [self.example(0)]

    def score(self, example: Example, completion: str) -> float:
        """Reward of a completion. Raises InputError if the reward function fails or is not finite."""
        name, prompt = self.reward, printable(str(example.prompt))[:80]
        try:
            value = float(self._score(example.prompt, example.answer, completion))
        except (Exception, SystemExit) as error:
            raise InputError(
                f"the reward {name} failed on {prompt} ({type(error).__name__}: {printable(str(error))[:200]}); "
                "fix it and run the same command again"
            ) from None
        if not abs(value) <= MAX_REWARD:
            raise InputError(f"the reward {name} gave {value} on {prompt}; it must be a finite number in fp32's range")
        return value


class ExamplesTask(Task):
    """Examples in memory, in an order that each epoch draws anew."""

    def __init__(
        self,
        examples: Sequence[Example],
        eval_examples: Sequence[Example] = (),
        *,
        seed: int = 0,
        reward: str = "exact",
        reward_fn: Reward | None = None,
    ):
        super().__init__(reward, reward_fn)
        self.train, self.held_out, self.seed = list(examples), list(eval_examples), seed

    def example(self, i: int) -> Example:
        epoch, index = divmod(i, len(self.train))
        return self.train[permuted(index, len(self.train), f"{self.seed}/{epoch}")]

    def eval_examples(self, n: int) -> list[Example]:
        return self.held_out[:n]

    def representative_examples(self) -> list[Example]:
        return self.train


class JsonlTask(ExamplesTask):
    """Examples from files of JSON lines."""

    def __init__(
        self, path: str, eval_path: str, *, seed: int = 0, reward: str = "exact", reward_fn: Reward | None = None
    ):
        held_out = read_examples(eval_path) if eval_path else []
        super().__init__(read_examples(path), held_out, seed=seed, reward=reward, reward_fn=reward_fn)


class Addition(Task):
    """Two two-digit numbers, "07+45=", with the three-digit sum "052": 8,000 pairs to train on, 2,000 held out."""

    def __init__(self, seed: int, reward: str = "exact", reward_fn: Reward | None = None):
        super().__init__(reward, reward_fn)
        self.seed = seed

    @staticmethod
    def example_of_pair(pair: int) -> Example:
        a, b = divmod(pair, 100)
        return Example(f"{a:02}+{b:02}=", f"{a + b:03}")

    def example(self, i: int) -> Example:
        epoch, index = divmod(i, NUM_TRAIN_PAIRS)
        index = permuted(index, NUM_TRAIN_PAIRS, f"{self.seed}/{epoch}")
        return self.example_of_pair(permuted(index, NUM_PAIRS, "pairs"))

    def eval_examples(self, n: int) -> list[Example]:
        indices = range(NUM_TRAIN_PAIRS, min(NUM_PAIRS, NUM_TRAIN_PAIRS + n))
        return [self.example_of_pair(permuted(index, NUM_PAIRS, "pairs")) for index in indices]


class Sums(Task):
    """Three numbers from 10 to 99 after two worked lines; a ninth of all triples is held out."""

    def __init__(self, seed: int, reward: str = "exact", reward_fn: Reward | None = None):
        super().__init__(reward, reward_fn)
        self.seed = seed

    @staticmethod
    def draw(key: str, held_out: bool) -> Example:
        generator = random.Random(key)
        while True:
            a, b, c = (generator.randrange(10, 100) for _ in range(3))
            if ((a + 7 * b + 31 * c) % 9 == 0) == held_out:
                return Example(f"{WORKED_LINES}{a}+{b}+{c}=", str(a + b + c))

    def example(self, i: int) -> Example:
        return self.draw(f"{self.seed}/{i}", False)

    def eval_examples(self, n: int) -> list[Example]:
        return [self.draw(f"held out/{i}", True) for i in range(n)]


class ReasoningGym(Task):
    """A task of reasoning_gym, with its own reward.

    reasoning_gym draws item i of a data set from its seed + i. Each seed of a run therefore gets a separate range;
    the held-out items are another range, the same for all seeds.
    """

    SIZE = 1 << 20
    SEEDS = (1 << 32) // SIZE - 1  # NumPy takes seeds below 2^32

    def __init__(self, name: str, seed: int, reward: str = "", reward_fn: Reward | None = None):
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
            self.held_out = create_dataset(name, size=self.SIZE, seed=0)
        except ValueError as error:
            raise UsageError(f"reasoning_gym has no task {printable(name)} ({printable(str(error))[:200]})") from None
        super().__init__(reward or f"reasoning_gym:{name}", reward_fn or self.score_answer)

    def score_answer(self, prompt: Any, answer: str | None, completion: str) -> float:
        return self.data.score_answer(completion.strip(), json.loads(answer or "{}"))

    @staticmethod
    def example_of_item(item: dict[str, Any]) -> Example:
        return Example([{"role": "user", "content": item["question"]}], json.dumps(item, default=str))

    def example(self, i: int) -> Example:
        return self.example_of_item(self.data[i % len(self.data)])

    def eval_examples(self, n: int) -> list[Example]:
        return [self.example_of_item(self.held_out[i]) for i in range(n)]


def open_task(
    prompts: str,
    eval_prompts: str = "",
    *,
    seed: int = 0,
    reward: str = "exact",
    reward_fn: Reward | None = None,
) -> Task:
    """The task that `prompts` names.

    Args:
        prompts: File of JSON lines, or addition, sums or reasoning_gym:NAME.
        eval_prompts: File of held-out prompts, if `prompts` is a file.
        seed: Seed of the order of examples.
        reward: Name of the reward.
        reward_fn: The reward if `reward` is not the name of an importable function.

    Raises:
        InputError: A file cannot be read.
        UsageError: The task or the reward does not exist.
    """
    kind, _, name = prompts.partition(":")
    if eval_prompts and (prompts in ("addition", "sums") or kind == "reasoning_gym"):
        raise UsageError(f"the task {prompts} has its own held-out prompts; remove eval_prompts")
    if reward != "exact" and reward_fn is None and kind == "reasoning_gym":
        raise UsageError(f"the task {prompts} has its own reward; remove reward")
    if prompts in ("addition", "sums"):
        return (Addition if prompts == "addition" else Sums)(seed, reward, reward_fn)
    if kind == "reasoning_gym":
        return ReasoningGym(name, seed, reward if reward_fn else "", reward_fn)
    return JsonlTask(prompts, eval_prompts, seed=seed, reward=reward, reward_fn=reward_fn)


def validate_prompts(options: DistillOptions, task: Task) -> None:
    """Raises InputError for training prompts that would stop the run later, or that mix two sources of completions."""
    examples, teachers = task.representative_examples(), options.teachers
    for example in examples:
        if teachers and not teachers.keys() & {example.teacher_id, ""}:
            raise InputError(
                f"{describe(example)} has the teacher_id {printable(example.teacher_id)!r} and no teacher has it; "
                f"the teachers are {', '.join(map(printable, teachers))}"
            )
    if options.on_policy_fraction < 1:
        missing = [example for example in examples if example.completion is None]
        if missing and len(missing) < len(examples):
            raise InputError(
                f"{describe(missing[0])} has no `completion` and others have one; give every prompt one, or none"
            )
        if missing and (len(teachers) != 1 or SELF in teachers.values()):
            raise InputError(
                "an off-policy step needs `completion` in every prompt, or exactly one teacher that is not self"
            )
    validate_images(examples)
    if options.reward_weight:
        validate_answers(examples, task.reward)


def validate_images(examples: Sequence[Example]) -> None:
    """Raises InputError for an image file that does not exist."""
    for path in dict.fromkeys(path for example in examples for path in example.images):
        if not os.path.isfile(path):
            raise InputError(f"an image of a prompt cannot be read ({printable(path)} is not a file)")


def validate_answers(examples: Sequence[Example], reward: str) -> None:
    """Raises InputError for an example whose answer the reward `exact` cannot compare."""
    for example in examples if reward == "exact" else ():
        if example.answer is None:
            raise InputError(
                f"{describe(example)} has no `answer`, which the reward exact needs; add it, or choose another reward"
            )
        if "\n" in example.answer.strip():
            raise InputError(
                f"{describe(example)} has an `answer` of several lines, and the reward exact compares one line; "
                "shorten it, or choose another reward"
            )


def permuted(index: int, n: int, key: str) -> int:
    """The image of `index` under a permutation of range(n) that `key` selects: a Feistel network over the next square
    number, repeated until the result is below n.

    >>> sorted(permuted(i, 10, "a") for i in range(10)) == list(range(10))
    True
    """
    half = max(1, math.ceil(math.sqrt(n)))
    while True:
        left, right = divmod(index, half)
        for round_key in round_keys(key):
            left, right = right, (left + splitmix64(right ^ round_key)) % half
        index = left * half + right
        if index < n:
            return index


@functools.lru_cache(maxsize=64)
def round_keys(key: str) -> tuple[int, ...]:
    """Keys of the four rounds of `permuted`."""
    return tuple(random.Random(f"{key}/{i}").getrandbits(64) for i in range(4))


def splitmix64(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    return x ^ x >> 31


def find_reward(name: str) -> Reward:
    """The reward function of a name: exact, or package.module:function, also from the working directory.

    Raises UsageError if there is no such function.
    """
    if name == "exact":
        return exact
    module, _, function = name.partition(":")
    if not all(module.split(".")):
        raise UsageError(f"there is no reward {printable(name)}; give exact or package.module:function")
    cwd = os.getcwd()
    sys.path.insert(0, cwd)  # not on the path of an installed command
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"there is no reward {printable(name)} ({printable(str(error))}); give exact or package.module:function"
        ) from None
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the reward {printable(name)} cannot be imported ({type(error).__name__}: {printable(str(error))[:200]}); "
            f"fix {printable(module)} and run the same command again"
        ) from None
    finally:
        sys.path.remove(cwd)
    if not callable(reward):
        raise UsageError(f"the reward {printable(name)} is not a function")
    return reward


def exact(prompt: Any, answer: str | None, completion: str) -> float:
    """1 if the completion's first line equals the answer, else 0; surrounding white space is ignored.

    >>> exact("1+1=", "2", " 2\\n3+4=7"), exact("1+1=", "2", "23")
    (1.0, 0.0)
    """
    if answer is None:
        raise ValueError("the prompt has no answer")
    return float(completion.strip().partition("\n")[0].strip() == answer.strip())
