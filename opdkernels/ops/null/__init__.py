"""`null`: what is expected from bf16 rounding alone, for a dense update that is independent of W.

Source of the question: arXiv 2606.13657. Everything follows from two histograms of the tally, of |W| and of |visible
delta|. With u the bf16 spacing at |w| and x = |update|:

    grid      W is stored in bf16, w + x and w - x are rounded: |visible delta| = k u for x between (k - 1/2) u and
              (k + 1/2) u, P(visible) = P(x > u/2). Below a power of two the spacing is u/2: half of it sees u/4.
    uniform   W is stored wider, and so is W'. The remainder of W is uniform within the rounding interval:
              P(|visible delta| > k u) = mean of P(x > y), y in (k u, (k + 1) u), so P(visible) ~ E[x] / u for small x.

From 128 u on, k u needs more bits than bf16 has, and the bf16 values themselves are the grid. Steps across a power of
two towards zero end on the finer spacing there (see `expected.expected_histograms`).

Spacings are powers of two, so P(visible delta = value) is read, for every |W|, from one lattice of P(x <= y) over the
numbers y with nine significant bits; |W| enters through at most 254 counts. There is no sampling and no loop over
coordinates. The reference is in NumPy: `histograms.py` (input), `sizes.py` (fit of the size), `kinds.py` (distributions
of the update), `expected.py` (expected histograms). The CPU kernel agrees with it up to the rounding of fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from opdkernels.ops import register
from opdkernels.ops.arguments import validate_memory, validate_tensor
from opdkernels.ops.null.expected import near_zero_threshold
from opdkernels.ops.null.expected import top_energy as top_energy_of
from opdkernels.ops.null.histograms import BINS, INFINITY, Histograms, exponent_of, half_spacing
from opdkernels.ops.null.kinds import empirical, normal, sign, sign_on_grid
from opdkernels.ops.null.layout import (
    FIT_CHANGED,
    FIT_DISTANCE,
    FIT_UNCHANGED,
    KINDS,
    NUM_FITS,
    NUM_KINDS,
)
from opdkernels.ops.null.sizes import normal_energy

REMAINDERS = ("grid", "uniform")
BATCH = 256  # tensors of a call: bounds the memory of their tables
SCHEMA = (
    "null_(Tensor starts, Tensor bin_bits, Tensor base, Tensor delta, Tensor uniform, float[] ratios, "
    "float[] fractions, int[] limits, Tensor(a!) fits, Tensor(b!) near_zero, Tensor(c!) chosen, "
    "Tensor(d!) top_energy, Tensor(e!) below, Tensor(f!)? expected, Tensor(g!)? visible) -> ()"
)


def reference(
    starts: torch.Tensor,
    bin_bits: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
    uniform: torch.Tensor,
    ratios: Sequence[float],
    fractions: Sequence[float],
    limits: Sequence[int],
    fits: torch.Tensor,
    near_zero: torch.Tensor,
    chosen: torch.Tensor,
    top_energy: torch.Tensor,
    below: torch.Tensor,
    expected: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> None:
    """The definition, in NumPy. All outputs are overwritten.

    It works on all tensors at once, in windows of as many octaves for each as the widest needs; the little that is
    expected below the window counts at its start. The kernel takes the window that each tensor needs.

    Args:
        starts: Where the bins of each tensor begin, and their number, int64 [T + 1].
        bin_bits: bf16 bits of the bins, ascending in each tensor, int64 [bins].
        base: Coordinates whose |W| is in each bin, int64 [bins].
        delta: Coordinates whose |visible delta| is in each bin, int64 [bins].
        uniform: Whether W is stored wider than bf16, bool [T].
        ratios: Sizes of the near-zero masks, as fractions of the coordinates.
        fractions: Fractions of the coordinates, for the top energy.
        limits: bf16 bits.
        fits: Columns as in `layout`, fp64 [T, NUM_KINDS, NUM_FITS]; NaN where there is no null of a kind.
        near_zero: Expected changes among the ceil(r n) smallest |W|, and the standard deviation of their fraction of
            all changes, fp64 [T, NUM_KINDS, ratios, 2].
        chosen: The kind with the least distance, for equal distances the first, int64 [T].
        top_energy: Fraction of the energy in the ceil(fraction n) largest |visible delta| of the chosen kind, mean and
            standard deviation, fp64 [T, fractions, 2]; NaN if no change is expected.
        below: Coordinates whose |visible delta| has at most these bits, as the chosen kind expects, fp64 [T, limits].
        expected: Expected coordinates by bf16 bits of |visible delta|, fp64 [T, NUM_KINDS, BINS], or None.
        visible: P(visible) at each bin of |W|, fp64 [NUM_KINDS, bins], or None; 0 at bins without coordinates.
    """
    first, wide = starts.cpu().numpy(), uniform.cpu().numpy()
    if first[0] != 0 or first[-1] != len(bin_bits) or (np.diff(first) < 0).any():
        raise ValueError("starts must not descend, from 0 to the number of bins")
    tables = np.stack([tensor.cpu().numpy() for tensor in (bin_bits, base, delta)])
    if visible is not None:
        visible.zero_()
    edges = [0, *(np.flatnonzero(np.diff(wide)) + 1).tolist(), len(wide)]
    for start, stop in itertools.pairwise(edges):  # tensors with the same remainder
        if start == stop:
            continue
        bins = slice(first[start], first[stop])
        sizes, (bits, w, d) = np.diff(first[start : stop + 1]), tables[:, bins]
        histograms = Histograms.of(sizes, bits, w, d, bool(wide[start]))
        kinds = [
            sign(histograms) if wide[start] else sign_on_grid(histograms),
            normal(histograms),
            empirical(histograms),
        ]
        thresholds = [near_zero_threshold(histograms, ratio) for ratio in ratios]
        outputs = [kind.outputs(histograms, thresholds) for kind in kinds]
        of_kinds = np.stack([fit for fit, _ in outputs], axis=1)
        nearest = np.nanargmin(of_kinds[:, :, FIT_DISTANCE], axis=1)
        rows = slice(start, stop)
        fits[rows] = torch.from_numpy(of_kinds)
        near_zero[rows] = torch.from_numpy(np.stack([inside for _, inside in outputs], axis=1))
        chosen[rows] = torch.from_numpy(nearest)
        for t, kind in enumerate(nearest):
            first_bits, values = int(kinds[kind].first[t]), kinds[kind].values[t]
            unchanged, changed = of_kinds[t, kind, FIT_UNCHANGED], of_kinds[t, kind, FIT_CHANGED]
            top_energy[start + t] = float("nan")
            if changed > 0:
                top = top_energy_of(first_bits, values, int(histograms.numel[t]), fractions)
                top_energy[start + t] = torch.from_numpy(top)
            for k, bits in enumerate(limits):
                below[start + t, k] = unchanged + values[: max(bits + 1 - first_bits, 0)].sum()
        for k, kind in enumerate(kinds):
            if expected is not None:
                expected[rows, k] = torch.from_numpy(kind.dense(of_kinds[:, k, FIT_UNCHANGED]))
            if visible is not None:
                at = torch.from_numpy(first[start] + np.flatnonzero(tables[1, bins]))
                shown = torch.from_numpy(np.where(kind.known[histograms.tensor], kind.visible, np.nan))
                visible[k, at.to(visible.device)] = shown.to(visible.device)


def validate(
    starts: torch.Tensor,
    bin_bits: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
    uniform: torch.Tensor,
    ratios: Sequence[float],
    fractions: Sequence[float],
    limits: Sequence[int],
    fits: torch.Tensor,
    near_zero: torch.Tensor,
    chosen: torch.Tensor,
    top_energy: torch.Tensor,
    below: torch.Tensor,
    expected: torch.Tensor | None,
    visible: torch.Tensor | None,
) -> None:
    """Raise ValueError where the arguments of the operator do not fit."""
    device, count, bins = starts.device, uniform.numel(), bin_bits.numel()
    if not all(0 <= x <= 1 for x in (*ratios, *fractions)):
        raise ValueError("ratios and fractions are between 0 and 1")
    if not all(0 <= bits < BINS for bits in limits):
        raise ValueError("limits are bf16 bits of magnitudes, 0 to 32767")
    validate_tensor("starts", starts, torch.int64, (count + 1,), device)
    for name, table in (("bin_bits", bin_bits), ("base", base), ("delta", delta)):
        validate_tensor(name, table, torch.int64, (bins,), device)
    validate_tensor("uniform", uniform, torch.bool, (count,), device)
    validate_tensor("chosen", chosen, torch.int64, (count,), device)
    outputs: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "fits": (fits, (count, NUM_KINDS, NUM_FITS)),
        "near_zero": (near_zero, (count, NUM_KINDS, len(ratios), 2)),
        "top_energy": (top_energy, (count, len(fractions), 2)),
        "below": (below, (count, len(limits))),
        "expected": (expected, (count, NUM_KINDS, BINS)),
        "visible": (visible, (NUM_KINDS, bins)),
    }
    for name, (tensor, shape) in outputs.items():
        if tensor is not None:
            validate_tensor(name, tensor, torch.float64, shape, device)
    written = [chosen, *(tensor for tensor, _ in outputs.values() if tensor is not None)]
    validate_memory(written, [starts, bin_bits, base, delta, uniform], aligned=True)


register("null", SCHEMA, reference, validate=validate)


@dataclass(frozen=True, eq=False)
class Nulls:
    """The null updates of several tensors, fitted to their visible energy.

    Attributes:
        fits: By kind, columns as in `layout`, float64 [T, NUM_KINDS, NUM_FITS]; NaN where there is no null of a kind.
        near_zero: By kind, expected visible changes among the ceil(r n) smallest |W|, float64 [T, NUM_KINDS, ratios].
        near_zero_sd: By kind, the standard deviation of the fraction of visible changes that are among these.
        chosen: The nearest kind, an index of `KINDS`, int64 [T].
        top_energy: Fraction of the energy in the ceil(fraction n) largest |visible delta|, as the nearest kind expects,
            float64 [T, fractions]; NaN if it expects no change.
        top_energy_sd: Its standard deviation.
        below: Coordinates whose |visible delta| has at most the bits of a limit, as the nearest kind expects, float64
            [T, limits].
    """

    fits: np.ndarray
    near_zero: np.ndarray
    near_zero_sd: np.ndarray
    chosen: np.ndarray
    top_energy: np.ndarray
    top_energy_sd: np.ndarray
    below: np.ndarray

    def of_kind(self, kind: str, values: np.ndarray) -> np.ndarray:
        """The values [T, NUM_KINDS, ...] of one kind, or of "chosen", the nearest of each tensor [T, ...]."""
        return values[np.arange(len(values)), self.chosen] if kind == "chosen" else values[:, KINDS.index(kind)]


@dataclass(frozen=True, eq=False)
class Null:
    """One null update fitted to one tensor, as expected counts of coordinates.

    Attributes:
        kind: "sign", "normal" or "empirical".
        size: Root mean square of the dense update.
        distance: Total variation distance between the expected and the observed histogram of |visible delta|, both over
            all coordinates, unchanged ones included: the fraction that would have to change bins, 0 to 1.
        changed: Expected number of visible changes.
        changed_sd: Standard deviation of the number of visible changes, which are independent.
        unchanged: Expected number of coordinates with visible delta 0.
        near_zero: Ratio r -> expected number of visible changes among the ceil(r n) smallest |W|.
        near_zero_sd: Ratio r -> standard deviation of the fraction of visible changes among these.
        delta: Expected histogram of |visible delta|, float64 [32768] by bf16 bits; it sums to all coordinates.
        visible: P(visible) by bf16 bits of |W|, float64 [32768]; 0 at magnitudes that no weight has.
    """

    kind: str
    size: float
    distance: float
    changed: float
    changed_sd: float
    unchanged: float
    near_zero: dict[float, float]
    near_zero_sd: dict[float, float]
    delta: np.ndarray
    visible: np.ndarray


def fit_many(
    bin_bits: Sequence[np.ndarray],
    base: Sequence[np.ndarray],
    delta: Sequence[np.ndarray],
    remainder: Sequence[str],
    *,
    ratios: Sequence[float] = (),
    fractions: Sequence[float] = (),
    limits: Sequence[int] = (),
) -> Nulls:
    """Null updates of each tensor, fitted to its observed visible energy.

    Args:
        bin_bits: bf16 bits of the bins of each tensor, ascending, int64.
        base: Coordinates whose |W| is in each bin, int64.
        delta: Coordinates whose |visible delta| is in each bin, int64.
        remainder: "grid" where W is stored in bf16, "uniform" where it is stored wider; of each tensor.
        ratios: Sizes of the near-zero masks, as fractions of the coordinates.
        fractions: Fractions of the coordinates, for the top energy.
        limits: bf16 bits of |visible delta|.

    Returns:
        The nulls. An "empirical" one is absent where too few small weights changed visibly to estimate a distribution.
        An empty or unchanged tensor has size 0 and no expected change.

    Raises:
        ValueError: The histograms do not cover the same finite coordinates, or a remainder is unknown.

    Examples:
        >>> nulls = fit_many([np.array([0, 0x3F80])], [np.array([0, 10])], [np.array([10, 0])], ["grid"])
        >>> nulls.of_kind("chosen", nulls.fits)[0, FIT_CHANGED].item()
        0.0
    """
    validate_tables(bin_bits, base, delta, remainder)
    parts = []
    for start in range(0, max(len(bin_bits), 1), BATCH):
        batch = slice(start, start + BATCH)
        tables = bin_bits[batch], base[batch], delta[batch], remainder[batch]
        parts.append(run(*tables, ratios, fractions, limits, keep=False)[0])
    joined = {field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Nulls)}
    return Nulls(**joined)


def fit(base: np.ndarray, delta: np.ndarray, remainder: str = "grid", ratios: Sequence[float] = ()) -> dict[str, Null]:
    """Null updates of one tensor, with their histograms.

    Args:
        base: Histogram of |W|, int64 [32768] by bf16 bits.
        delta: Histogram of |visible delta|, in the same form.
        remainder: As for `fit_many`.
        ratios: As for `fit_many`.

    Returns:
        The nulls by kind, and the nearest as "chosen".

    Raises:
        ValueError: As for `fit_many`.

    Examples:
        >>> base, delta = np.zeros(32768, np.int64), np.zeros(32768, np.int64)
        >>> base[0x3F80], delta[0] = 10, 10  # ten ones, none of them changed
        >>> fit(base, delta)["chosen"].changed
        0.0
    """
    bits = np.flatnonzero((base != 0) | (delta != 0))
    validate_tables([bits], [base[bits]], [delta[bits]], [remainder])
    nulls, expected, visible = run([bits], [base[bits]], [delta[bits]], [remainder], ratios, (), (), keep=True)
    fitted = {}
    for k, kind in enumerate(KINDS):
        size, distance, changed, changed_sd, unchanged = nulls.fits[0, k].tolist()
        if not np.isnan(size):
            dense = np.zeros(BINS)
            dense[bits] = visible[k]
            fitted[kind] = Null(
                kind,
                size,
                distance,
                changed,
                changed_sd,
                unchanged,
                dict(zip(ratios, nulls.near_zero[0, k].tolist(), strict=True)),
                dict(zip(ratios, nulls.near_zero_sd[0, k].tolist(), strict=True)),
                expected[0, k],
                dense,
            )
    return {**fitted, "chosen": fitted[KINDS[nulls.chosen[0]]]}


def validate_tables(
    bin_bits: Sequence[np.ndarray], base: Sequence[np.ndarray], delta: Sequence[np.ndarray], remainder: Sequence[str]
) -> None:
    """Raise ValueError unless there is one table of each kind per tensor, of the same number of bins."""
    count = len(bin_bits)
    if not len(base) == len(delta) == len(remainder) == count:
        raise ValueError(
            f"{count} lists of bins, {len(base)} base and {len(delta)} delta tables, {len(remainder)} remainders; give "
            "one of each per tensor"
        )
    if not set(remainder) <= set(REMAINDERS):
        raise ValueError(f"remainder is 'grid' or 'uniform', not {sorted(set(remainder) - set(REMAINDERS))[0]!r}")
    sizes = [len(bits) for bits in bin_bits]
    if [len(table) for table in base] != sizes or [len(table) for table in delta] != sizes:
        raise ValueError("a table has another number of bins than its tensor")


def run(
    bin_bits: Sequence[np.ndarray],
    base: Sequence[np.ndarray],
    delta: Sequence[np.ndarray],
    remainder: Sequence[str],
    ratios: Sequence[float],
    fractions: Sequence[float],
    limits: Sequence[int],
    *,
    keep: bool,
) -> tuple[Nulls, np.ndarray, np.ndarray]:
    """Calls the operator: the nulls, and the outputs `expected` and `visible`, which are empty unless `keep` is set."""
    sizes, count = [len(bits) for bits in bin_bits], len(bin_bits)

    def joined(tables: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *tables]).astype(np.int64, copy=False))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float64)

    bins = sum(sizes)
    starts = torch.from_numpy(np.cumsum([0, *sizes], dtype=np.int64))
    uniform = torch.tensor([name == "uniform" for name in remainder], dtype=torch.bool)
    fits, near_zero = empty(count, NUM_KINDS, NUM_FITS), empty(count, NUM_KINDS, len(ratios), 2)
    chosen = torch.empty(count, dtype=torch.int64)
    top, below = empty(count, len(fractions), 2), empty(count, len(limits))
    kept = (empty(count, NUM_KINDS, BINS), empty(NUM_KINDS, bins)) if keep else (None, None)
    inputs = starts, joined(bin_bits), joined(base), joined(delta), uniform
    torch.ops.opdkernels.null_(*inputs, ratios, fractions, limits, fits, near_zero, chosen, top, below, *kept)
    inside, tops = near_zero.numpy(), top.numpy()
    nulls = Nulls(
        fits.numpy(), inside[..., 0], inside[..., 1], chosen.numpy(), tops[..., 0], tops[..., 1], below.numpy()
    )
    expected, visible = (np.empty(0) if tensor is None else tensor.numpy() for tensor in kept)
    return nulls, expected, visible


def expected_square(size: float, remainder: str = "grid") -> np.ndarray:
    """E[visible delta^2] at each |W| under a normal update.

    Args:
        size: Standard deviation of the update.
        remainder: "grid" where W is stored in bf16, "uniform" where it is stored wider.

    Returns:
        float64 [32768] by the bf16 bits of |W|; 0 for infinities and NaN.
    """
    uniform = remainder == "uniform"
    spacing = np.ldexp(1.0, np.arange(256) - 134)  # by exponent field
    with np.errstate(divide="ignore"):  # a size far below the spacing
        squares = normal_energy(size / spacing, uniform) * spacing**2 if size > 0 else np.zeros(256)
    bits = np.arange(BINS)
    exponent, below = exponent_of(bits), half_spacing(bits, uniform)
    table = (1 - below) * squares[exponent] + below * squares[np.maximum(exponent - 1, 0)]
    table[bits >= INFINITY] = 0
    return table
