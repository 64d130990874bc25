"""What is expected of one matrix's spectra and masks from bf16 rounding alone, and at random within each |W|."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opdkernels.ops.delta import Tally, delta
from opdkernels.ops.null import expected_square, fit
from opdkernels.spectral.exact import GRAM_LIMIT, Factor, Spectra, top_ranks
from opdkernels.spectral.null import BINS, Composites, Profile, mask_histograms, perturbation
from opdkernels.spectral.principal import Masks

WIDE = (torch.float32, torch.float64)


def expected_arrays(
    w: torch.Tensor,
    v: torch.Tensor,
    view: str,
    factor: Factor,
    projected: torch.Tensor,
    masks: list[Masks],
    spectra: Spectra | None,
) -> dict[str, Any]:
    """The fields `null_*` and `profile_factors` of a record.

    In the visible view, and in the stored view of a bf16 pair, the update is rounded to bf16. In the stored view of a
    pair with an fp32 or fp64 side it is as good as not rounded: a dense update changes every coordinate, and its
    variance is the same at every |W|. Of other pairs (fp16) the stored view has no null.

    Args:
        w: W as stored [m, n].
        v: W' as stored [m, n].
        view: "stored" or "visible".
        factor: Factor of W in this view.
        projected: W in this view times the vectors of its factor, fp64 [long, K].
        masks: Masks of W in this view.
        spectra: Spectra of the pair in this view; None if delta is zero.
    """
    wide = view == "stored" and (w.dtype in WIDE or v.dtype in WIDE)
    if view == "stored" and not wide and not w.dtype == v.dtype == torch.bfloat16:
        return {}
    tally = delta(w, v)
    changed = tally.hist_base_changed if view == "stored" else tally.hist_base_over[0]
    remainder = "grid" if w.dtype == torch.bfloat16 else "uniform"
    visible, variance = (np.ones(BINS), None) if wide else rounding(tally, remainder)
    source = w if w.shape[0] >= w.shape[1] else w.T
    source = source.bfloat16() if view == "visible" else source
    fields: dict[str, Any] = {"null_coverage": coverage(source, masks, tally.hist_base, changed, visible)}
    ranks = top_ranks(min(w.shape))
    defined = float(factor.sigma[ranks[-1] - 1]) > GRAM_LIMIT * float(factor.sigma[0])
    if spectra is None or not defined:
        return fields
    long, short = source.shape
    profile = Profile.of(source, factor.vectors, projected, factor.sigma, ranks, variance)
    if not profile.total > 0:  # the null expects no change
        return fields
    both, on_long, on_short = profile.projections(long, short)
    energy = float(spectra.delta.square().sum())
    undefined = (np.full((len(ranks), 2), np.nan),) * 2 + (np.full(2, np.nan),)
    rotation_long, rotation_short, drift = perturbation(factor.sigma, profile, long, energy) or undefined
    tall = w.shape[0] >= w.shape[1]
    sides = ((on_long, on_short), (rotation_long, rotation_short))
    left_right = [array for pair in sides for array in (pair if tall else pair[::-1])]
    return fields | {
        "null_subspace": np.stack([both, *left_right]),
        "null_drift": drift,
        "profile_factors": np.array(profile.spectrum_factors()),
    }


def rounding(tally: Tally, remainder: str) -> tuple[np.ndarray, np.ndarray]:
    """P(visible) under the nearest null, and the variance of the visible update under the normal null, at each |W|.

    Returns:
        Two arrays, float64 [BINS] by the bf16 bits of |W|.
    """
    nulls = fit(tally.hist_base, tally.hist_delta, remainder)
    return nulls["chosen"].visible, expected_square(nulls["normal"].size, remainder)


def coverage(
    source: torch.Tensor, masks: list[Masks], hist_base: np.ndarray, hist_changed: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """Expected coverage of the masks of each ratio: [null or magnitude-conditioned, ratios, masks, mean and deviation].

    The masks are those of `spectral.null.Composites`.
    """
    result = []
    used = np.flatnonzero(hist_base)
    histograms = mask_histograms(masks, source)[:, used]
    hist_base, hist_changed, visible = hist_base[used], hist_changed[used], visible[used]
    for mask, histogram in zip(masks, histograms, strict=True):
        composites = Composites.of(histogram, hist_base, mask.size)
        result.append(
            (
                composites.independent(hist_base, visible),
                composites.magnitude_conditioned(hist_base, hist_changed),
            )
        )
    return np.array(result).transpose(1, 0, 2, 3)
