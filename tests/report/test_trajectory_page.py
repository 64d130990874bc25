"""The report of `trajectory`: self-contained, complete in every case, and correct in a real browser."""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

from opdkernels import report, trajectory, write_report
from opdkernels.report.charts import axis_ticks
from tests.report.browser import brightness, probe
from tests.report.pages import EXPECTED_TAGS, Page, assert_self_contained, update
from tests.report.test_overlap_page import CASES, sources

SECTIONS = ["summary", "along", "steps", "groups", "left-out", "run", "glossary"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    actual = {}
    for case in CASES:
        folder, paths = tmp_path_factory.mktemp("trajectory"), []
        source = sources(case)
        for i, tensors in enumerate(
            [source, *(source if case == "identical" else update(source, 4e-5, seed) for seed in (11, 12, 13))]
        ):
            path = folder / f"checkpoint-{100 * i}"
            path.mkdir()
            save_file(tensors, path / "model.safetensors")
            paths.append(path)
        result = trajectory(*paths)
        actual[case] = report.render("trajectory", result)
        assert report.render("trajectory", result) == actual[case]
    return actual


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_every_section_and_valid_nesting(pages, case):
    page = Page(pages[case])
    assert [e["attrs"]["id"] for e in page.all("section")] == SECTIONS
    assert {e["tag"] for e in page.elements} <= EXPECTED_TAGS
    assert len(page.all("table", id="checkpoints")) == 1


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(pages, case):
    assert_self_contained(Page(pages[case]))


def test_the_summary_describes_the_run(pages):
    answer = Page(pages["layers"]).section("summary")
    assert "At step 100 of 300" in answer
    assert "it follows from the magnitudes of the weights" in answer  # independent updates share nothing more
    assert "Nothing changed visibly by the end" in Page(pages["identical"]).section("summary")


@pytest.mark.parametrize(("case", "figures"), [("layers", 6), ("identical", 3)])
def test_every_question_with_known_values_has_a_figure(pages, case, figures):
    assert len(Page(pages[case]).all("figure")) == figures


def test_the_page_links_the_report_of_each_checkpoint(tmp_path):
    paths = []
    for i, tensors in enumerate([sources("layers"), *(update(sources("layers"), 4e-5, seed) for seed in (11, 12))]):
        paths.append(tmp_path / f"checkpoint-{100 * i}")
        paths[-1].mkdir()
        save_file(tensors, paths[-1] / "model.safetensors")
    trajectory(*paths, out=tmp_path / "out", spectra="off")
    page = Page((tmp_path / "out" / "report.html").read_text())
    links = [element["attrs"]["href"] for element in page.all("a") if element["attrs"]["href"].startswith("steps/")]
    assert links == ["steps/000100/report.html", "steps/000200/report.html"]
    assert all((tmp_path / "out" / link).is_file() for link in links)
    (tmp_path / "out" / links[0]).unlink()
    assert links[0] not in write_report(tmp_path / "out").read_text()


def test_an_axis_covers_its_values_with_round_numbers():
    for least, most in ((0.0, 0.0), (0.0, 1.0), (0.7, 0.7), (-0.2, 0.9), (1e-7, 3e-5), (145, 146), (0, 1e-300)):
        ticks = axis_ticks(least, most)
        assert ticks[0] <= least <= most <= ticks[-1]
        assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("case", "width", "dark"), [("layers", 360, True), ("layers", 1280, False), ("hostile", 360, False)]
)
def test_browser_no_overflow(chromium, pages, case, width, dark):
    result = probe(chromium, pages[case], width, dark)
    assert result["scroll"] <= width
    assert (brightness(result["paper"]) < brightness(result["ink"])) == dark
