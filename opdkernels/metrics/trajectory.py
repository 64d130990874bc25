"""Metrics that compare the checkpoints of one run.

T is the last checkpoint and S_t the coordinates with visible |Δ_t| > atol. `analysis.trajectory` computes them from the
tallies and overlaps of all checkpoints.
"""

from __future__ import annotations

from opdkernels.metrics.registry import NON_NEGATIVE, Metric
from opdkernels.metrics.similarity import TOP

TABLE = ("trajectory",)
VISIBLE, STORED = ("visible",), ("stored",)
WITH_LAST = "compared with the last checkpoint"
WITH_PREVIOUS = "since the previous checkpoint"
SIMILARITY = (f"similarity_left_{TOP}", f"similarity_right_{TOP}")
CHANCE = tuple(f"{name}_chance" for name in SIMILARITY)

METRICS = (
    Metric(
        name="cosine_final",
        label="cosine",
        definition="cosine of Δ_t with Δ_T",
        range="−1 to 1",
        format="measure",
        tables=TABLE,
        views=STORED,
        pages={"trajectory": STORED},
        section=WITH_LAST,
    ),
    *(
        Metric(
            name=name,
            label=f"Sim₁₆, {side}",
            definition=f"Sim_K(t, T) = ‖V_K(t)ᵀ V_K(T)‖² / K of the K = {TOP} top {side} singular vectors of Δ; null "
            f"where an update has fewer than {TOP} directions",
            format="measure",
            tables=TABLE,
            views=STORED,
        )
        for name, side in zip(SIMILARITY, ("left", "right"), strict=True)
    ),
    *(
        Metric(
            name=name,
            label=f"Sim₁₆ by chance, {side}",
            definition=f"`{name.removesuffix('_chance')}` of unrelated updates: K over the side of the matrix",
            format="measure",
            tables=TABLE,
            views=STORED,
        )
        for name, side in zip(CHANCE, ("left", "right"), strict=True)
    ),
    Metric(
        name="recall_vs_final",
        label="recall vs final",
        definition="fraction of the coordinates changed at the end that are changed at this checkpoint, |S_t ∩ S_T| / "
        "|S_T|",
        tables=TABLE,
        views=VISIBLE,
        pages={"trajectory": VISIBLE},
        section=WITH_LAST,
    ),
    Metric(
        name="precision_vs_final",
        label="precision vs final",
        definition="fraction of the coordinates changed at this checkpoint that are changed at the end, |S_t ∩ S_T| / "
        "|S_t|",
        tables=TABLE,
        views=VISIBLE,
        pages={"trajectory": VISIBLE},
        section=WITH_LAST,
    ),
    Metric(
        name="shared_over_magnitude",
        label="over |W|",
        definition="|S_t ∩ S_T| over its magnitude-conditioned chance level: what independent changes at each |W| of "
        "each tensor would share; null at T itself, and necessarily near 1 where most coordinates changed",
        range=NON_NEGATIVE,
        format="times",
        tables=TABLE,
        views=VISIBLE,
        pages={"trajectory": VISIBLE},
        section=WITH_LAST,
    ),
    Metric(
        name="frac_changed_since_previous",
        label="changed since previous",
        definition="fraction of the coordinates that differ visibly from the previous checkpoint (the first: from the "
        "base)",
        tables=TABLE,
        views=VISIBLE,
        pages={"trajectory": VISIBLE},
        section=WITH_PREVIOUS,
    ),
    Metric(
        name="relative_norm_since_previous",
        label="norm since previous",
        definition="‖W_t − W_{t−1}‖ / ‖W‖",
        range=NON_NEGATIVE,
        tables=TABLE,
        views=STORED,
        pages={"trajectory": STORED},
        section=WITH_PREVIOUS,
    ),
)
