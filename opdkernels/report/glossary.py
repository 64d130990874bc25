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
            name="stored",
            label="stored view",
            definition="both checkpoints as stored, Δ = W′ − W in fp32 (fp64 for fp64): what training did",
        ),
        Metric(
            name="visible",
            label="visible view",
            definition="both checkpoints rounded to bf16, Δ rounded to bf16: what a bf16 deployment sees",
            source=PAPER,
        ),
        Metric(
            name="null",
            label="expected from bf16 rounding alone (the null)",
            definition="a dense update that is independent of W and has the observed visible energy, stored in bf16: "
            "its expected metrics, in closed form, per tensor",
        ),
        Metric(
            name="ulp",
            label="bf16 step",
            definition="signed number of bf16 values from the old to the new value, both rounded to bf16",
        ),
        Metric(name="layer", label="layer", definition="layer number in the tensor's name; – where the name has none"),
        Metric(
            name="module",
            label="module",
            definition="role of the tensor in its layer, from the words of its name",
            source=PAPER,
        ),
        Metric(
            name="block",
            label="block",
            definition="attention, mlp, embedding, lm_head, norm, router, vision or other",
            source=PAPER,
        ),
        Metric(name="tower", label="tower", definition="language model or vision tower"),
        Metric(
            name="name",
            label="tensor",
            definition="name in the base checkpoint; → name in the trained one, where it differs",
        ),
        Metric(name="shape", label="shape", definition="dimensions of the compared part"),
        Metric(name="dtype", label="dtype", definition="stored type, base → trained where they differ"),
        Metric(name="pair", label="runs", definition="the two runs that are compared, A first"),
        Metric(
            name="step",
            label="step",
            definition="training step of the checkpoint, from --steps, its name or trainer_state.json; otherwise its "
            "name",
        ),
        Metric(
            name="similarity",
            label="Sim₁₆",
            definition="‖V(t)ᵀV(T)‖² / 16 of the 16 top singular vectors of the update at a step and at the end, mean "
            "of left and right and over matrices",
            section="compared with the last checkpoint",
            format="measure",
        ),
        Metric(
            name="arm",
            label="arm",
            definition="the run with some options, or trained on a mask; start: before any step",
        ),
        Metric(
            name="score",
            label="score",
            definition="mean reward of greedy completions of held-out prompts, the same for all arms; 95 % interval by "
            "resampling seeds, and prompts within them",
        ),
        Metric(
            name="gain_retained",
            label="gain retained",
            definition="an arm's gain in score over the start, divided by that of the reference arm; 95 % interval by "
            "the same resampling; absent where the reference gain may be zero",
        ),
        Metric(
            name="update_fraction",
            label="update fraction",
            definition="fraction of the coordinates changed by the full run that have their values from that run; the "
            "others are as at the start",
        ),
        Metric(
            name="mask_recall",
            label="mask recall",
            definition="fraction of the full run's mask that an arm's mask contains; by chance, its own density",
        ),
        Metric(name="trained", label="trained", definition="fraction of the coordinates that the optimizer may change"),
        Metric(
            name="changed_stored",
            label="changed, stored",
            definition="fraction of the coordinates with Δ ≠ 0 as stored",
        ),
        Metric(
            name="changed_visible",
            label="changed, visible",
            definition="fraction of the coordinates whose bf16 value changed",
            source=PAPER,
        ),
        Metric(
            name="changed_null",  # a fraction in experiments, a count in tables of tensors
            label="expected from bf16 rounding alone",
            definition="fraction of the coordinates that an update of the same visible energy would change in bf16 if "
            "it were independent of the weights",
        ),
    )
}


def term(name: str) -> Metric:
    """The metric or term of a name. Raises KeyError for an unknown name."""
    return TERMS[name] if name in TERMS else METRICS[name]


def glossary(names: Iterable[str]) -> list[Metric]:
    """The metrics and terms of a page in its order, each once."""
    return [term(name) for name in dict.fromkeys(names)]
