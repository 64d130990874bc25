"""How much of each checkpoint a comparison covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdkernels.formatting import percent

MIN_FRACTION = 0.9  # of the parameters of every side; below it, a comparison says little about the models

SIDES = {"base": "the base", "trained": "the trained checkpoint"}


@dataclass(frozen=True)
class Coverage:
    """Parameters that were compared, over the parameters of each side.

    Buffers and copies of tied tensors are no parameters. The tensors of absent files have no known size and count 0.

    Attributes:
        compared: Number of parameters that all sides have in common.
        parameters: Number of parameters of each side: "base" first, then "trained" or the labels of the runs.
        uncompared: Names of sides that hold tensors which are not compared, such as those of an absent file.
    """

    compared: int
    parameters: Mapping[str, int]
    uncompared: Sequence[str] = ()

    @property
    def fractions(self) -> dict[str, float]:
        """Compared fraction of the parameters of each side, in 0 .. 1; 1 for a side without parameters."""
        return {side: self.compared / count if count else 1.0 for side, count in self.parameters.items()}

    @property
    def complete(self) -> bool:
        """Whether every tensor of every side was compared."""
        return not self.uncompared

    @property
    def sufficient(self) -> bool:
        """Whether the comparison describes the models.

        False if less than `MIN_FRACTION` of a side was compared, or if tensors of the base and of another side have no
        counterpart: they may be the same ones under names that are not understood.
        """
        both = "base" in self.uncompared and len(self.uncompared) > 1
        return not both and min(self.fractions.values(), default=0.0) >= MIN_FRACTION

    def to_dict(self) -> dict[str, Any]:
        """The form in summary.json, see `opdkernels.analysis.summary.CoverageSummary`."""
        return {
            "compared": self.compared,
            "parameters": dict(self.parameters),
            "fractions": self.fractions,
            "uncompared": list(self.uncompared),
            "complete": self.complete,
            "sufficient": self.sufficient,
        }


def coverage_sentence(coverage: Mapping[str, Any]) -> str:
    """What was compared, in one sentence, from the form of `Coverage.to_dict`.

    >>> coverage_sentence(Coverage(60, {"base": 60, "trained": 80}, ["trained"]).to_dict())
    'Only 60 parameters were compared: 100 % of the base and 75 % of the trained checkpoint.'
    >>> coverage_sentence(Coverage(60, {"base": 60, "trained": 60}).to_dict())
    'All 60 parameters of the base and the trained checkpoint were compared.'
    """
    sides = {side: SIDES.get(side, side) for side in coverage["fractions"]}
    fractions = [f"{percent(fraction)} of {sides[side]}" for side, fraction in coverage["fractions"].items()]
    compared = f"{coverage['compared']:,} parameters"
    if coverage["complete"]:
        return f"All {compared} of {_listed(list(sides.values()))} were compared."
    return f"{'' if coverage['sufficient'] else 'Only '}{compared} were compared: {_listed(fractions)}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
