"""Terms of reports that are no registered metric, and the glossary of a page."""

from __future__ import annotations

from collections.abc import Iterable

from opdkernels.metrics.catalog import METRICS
from opdkernels.metrics.registry import PAPER, Metric

# Views, the columns that identify a row, and the columns of an experiment's table.
TERMS: dict[str, Metric] = {
    term.name: term
    for term in (
        Metric(
            "stored",
            "stored view",
            "both checkpoints as stored, Δ = W′ − W in fp32 (fp64 for fp64): what training did",
        ),
        Metric(
            "visible",
            "visible view",
            "both checkpoints rounded to bf16, Δ rounded to bf16: what a bf16 deployment sees",
            source=PAPER,
        ),
        Metric(
            "null",
            "expected from bf16 rounding alone (the null)",
            "a dense update that is independent of W and has the observed visible energy, stored in bf16: its expected "
            "metrics, in closed form, per tensor",
        ),
        Metric(
            "ulp",
            "bf16 step",
            "signed number of bf16 values from the old to the new value, both rounded to bf16",
        ),
        Metric("layer", "layer", "layer number in the tensor's name; – where the name has none"),
        Metric("module", "module", "role of the tensor in its layer, from the words of its name", source=PAPER),
        Metric("block", "block", "attention, mlp, embedding, lm_head, norm, router, vision or other", source=PAPER),
        Metric("tower", "tower", "language model or vision tower"),
        Metric("name", "tensor", "name in the base checkpoint; → name in the trained one, where it differs"),
        Metric("shape", "shape", "dimensions of the compared part"),
        Metric("dtype", "dtype", "stored type, base → trained where they differ"),
        Metric("pair", "runs", "the two runs that are compared, A first"),
        Metric("step", "step", "number of the checkpoint: from its name, or its position in the order given"),
        Metric(
            "similarity",
            "Sim₁₆",
            "‖V(t)ᵀV(T)‖² / 16 of the 16 top singular vectors of the update at a step and at the end, mean of left and "
            "right and over matrices",
            section="compared with the last checkpoint",
            format="measure",
        ),
        Metric("arm", "arm", "the run with some options, or trained on a mask; start: before any step"),
        Metric(
            "score",
            "score",
            "mean reward of greedy completions of held-out prompts, the same for all arms; 95 % interval by resampling "
            "seeds, and prompts within them",
        ),
        Metric(
            "gain_retained",
            "gain retained",
            "an arm's gain in score over the start, divided by that of the reference arm; 95 % interval by the same "
            "resampling; absent where the reference gain may be zero",
        ),
        Metric(
            "update_fraction",
            "update fraction",
            "fraction of the coordinates changed by the full run that have their values from that run; the others are "
            "as at the start",
        ),
        Metric(
            "mask_recall",
            "mask recall",
            "fraction of the full run's mask that an arm's mask contains; by chance, its own density",
        ),
        Metric("trained", "trained", "fraction of the coordinates that the optimizer may change"),
        Metric("changed_stored", "changed, stored", "fraction of the coordinates with Δ ≠ 0 as stored"),
        Metric(
            "changed_visible", "changed, visible", "fraction of the coordinates whose bf16 value changed", source=PAPER
        ),
        Metric(
            "changed_null",  # a fraction in experiments, a count in tables of tensors
            "expected from bf16 rounding alone",
            "fraction of the coordinates that an update of the same visible energy would change in bf16 if it were "
            "independent of the weights",
        ),
    )
}


def term(name: str) -> Metric:
    """The metric or term of a name. Raises KeyError for an unknown name."""
    return TERMS[name] if name in TERMS else METRICS[name]


def glossary(names: Iterable[str]) -> list[Metric]:
    """The metrics and terms of a page in its order, each once."""
    return [term(name) for name in dict.fromkeys(names)]
