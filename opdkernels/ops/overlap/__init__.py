r"""`overlap`: which coordinates two or more runs from one base model changed, from one pass; and the expected overlap.

For W (base) and runs W'_r, per coordinate: run r changed it where |bf16(bf16(W'_r) - bf16(W))| > threshold, the visible
view. The pass makes histograms of |W| over all coordinates and over those that each run changed, counts the coordinates
that each pair of runs changed, and the coordinates that exactly j runs changed. A coordinate is excluded, and counted
as non-finite, where any of the tensors or any visible delta is not finite.

Chance level: if the changes of run b were placed at random among all coordinates, or among those with the same |W|, or
among those with nearly the same |W| in the same row or column, the count of coordinates that both runs changed would be
hypergeometric in each such stratum:

    mean n_a n_b / n        variance n_a n_b (n - n_a) (n - n_b) / (n^2 (n - 1))

Two unrelated dense updates stored in bf16 overlap far beyond the uniform chance level, because only small weights can
change visibly. A claim about overlap therefore needs the magnitude-conditioned chance level and its z-score.

Source: arXiv 2606.13657 (overlap and uniform chance level); the strata are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.backends.layout import BINS, INFINITY_BITS
from opdkernels.ops import register, to_local
from opdkernels.ops.arguments import validate_input, validate_memory, validate_tensor
from opdkernels.ops.delta import DTYPES, bf16_bits
from opdkernels.ops.overlap.layout import COUNT_NONFINITE, COUNT_NUMEL, MAX_RUNS, NUM_COUNTS

DEFAULT_THRESHOLD_BITS = 0x3728  # bf16(1e-5) = 1.00136e-5, to which the paper's reference script rounds its threshold
STRATA = ("row", "column")
CLASS_SHIFT = 6  # a class of |W|: its bf16 bits without six mantissa bits, so exponent and top mantissa bit
CLASSES = BINS >> CLASS_SHIFT
STRATA_LINES, STRATA_TILE = 1 << 10, 1 << 20  # rows or columns counted at a time, coordinates widened at a time

SCHEMA = (
    "overlap_(Tensor base, Tensor[] trained, int threshold_bits, Tensor(a!) hist_base, Tensor(b!) hist_changed, "
    "Tensor(c!) both, Tensor(d!) hist_num_runs, Tensor(e!) counts) -> ()"
)


def fake(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,
    hist_changed: torch.Tensor,
    both: torch.Tensor,
    hist_num_runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    for tensor in trained:
        torch._check(base.numel() == tensor.numel(), lambda: "the runs' sizes differ from the base's")


def changes(
    base: torch.Tensor, trained: Sequence[torch.Tensor], threshold_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits of |W|, int64 [n]; which runs changed a coordinate, bool [R, n]; which coordinates are finite, bool [n]."""
    w = base.float().bfloat16()
    magnitude = bf16_bits(w) & 0x7FFF
    finite, changed = magnitude < INFINITY_BITS, []
    for tensor in trained:
        v = tensor.float().bfloat16()
        visible = bf16_bits((v.float() - w.float()).bfloat16()) & 0x7FFF
        finite = finite & ((bf16_bits(v) & 0x7FFF) < INFINITY_BITS) & (visible < INFINITY_BITS)
        changed.append(visible > threshold_bits)
    return magnitude, torch.stack(changed), finite


def reference(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,  # int64 [BINS]
    hist_changed: torch.Tensor,  # int64 [R, BINS]
    both: torch.Tensor,  # int64 [R, R]
    hist_num_runs: torch.Tensor,  # int64 [R + 1]
    counts: torch.Tensor,  # int64 [NUM_COUNTS]
) -> None:
    """The definition, in plain PyTorch. Adds to every output."""
    magnitude, change, finite = changes(base.flatten(), [tensor.flatten() for tensor in trained], threshold_bits)
    counts[COUNT_NUMEL] += base.numel()
    counts[COUNT_NONFINITE] += (~finite).sum()
    magnitude, change = magnitude[finite], change[:, finite]
    hist_base += torch.bincount(magnitude, minlength=BINS)
    for a in range(len(trained)):
        hist_changed[a] += torch.bincount(magnitude[change[a]], minlength=BINS)
        for b in range(len(trained)):
            both[a, b] += (change[a] & change[b]).sum()
    hist_num_runs += torch.bincount(change.sum(0), minlength=len(trained) + 1)


