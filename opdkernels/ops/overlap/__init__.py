r"""`overlap`: which coordinates two or more runs changed, of one source, from one pass; and what chance alone would share.

For W (source) and runs W'_r, per coordinate: run r changed it where |bf16(bf16(W'_r) - bf16(W))| > cut, the visible view.
The pass counts |W| of all coordinates and of each run's changed ones, the joint counts, and coordinates changed in exactly
j runs. A coordinate that is not finite in any of the tensors, or whose visible delta is not, is left out and counted.

Chance: were run b's changes placed at random among the coordinates, or among those of the same |W|, or of about the same
|W| in the same row or column, the count of coordinates that both changed would be hypergeometric in each such stratum:

    mean n_a n_b / n        variance n_a n_b (n - n_a) (n - n_b) / (n^2 (n - 1))

Two unrelated dense updates stored in bf16 overlap far beyond uniform chance, since only small weights can visibly move:
an overlap claim stands on the chance within |W| (magnitude), with its z-score.

Source: arXiv 2606.13657 (the overlap and uniform chance); the strata are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opdkernels.ops import localise, register
from opdkernels.ops.delta import BINS, DTYPES, NONFINITE, NUMEL, pattern

DEFAULT_CUT = 0x3728  # bf16(1e-5) = 1.00136e-5, to which the paper's reference script rounds its threshold
MAX_RUNS = 16
STRATA = ("row", "column")
CLASS_SHIFT = 6  # a bf16 magnitude without six mantissa bits: its exponent and top mantissa bit
CLASSES = BINS >> CLASS_SHIFT
STRATA_LINES, STRATA_TILE = 1 << 10, 1 << 20  # rows or columns counted together, coordinates widened together

SCHEMA = (
    "overlap_(Tensor source, Tensor[] trained, int cut, Tensor(a!) source_table, Tensor(b!) changed, Tensor(c!) both, "
    "Tensor(d!) runs, Tensor(e!) counts) -> ()"
)


def fake(source, trained, cut, source_table, changed, both, runs, counts) -> None:
    for tensor in trained:
        torch._check(source.numel() == tensor.numel(), lambda: "the runs' sizes differ from the source's")


def changes(
    source: torch.Tensor, trained: Sequence[torch.Tensor], cut: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|W| patterns int64 [n], which runs changed them bool [R, n], and which coordinates are finite bool [n]."""
    w = source.float().bfloat16()
    magnitude = pattern(w) & 0x7FFF
    finite, changed = magnitude < 0x7F80, []
    for tensor in trained:
        v = tensor.float().bfloat16()
        visible = pattern((v.float() - w.float()).bfloat16()) & 0x7FFF
        finite = finite & ((pattern(v) & 0x7FFF) < 0x7F80) & (visible < 0x7F80)
        changed.append(visible > cut)
    return magnitude, torch.stack(changed), finite


def reference(source, trained, cut, source_table, changed, both, runs, counts) -> None:
    """The definition, in plain PyTorch. Adds to `source_table`, `changed`, `both`, `runs` and `counts`."""
    magnitude, change, finite = changes(source.flatten(), [tensor.flatten() for tensor in trained], cut)
    counts[NUMEL] += source.numel()
    counts[NONFINITE] += (~finite).sum()
    magnitude, change = magnitude[finite], change[:, finite]
    source_table += torch.bincount(magnitude, minlength=BINS)
    for a in range(len(trained)):
        changed[a] += torch.bincount(magnitude[change[a]], minlength=BINS)
        for b in range(len(trained)):
            both[a, b] += (change[a] & change[b]).sum()
    runs += torch.bincount(change.sum(0), minlength=len(trained) + 1)


register("overlap", SCHEMA, reference, fake)


