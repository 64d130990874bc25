"""The kinds of null: updates of one size (sign), normal ones, and ones with the observed distribution (empirical)."""

from __future__ import annotations

import math

import numpy as np

from opdkernels.ops.null.expected import (
    Expected,
    cumulative_at_steps,
    cumulative_from_means,
    expected_histograms,
    lattice,
    octave,
    window,
)
from opdkernels.ops.null.histograms import Histograms, magnitude, sum_by
from opdkernels.ops.null.sizes import (
    erf,
    normal_energy,
    rounded_square,
    rounded_square_integral,
    rounded_square_with_carry,
    solve,
    solve_by_spacing,
)

LARGEST = 2.0**128 - 2.0**120  # the largest finite bf16
MAX_ROWS = 40  # octaves of the empirical update, from the largest down
DENSITY_BINS = 8  # per octave, for the density of the empirical update
MIN_EXPOSURE = 256  # coordinates that could have shown an update of a bin's size; with fewer, its density is noise
MIN_MOVED = 0.8  # fraction of small weights that must have moved; with fewer, the update is a mask, not dense
MIN_COUNT = 256  # least number of visible updates from which the empirical density is estimated


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp64 magnitudes rounded to bf16, nearest even; larger values become the largest finite one.

    Rounded once: through fp32 a size next to half a spacing, where the fit of a jump ends, would become a tie.
    """
    bits = x.view(np.int64)
    bits = bits + ((1 << 44) - 1) + ((bits >> 45) & 1)
    bits &= -1 << 45
    rounded = np.minimum(bits.view(np.float64), LARGEST)
    subnormal = x < 2.0**-126
    rounded[subnormal] = np.ldexp(np.rint(np.ldexp(x[subnormal], 133)), -133)
    return rounded


def sign_on_grid(tables: Histograms) -> Expected:
    """+-size on a bf16 grid: both results of every used |W|, computed as training would compute them."""
    size = solve_by_spacing(tables, rounded_square, rounded_square_with_carry)
    count, top = len(size), octave(size) + 1
    first_row, rows = window(tables, top - 3, top)
    width, first = rows * 128, np.maximum(first_row * 128, 0)
    weight, update = magnitude(tables.pattern), size[tables.tensor]
    visible, values = np.zeros(len(weight)), np.zeros(count * width)
    for step in (update, -update):
        target = weight + step
        moved = round_to_bf16(np.abs(np.copysign(round_to_bf16(np.abs(target)), target) - weight))
        pattern = (moved.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
        visible += (pattern > 0) / 2
        # A step that ends at the largest finite value may be shorter than the window: counted at its first value.
        offset = np.maximum(pattern - first[tables.tensor], 0)
        shown = (pattern > 0) & (offset < width)
        values += sum_by(tables.tensor[shown] * width + offset[shown], tables.count[shown] / 2, count * width)
    return Expected(size, visible, first, values.reshape(count, width), np.ones(count, bool))


def sign(tables: Histograms) -> Expected:
    """+-size with a remainder."""
    size = solve_by_spacing(tables, rounded_square)
    safe = np.where(size > 0, size, 1.0)
    first, rows = window(tables, octave(safe) - 2, octave(safe) + 1)
    edges = lattice(first, rows, 128)
    step = edges[:, :, :1] / 128
    mean = np.clip((edges + step - safe[:, None, None]) / step, 0, 1)
    bottom = np.clip(1 - safe / edges[:, 0, 0], 0, 1)
    return expected_histograms(
        tables, size, np.ones(len(size), bool), first, *cumulative_from_means(mean, bottom), np.zeros(len(size))
    )


def normal(tables: Histograms) -> Expected:
    """`size` times a standard normal."""
    size = solve_by_spacing(tables, normal_energy)
    safe = np.where(size > 0, size, 1.0)
    first, rows = window(tables, octave(safe) - 12, octave(safe * 6.5) + 1)
    below = erf(lattice(first, rows, 256) / (safe * math.sqrt(2))[:, None, None])
    unmoved = np.zeros(len(size))
    return expected_histograms(
        tables, size, np.ones(len(size), bool), first, *cumulative_at_steps(below, tables.uniform, unmoved), unmoved
    )


def density(tables: Histograms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distribution of |update| where rounding hides least.

    Returns probabilities [T, rows, DENSITY_BINS], the octaves (rows), and whether there were enough changes [T]. No
    histogram joins |W| and |delta|, but an odd multiple of 2**t can only come from weights of spacing 2**t or less: the
    lowest set bit of a visible delta x bounds its |W|. The odd multiples from nine on are used. Their |W| is below 256
    x / 9 (at relative norms near 1e-3 the smallest decile and less), where every move by about x is visible and a cell
    no wider than a bin. Where the density is f, such a pattern is expected f times the summed cell widths of those
    weights often: solved for f, bin by bin.
    """
    count = len(tables.numel)
    row, slot = tables.delta_pattern >> 7, tables.delta_pattern & 127
    usable = (row > 0) & ((slot & 15 > 0) | (slot & 31 == 16))
    tensor, row, slot = tables.delta_tensor[usable], row[usable], slot[usable]
    lowest, rows = (int(row.min()), int(np.ptp(row)) + 1) if len(row) else (127, 1)
    group = (tensor * rows + row - lowest) * DENSITY_BINS + slot // (128 // DENSITY_BINS)
    counts = tables.delta_count[usable].astype(float)
    mass = sum_by(group, counts, count * rows * DENSITY_BINS).reshape(count, rows, DENSITY_BINS)

    # Cell widths in units of the row's own spacing. Steps across a power of two add halves (see `expected_histograms`).
    padded = np.pad(tables.spacing, ((0, 0), (0, 8)))
    finer = np.cumsum(tables.spacing, axis=1)
    middle = 1 + (np.arange(DENSITY_BINS) + 0.5) / DENSITY_BINS
    half_steps = padded[:, :, None] * middle / 4
    half_steps[:, :2] = 0
    row = lowest + np.arange(rows)
    width, exposure = np.repeat(finer[:, row, None], DENSITY_BINS, axis=2), np.zeros((count, rows, DENSITY_BINS))
    for t in range(5):  # patterns of t trailing zeros: in each bin 8, 4, 2, 1, and in every other bin one more
        if t:
            width += padded[:, row + t, None] * 2**t - half_steps[:, row + t]
        exposure += (np.arange(DENSITY_BINS) % 2 if t == 4 else 8 >> t) * (width + half_steps[:, row + t + 1])
    exposure /= 128 // DENSITY_BINS
    mass[exposure < MIN_EXPOSURE] = 0
    known = (mass.sum((1, 2)) >= MIN_COUNT) | (tables.energy == 0)
    mass /= np.maximum(exposure, 1)
    mass /= np.maximum(mass.sum((1, 2)), 1)[:, None, None]
    return mass, row, known


