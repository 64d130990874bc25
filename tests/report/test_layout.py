"""Pages are short on a screen, with the rest folded, and complete in print."""

from __future__ import annotations

from pathlib import Path

import pytest

from opdkernels import analyze, overlap, report, trajectory

SAMPLE = Path(__file__).parent.parent.parent / "examples" / "opd_sample"
BASE, SEED_0, STEP_20, STEP_40, SEED_1 = (
    SAMPLE / f"{name}.safetensors" for name in ("base", "seed0", "seed1-step-20", "seed1-step-40", "seed1")
)
SCREEN = 800  # pixels; a desktop is 1280 wide


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {
        "analyze": report.render("analyze", analyze(BASE, SEED_1)),
        "overlap": report.render("overlap", overlap(BASE, SEED_0, SEED_1)),
        "trajectory": report.render("trajectory", trajectory(BASE, STEP_20, STEP_40, SEED_1, spectra="off")),
    }


MEASURE = """
const height = () => document.documentElement.scrollHeight, folds = [...document.querySelectorAll("details.fold")];
const measured = {folded: height(), closed: folds.filter((f) => !f.open).map((f) => f.parentElement.id)};
dispatchEvent(new Event("beforeprint")); measured.printed = folds.every((f) => f.open); measured.unfolded = height();
dispatchEvent(new Event("afterprint")); measured.again = height();
document.querySelector('nav a[href="#glossary"]').click(); await new Promise((r) => setTimeout(r, 50));
measured.opened = document.querySelector("#glossary > details").open;
return measured;
"""


@pytest.mark.parametrize("kind", ["analyze", "overlap", "trajectory"])
def test_a_small_page_is_under_four_screens_with_the_rest_folded(chromium, pages, kind):
    measured = chromium.open(pages[kind]).evaluate(MEASURE)
    assert measured["folded"] < 4 * SCREEN
    assert {"run", "glossary"} <= set(measured["closed"])
    assert measured["printed"]
    assert measured["unfolded"] > measured["folded"] == measured["again"]
    assert measured["opened"]
