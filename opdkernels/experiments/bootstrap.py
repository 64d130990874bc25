"""Scores of an experiment's arms with 95 % intervals, by resampling prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

START = "start"  # the row of the student before training
RESAMPLES = 10_000
BLOCK = 500  # draws at a time: bounds the memory


def table_rows(
    scores: Mapping[str, list[list[float]]], final: Mapping[str, list[dict[str, Any]]], reference_arm: str
) -> list[dict[str, Any]]:
    """One row per arm: mean score, the fraction of the reference gain that it retains, and means of its final metrics.

    The gain of an arm is its score minus that of the start. If the interval of the reference arm's gain contains 0, no
    fraction of it is given.

    Args:
        scores: Scores by arm, [seeds, prompts]; includes `START` and the reference arm.
        final: Metrics at the end of each arm's run, one dictionary per seed.
        reference_arm: Name of the arm whose gain the others are compared with.

    Returns:
        One dictionary per arm, `START` first; a value with an interval has keys NAME, NAME_low and NAME_high.
    """
    arrays = {name: np.array(values) for name, values in scores.items()}  # [seeds, prompts]
    draws = resample_means(arrays)
    gain_draws = draws[reference_arm] - draws[START]
    gain = arrays[reference_arm].mean() - arrays[START].mean()
    gain_is_positive = np.quantile(gain_draws, 0.025) > 0
    rows = [{"arm": START, **with_ci("score", arrays[START].mean(), draws[START])}]
    for name, metrics in final.items():
        row = {"arm": name, **with_ci("score", arrays[name].mean(), draws[name])}
        if gain_is_positive:
            row |= with_ci(
                "gain_retained",
                (arrays[name].mean() - arrays[START].mean()) / gain,
                (draws[name] - draws[START]) / np.where(gain_draws > 0, gain_draws, np.nan),
            )
        rows.append(row | {key: mean_of_known([of_seed[key] for of_seed in metrics]) for key in metrics[0]})
    return rows


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def resample_means(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bootstrap draws of each arm's mean score, [RESAMPLES].

    Prompts and seeds are resampled, the same draws for all arms, and the same prompts for all seeds, as in the runs.
    The variance of a resampled mean over n seeds is (n - 1) / n of that of the seeds, so deviations between seeds are
    scaled by sqrt(n / (n - 1)) (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).

    Args:
        scores: Scores by arm, [seeds, prompts].
    """
    num_seeds, num_prompts = next(iter(scores.values())).shape
    scale = (num_seeds / (num_seeds - 1)) ** 0.5 if num_seeds > 1 else 0.0
    generator = np.random.default_rng(0)
    uniform = np.full(num_prompts, 1 / num_prompts)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for first in range(0, RESAMPLES, BLOCK):
        seeds = np.empty((min(BLOCK, RESAMPLES - first), num_seeds), np.int64)
        weights = np.empty((len(seeds), num_prompts))
        for i in range(len(seeds)):
            seeds[i] = generator.integers(num_seeds, size=num_seeds)
            weights[i] = generator.multinomial(num_prompts, uniform) / num_prompts
        for name, values in scores.items():
            seed_means = weights @ values.T  # [draws, seeds]
            mean = seed_means.mean(1)
            drawn_mean = np.take_along_axis(seed_means, seeds, 1).mean(1)
            parts[name].append(mean + scale * (drawn_mean - mean))
    return {name: np.concatenate(draws) for name, draws in parts.items()}


def with_ci(name: str, value: float, draws: np.ndarray) -> dict[str, Any]:
    """A value and its 95 % interval, as three entries."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
