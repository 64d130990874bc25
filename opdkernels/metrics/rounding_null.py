"""What rounding alone would show: a dense update, independent of W, stored in bf16 (metrics.md 6; arXiv 2606.13657).

Everything follows from two integer tables of the tally. With u the bf16 spacing at |w| and x = |update|:

    grid      W is stored in bf16, w + x and w - x are rounded: |visible delta| = k u for x between (k - 1/2) u and
              (k + 1/2) u, P(visible) = P(x > u/2). Below a power of two the spacing is u/2: half of it sees u/4.
    uniform   W is stored wider, and so is W'. The remainder of W is uniform within the rounding interval:
              P(|visible delta| > k u) = mean of P(x > y), y in (k u, (k + 1) u), so P(visible) ~ E[x] / u for small x.

From 128 u on, k u needs more bits than bf16 has, and its patterns themselves are the grid. Steps across a power of two
towards zero land on the finer spacing there (see `_expected_tables`).

Spacings are powers of two, so P(visible delta = pattern) is read, for every |W|, from one lattice of P(x <= y) over
the numbers y of nine significant bits; |W| enters through at most 254 counts. No sampling, no loop over coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np

KINDS = ("sign", "normal", "empirical")
RATIOS = (0.01, 0.05, 0.1, 0.2)
PATTERNS = 1 << 15
INFINITY = 0x7F80  # the first magnitude pattern that is not finite
LARGEST = 2.0**128 - 2.0**120  # the largest finite bf16
LOWEST_ROW = -6  # spacing of the subnormals, 2**-133, as an exponent field
BATCH = 128  # tensors at a time: bounds the memory, and arrays stay near the caches
MAX_ROWS = 40  # octaves of the empirical update, from the largest down
BINS = 8  # of one octave, for the density of the empirical update
MIN_EXPOSURE = 256  # coordinates that could have shown an update of a bin's size; below that its density is noise
MIN_COUNT = 256  # visible updates that the empirical density must rest on

Table = np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Null:
    """One null update fitted to one tensor: what it would show, as expected counts of coordinates.

    `size` is the root mean square of the dense update; `distance` the total variation between the expected and the
    observed |visible delta| table, both over all coordinates, the unchanged among them (0 to 1: the share that would
    have to move bins); `changed` the expected number of visible changes; `near_zero[r]` that among the ceil(r n)
    smallest |W|; `unchanged` the expected count of pattern 0, `values` those of the patterns `first`, `first + 1`,
    and so on.
    """

    kind: str
    size: float
    distance: float
    changed: float
    near_zero: dict[float, float]
    unchanged: float
    first: int
    values: np.ndarray

    @cached_property
    def delta(self) -> np.ndarray:
        """Expected |visible delta| table, float64 [32768] by bf16 magnitude pattern; it sums to all coordinates."""
        table = np.zeros(PATTERNS)
        table[self.first : self.first + len(self.values)] = self.values
        table[0] += self.unchanged
        return table


def fit(source: Table, delta: Table, ratios: Sequence[float] = RATIOS, remainder: str = "grid") -> dict[str, Null]:
    """Null updates of one tensor; see `fit_many`.

    >>> source, delta = np.zeros(32768, np.int64), np.zeros(32768, np.int64)
    >>> source[0x3F80], delta[0] = 10, 10  # ten ones, none of them changed
    >>> fit(source, delta)["chosen"].changed
    0.0
    """
    return fit_many([source], [delta], ratios, remainder)[0]


def fit_many(
    source: Sequence[Table],
    delta: Sequence[Table],
    ratios: Sequence[float] = RATIOS,
    remainder: str | Sequence[str] = "grid",
) -> list[dict[str, Null]]:
    """For each tensor its nulls `sign`, `normal`, `empirical` of the observed visible energy; `chosen` is nearest.

    `source` and `delta`: for each tensor the table of |W| and of |visible delta|, int64 [32768] by bf16 magnitude
    pattern (an array [T, 32768] serves), or a pair (patterns ascending, counts). `remainder`: "grid" where W is
    stored in bf16, "uniform" where it is stored wider; one for all, or one a tensor. `empirical` is absent where too
    few small weights moved visibly to show a distribution. Equal distances go to the first kind. An empty or unmoved
    tensor gives size 0 and no expected change. Raises ValueError for tables that are not of the same finite
    coordinates, and for an unknown remainder. Source: metrics.md 6.
    """
    count = len(source)
    if len(delta) != count:
        raise ValueError(f"{count} source tables but {len(delta)} delta tables; give one of each for a tensor")
    named = [remainder] * count if isinstance(remainder, str) else list(remainder)
    if len(named) != count or not set(named) <= {"grid", "uniform"}:
        raise ValueError(
            f"remainder is 'grid' or 'uniform', one for all {count} tensors or one each, not {remainder!r}"
        )
    fitted: list[dict[str, Null]] = [{} for _ in range(count)]
    for mode in sorted(set(named)):
        same = [i for i in range(count) if named[i] == mode]
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            tables = _Tables.of([source[i] for i in batch], [delta[i] for i in batch], mode == "uniform")
            for i, nulls in zip(batch, _fit_tables(tables, tuple(ratios)), strict=True):
                fitted[i] = nulls
    return fitted


def _fit_tables(tables: _Tables, ratios: tuple[float, ...]) -> list[dict[str, Null]]:
    kinds = [_sign(tables) if tables.uniform else _sign_on_grid(tables), _normal(tables), _empirical(tables)]
    cuts = {ratio: _cuts(tables, ratio) for ratio in ratios}
    nulls = [expected.nulls(tables, kind, cuts) for kind, expected in zip(KINDS, kinds, strict=True)]
    fitted = []
    for one in zip(*nulls, strict=True):
        named = {null.kind: null for null in one if null is not None}
        fitted.append({**named, "chosen": min(named.values(), key=lambda null: null.distance)})
    return fitted


def _flatten(tables: Sequence[Table]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tensor number, pattern and count of every used bin, in that order."""
    sparse = []
    for table in tables:
        if isinstance(table, tuple):
            patterns, counts = np.asarray(table[0], np.int64), np.asarray(table[1], np.int64)
        else:
            patterns = np.flatnonzero(table)
            counts = np.asarray(table)[patterns].astype(np.int64)
        if len(patterns) and not (patterns[0] >= 0 and patterns[-1] < PATTERNS and np.all(np.diff(patterns) > 0)):
            raise ValueError("patterns are bf16 magnitudes, 0 to 32767, each once and ascending")
        sparse.append((patterns, counts))
    tensor = np.repeat(np.arange(len(sparse)), [len(p) for p, _ in sparse])
    empty = np.zeros(0, np.int64)
    return (
        tensor,
        np.concatenate([p for p, _ in sparse] or [empty]),
        np.concatenate([c for _, c in sparse] or [empty]),
    )


