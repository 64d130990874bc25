r"""What an update with independent entries gives for the metrics of spectra and of W's geometry.

The update has mean 0 and a variance v(|w|) that depends on the weight only: constant where the pair is stored wider
than bf16, and otherwise what rounding to bf16 leaves of a normal update at each |w|. Large weights hide small updates,
so v is smaller where the top singular vectors of W have their mass, and expectations differ from k^2 / (m n).

    coverage of a mask    fraction of sum p over the mask, with p(|w|) the probability of a change
    projections           E|U_k^T D V_k|^2 = sum of v_ij l_i r_j, with the leverages l_i = |U_k[i]|^2, r_j = |V_k[j]|^2
    rotation and drift    second-order perturbation of the singular vectors and values of W, averaged over DRAWS draws
                          of U^T D V, whose entries are close to normal; the entries of near-equal singular values are
                          rotated exactly, pair by pair
    top of the spectrum   the law of Marchenko and Pastur for one variance, times a correction: the ratio of two small
                          matrices with the same normal draws, one with the row and column profile of v

Every result is a mean and a standard deviation over updates. Draws have a fixed seed.

Source: Stewart and Sun, Matrix Perturbation Theory, 1990, V.2 (perturbation); Marchenko and Pastur 1967.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from opdkernels.spectral.principal import Masks, row_blocks
from opdkernels.spectral.symmetric import eigenvalues

BINS = 1 << 15  # bf16 magnitudes
DRAWS = 4  # of U^T D V; the Monte-Carlo error of a mean is its standard deviation over 2
SEED = 0
MAX_RELATIVE_NORM = 0.03  # |D| / |W| up to which second-order perturbation gives rotation and drift
PROFILE_SIDE = (
    128  # shorter side of the small matrices that give the correction for the profile; the longer: in proportion
)


def magnitude_bits(weights: torch.Tensor) -> torch.Tensor:
    """bf16 bits of |W|, rounded to bf16: int32 of the same shape."""
    return weights.bfloat16().contiguous().view(torch.int16).to(torch.int32) & 0x7FFF


def mask_histograms(masks: Sequence[Masks], source: torch.Tensor) -> np.ndarray:
    """Histogram of |W| in each principal mask, ties at the threshold in expectation.

    Args:
        masks: The masks of W, one per ratio.
        source: W as the view [long, short] that the masks were computed from.

    Returns:
        float64 [masks, BINS] by the bf16 bits of |W|.
    """
    long, short = source.shape
    histograms = np.zeros((len(masks), BINS))
    for rows in row_blocks(long, short):
        bits = magnitude_bits(source[rows]).numpy().ravel()
        first, last = rows.start * short, min(rows.stop, long) * short
        for histogram, mask in zip(histograms, masks, strict=True):
            sure = np.unpackbits(mask.sure[first // 8 : (last + 7) // 8], count=last - first, bitorder="little")
            histogram += np.bincount(bits[sure.view(bool)], minlength=BINS)
    for histogram, mask in zip(histograms, masks, strict=True):
        for index, weight in ((mask.above, 1.0), (mask.tied, mask.taken / max(len(mask.tied), 1))):
            row, column = (torch.from_numpy(i) for i in np.divmod(index, short))
            histogram += weight * np.bincount(magnitude_bits(source[row, column]).numpy(), minlength=BINS)
    return histograms


def low_fractions(hist_base: np.ndarray, size: int) -> np.ndarray:
    """The fraction of each bin of |W| that the near-zero mask of `size` coordinates contains, float64 [BINS]."""
    below = np.cumsum(hist_base) - hist_base
    return np.clip((size - below) / np.maximum(hist_base, 1), 0, 1)


@dataclass(frozen=True)
class Composites:
    """Histograms of |W| in the masks of one ratio [3, BINS]: principal, principal and not near-zero, and outside the
    principal mask or near-zero."""

    histograms: np.ndarray

    @classmethod
    def of(cls, principal: np.ndarray, hist_base: np.ndarray, size: int) -> Composites:
        """From the histogram of the principal mask [BINS], of all |W| [BINS], and the size of the near-zero mask."""
        low = low_fractions(hist_base, size) * principal
        return cls(np.stack([principal, principal - low, hist_base - principal + low]))

    def independent(self, hist_base: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """Coverage of changes that are independent with probability `visible` [BINS] at each |W|.

        Returns:
            Mean and standard deviation, by the delta method, of the fraction of the changes in each mask [3, 2]; NaN
            if no change is expected.
        """
        total = float((hist_base * visible).sum())
        if not total > 0:
            return np.full((len(self.histograms), 2), np.nan)
        mean = self.histograms @ visible / total
        spread = np.maximum(visible * (1 - visible), 0)  # P(visible) may exceed 1 by its rounding
        inside, all_ = self.histograms @ spread, float((hist_base * spread).sum())
        variance = np.maximum(inside * (1 - 2 * mean) + mean**2 * all_, 0)
        return np.stack([mean, np.sqrt(variance) / total], 1)

    def magnitude_conditioned(self, hist_base: np.ndarray, hist_changed: np.ndarray) -> np.ndarray:
        """Coverage if as many coordinates of each bin of |W| as changed are drawn at random.

        Returns:
            Mean and standard deviation of the fraction of the changes in each mask (hypergeometric in each bin)
            [3, 2]; NaN if nothing changed.
        """
        changed = float(hist_changed.sum())
        if not changed:
            return np.full((len(self.histograms), 2), np.nan)
        n = np.maximum(hist_base, 1)
        rate = hist_changed / n
        mean = self.histograms @ rate / changed
        variance = self.histograms * (1 - self.histograms / n) * rate * (n - hist_changed) / np.maximum(n - 1, 1)
        return np.stack([mean, np.sqrt(np.maximum(variance.sum(1), 0)) / changed], 1)


@dataclass(frozen=True)
class Profile:
    """The variance of a random update in the singular basis of W.

    Attributes:
        rows: Sum of the variances of each row, fp64 [long].
        columns: Sum of the variances of each column, fp64 [short].
        moments: Sums of v_ij l_i r_j, fp64 [ratios + 1, ratios + 1], for the leverages of the top vectors of each ratio
            and, last, for all vectors (l = r = 1).
        ranks: Number of top vectors of each ratio.
    """

    rows: np.ndarray
    columns: np.ndarray
    moments: np.ndarray
    ranks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        source: torch.Tensor,
        basis: torch.Tensor,
        projected: torch.Tensor,
        sigma: torch.Tensor,
        ranks: Sequence[int],
        variance: np.ndarray | None,
    ) -> Profile:
        """The profile of the update that an expected variance at each |W| gives.

        Args:
            source: W as a view [long, short].
            basis: Top singular vectors of W on its shorter side, fp64 [short, K].
            projected: W times these, fp64 [long, K].
            sigma: Singular values of W, descending, fp64 [short]; the first K are not 0.
            ranks: Number of top vectors of each ratio; the last is K.
            variance: E[delta^2] by the bf16 bits of |W|, float64 [BINS]; None: the same at every |W|.
        """
        long, short = source.shape
        ends = torch.tensor(ranks) - 1
        right = torch.cat([basis.square().cumsum(1)[:, ends], torch.ones(short, 1, dtype=torch.float64)], 1)
        table = (
            torch.ones(BINS) if variance is None else torch.from_numpy(variance / max(variance.max(), 1e-300)).float()
        )
        rows, columns = torch.zeros(long, dtype=torch.float64), torch.zeros(short, dtype=torch.float64)
        moments = torch.zeros(right.shape[1], right.shape[1], dtype=torch.float64)
        right_narrow = right.float()
        for block in row_blocks(long, short):
            weights = source[block]
            vectors = projected[block] / sigma[: basis.shape[1]]
            left = torch.cat([vectors.square().cumsum(1)[:, ends], torch.ones(len(weights), 1)], 1)
            values = table[magnitude_bits(weights)] if variance is not None else torch.ones(weights.shape)
            products = (values @ right_narrow).double()
            moments += left.T @ products
            rows[block] = products[:, -1]
            columns += values.sum(0)
        return cls(rows.numpy(), columns.numpy(), moments.numpy(), tuple(ranks))

    @property
    def total(self) -> float:
        """Sum of all variances."""
        return float(self.moments[-1, -1])

    def band_sizes(self, side: int) -> np.ndarray:
        """Number of vectors in each band: up to the first rank, between ranks, and the rest of `side`."""
        return np.diff([0, *self.ranks, side])

    def band_variances(self, long: int, short: int) -> np.ndarray:
        """Variance of an entry of U^T D V in each pair of bands, relative to the sum of all variances."""
        sizes = np.outer(self.band_sizes(long), self.band_sizes(short))
        sums = np.diff(np.diff(np.pad(self.moments, ((1, 0), (1, 0))), axis=0), axis=1)
        return np.maximum(sums, 0) / np.maximum(sizes, 1) / self.total

    def projections(self, long: int, short: int) -> np.ndarray:
        """Fractions of the energy of the update in the top vectors of W.

        Returns:
            Mean and standard deviation, for entries of U^T D V that are normal, of the fraction within both sides, on
            the long side, and on the short side [3, ratios, 2].
        """
        sizes = np.outer(self.band_sizes(long), self.band_sizes(short))
        squares = 2 * sizes * self.band_variances(long, short) ** 2
        result = np.empty((3, len(self.ranks), 2))
        for i in range(len(self.ranks)):
            for which, (left, right) in enumerate(((i, i), (i, -1), (-1, i))):
                rows, columns = (slice(None) if end < 0 else slice(end + 1) for end in (left, right))
                inside, all_ = float(squares[rows, columns].sum()), float(squares.sum())
                mean = self.moments[left, right] / self.total
                result[which, i] = mean, math.sqrt(max(inside * (1 - 2 * mean) + mean**2 * all_, 0))
        return result

    def spectrum_factors(self) -> tuple[float, float]:
        """How the profile changes the stable rank and the energy of the top sixteen of a random matrix.

        Returns:
            Factors of both: those of a small matrix with the row and column profile over those of one without it, for
            the same normal draws.
        """
        long, short = len(self.rows), len(self.columns)
        small = min(short, PROFILE_SIDE)
        tall = min(long, max(small, round(long * small / short)), 4096)
        if min(self.rows.sum(), self.columns.sum()) <= 0:
            return 1.0, 1.0
        rows, columns = (
            torch.from_numpy(np.sort(sums)[((np.arange(size) + 0.5) * len(sums) / size).astype(int)]).sqrt()
            for sums, size in ((self.rows, tall), (self.columns, small))
        )
        top = max(1, round(16 * small / short))
        with_profile = top_of_random(tall, small, top, rows.unsqueeze(1) * columns)
        stable_rank, energy = with_profile / top_of_random_without_profile(tall, small, top)
        return float(stable_rank), float(energy)


def top_of_random(long: int, short: int, top: int, scale: torch.Tensor | None = None) -> np.ndarray:
    """The stable rank of normal draws and the energy of their `top` largest singular values, each summed over DRAWS
    draws: float64 [2]. Draws are multiplied by `scale` [long, short], and are the same at each call."""
    sums, generator = np.zeros(2), torch.Generator().manual_seed(SEED)
    for _ in range(DRAWS):
        draw = torch.randn(long, short, generator=generator, dtype=torch.float64)
        matrix = draw if scale is None else scale * draw
        squares = eigenvalues(matrix.T @ matrix).clamp(min=0).flip(0)
        sums += float(squares.sum() / squares[0]), float(squares[:top].sum() / squares.sum())
    return sums


@lru_cache(maxsize=256)
def top_of_random_without_profile(long: int, short: int, top: int) -> np.ndarray:
    """`top_of_random` without a scale; kept, since the matrices of a model have few shapes."""
    return top_of_random(long, short, top)


def perturbation(
    sigma: torch.Tensor, profile: Profile, long: int, energy: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Rotation of the top subspaces of W and drift of its singular values under random updates.

    Args:
        sigma: Singular values of W, descending, fp64 [short].
        profile: Variance of the update in the singular basis of W.
        long: The longer side of W.
        energy: Squared norm of the update.

    Returns:
        Mean and standard deviation over DRAWS draws of the mean sine of the principal angles on the long and on the
        short side [ratios, 2], and of the drift [2]. None if the update is larger than MAX_RELATIVE_NORM times W, or
        if W has too low a rank for its top vectors to be defined.
    """
    short, norm = len(sigma), float(sigma.norm())
    if not norm > 0 or energy > (MAX_RELATIVE_NORM * norm) ** 2 or not float(sigma[profile.ranks[-1] - 1]) > 0:
        return None
    variances = profile.band_variances(long, short) * energy
    column_band, row_band = (np.repeat(np.arange(len(profile.ranks) + 1), profile.band_sizes(short)) for _ in range(2))
    scale = torch.from_numpy(variances[np.ix_(row_band, column_band)]).sqrt().float()
    below = torch.from_numpy(variances[-1][column_band]) * (long - short)  # energy of the rows beyond `short`
    generator = torch.Generator().manual_seed(SEED)
    gap = gap_of_squares(sigma)
    draws = [
        one_perturbation(sigma, gap, scale * torch.randn(short, short, generator=generator), below, profile.ranks)
        for _ in range(DRAWS)
    ]

    def mean_and_deviation(values: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.mean(values, 0), np.std(values, 0, ddof=1)], -1)

    left, right, drift = (mean_and_deviation(list(values)) for values in zip(*draws, strict=True))
    return left, right, drift


