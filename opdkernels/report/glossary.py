"""What each figure of a report means and where it comes from: one text for tooltips and for the glossary."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "arXiv 2606.13657"
OWN = "this package"


@dataclass(frozen=True)
class Figure:
    """A figure's short name, its definition in one line, and its source."""

    term: str
    definition: str
    source: str


FIGURES: dict[str, Figure] = {
    "arm": Figure("arm", "the run with some options, or trained on some mask; start: before any step", OWN),
    "score": Figure(
        "score",
        "mean reward of greedy completions of held-out prompts, the same for all arms; 95 % interval by resampling seeds, and prompts within them",
        OWN,
    ),
    "gain_retained": Figure(
        "gain kept",
        "an arm's gain in score over the start, over that of the arm it is measured against; 95 % interval by the same resampling, none where that gain may be nothing",
        OWN,
    ),
    "update_fraction": Figure(
        "of the change",
        "share of the coordinates that the full run changed which are as that run left them; the others are as at the start",
        OWN,
    ),
    "mask_recall": Figure(
        "of the found set", "share of the full run's set that an arm's mask holds; by chance, its own density", OWN
    ),
    "trained": Figure("trained", "numbers that the optimizer may move, as a share of the coordinates", OWN),
    "changed_stored": Figure("changed, stored", "share of the coordinates with Δ ≠ 0 as stored", OWN),
    "changed_null": Figure(
        "by rounding alone",
        "share of the coordinates that an update of the same visible energy would change in bf16 if it knew nothing of the weights",
        OWN,
    ),
    "changed_visible": Figure("changed, visible", "share of the coordinates whose value in bf16 changed", PAPER),
    "stored": Figure(
        "stored view", "both checkpoints as stored, Δ = W′ − W in fp32 (fp64 for fp64): what training did", OWN
    ),
    "visible": Figure(
        "visible view", "both checkpoints rounded to bf16, Δ rounded to bf16: what a bf16 deployment sees", PAPER
    ),
    "changed": Figure("changed", "share of the finite coordinates with Δ ≠ 0", PAPER),
    "frac_zero": Figure("unchanged", "share of the finite coordinates with Δ = 0, the sparsity at ε = 0", PAPER),
    "frac_le_1e-5": Figure(
        "|Δ| ≤ 1e-5",
        "share of the finite coordinates with |Δ| ≤ 1e-5, the paper's sparsity; in the visible view 1e-5 is "
        "rounded to bf16, 1.00136e-5",
        PAPER,
    ),
    "unchanged_rtol_1e-3": Figure(
        "unchanged, bf16-aware",
        "share of coordinates with |w − w′| ≤ 1e-3 · max(|w|, |w′|), which for bf16 is equality of bits",
        "arXiv 2511.08567",
    ),
    "relative_norm": Figure("relative norm", "‖Δ‖ / ‖W‖, Frobenius norms", PAPER),
    "max_abs": Figure("largest |Δ|", "the largest |Δ|, in the units of the weights", PAPER),
    "top_energy_1pct": Figure(
        "top 1 % energy",
        "share of the update energy ‖Δ‖² in the 1 % of coordinates with the largest |Δ|, chosen in each "
        "tensor; groups weigh it by energy",
        PAPER,
    ),
    "energy_share": Figure("energy share", "the group's share of the update energy, the sum of Δ²", PAPER),
    "parameter_share": Figure("parameter share", "the group's share of the compared coordinates", OWN),
    "energy_over_parameters": Figure(
        "energy / parameters",
        "energy share over parameter share: above 1× the group moved more than its size alone would give",
        OWN,
    ),
    "near_zero_coverage_10pct": Figure(
        "near-zero coverage",
        "share of the changed coordinates that lie among the 10 % smallest |W| of their tensor; by chance 10 "
        "%. Ties at the cut count in expectation",
        PAPER,
    ),
    "null": Figure(
        "rounding alone (the null)",
        "a dense update independent of W, of the same visible energy as the observed one, stored in bf16: "
        "expected figures, in closed form, tensor by tensor",
        OWN,
    ),
    "null_kind": Figure(
        "nearest null",
        "the kind of null whose expected |Δ| is nearest to the observed: sign (± one size), normal (Gaussian), "
        "empirical (the |Δ| seen among the smallest tenth of |W|)",
        OWN,
    ),
    "null_distance": Figure(
        "null distance",
        "total variation between observed and expected |Δ|: the share of coordinates that would have to move "
        "for the two to agree",
        OWN,
    ),
    "changed_over_null": Figure(
        "changed / null", "changed coordinates over what rounding alone would show: 1× is no more and no fewer", OWN
    ),
    "near_zero_coverage_10pct_over_null": Figure(
        "near-zero / null",
        "near-zero coverage at 10 % over what rounding alone would show: 1× means that rounding explains it",
        OWN,
    ),
    "ulp": Figure(
        "bf16 step",
        "how many bf16 numbers lie between the old and the new value, both rounded to bf16, with its sign",
        OWN,
    ),
    "tensors": Figure("tensors", "matched tensors in the group", OWN),
    "numel": Figure("parameters", "coordinates compared", OWN),
    "nonfinite": Figure(
        "NaN or Inf",
        "coordinates that are not finite on one side or the other; they are left out of every other figure",
        OWN,
    ),
    "bit_equal": Figure(
        "bit-identical", "coordinates whose stored bits are equal; +0 and −0 differ, a NaN equals itself", OWN
    ),
    "layer": Figure("layer", "layer number in the tensor's name; – where the name has none", OWN),
    "module": Figure("module", "what the tensor is in its layer, from whole words of its name", PAPER),
    "block": Figure("block", "attention, mlp, embedding, lm_head, norm, router, vision or other", PAPER),
    "tower": Figure("tower", "language model or vision tower", OWN),
    "name": Figure("tensor", "name in the source checkpoint; → the trained one's, where it differs", OWN),
    "shape": Figure("shape", "dimensions of the compared part", OWN),
    "dtype": Figure("dtype", "stored type, source → trained where they differ", OWN),
    "pair": Figure("runs", "the two runs compared, A the first", OWN),
    "changed_a": Figure(
        "changed by A", "coordinates with visible |Δ| above the threshold in the pair's first run", PAPER
    ),
    "changed_b": Figure("changed by B", "the same in the pair's second run", PAPER),
    "coverage_a": Figure("A covered by B", "share of what the first run changed that the second changed too", PAPER),
    "coverage_b": Figure("B covered by A", "share of what the second run changed that the first changed too", PAPER),
    "jaccard": Figure("Jaccard", "changed by both over changed by either", PAPER),
    "over_uniform_global": Figure(
        "uniform, model", "changed by both over chance from the densities of the whole model", PAPER
    ),
    "over_uniform": Figure("uniform", "changed by both over chance from the densities, tensor by tensor", OWN),
    "over_magnitude": Figure(
        "within |W|", "changed by both over chance among coordinates of the same |W| in bf16, tensor by tensor", OWN
    ),
    "z_magnitude": Figure("z", "standard deviations above chance within |W| (hypergeometric)", OWN),
    "over_row": Figure("within rows", "changed by both over chance within |W| classes of each row", OWN),
    "z_row": Figure("z, rows", "standard deviations above chance within rows and |W|", OWN),
    "over_column": Figure("within columns", "changed by both over chance within |W| classes of each column", OWN),
    "step": Figure("step", "number of the checkpoint: from its name, or its place in the order given", OWN),
    "cosine_final": Figure("cosine", "of the checkpoint's update with that of the last one, stored view", OWN),
    "similarity": Figure(
        "Sim₁₆",
        "‖V(t)ᵀV(T)‖² / 16 of the 16 top singular vectors of the update at a step and at the end, mean of left and right and over matrices",
        OWN,
    ),
    "coverage_final": Figure(
        "final set so far",
        "share of the coordinates changed at the end that are changed at this step, visible |Δ| > atol",
        OWN,
    ),
    "coverage_step": Figure(
        "kept to the end", "share of the coordinates changed at this step that are changed at the end", OWN
    ),
    "shared_over_magnitude": Figure(
        "over |W|",
        "changed now and at the end, over what independent changes within each |W| of each tensor would share",
        OWN,
    ),
    "frac_changed_since_previous": Figure(
        "since previous", "share of the coordinates visibly other than at the checkpoint before", OWN
    ),
    "relative_norm_since_previous": Figure("moved since previous", "‖W_t − W_{t−1}‖ / ‖W‖, stored view", OWN),
    "stable_rank": Figure("stable rank", "‖Δ‖² / σ₁², mean over matrices", PAPER),
    "principal_coverage_10pct": Figure(
        "principal coverage",
        "share of the changed coordinates in the tenth that the top singular vectors of W make large, mean over matrices",
        PAPER,
    ),
    "z_column": Figure("z, columns", "standard deviations above chance within columns and |W|", OWN),
}


def glossary(keys: list[str]) -> list[Figure]:
    """The figures a page uses, in its order, each once."""
    return [FIGURES[key] for key in dict.fromkeys(keys)]
