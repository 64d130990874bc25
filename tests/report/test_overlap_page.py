"""The report of `overlap`: self-contained, complete in every case, and correct in a real browser."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from opdkernels import overlap, report
from tests.report.browser import brightness, probe
from tests.report.pages import EXPECTED_TAGS, HOSTILE, Page, assert_self_contained, model, update

SECTIONS = ["summary", "pairs-of-runs", "where", "groups", "all", "left-out", "run", "glossary"]
CASES = ["layers", "no layers", "hostile", "identical"]


def sources(case: str) -> dict[str, torch.Tensor]:
    if case == "hostile":
        return {name: torch.randn(8, 4).bfloat16() for name in HOSTILE}
    if case == "no layers":
        return {"members.a.weight": 0.03 * torch.randn(40, 30), "members.a.bias": torch.zeros(40)}
    return model(3)


def checkpoints(case: str) -> list[dict[str, torch.Tensor]]:
    source = sources(case)
    return [source, *(source if case == "identical" else update(source, 4e-5, seed) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    actual = {}
    for case in CASES:
        folder, paths = tmp_path_factory.mktemp("overlap"), []
        for i, tensors in enumerate(checkpoints(case)):
            (folder / str(i)).mkdir()
            save_file(tensors, folder / str(i) / "model.safetensors")
            paths.append(folder / str(i))
        result = overlap(*paths, strata=("row", "column"))
        actual[case] = report.render("overlap", result)
        assert report.render("overlap", result) == actual[case]
    return actual


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_every_section_and_valid_nesting(pages, case):
    page = Page(pages[case])
    assert [e["attrs"]["id"] for e in page.all("section")] == SECTIONS
    assert {e["tag"] for e in page.elements} <= EXPECTED_TAGS
    assert len(page.all("table", id="pairs")) == 1


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(pages, case):
    assert_self_contained(Page(pages[case]))


def test_the_summary_describes_the_first_pair(pages):
    answer = Page(pages["layers"]).section("summary")
    assert re.search(r"of what run A changed, run B changed too", answer)
    assert "the overlap follows from the magnitudes" in answer
    assert "A run changed nothing" in Page(pages["identical"]).section("summary")


@pytest.mark.parametrize(
    ("case", "width", "dark"), [("layers", 360, True), ("layers", 1280, False), ("hostile", 360, False)]
)
def test_browser_no_overflow_and_sorted_tables(chromium, pages, case, width, dark):
    result = probe(chromium, pages[case], width, dark)
    assert result["scroll"] <= width
    assert (brightness(result["paper"]) < brightness(result["ink"])) == dark
    assert result["down"] == sorted(result["down"], reverse=True)
    assert result["up"] == sorted(result["up"])