def validate(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    threshold_bits: int,
    hist_base: torch.Tensor,
    hist_changed: torch.Tensor,
    both: torch.Tensor,
    hist_num_runs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    device, num_runs = base.device, len(trained)
    validate_num_runs(num_runs, threshold_bits)
    validate_input("base", base, DTYPES, device)
    for r, tensor in enumerate(trained):
        validate_input(f"run {r}", tensor, DTYPES, device, base.numel())
    shapes = {"hist_base": (BINS,), "hist_changed": (num_runs, BINS), "both": (num_runs, num_runs)}
    shapes |= {"hist_num_runs": (num_runs + 1,), "counts": (NUM_COUNTS,)}
    written = (hist_base, hist_changed, both, hist_num_runs, counts)
    for (name, shape), tensor in zip(shapes.items(), written, strict=True):
        validate_tensor(name, tensor, torch.int64, shape, device)
    validate_memory(written, [base, *trained])


def validate_num_runs(num_runs: int, threshold_bits: int) -> None:
    """Raise ValueError unless the number of runs and the threshold are in range."""
    if not 2 <= num_runs <= MAX_RUNS:
        raise ValueError(f"overlap takes 2 to {MAX_RUNS} runs, not {num_runs}")
    if not 0 <= threshold_bits < INFINITY_BITS:
        raise ValueError(f"threshold_bits must be a bf16 magnitude below 0x7F80, not {threshold_bits}")


register("overlap", SCHEMA, reference, fake, validate=validate)


def expected_uniform(n_a, n_b, n) -> np.ndarray:
    """Expected size of the intersection of two random subsets of n_a and n_b of n coordinates; 0 where n is 0.

    Takes scalars or arrays that broadcast; returns float64 of their shape.

    >>> float(expected_uniform(10, 20, 100))
    2.0
    """
    n_a, n_b, n = (np.asarray(x, np.float64) for x in (n_a, n_b, n))
    return n_a * n_b / np.maximum(n, 1)


def variance_uniform(n_a, n_b, n) -> np.ndarray:
    """Variance of that count (hypergeometric); 0 where n is at most 1."""
    n_a, n_b, n = (np.asarray(x, np.float64) for x in (n_a, n_b, n))
    scale = np.where(n > 1, n * n * (n - 1), 1)
    return np.where(n > 1, n_a * n_b * (n - n_a) * (n - n_b) / scale, 0.0)


def expected_magnitude(base: np.ndarray, changed_a: np.ndarray, changed_b: np.ndarray) -> float:
    """Expected size of the intersection when each set is placed at random within the bins of |W|.

    Args:
        base: Histogram of |W| over all coordinates [bins].
        changed_a: Histogram of |W| over the first set [bins].
        changed_b: Histogram of |W| over the second set [bins].
    """
    return float(expected_uniform(changed_a, changed_b, base).sum())


def variance_magnitude(base: np.ndarray, changed_a: np.ndarray, changed_b: np.ndarray) -> float:
    """Variance of that count: the bins are independent, so their variances add up."""
    return float(variance_uniform(changed_a, changed_b, base).sum())


def z_score(observed: float, expected: float, variance: float) -> float:
    """Standard deviations between the observed and the expected count; 0 if the variance is 0.

    Tensors are independent strata too: for a model pass the sums over its tensors.
    """
    return float((observed - expected) / np.sqrt(variance)) if variance > 0 else 0.0


def fraction(part: float, total: float) -> float:
    """part / total, NaN if total is 0."""
    return part / total if total else float("nan")


@dataclass
class Overlap:
    """The counts of `overlap` for R runs. All are integers, so `merge` is exact, associative and commutative.

    Fractions are NaN where their denominator is 0.

    Attributes:
        threshold_bits: bf16 bits of the threshold of visible |delta|.
        hist_base: Histogram of |W|, int64 [32768].
        hist_changed: Histogram of |W| over the coordinates that run r changed, int64 [R, 32768].
        both: Coordinates that runs a and b both changed, int64 [R, R]; the diagonal counts those that run a changed.
        hist_num_runs: Coordinates that exactly j runs changed, int64 [R + 1].
        counts: Coordinates in total and non-finite ones, int64 [2].
    """

    threshold_bits: int
    hist_base: np.ndarray
    hist_changed: np.ndarray
    both: np.ndarray
    hist_num_runs: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, n_runs: int, threshold_bits: int = DEFAULT_THRESHOLD_BITS) -> Overlap:
        """Counts of no coordinates: the neutral element of `merge`."""
        shapes = ((BINS,), (n_runs, BINS), (n_runs, n_runs), (n_runs + 1,), (NUM_COUNTS,))
        return cls(threshold_bits, *(np.zeros(shape, np.int64) for shape in shapes))

    arrays = property(
        lambda self: (self.hist_base, self.hist_changed, self.both, self.hist_num_runs, self.counts),
        doc="The arrays in the order of the operator's outputs.",
    )
    n_runs = property(lambda self: len(self.hist_changed), doc="Number of runs, R.")
    numel = property(lambda self: int(self.counts[COUNT_NUMEL]), doc="Coordinates, non-finite ones included.")
    nonfinite = property(
        lambda self: int(self.counts[COUNT_NONFINITE]), doc="Coordinates excluded from everything else."
    )
    finite = property(lambda self: self.numel - self.nonfinite, doc="Coordinates that the histograms count.")

    def n_changed(self, a: int) -> int:
        """Coordinates that run a changed."""
        return int(self.both[a, a])

    def n_both(self, a: int, b: int) -> int:
        """Coordinates that runs a and b both changed."""
        return int(self.both[a, b])

    def n_either(self, a: int, b: int) -> int:
        """Coordinates that run a or run b changed."""
        return self.n_changed(a) + self.n_changed(b) - self.n_both(a, b)

    def density(self, a: int) -> float:
        """Fraction of the coordinates that run a changed: the uniform chance level of the coverage of any run by a."""
        return fraction(self.n_changed(a), self.finite)

    def coverage(self, a: int, b: int) -> float:
        """|A and B| / |A|: the fraction of the changes of run a that run b changed too."""
        return fraction(self.n_both(a, b), self.n_changed(a))

    def jaccard(self, a: int, b: int) -> float:
        """|A and B| / |A or B|."""
        return fraction(self.n_both(a, b), self.n_either(a, b))

    def both_zero(self, a: int, b: int) -> float:
        """Fraction of the coordinates that neither run changed."""
        return fraction(self.finite - self.n_either(a, b), self.finite)

    def only(self, a: int, b: int) -> float:
        """Fraction of the coordinates that run a changed and run b did not."""
        return fraction(self.n_changed(a) - self.n_both(a, b), self.finite)

    def expected_uniform(self, a: int, b: int) -> float:
        """Expected count changed in both if changes were uniform over the tensor (the paper's chance level)."""
        return float(expected_uniform(self.n_changed(a), self.n_changed(b), self.finite))

    def expected_magnitude(self, a: int, b: int) -> float:
        """Expected count changed in both if changes were uniform among coordinates with the same |W|."""
        return expected_magnitude(self.hist_base, self.hist_changed[a], self.hist_changed[b])

    def variance_magnitude(self, a: int, b: int) -> float:
        """Variance of that count."""
        return variance_magnitude(self.hist_base, self.hist_changed[a], self.hist_changed[b])

    def over_uniform(self, a: int, b: int) -> float:
        """Observed count over the uniform chance level."""
        return fraction(self.n_both(a, b), self.expected_uniform(a, b))

    def over_magnitude(self, a: int, b: int) -> float:
        """Observed count over the magnitude-conditioned chance level."""
        return fraction(self.n_both(a, b), self.expected_magnitude(a, b))

    def z_magnitude(self, a: int, b: int) -> float:
        """Standard deviations of the observed count above the magnitude-conditioned chance level."""
        return z_score(self.n_both(a, b), self.expected_magnitude(a, b), self.variance_magnitude(a, b))

    def merge(self, other: Overlap) -> Overlap:
        """The counts of the coordinates of both; raises ValueError if thresholds or numbers of runs differ."""
        if (self.threshold_bits, self.n_runs) != (other.threshold_bits, other.n_runs):
            raise ValueError(
                "overlaps with different thresholds or runs do not merge: "
                f"threshold_bits {self.threshold_bits}, {self.n_runs} runs and "
                f"threshold_bits {other.threshold_bits}, {other.n_runs} runs"
            )
        return Overlap(self.threshold_bits, *(a + b for a, b in zip(self.arrays, other.arrays, strict=True)))

    def reset(self) -> None:
        """Set every count to zero."""
        for array in self.arrays:
            array.fill(0)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Overlap)
            and (self.threshold_bits, self.n_runs) == (other.threshold_bits, other.n_runs)
            and all(np.array_equal(a, b) for a, b in zip(self.arrays, other.arrays, strict=True))
        )


