"""The null: what is expected from bf16 rounding alone, for a dense update that is independent of W.

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
coordinates. Files: `histograms.py` (input), `sizes.py` (fit of the size), `kinds.py` (distributions of the update),
`expected.py` (expected histograms).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opdkernels.metrics.rounding_null.expected import Null, near_zero_threshold
from opdkernels.metrics.rounding_null.histograms import (
    BINS,
    INFINITY,
    Histograms,
    Table,
    exponent_of,
    half_spacing,
)
from opdkernels.metrics.rounding_null.kinds import empirical, normal, sign, sign_on_grid
from opdkernels.metrics.rounding_null.sizes import normal_energy
from opdkernels.spectral.exact import RATIOS

KINDS = ("sign", "normal", "empirical")
BATCH = 128  # tensors at a time: bounds the memory, and arrays stay near the caches


def fit(
    base: Table,
    delta: Table,
    ratios: Sequence[float] = RATIOS,
    remainder: str = "grid",
    keep_visible: bool = False,
) -> dict[str, Null]:
    """Null updates of one tensor, as for `fit_many`.

    >>> import numpy as np
    >>> base, delta = np.zeros(32768, np.int64), np.zeros(32768, np.int64)
    >>> base[0x3F80], delta[0] = 10, 10  # ten ones, none of them changed
    >>> fit(base, delta)["chosen"].changed
    0.0
    """
    return fit_many([base], [delta], ratios, remainder, keep_visible)[0]


def fit_many(
    base: Sequence[Table],
    delta: Sequence[Table],
    ratios: Sequence[float] = RATIOS,
    remainder: str | Sequence[str] = "grid",
    keep_visible: bool = False,
) -> list[dict[str, Null]]:
    """Null updates of each tensor, fitted to its observed visible energy.

    Args:
        base: Histogram of |W| of each tensor, int64 [32768] by bf16 bits (an array [T, 32768] also works), or a pair
            (bf16 bits ascending, counts).
        delta: Histogram of |visible delta| of each tensor, in the same form.
        ratios: Sizes of the near-zero masks, as fractions of the coordinates.
        remainder: "grid" where W is stored in bf16, "uniform" where it is stored wider; one for all tensors, or one
            per tensor.
        keep_visible: Whether the nulls contain P(visible) at each used bin of |W|, which takes much memory.

    Returns:
        For each tensor its nulls by kind: "sign", "normal", "empirical" and "chosen", the nearest (for equal distances
        the first). "empirical" is absent where too few small weights changed visibly to estimate a distribution. An
        empty or unchanged tensor has size 0 and no expected change.

    Raises:
        ValueError: The histograms do not cover the same finite coordinates, or a remainder is unknown.
    """
    count = len(base)
    if len(delta) != count:
        raise ValueError(f"{count} base tables but {len(delta)} delta tables; give one of each per tensor")
    modes = [remainder] * count if isinstance(remainder, str) else list(remainder)
    if len(modes) != count or not set(modes) <= {"grid", "uniform"}:
        raise ValueError(
            f"remainder is 'grid' or 'uniform', one for all {count} tensors or one per tensor, not {remainder!r}"
        )
    fitted: list[dict[str, Null]] = [{} for _ in range(count)]
    for mode in sorted(set(modes)):
        same = [i for i in range(count) if modes[i] == mode]
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            tables = Histograms.of([base[i] for i in batch], [delta[i] for i in batch], mode == "uniform")
            by_kind = fit_histograms(tables, tuple(ratios), keep_visible)
            for i, nulls in zip(batch, by_kind, strict=True):
                fitted[i] = nulls
    return fitted


def fit_histograms(tables: Histograms, ratios: tuple[float, ...], keep_visible: bool = False) -> list[dict[str, Null]]:
    """The nulls of each tensor by kind, with the nearest as "chosen"."""
    kinds = [sign(tables) if tables.uniform else sign_on_grid(tables), normal(tables), empirical(tables)]
    thresholds = {ratio: near_zero_threshold(tables, ratio) for ratio in ratios}
    nulls = [
        expected.nulls(tables, kind, thresholds, keep_visible) for kind, expected in zip(KINDS, kinds, strict=True)
    ]
    fitted = []
    for of_tensor in zip(*nulls, strict=True):
        by_kind = {null.kind: null for null in of_tensor if null is not None}
        fitted.append({**by_kind, "chosen": min(by_kind.values(), key=lambda null: null.distance)})
    return fitted


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