def expected_uniform(n_a, n_b, n) -> np.ndarray:
    """Expected count of coordinates in both of two sets of n_a and n_b of n, placed at random; 0 where n is 0.

    Scalars or arrays that broadcast; float64 of their shape.

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


def expected_magnitude(source: np.ndarray, changed_a: np.ndarray, changed_b: np.ndarray) -> float:
    """Expected count of coordinates in both sets when each is placed at random within the bins of |W|.

    source, changed_a, changed_b: counts [bins] of all coordinates and of either set.
    """
    return float(expected_uniform(changed_a, changed_b, source).sum())


def variance_magnitude(source: np.ndarray, changed_a: np.ndarray, changed_b: np.ndarray) -> float:
    """Variance of that count: the bins are independent, so theirs add up."""
    return float(variance_uniform(changed_a, changed_b, source).sum())


def z_score(observed: float, expected: float, variance: float) -> float:
    """Standard deviations between the observed and the expected count; 0 where chance leaves no choice (variance 0).

    Tensors are independent strata too: for a whole model pass the sums over its tensors.
    """
    return float((observed - expected) / np.sqrt(variance)) if variance > 0 else 0.0


def share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


@dataclass
class Overlap:
    """What `overlap` counts, for R runs. All integers, so `merge` is exact, associative and commutative.

    int64: `source` [32768] counts of |W|, `changed` [R, 32768] of |W| where run r changed, `both` [R, R] coordinates that
    runs a and b changed (the diagonal: that run a changed), `runs` [R + 1] coordinates that exactly j runs changed,
    `counts` [2]. Shares are NaN where they have no whole.
    """

    cut: int
    source: np.ndarray
    changed: np.ndarray
    both: np.ndarray
    runs: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, n_runs: int, cut: int = DEFAULT_CUT) -> Overlap:
        shapes = ((BINS,), (n_runs, BINS), (n_runs, n_runs), (n_runs + 1,), (2,))
        return cls(cut, *(np.zeros(shape, np.int64) for shape in shapes))

    arrays = property(lambda self: (self.source, self.changed, self.both, self.runs, self.counts))
    n_runs = property(lambda self: len(self.changed))
    numel = property(lambda self: int(self.counts[NUMEL]), doc="Coordinates, non-finite ones included.")
    nonfinite = property(lambda self: int(self.counts[NONFINITE]), doc="Coordinates left out of everything else.")
    finite = property(lambda self: self.numel - self.nonfinite, doc="Coordinates that the tables count.")

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
        """Share of the coordinates that run a changed: what uniform chance gives for the coverage of any run by a."""
        return share(self.n_changed(a), self.finite)

    def coverage(self, a: int, b: int) -> float:
        """|A and B| / |A|: how much of what run a changed run b changed too."""
        return share(self.n_both(a, b), self.n_changed(a))

    def jaccard(self, a: int, b: int) -> float:
        """|A and B| / |A or B|."""
        return share(self.n_both(a, b), self.n_either(a, b))

    def both_zero(self, a: int, b: int) -> float:
        """Share of the coordinates that neither run changed."""
        return share(self.finite - self.n_either(a, b), self.finite)

    def only(self, a: int, b: int) -> float:
        """Share of the coordinates that run a changed and run b did not."""
        return share(self.n_changed(a) - self.n_both(a, b), self.finite)

    def expected_uniform(self, a: int, b: int) -> float:
        """Expected count changed in both, were the changes placed at random in the tensor (the paper's chance level)."""
        return float(expected_uniform(self.n_changed(a), self.n_changed(b), self.finite))

    def expected_magnitude(self, a: int, b: int) -> float:
        """Expected count changed in both, were the changes placed at random among coordinates of the same |W|."""
        return expected_magnitude(self.source, self.changed[a], self.changed[b])

    def variance_magnitude(self, a: int, b: int) -> float:
        """Variance of that count."""
        return variance_magnitude(self.source, self.changed[a], self.changed[b])

    def over_uniform(self, a: int, b: int) -> float:
        """Observed over expected count, uniform chance."""
        return share(self.n_both(a, b), self.expected_uniform(a, b))

    def over_magnitude(self, a: int, b: int) -> float:
        """Observed over expected count, chance within |W|."""
        return share(self.n_both(a, b), self.expected_magnitude(a, b))

    def z_magnitude(self, a: int, b: int) -> float:
        """Standard deviations of the observed count above chance within |W|."""
        return z_score(self.n_both(a, b), self.expected_magnitude(a, b), self.variance_magnitude(a, b))

    def merge(self, other: Overlap) -> Overlap:
        """The counts of both inputs' coordinates together; raises ValueError where cuts or numbers of runs differ."""
        if (self.cut, self.n_runs) != (other.cut, other.n_runs):
            raise ValueError(
                f"overlaps of different cuts or runs do not merge: cut {self.cut}, {self.n_runs} runs and "
                f"cut {other.cut}, {other.n_runs} runs"
            )
        return Overlap(self.cut, *(a + b for a, b in zip(self.arrays, other.arrays, strict=True)))

    def clear(self) -> None:
        for array in self.arrays:
            array.fill(0)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Overlap)
            and (self.cut, self.n_runs) == (other.cut, other.n_runs)
            and all(np.array_equal(a, b) for a, b in zip(self.arrays, other.arrays, strict=True))
        )