def validate_runs(
    base: torch.Tensor, trained: Sequence[torch.Tensor], threshold_bits: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The local, contiguous tensors; raises TypeError or ValueError if they or the threshold do not fit."""
    validate_num_runs(len(trained), threshold_bits)
    base, runs = to_local(base), [to_local(tensor) for tensor in trained]
    for name, tensor in (("base", base), *((f"run {r}", tensor) for r, tensor in enumerate(runs))):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; overlap takes bfloat16, float16, float32 and float64")
        if tensor.shape != base.shape:
            raise ValueError(f"shapes differ: base {tuple(base.shape)}, {name} {tuple(tensor.shape)}")
        if tensor.device != base.device:
            raise ValueError(f"base is on {base.device}, {name} on {tensor.device}; move one of them")
    return base, runs


def overlap(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    *,
    threshold_bits: int = DEFAULT_THRESHOLD_BITS,
    out: Overlap | None = None,
) -> Overlap:
    """Count which coordinates two or more runs changed, in one pass over the base and all runs.

    Args:
        base: W: bf16, fp16, fp32 or fp64, any shape. Copied only if not contiguous; of a DTensor, the local shard.
        trained: 2 to 16 runs W'_r: same shape and device as `base`; the dtypes may differ.
        threshold_bits: A bf16 magnitude, as bits (0x3728 is 1.00136e-5); a coordinate is changed where visible |delta|
            exceeds it.
        out: Counts with the same threshold and number of runs that are added to in place and returned.

    Returns:
        The counts of the runs.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes, devices, the threshold, the number of runs or `out` do not fit.

    Examples:
        >>> result = overlap(torch.zeros(4), [torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 1, 1, 0])])
        >>> result.n_both(0, 1), result.coverage(0, 1), result.hist_num_runs.tolist()
        (1, 0.5, [1, 2, 1])
    """
    base, runs = validate_runs(base, trained, threshold_bits)
    if out is not None and (out.threshold_bits, out.n_runs) != (threshold_bits, len(runs)):
        raise ValueError(
            f"out has threshold_bits {out.threshold_bits} and {out.n_runs} runs, not {threshold_bits} and {len(runs)}"
        )
    result = Overlap.empty(len(runs), threshold_bits) if out is None else out
    arrays = [torch.from_numpy(array) for array in result.arrays]
    outputs = [array.to(base.device) for array in arrays]
    torch.ops.opdkernels.overlap_(base, runs, threshold_bits, *outputs)
    if base.device.type != "cpu":
        for array, output in zip(arrays, outputs, strict=True):
            array.copy_(output)
    return result


def line_counts(tensors: Sequence[torch.Tensor], threshold_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts by (row, class of |W|), STRATA_LINES rows at a time.

    Yields the counts of all coordinates [rows * CLASSES] and of each run's changed ones [R, rows * CLASSES].
    """
    rows, columns = tensors[0].shape
    for top in range(0, rows, STRATA_LINES):
        n_lines = min(STRATA_LINES, rows - top)
        n = torch.zeros(n_lines * CLASSES, dtype=torch.int64)
        n_changed = torch.zeros(len(tensors) - 1, n_lines * CLASSES, dtype=torch.int64)
        width = STRATA_TILE // n_lines
        for left in range(0, columns, width):
            base, *trained = (tensor[top : top + n_lines, left : left + width].contiguous() for tensor in tensors)
            magnitude, change, finite = changes(base, trained, threshold_bits)
            stratum = (magnitude >> CLASS_SHIFT) + CLASSES * torch.arange(n_lines, device=base.device)[:, None]
            n += torch.bincount(stratum[finite], minlength=len(n)).cpu()
            for r in range(len(trained)):
                n_changed[r] += torch.bincount(stratum[finite & change[r]], minlength=len(n)).cpu()
        yield n.numpy(), n_changed.numpy()