def _value(patterns: np.ndarray) -> np.ndarray:
    return (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tables of T tensors that share a remainder: used bins end to end, and |W| counts by spacing."""

    uniform: bool
    numel: np.ndarray  # [T] int64
    tensor: np.ndarray  # [used |W| bins]
    pattern: np.ndarray
    count: np.ndarray
    delta_tensor: np.ndarray  # [used |visible delta| bins, the unchanged left out]
    delta_pattern: np.ndarray
    delta_count: np.ndarray
    unchanged: np.ndarray  # [T]
    energy: np.ndarray  # [T] sum of |visible delta|^2
    spacing: np.ndarray  # [T, 256] counts of |W| by exponent e, spacing 2**(e - 134), powers of two shared out

    @classmethod
    def of(cls, source: Sequence[Table], delta: Sequence[Table], uniform: bool) -> _Tables:
        count = len(source)
        tensor, pattern, counts = _flatten(source)
        delta_tensor, delta_pattern, delta_counts = _flatten(delta)
        numel = _sum_by(tensor, counts, count)
        if np.any(pattern >= INFINITY):
            raise ValueError("the source table holds infinities or NaN; tables are of finite coordinates only")
        if np.any(numel != _sum_by(delta_tensor, delta_counts, count)):
            raise ValueError("source and delta tables hold different numbers of coordinates")
        moved = delta_pattern > 0
        unchanged = numel - _sum_by(delta_tensor[moved], delta_counts[moved], count)
        # A difference of finite weights can overflow; the largest finite value stands for it.
        largest = np.minimum(delta_pattern[moved], INFINITY - 1)
        energy = _sum_by(delta_tensor[moved], delta_counts[moved] * _value(largest) ** 2, count)
        exponent, below = _exponent(pattern), _below(pattern, uniform)
        spacing = _sum_by(tensor * 256 + exponent, counts * (1 - below), count * 256)
        spacing += _sum_by(tensor * 256 + exponent - 1, counts * below, count * 256)
        return cls(
            uniform=uniform,
            numel=numel,
            tensor=tensor,
            pattern=pattern,
            count=counts,
            delta_tensor=delta_tensor[moved],
            delta_pattern=largest,
            delta_count=delta_counts[moved],
            unchanged=unchanged,
            energy=energy,
            spacing=spacing.reshape(count, 256),
        )


def _sum_by(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    sums = np.bincount(group, weights=values, minlength=groups)
    # Without any value bincount gives integers whatever the weights.
    return sums.astype(np.int64 if values.dtype == np.int64 else np.float64)


def _exponent(pattern: np.ndarray) -> np.ndarray:
    return np.maximum(pattern >> 7, 1)  # subnormals have the spacing of exponent 1


def _below(pattern: np.ndarray, uniform: bool) -> np.ndarray:
    """The part of a bin's coordinates that sees half the spacing.

    Below a power of two the spacing is half as wide: half of its coordinates move there. With a remainder the
    rounding interval is (-u/4, u/2) and P(hidden) = 1 - x / (3u/4) for either sign, which is what a third of half
    spacings and two thirds of whole ones give as long as x < u/2.
    """
    return np.where((pattern & 127 == 0) & (pattern >= 256), 1 / 3 if uniform else 1 / 2, 0.0)


@dataclass(frozen=True, eq=False)
class _Expected:
    """Expected counts under one kind, over a window of patterns a tensor."""

    size: np.ndarray  # [T]
    visible: np.ndarray  # P(visible) of each used |W| bin
    first: np.ndarray  # [T] the window's first pattern
    values: np.ndarray  # [T, patterns]
    known: np.ndarray  # [T] bool: the kind exists for this tensor

    def nulls(self, tables: _Tables, kind: str, cuts: dict[float, tuple[np.ndarray, np.ndarray]]) -> list[Null | None]:
        count, width = self.values.shape
        changes = tables.count * self.visible
        changed = _sum_by(tables.tensor, changes, count)
        unchanged = tables.numel - changed
        tensor, counts = tables.delta_tensor, tables.delta_count.astype(float)
        offset = tables.delta_pattern - self.first[tensor]
        inside = (offset >= 0) & (offset < width)
        observed = _sum_by(tensor[inside] * width + offset[inside], counts[inside], count * width).reshape(count, width)
        observed -= self.values
        apart = np.abs(observed, out=observed).sum(1) + np.abs(unchanged - tables.unchanged)
        apart += _sum_by(tensor[~inside], counts[~inside], count)
        distance = apart / 2 / np.maximum(tables.numel, 1)
        below = np.concatenate([[0.0], np.cumsum(changes)])
        below_tensor = below[np.searchsorted(tables.tensor, np.arange(count))]
        at_cut = np.append(self.visible, 0.0)
        near_zero = {r: (below[cut] - below_tensor + part * at_cut[cut]).tolist() for r, (cut, part) in cuts.items()}
        return [
            Null(
                kind,
                float(self.size[t]),
                float(distance[t]),
                float(changed[t]),
                {r: expected[t] for r, expected in near_zero.items()},
                float(unchanged[t]),
                int(self.first[t]),
                self.values[t],
            )
            if self.known[t]
            else None
            for t in range(count)
        ]


def _cuts(tables: _Tables, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """The used bin where the ceil(ratio n) smallest |W| of each tensor end [T], and how many they take of it [T]."""
    # In floating point, as the paper's masks are: ceil(0.1 * 30) is 4 there.
    taken = np.array([min(n, math.ceil(ratio * n)) for n in tables.numel.tolist()], np.int64)
    below = np.concatenate([[0], np.cumsum(tables.count)])
    target = below[np.searchsorted(tables.tensor, np.arange(len(tables.numel)))] + taken
    cut = np.maximum(np.searchsorted(below, target, side="left") - 1, 0)
    return cut, target - below[cut]


# Sizes: the energy of a kind at every spacing, and a bisection over all tensors at once.


def _rounded_square(x: np.ndarray, uniform: bool) -> np.ndarray:
    """E[k^2] for an update of x spacings."""
    if not uniform:
        return np.floor(x + 0.5) ** 2
    whole = np.floor(x)
    return whole * whole + (2 * whole + 1) * (x - whole)


def _rounded_square_with_carry(x: np.ndarray, uniform: bool) -> np.ndarray:
    """The same with the steps of j or more spacings from j below a power of two, beyond which the spacing is double.

    One weight of 128 for each j, on half of the signs: a part in a thousand, but it decides on which side of a jump a
    size is.
    """
    square = _rounded_square(x, uniform)
    below = np.arange(1, 17)
    few = (x >= 1) & (x < 16)  # beyond, jumps are small and average out
    y = x[few][:, None]
    carried = (below + 2 * np.floor((y - below) / 2 + 0.5)) ** 2 - square[few][:, None]
    square[few] += np.where(y >= below, carried, 0).sum(1) / 256
    return square


def _rounded_square_integral(x: np.ndarray, uniform: bool) -> np.ndarray:
    """Integral of `_rounded_square` from 0 to x."""
    if uniform:
        whole = np.floor(x)
        part = x - whole
        steps = (whole - 1) * whole * (2 * whole - 1) / 6 + whole * whole / 2
        return steps + whole * whole * part + (whole + 0.5) * part * part
    whole = np.floor(x + 0.5)
    return (whole - 1) * whole * (2 * whole - 1) / 6 + whole * whole * np.where(whole > 0, x - (whole - 0.5), 0.0)


@cache
def _normal_square(uniform: bool) -> tuple[np.ndarray, np.ndarray]:
    """log2 E[k^2] for a normal update, against log2 of its standard deviation in spacings, from 1/32 to 2."""
    log_size = np.linspace(-5.0, 1.0, 6 * 512 + 1)
    size, k = np.exp2(log_size)[:, None], np.arange(20)
    if uniform:  # sum over k of (2k + 1) times the integral of P(x > y) over (k, k + 1), summed by parts
        tail = size * math.sqrt(2 / math.pi) * np.exp(-((k / size) ** 2) / 2) - k * (1 - _erf(k / size / math.sqrt(2)))
        return log_size, np.log2(tail[:, 0] + 2 * tail[:, 1:].sum(1))
    erfc = np.asarray(np.frompyfunc(math.erfc, 1, 1)((k + 0.5) / size / math.sqrt(2)), float)
    return log_size, np.log2(((2 * k + 1) * erfc).sum(1))


def _erf(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def _normal_energy(size: np.ndarray, uniform: bool) -> np.ndarray:
    log_size, log_energy = _normal_square(uniform)
    below = math.sqrt(2 / math.pi) * size if uniform else 0.0
    inside = np.exp2(np.interp(np.log2(size), log_size, log_energy))
    # From two spacings on, rounding adds its own variance and nothing else (Sheppard; the error is below 1e-30).
    return np.where(size < 2**-5, below, np.where(size < 2, inside, size * size + (1 / 6 if uniform else 1 / 12)))


def _solve(
    target: np.ndarray,
    energy: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    halvings: int = 34,
) -> np.ndarray:
    """The sizes in (low, high) whose energy is nearest to the target; the energy grows with size, perhaps in jumps."""
    low, high = np.log2(low), np.log2(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        under = energy(np.exp2(middle)) < target
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    low, high = np.exp2(low), np.exp2(high)
    return np.where(target - energy(low) < energy(high) - target, low, high)


def _solve_by_spacing(tables: _Tables, *squares: Callable[[np.ndarray, bool], np.ndarray]) -> np.ndarray:
    """Size [T] for a kind whose E[k^2] depends on its size in spacings, 0 where nothing moved; a second refines."""
    used = np.flatnonzero(tables.spacing.any(0))
    if not len(used):
        return np.zeros(len(tables.numel))
    spacing, counts = np.exp2(used - 134.0), tables.spacing[:, used]
    moved = tables.energy > 0
    rms = np.sqrt(np.where(moved, tables.energy, 1.0) / np.maximum(tables.numel, 1))
    widest = spacing[len(used) - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)]

    def energy(size: np.ndarray, square: Callable[[np.ndarray, bool], np.ndarray]) -> np.ndarray:
        return square(size[:, None] / spacing, tables.uniform) * counts @ spacing**2

    # Visible steps are at most twice the update, so 0.4 rms is too small, unless a remainder carries it; the top is
    # far above.
    low = rms**2 / np.maximum(widest, rms) / 8 if tables.uniform else rms * 0.4
    size = _solve(tables.energy, partial(energy, square=squares[0]), low, 4 * np.maximum(widest, rms))
    for square in squares[1:]:
        size = _solve(tables.energy, partial(energy, square=square), size * 0.9, size * 1.1, 14)
    return np.where(moved, size, 0.0)


# Tables: windows of octaves ("rows", by bf16 exponent field) of 128 patterns. Rows below 1 stand for the subnormals.


def _row(x: np.ndarray) -> np.ndarray:
    return np.frexp(x)[1] + 126


def _window(tables: _Tables, bottom: np.ndarray, top: np.ndarray) -> tuple[np.ndarray, int]:
    """First row of each tensor's window [T] and the rows of all."""
    if tables.uniform:  # however small the update, a remainder near the edge carries one whole spacing
        widest = 255 - np.argmax(tables.spacing[:, ::-1] > 0, axis=1) - 7
        top = np.maximum(top, widest)
    top = np.clip(top, LOWEST_ROW, 254)
    rows = min(int((top - np.maximum(bottom, LOWEST_ROW)).max(initial=0)) + 1, 254 - LOWEST_ROW)
    return np.clip(top - rows + 1, LOWEST_ROW, 255 - rows), rows


def _lattice(first: np.ndarray, rows: int, steps: int) -> np.ndarray:
    """Values [T, rows + 1, steps] of the row before the window and of its rows."""
    row = (first - 1)[:, None] + np.arange(rows + 1)
    return np.ldexp(1.0, row - 127)[:, :, None] * (1 + np.arange(steps) / steps)


def _steps(below: np.ndarray, uniform: bool, unmoved: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """P(x <= y) on the lattice [T, rows + 1, 256] as chances of staying at or below each visible delta.

    Of spacing u a row holds 2**o multiples, o = log2(row / u): list[o], [T, rows + 1, 2**o], is the chance of being
    rounded to one of them or less. The array [T, rows + 1] is P(hidden) where the row's first value is u. `unmoved`
    [T] is P(x = 0).
    """
    bottom = (unmoved + below[:, 0, 0]) / 2
    if not uniform:
        upper_edges = [below[:, :, 1 << (7 - o) :: 1 << (8 - o)] for o in range(8)]
        return upper_edges, np.concatenate([bottom[:, None], below[:, :-1, 0]], axis=1)
    following = np.concatenate([below[:, 1:, 0], below[:, -1:, -1]], axis=1)[:, :, None]
    edges = np.concatenate([below[:, :, 0::2], following], axis=2)
    mean = (edges[:, :, :-1] + 4 * below[:, :, 1::2] + edges[:, :, 1:]) / 6  # Simpson over a 128th of an octave
    return _steps_of_means(mean, bottom)


def _steps_of_means(mean: np.ndarray, bottom: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The same for a remainder, from the means of P(x <= y): steps of bf16 [T, rows + 1, 128], and all below [T]."""
    steps = [mean]
    for _ in range(7):
        steps.insert(0, (steps[0][:, :, 0::2] + steps[0][:, :, 1::2]) / 2)
    hidden = np.empty(mean.shape[:2])
    hidden[:, 0] = bottom
    for row in range(1, mean.shape[1]):
        hidden[:, row] = (hidden[:, row - 1] + steps[0][:, row - 1, 0]) / 2
    return steps, hidden


def _expected_tables(
    tables: _Tables,
    size: np.ndarray,
    known: np.ndarray,
    first: np.ndarray,
    steps: list[np.ndarray],
    hidden: np.ndarray,
    unmoved: np.ndarray,
) -> _Expected:
    """Expected tables from the steps of one lattice, which all spacings share."""
    count, rows = len(first), hidden.shape[1] - 1
    padded = np.zeros((count, 256 + 32))  # rows above 255 or below 0 hold no weights
    padded[:, 16:272] = tables.spacing
    finer = np.cumsum(padded, axis=1)
    tensor, row = np.arange(count)[:, None], first[:, None] + np.arange(rows) + 16
    values = np.zeros((count, rows, 128))
    for o in range(7):  # spacing u, 2**o of its multiples in the row
        weights = padded[tensor, row + 7 - o][:, :, None]
        if not weights.any():
            continue
        upper = steps[o][:, 1:]
        mass = upper.copy()
        mass[:, :, 1:] -= upper[:, :, :-1]
        mass[:, :, 0] -= steps[o - 1][:, :-1, -1] if o else hidden[:, 1:]
        mass *= weights
        if o >= 2:
            # Half of the coordinates move towards zero, and q = x / (128 u) of those pass a power of two, below which
            # odd multiples of u/2 are as likely as even ones: q/4 goes there. Below exponent 2 there is no finer
            # spacing.
            crossed = mass * ((1 + np.arange(1 << o) / (1 << o)) * 2.0 ** (o - 9))
            crossed[row + 7 - o <= 17] = 0
            mass -= crossed
            values[:, :, 1 << (6 - o) :: 1 << (7 - o)] += crossed
        values[:, :, :: 1 << (7 - o)] += mass
    upper = steps[7][:, 1:]
    here, smaller = padded[tensor, row], finer[tensor, row - 1]
    values[:, :, 1:] += (here + smaller)[:, :, None] * (upper[:, :, 1:] - upper[:, :, :-1])
    values[:, :, 0] += here * (upper[:, :, 0] - steps[6][:, :-1, -1])
    values[:, :, 0] += smaller * (upper[:, :, 0] - steps[7][:, :-1, -1])

    # P(visible) by exponent, and from it that of each used bin. Below the window P(0 < x <= y) goes down with y.
    above = np.arange(256) - 7 - (first[:, None] - 1)
    hidden_at = hidden[tensor, np.clip(above, 0, rows)]
    hidden_at = unmoved[:, None] + (hidden_at - unmoved[:, None]) * np.exp2(np.minimum(above, 0.0))
    visible_at = np.where(above > rows, 0.0, 1 - hidden_at)
    exponent, below = _exponent(tables.pattern), _below(tables.pattern, tables.uniform)
    visible = (1 - below) * visible_at[tables.tensor, exponent] + below * visible_at[tables.tensor, exponent - 1]
    # The little that is visible below the window is counted at its foot.
    values = values.reshape(count, rows * 128)
    values[:, 0] += np.maximum((tables.spacing * visible_at).sum(1) - values.sum(1), 0.0)
    still = size == 0
    visible[still[tables.tensor]] = 0
    values[still] = 0
    return _Expected(size, visible, *_fold_subnormals(first, values), known)


def _fold_subnormals(first_row: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First pattern of each window, and the values by pattern: rows below 1 share the 128 subnormal patterns."""
    for t in np.flatnonzero(first_row < 1):
        row, slot = first_row[t] + np.arange(values.shape[1]) // 128, np.arange(values.shape[1]) % 128
        pattern = np.where(row < 1, (128 + slot) >> np.maximum(1 - row, 0), row * 128 + slot)
        values[t] = np.bincount(pattern, weights=values[t], minlength=values.shape[1])[: values.shape[1]]
    return np.maximum(first_row * 128, 0), values


# Kinds.


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp64 magnitudes rounded to bf16, nearest even; beyond the largest finite value stays there.

    Rounded once: through fp32 a size just beside half a spacing, where the fit of a jump ends, would become a tie.
    """
    bits = x.view(np.int64)
    bits = bits + ((1 << 44) - 1) + ((bits >> 45) & 1)
    bits &= -1 << 45
    rounded = np.minimum(bits.view(np.float64), LARGEST)
    subnormal = x < 2.0**-126
    rounded[subnormal] = np.ldexp(np.rint(np.ldexp(x[subnormal], 133)), -133)
    return rounded


def _sign_on_grid(tables: _Tables) -> _Expected:
    """+-size: both results of every used |W|, computed as training would have."""
    size = _solve_by_spacing(tables, _rounded_square, _rounded_square_with_carry)
    count, top = len(size), _row(size) + 1
    first_row, rows = _window(tables, top - 3, top)
    width, first = rows * 128, np.maximum(first_row * 128, 0)
    weight, update = _value(tables.pattern), size[tables.tensor]
    visible, values = np.zeros(len(weight)), np.zeros(count * width)
    for step in (update, -update):
        target = weight + step
        moved = _round_to_bf16(np.abs(np.copysign(_round_to_bf16(np.abs(target)), target) - weight))
        pattern = (moved.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
        visible += (pattern > 0) / 2
        # A step that ends at the largest finite value may be shorter than the window: counted at its foot.
        offset = np.maximum(pattern - first[tables.tensor], 0)
        shown = (pattern > 0) & (offset < width)
        values += _sum_by(tables.tensor[shown] * width + offset[shown], tables.count[shown] / 2, count * width)
    return _Expected(size, visible, first, values.reshape(count, width), np.ones(count, bool))


def _sign(tables: _Tables) -> _Expected:
    """+-size beside a remainder."""
    size = _solve_by_spacing(tables, _rounded_square)
    safe = np.where(size > 0, size, 1.0)
    first, rows = _window(tables, _row(safe) - 2, _row(safe) + 1)
    edges = _lattice(first, rows, 128)
    step = edges[:, :, :1] / 128
    mean = np.clip((edges + step - safe[:, None, None]) / step, 0, 1)
    bottom = np.clip(1 - safe / edges[:, 0, 0], 0, 1)
    return _expected_tables(
        tables, size, np.ones(len(size), bool), first, *_steps_of_means(mean, bottom), np.zeros(len(size))
    )


def _normal(tables: _Tables) -> _Expected:
    """size times a standard normal."""
    size = _solve_by_spacing(tables, _normal_energy)
    safe = np.where(size > 0, size, 1.0)
    first, rows = _window(tables, _row(safe) - 12, _row(safe * 6.5) + 1)
    below = _erf(_lattice(first, rows, 256) / (safe * math.sqrt(2))[:, None, None])
    unmoved = np.zeros(len(size))
    return _expected_tables(
        tables, size, np.ones(len(size), bool), first, *_steps(below, tables.uniform, unmoved), unmoved
    )


def _density(tables: _Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distribution of |update| where rounding hides least.

    Returns probabilities [T, rows, BINS], the rows, and whether there was enough to tell [T]. No table holds |W|
    beside |delta|, but an odd multiple of 2**t can only come from weights of spacing 2**t or less: the lowest set bit
    of a visible delta x bounds its |W|. Taken are the odd multiples of nine and more. Their |W| is below 256 x / 9
    (at relative norms near 1e-3 the smallest decile and less), where every move by about x is visible and a cell no
    wider than a bin. Where the density is f, such a pattern is expected f times the summed cell widths of those
    weights often: solved for f, bin by bin.
    """
    count = len(tables.numel)
    row, slot = tables.delta_pattern >> 7, tables.delta_pattern & 127
    usable = (row > 0) & ((slot & 15 > 0) | (slot & 31 == 16))
    tensor, row, slot = tables.delta_tensor[usable], row[usable], slot[usable]
    lowest, rows = (int(row.min()), int(np.ptp(row)) + 1) if len(row) else (127, 1)
    group = (tensor * rows + row - lowest) * BINS + slot // (128 // BINS)
    counts = tables.delta_count[usable].astype(float)
    mass = _sum_by(group, counts, count * rows * BINS).reshape(count, rows, BINS)

    # Cell widths in units of the row's own spacing. Steps across a power of two add halves (see `_expected_tables`).
    padded = np.pad(tables.spacing, ((0, 0), (0, 8)))
    finer = np.cumsum(tables.spacing, axis=1)
    middle = 1 + (np.arange(BINS) + 0.5) / BINS
    half_steps = padded[:, :, None] * middle / 4
    half_steps[:, :2] = 0
    row = lowest + np.arange(rows)
    width, exposure = np.repeat(finer[:, row, None], BINS, axis=2), np.zeros((count, rows, BINS))
    for t in range(5):  # patterns of t trailing zeros: in each bin 8, 4, 2, 1, and in every other bin one more
        if t:
            width += padded[:, row + t, None] * 2**t - half_steps[:, row + t]
        exposure += (np.arange(BINS) % 2 if t == 4 else 8 >> t) * (width + half_steps[:, row + t + 1])
    exposure /= 128 // BINS
    mass[exposure < MIN_EXPOSURE] = 0
    known = (mass.sum((1, 2)) >= MIN_COUNT) | (tables.energy == 0)
    mass /= np.maximum(exposure, 1)
    mass /= np.maximum(mass.sum((1, 2)), 1)[:, None, None]
    return mass, row, known


def _empirical(tables: _Tables) -> _Expected:
    """The observed shape times a fitted factor within 1/8 and 8; what small weights leave unchanged stays unmoved."""
    mass, row, known = _density(tables)
    count = len(known)
    moved = known & (tables.energy > 0)
    mass[~moved] = 0
    mass[~moved, 0, 0] = 1  # any shape: its results are not used
    lower = 1 + np.arange(BINS) / BINS
    mean, mean_square = lower + 0.5 / BINS, lower * lower + lower / BINS + 1 / (3 * BINS**2)

    # E[k^2] depends on the update over the spacing only, so counts are first summed by row less exponent. For factors
    # within 1/8 and 8, below a difference of -12 all is hidden (but for what a remainder carries), and above 3
    # rounding is no matter.
    near = np.arange(-12, 4)
    squared = np.pad(tables.spacing * np.exp2(2.0 * (np.arange(256) - 134)), ((0, 0), (4, 16)))
    counts = np.stack([np.einsum("trb,tr->tb", mass, squared[:, row - d + 4]) for d in near], axis=1)
    finer = np.pad(np.cumsum(tables.spacing, axis=1), ((0, 0), (4, 0)))
    square = np.einsum("trb,tr,r,b->t", mass, finer[:, row], np.exp2(2.0 * (row - 127)), mean_square)
    linear = np.zeros(count)
    if tables.uniform:
        first_moment = np.pad(tables.spacing * np.exp2(np.arange(256) - 134.0), ((0, 0), (0, 16)))
        coarser = np.cumsum(first_moment[:, ::-1], axis=1)[:, ::-1]
        linear = np.einsum("trb,tr,r,b->t", mass, coarser[:, np.minimum(row + 13, 271)], np.exp2(row - 127.0), mean)
    spacings = np.exp2(near + 7.0)[:, None] * np.append(lower, 2.0)

    def energy(factor: np.ndarray) -> np.ndarray:
        integral = _rounded_square_integral(factor[:, None, None] * spacings, tables.uniform)
        average = np.diff(integral, axis=2) / (factor[:, None, None] * (np.exp2(near + 7.0) / BINS)[:, None])
        return (counts * average).sum((1, 2)) + square * factor**2 + linear * factor

    factor = _solve(tables.energy, energy, np.full(count, 1 / 8), np.full(count, 8.0))
    known = np.asarray(known & (~moved | (np.abs(np.log2(factor)) < 2.99)))
    probability = mass.sum((1, 2))
    rms = np.sqrt(np.einsum("trb,r,b->t", mass, np.exp2(2.0 * (row - 127)), mean_square)) * factor
    size = np.where(moved, rms, 0.0)

    present = np.asarray(mass.any(2))
    shift = _row(factor) - 127
    bottom, top = (
        row[np.argmax(present, axis=1)] + shift,
        row[len(row) - 1 - np.argmax(present[:, ::-1], axis=1)] + shift + 2,
    )
    first, rows = _window(tables, np.maximum(bottom, top - MAX_ROWS), top)
    points = (_lattice(first, rows, 256) / factor[:, None, None]).reshape(count, -1)
    edges = np.append(np.exp2(row - 127.0)[:, None] * lower, np.exp2(row[-1] - 126.0))
    cumulative = np.pad(np.cumsum(mass.reshape(count, -1), axis=1), ((0, 0), (1, 0)))
    cumulative += (1 - probability)[:, None]
    below = np.stack([np.interp(points[t], edges, cumulative[t]) for t in range(count)]).reshape(count, -1, 256)
    return _expected_tables(
        tables, size, known, first, *_steps(below, tables.uniform, 1 - probability), 1 - probability
    )