def checked(source: torch.Tensor, trained: Sequence[torch.Tensor], cut: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if not 2 <= len(trained) <= MAX_RUNS:
        raise ValueError(f"overlap takes 2 to {MAX_RUNS} runs, not {len(trained)}")
    if not 0 <= cut < 0x7F80:
        raise ValueError(f"cut must be a bf16 magnitude pattern below 0x7F80, not {cut}")
    source, trained = localise(source), [localise(tensor) for tensor in trained]
    for side, tensor in (("source", source), *((f"run {r}", tensor) for r, tensor in enumerate(trained))):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{side} is {tensor.dtype}; overlap takes bfloat16, float16, float32 and float64")
        if tensor.shape != source.shape:
            raise ValueError(f"shapes differ: source {tuple(source.shape)}, {side} {tuple(tensor.shape)}")
        if tensor.device != source.device:
            raise ValueError(f"source is on {source.device}, {side} on {tensor.device}; move one of them")
    return source, trained


def overlap(
    source: torch.Tensor, trained: Sequence[torch.Tensor], *, cut: int = DEFAULT_CUT, into: Overlap | None = None
) -> Overlap:
    """Joint change counts of two or more runs against one source, from one pass over all of them.

    source, and 2 to 16 trained: bf16, fp16, fp32 or fp64 (they may differ), same shape, same device; copied only if not contiguous.
    cut: a bf16 magnitude pattern; a coordinate is changed where visible |delta| exceeds it.
    into: an overlap of the same cut and number of runs, added to in place and returned.

    Raises TypeError for other dtypes, ValueError for shapes, devices, cuts or numbers of runs that do not fit.

    >>> found = overlap(torch.zeros(4), [torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 1, 1, 0])])
    >>> found.n_both(0, 1), found.coverage(0, 1), found.runs.tolist()
    (1, 0.5, [1, 2, 1])
    """
    source, trained = checked(source, trained, cut)
    if into is not None and (into.cut, into.n_runs) != (cut, len(trained)):
        raise ValueError(
            f"the overlap to add to has cut {into.cut} and {into.n_runs} runs, not {cut} and {len(trained)}"
        )
    found = Overlap.empty(len(trained), cut) if into is None else into
    arrays = [torch.from_numpy(array) for array in found.arrays]
    outputs = [array.to(source.device) for array in arrays]
    torch.ops.opdkernels.overlap_(source, trained, cut, *outputs)
    if source.device.type != "cpu":
        for array, output in zip(arrays, outputs, strict=True):
            array.copy_(output)
    return found


def line_counts(tensors: Sequence[torch.Tensor], cut: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per group of rows: counts by (row, class of |W|) of all coordinates [rows * 512] and of each run's changed [R, rows * 512]."""
    rows, columns = tensors[0].shape
    for top in range(0, rows, STRATA_LINES):
        n_lines = min(STRATA_LINES, rows - top)
        n, n_changed = (
            torch.zeros(n_lines * CLASSES, dtype=torch.int64),
            torch.zeros(len(tensors) - 1, n_lines * CLASSES, dtype=torch.int64),
        )
        width = STRATA_TILE // n_lines
        for left in range(0, columns, width):
            source, *trained = (tensor[top : top + n_lines, left : left + width].contiguous() for tensor in tensors)
            magnitude, change, finite = changes(source, trained, cut)
            stratum = (magnitude >> CLASS_SHIFT) + CLASSES * torch.arange(n_lines, device=source.device)[:, None]
            n += torch.bincount(stratum[finite], minlength=len(n)).cpu()
            for r in range(len(trained)):
                n_changed[r] += torch.bincount(stratum[finite & change[r]], minlength=len(n)).cpu()
        yield n.numpy(), n_changed.numpy()


def strata_chance(
    source: torch.Tensor, trained: Sequence[torch.Tensor], strata: str, *, cut: int = DEFAULT_CUT
) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts changed in both and their variances, float64 [R, R] each, by chance within finer strata.

    A stratum is a row or a column (`strata`) and a class of |W|: exponent and top mantissa bit. The diagonals are a run
    against an independent one of its own counts. Memory: 4 MB a run and some 20 MB, whatever the tensor's size.

    source, trained: as `overlap`, but 2-D. Raises as `overlap`, and ValueError for other dimensions or strata.

    >>> w = torch.ones(2, 4)
    >>> v = w + torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    >>> strata_chance(w, [v, v], "row")[0][0, 1], overlap(w, [v, v]).expected_uniform(0, 1)
    (np.float64(4.0), 2.0)
    """
    if strata not in STRATA:
        raise ValueError(f"strata must be one of {', '.join(STRATA)}, not {strata}")
    source, trained = checked(source, trained, cut)
    if source.ndim != 2:
        raise ValueError(f"rows and columns are those of a matrix; source has shape {tuple(source.shape)}")
    tensors = [source, *trained] if strata == "row" else [tensor.mT for tensor in (source, *trained)]
    expected, variance = np.zeros((2, len(trained), len(trained)))
    for n, n_changed in line_counts(tensors, cut):
        for a in range(len(trained)):
            for b in range(len(trained)):
                expected[a, b] += expected_uniform(n_changed[a], n_changed[b], n).sum()
                variance[a, b] += variance_uniform(n_changed[a], n_changed[b], n).sum()
    return expected, variance
