"""Counts of one tensor along a trajectory that need several checkpoints at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.analysis.common_tensors import Elements, base_elements, bytes_per_element, read_slice
from opdkernels.analysis.tallying import slices
from opdkernels.checkpoint.match import Match, Pair
from opdkernels.metrics.batch import to_bf16_bits
from opdkernels.metrics.tallies import TallyRecord
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, Tally, delta, exact_float, from_limbs
from opdkernels.ops.overlap import MAX_RUNS, Overlap, overlap
from opdkernels.progress import Progress


@dataclass(frozen=True)
class TensorTotals:
    """Totals of a tensor's tally: finite coordinates, those that visibly changed, and the exact sums of W^2 and
    delta^2 in units of 2^-1074."""

    finite: int
    changed: int
    base_sq: int
    delta_sq: int

    @classmethod
    def of(cls, record: TallyRecord) -> TensorTotals | None:
        """None if the tensor failed or contains NaN or Inf."""
        tally = record.tally
        if tally is None or tally.nonfinite:
            return None
        return cls(
            tally.finite, int(tally.changed("visible").sum()), from_limbs(tally.sums[0]), from_limbs(tally.sums[2])
        )


@dataclass
class TensorTrajectory:
    """One tensor of the base along the run; every array is int64 or float64 [checkpoints].

    Attributes:
        match: The tensor in the first checkpoint.
        finite: Number of finite coordinates.
        base_energy: Sum of W^2.
        changed: Coordinates with visible |delta| > atol.
        shared: Coordinates changed at this checkpoint and at the last one.
        expected: Expected `shared` if changes were independent within each |W|; 0 at the last checkpoint.
        changed_since: Coordinates that visibly differ from the previous checkpoint.
        energy: Sum of delta^2.
        dot: Sum of delta times the last delta.
        step_energy: Sum of squared differences to the previous checkpoint.
    """

    match: Match
    finite: int
    base_energy: float
    changed: np.ndarray
    shared: np.ndarray
    expected: np.ndarray
    changed_since: np.ndarray
    energy: np.ndarray
    dot: np.ndarray
    step_energy: np.ndarray


class TrajectoryCounter:
    """Accumulates the counts of one tensor along the run from slices of it.

    `overlap` compares at most MAX_RUNS checkpoints at once, so they are counted in groups that all contain the last
    one.
    """

    def __init__(self, steps: int, threshold_bits: int):
        last, others = steps - 1, range(steps - 1)
        self.groups = [[*others[i : i + MAX_RUNS - 1], last] for i in range(0, last, MAX_RUNS - 1)]
        self.threshold_bits = threshold_bits
        self.overlaps = [Overlap.empty(len(group), threshold_bits) for group in self.groups]
        self.to_last = [Tally.empty(DEFAULT_THRESHOLD_BITS) for _ in others]
        self.since = [Tally.empty(DEFAULT_THRESHOLD_BITS) for _ in others[1:]]

    def reset(self) -> None:
        """Sets all counts to zero."""
        for tally in (*self.to_last, *self.since):
            tally.reset()
        for counts in self.overlaps:
            for array in counts.arrays:
                array.fill(0)

    def add(self, w: torch.Tensor, trained: Sequence[torch.Tensor]) -> None:
        """Counts one slice: of the base and of every checkpoint."""
        for group, counts in zip(self.groups, self.overlaps, strict=True):
            overlap(w, [trained[i] for i in group], threshold_bits=self.threshold_bits, out=counts)
        for tensor, tally in zip(trained, self.to_last, strict=False):
            delta(tensor, trained[-1], out=tally)
        for tensor, following, tally in zip(trained, trained[1:], self.since, strict=False):
            delta(tensor, following, out=tally)

    def result(self, match: Match, totals: Sequence[TensorTotals]) -> TensorTrajectory:
        """The trajectory of a tensor whose slices were all counted. totals: against the base, one per checkpoint."""
        steps = len(totals)
        changed, shared, expected = np.zeros(steps, np.int64), np.zeros(steps, np.int64), np.zeros(steps)
        for group, counts in zip(self.groups, self.overlaps, strict=True):
            last = len(group) - 1
            for i, step in enumerate(group):
                changed[step], shared[step] = counts.n_changed(i), counts.n_both(i, last)
                expected[step] = counts.expected_magnitude(i, last) if i != last else 0
        energies = [total.delta_sq for total in totals]
        to_last = [*(tally.sum_delta_sq for tally in self.to_last), 0]
        since = [*self.since, self.to_last[-1]]
        dots = [
            exact_float(energy + energies[-1] - distance) / 2
            for energy, distance in zip(energies, to_last, strict=True)
        ]
        return TensorTrajectory(
            match,
            totals[0].finite,
            exact_float(totals[0].base_sq),
            changed,
            shared,
            expected,
            np.array([totals[0].changed, *(int(tally.hist_base_over[0].sum()) for tally in since)]),
            np.array([exact_float(energy) for energy in energies]),
            np.array(dots),
            np.array([exact_float(energies[0]), *(exact_float(tally.sum_delta_sq) for tally in since)]),
        )


def count_trajectories(
    pairs: Sequence[Pair],
    totals: Sequence[dict[Elements, TensorTotals | None]],
    common: list[list[Match]],
    atol: float,
    memory: int,
    progress: Progress,
) -> list[TensorTrajectory]:
    """The trajectory of every common tensor; tensors that failed or contain NaN or Inf in any checkpoint are left out.

    Args:
        pairs: The base with each checkpoint.
        totals: `TensorTotals` of each checkpoint by the elements of the base.
        common: Matches of the tensors that every checkpoint has.
        atol: Threshold of visible |delta| for a changed coordinate.
        memory: Bytes for the buffers of slices.
        progress: Called with bytes done, total bytes and the name of the tensor.
    """
    total, done = sum(matches[0].numel * bytes_per_element(matches) for matches in common), 0
    trajectories = []
    counter = TrajectoryCounter(len(pairs), to_bf16_bits(atol))
    for matches in common:
        first, size = matches[0], bytes_per_element(matches)
        known = [
            tensor_totals for checkpoint in totals if (tensor_totals := checkpoint[base_elements(first)]) is not None
        ]
        if len(known) == len(pairs):
            counter.reset()
            for begin, end in slices(first.numel, size, memory):
                w, *trained = read_slice(pairs, matches, begin, end)
                counter.add(w, trained)
                progress(done + end * size, total, first.name)
            trajectories.append(counter.result(first, known))
        done += first.numel * size
        progress(done, total, first.name)
    return trajectories