def gap_of_squares(sigma: torch.Tensor) -> torch.Tensor:
    """[i, j]: sigma_j^2 - sigma_i^2, computed in fp64 and rounded to fp32 [short, short]."""
    squares = sigma.square()
    return (squares[None, :] - squares[:, None]).float()


def one_perturbation(
    sigma: torch.Tensor, gap: torch.Tensor, update: torch.Tensor, below: torch.Tensor, ranks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean sines on both sides [ratios] and drift [] for one draw of U^T D V, fp32 [short, short], whose further rows
    have the expected energy `below` in each column, fp64 [short].

    Elements are fp32, sums and eigenvalues fp64: an element has a relative error of a few 1e-7, and the gap of
    near-equal singular values one of 6e-8, where DRAWS draws leave 1e-2.
    """
    squares, narrow = sigma.square(), sigma.float()
    right = narrow[:, None] * update
    right = right + right.T
    right_tangent = half_angle_tangent(right, gap)
    top = ranks[-1]  # angles between top vectors and others need these columns only
    left = update[:, :top] * narrow[:top] + (update[:top] * narrow).T
    tangents = []
    for tangent, rest in (
        (half_angle_tangent(left, gap[:, :top]), below / squares.clamp(min=torch.finfo(squares.dtype).tiny)),
        (right_tangent[:, :top], None),
    ):
        sines = []
        for k in ranks:
            x = tangent[k:, :k].double()
            inner = x.T @ x
            if rest is not None:
                inner.diagonal().add_(rest[:k])
            tangent_sq = eigenvalues(inner).clamp(min=0)
            sines.append(float((tangent_sq / (1 + tangent_sq)).sqrt().mean()))
        tangents.append(np.array(sines))
    # [i, j]: what the square of the larger value j takes from that of i. Converting first is faster than sum(dtype=).
    gained = right_tangent.mul_(right).tril(-1).double()
    shift = gained.sum(0) - gained.sum(1)
    trained = squares + 2 * sigma * update.diagonal() + update.square().double().sum(0) + below + shift
    change = trained.clamp(min=0).sqrt().sort(descending=True).values - sigma
    return tangents[0], tangents[1], np.array(float(change.norm() / sigma.norm()))


def half_angle_tangent(off_diagonal: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The tangent t of the angle that diagonalises [[0, x], [x, |gap|]], for each element x.

    The larger eigenvalue is |gap| + x t and the smaller one -x t.
    """
    twice = 2 * off_diagonal
    return twice.div_(torch.hypot(twice, gap).add_(gap.abs()).clamp_(min=torch.finfo(gap.dtype).tiny))