def interpolate_on_lattice(
    cumulative: np.ndarray, first: np.ndarray, rows: int, steps: int, factor: np.ndarray
) -> np.ndarray:
    """Cumulative probabilities of `factor` times an update, on a lattice: linear between the edges of bins.

    Args:
        cumulative: P(update <= edge), DENSITY_BINS edges per octave and the last one, [T, octaves * DENSITY_BINS + 1].
        first: Octave of the first row of the lattice, relative to the first one of `cumulative` [T].
        rows: Rows of the lattice, each an octave.
        steps: Points per row: 1, 1 + 1 / steps, ... times a power of two.
        factor: [T].

    Returns:
        float64 [T, rows, steps]; constant beyond the edges.
    """
    # A point over the factor is in the same place of its octave in every row.
    mantissa, exponent = np.frexp((1 + np.arange(steps) / steps) / factor[:, None])
    place = (2 * mantissa - 1) * DENSITY_BINS
    bin_ = place.astype(np.int64)
    padded = np.pad(cumulative, ((0, 0), (1, 1)), mode="edge")
    bin_ += DENSITY_BINS * (exponent + first[:, None] - 1) + 1  # of the first row, in `padded`
    index = np.clip(bin_[:, None] + DENSITY_BINS * np.arange(rows)[:, None], 0, padded.shape[1] - 2)
    index += padded.shape[1] * np.arange(len(padded))[:, None, None]
    differences = np.diff(padded, axis=1, append=0)
    below = np.take(differences, index)
    below *= (place - np.floor(place))[:, None]
    below += np.take(padded, index)
    return below


def empirical(tables: Histograms) -> Expected:
    """The observed distribution times a factor of 1/8 to 8.

    What small weights leave unchanged stays unchanged. If that is more than 1 - MIN_MOVED of them, the update is not
    dense: the distribution would explain a mask by itself, and is unknown.
    """
    mass, row, known = density(tables)
    count = len(known)
    moved = known & (tables.energy > 0)
    mass[~moved] = 0
    mass[~moved, 0, 0] = 1  # arbitrary: the results are not used
    lower = 1 + np.arange(DENSITY_BINS) / DENSITY_BINS
    mean, mean_square = lower + 0.5 / DENSITY_BINS, lower * lower + lower / DENSITY_BINS + 1 / (3 * DENSITY_BINS**2)

    # E[k^2] depends on the update over the spacing only, so counts are first summed by row less exponent. For factors
    # of 1/8 to 8, everything below a difference of -12 is hidden (except through a remainder), and above 3 rounding is
    # negligible.
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
        integral = rounded_square_integral(factor[:, None, None] * spacings, tables.uniform)
        average = np.diff(integral, axis=2) / (factor[:, None, None] * (np.exp2(near + 7.0) / DENSITY_BINS)[:, None])
        return (counts * average).sum((1, 2)) + square * factor**2 + linear * factor

    factor = solve(tables.energy, energy, np.full(count, 1 / 8), np.full(count, 8.0))
    probability = mass.sum((1, 2))
    known = np.asarray(known & (~moved | ((np.abs(np.log2(factor)) < 2.99) & (probability >= MIN_MOVED))))
    rms = np.sqrt(np.einsum("trb,r,b->t", mass, np.exp2(2.0 * (row - 127)), mean_square)) * factor
    size = np.where(moved, rms, 0.0)

    present = np.asarray(mass.any(2))
    shift = octave(factor) - 127
    bottom, top = (
        row[np.argmax(present, axis=1)] + shift,
        row[len(row) - 1 - np.argmax(present[:, ::-1], axis=1)] + shift + 2,
    )
    first, rows = window(tables, np.maximum(bottom, top - MAX_ROWS), top)
    cumulative = np.pad(np.cumsum(mass.reshape(count, -1), axis=1), ((0, 0), (1, 0)))
    cumulative += (1 - probability)[:, None]
    below = interpolate_on_lattice(cumulative, first - 1 - int(row[0]), rows + 1, 256, factor)
    return expected_histograms(
        tables, size, known, first, *cumulative_at_steps(below, tables.uniform, 1 - probability), 1 - probability
    )
