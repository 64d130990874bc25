"""Every command, with arguments that are valid and the function of the package that it calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import click
import pytest
from typer.main import get_command

from opdkernels import cli
from tests.analysis.conftest import save, trained, weights


@dataclass(frozen=True)
class Case:
    """Arguments of a command; {base}, {trained}, {later}, {masks}, {patch}, {run} and {out} are replaced by paths."""

    arguments: str
    function: str  # module:name that does the work
    bad_value: str = "--io tape"


CASES = {
    "inspect": Case("{base} {trained}", "opdkernels.analysis.headers:inspect"),
    "analyze": Case("{base} {trained} -o {out}", "opdkernels.api:analyze"),
    "lineage": Case("{trained} {base} {later}", "opdkernels.api:lineage"),
    "overlap": Case("{base} {trained} {trained} -o {out}", "opdkernels.api:overlap"),
    "trajectory": Case("{base} {trained} {later} -o {out}", "opdkernels.api:trajectory"),
    "report": Case("{run}", "opdkernels.api:write_report", "--no-such-option"),
    "doctor": Case("", "opdkernels.doctor:examine", "--no-such-option"),
    "bench": Case("--quick -o {out}", "opdkernels.api:bench", "--threads 0"),
    "distill": Case(
        "--student {base} --teacher {base} --prompts {base} -o {out}",
        "opdkernels.distillation.loop:train",
        "--optimizer lion",
    ),
    "experiment": Case("masks -o {out}", "opdkernels.api:experiment", "--seeds 0"),
    "graft": Case("{base} {trained} --select mlp -o {out}", "opdkernels.patch:graft"),
    "mask changed": Case("{base} {trained} -o {out}", "opdkernels.masks:changed", "--atol -1"),
    "mask top-changed": Case("{base} {trained} -o {out}", "opdkernels.masks:top_changed", "--scope layer"),
    "mask near-zero": Case("{base} -o {out}", "opdkernels.masks:near_zero", "--density 0"),
    "mask principal": Case("{base} -o {out}", "opdkernels.masks:principal", "--density 2"),
    "mask safe": Case("{base} -o {out}", "opdkernels.masks:safe", "--density x"),
    "mask random": Case("{base} -o {out}", "opdkernels.masks:random_subset", "--seed x"),
    "mask magnitude-matched": Case("{masks} {base} -o {out}", "opdkernels.masks:magnitude_matched", "--seed 0.5"),
    "mask combine": Case("{masks} xor {masks} -o {out}", "opdkernels.masks.mask_set:MaskSet.save", "--no-such-option"),
    "mask stats": Case("{masks}", "opdkernels.masks.stats:mask_stats", "--no-such-option"),
    "mask compare": Case("{masks} {masks}", "opdkernels.masks.stats:compare_masks", "--no-such-option"),
    "patch create": Case("{base} {trained} -o {out}", "opdkernels.patch:create"),
    "patch apply": Case("{base} {patch} -o {out}", "opdkernels.patch:apply"),
    "push": Case("{masks} org/name", "opdkernels.hub:push_to_hub", "--repo-type space"),
    "patch info": Case("{patch}", "opdkernels.patch:info", "--no-such-option"),
}


def commands() -> dict[str, click.Command]:
    """Every command by its full name, without those that only group others."""
    tree = get_command(cli.app)
    return {
        f"{name} {below}".strip(): command
        for name, child in tree.commands.items()
        for below, command in (child.commands if isinstance(child, click.Group) else {"": child}).items()
    }


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Valid inputs by the names that cases use."""
    from opdkernels import analyze, masks, patch

    folder = tmp_path_factory.mktemp("inputs")
    base, after = save(folder / "base", weights()), save(folder / "trained", trained(weights()))
    masks.near_zero(base, 0.1).save(folder / "masks")
    patch.create(base, after, folder / "patch")
    analyze(base, after, folder / "run", spectra="off")
    return {
        "base": str(base),
        "trained": str(after),
        "later": str(save(folder / "later", trained(weights(), seed=9))),
        "masks": str(folder / "masks"),
        "patch": str(folder / "patch"),
        "run": str(folder / "run"),
    }


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process; returns exit status, standard output and error stream."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main replaces it

    def run_command(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        return (int(stopped.value.code or 0), *capsys.readouterr())

    return run_command