def strata_chance(
    base: torch.Tensor,
    trained: Sequence[torch.Tensor],
    strata: str,
    *,
    threshold_bits: int = DEFAULT_THRESHOLD_BITS,
) -> tuple[np.ndarray, np.ndarray]:
    """Chance level of the counts changed in both, conditioned on the row or column and on a class of |W|.

    A class of |W| is its exponent and top mantissa bit. The diagonals compare a run with an independent one that
    changes as many coordinates per stratum. Memory: 4 MB per run and some 20 MB, for any size of the tensor.

    Args:
        base: As `overlap`, but 2-D.
        trained: As `overlap`, but 2-D.
        strata: "row" or "column".
        threshold_bits: As `overlap`.

    Returns:
        Expected counts and their variances, float64 [R, R] each.

    Raises:
        TypeError: As `overlap`.
        ValueError: As `overlap`, or the tensors are not matrices, or another value of `strata`.

    Examples:
        >>> w = torch.ones(2, 4)
        >>> v = w + torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
        >>> strata_chance(w, [v, v], "row")[0][0, 1], overlap(w, [v, v]).expected_uniform(0, 1)
        (np.float64(4.0), 2.0)
    """
    if strata not in STRATA:
        raise ValueError(f"strata must be one of {', '.join(STRATA)}, not {strata}")
    base, runs = validate_runs(base, trained, threshold_bits)
    if base.ndim != 2:
        raise ValueError(f"strata are rows or columns of a matrix; base has shape {tuple(base.shape)}")
    tensors = [base, *runs] if strata == "row" else [tensor.mT for tensor in (base, *runs)]
    expected, variance = np.zeros((2, len(runs), len(runs)))
    for n, n_changed in line_counts(tensors, threshold_bits):
        for a in range(len(runs)):
            for b in range(len(runs)):
                expected[a, b] += expected_uniform(n_changed[a], n_changed[b], n).sum()
                variance[a, b] += variance_uniform(n_changed[a], n_changed[b], n).sum()
    return expected, variance
