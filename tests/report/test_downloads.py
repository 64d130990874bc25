"""What the buttons of a page save: the values of each figure and table as CSV, and the drawing of a figure as PNG."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opdkernels import analyze, report
from opdkernels.analysis.result import Analysis
from tests.report import pages
from tests.report.browser import Page
from tests.report.pages import model, update
from tests.report.test_experiment_page import FULL, result, row


def save(page: Page, kind: str, within: str = "body") -> dict[str, Path]:
    """The files that the buttons of one kind in a part of a page save, by name; a browser allows ten per page."""
    shown = f"(b) => b.textContent === '{kind}' && !b.closest('.off')"
    buttons = f"[...document.querySelectorAll('{within} .save button')].filter({shown})"
    paths = [page.download(f"{buttons}[{i}]") for i in range(page.evaluate(f"return {buttons}.length"))]
    return {path.name: path for path in paths}


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))


def numbers(cells: list[str]) -> list[float | None]:
    return [float(cell) if cell else None for cell in cells]


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    """The colours of more than 20 pixels."""
    return {colour for count, colour in image.convert("RGB").getcolors(1 << 24) if count > 20}


def compare(folder: Path, base: dict[str, torch.Tensor], size: float) -> Analysis:
    """The analysis of tensors and of the same tensors with noise."""
    save_file(base, folder / "base.safetensors")
    save_file(update(base, size, 5), folder / "trained.safetensors")
    return analyze(folder / "base.safetensors", folder / "trained.safetensors")


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> Analysis:
    return compare(tmp_path_factory.mktemp("pair"), model(3), 5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_figure_of_a_page_has_a_table_of_its_values(dtype, tmp_path):
    page = pages.Page(report.render("analyze", compare(tmp_path, model(2, dtype), 5e-5)))
    assert len(page.all("figure")) >= 6
    assert len(page.all("details", **{"class": "values"})) == len(page.all("figure"))


def test_csv_files_have_the_values_of_the_analysis(chromium, bf16):
    text, files = report.render("analyze", bf16), {}
    for section in ("sparsity", "where", "steps", "all"):
        paths = save(chromium.open(text), "CSV", f"#{section}")
        files |= {name: table(path) for name, path in paths.items()}
    curve = bf16.summary["curve"]
    head, *rows = files["sparsity.csv"]
    assert head == ["ε", "observed", "expected from bf16 rounding alone"]
    for column, key in enumerate(("eps", "visible", "null")):
        assert numbers([row[column] for row in rows]) == pytest.approx(curve[key], rel=1e-5)
    head, *rows = files["bf16-steps.csv"]
    assert [row[0] for row in rows] == bf16.summary["ulp"]["distance"]
    assert [int(row[1]) for row in rows] == bf16.summary["ulp"]["count"]
    head, *rows = files["unchanged-coordinates.csv"]
    cells = {
        (group["module"], group["layer"]): group["frac_zero"]
        for group in bf16.groups.to_pylist()
        if group["by"] == "layer_module" and group["view"] == "visible"
    }
    assert len(cells) == 23
    layers = [-1 if name == "no layer" else int(name.removeprefix("layer ")) for name in head[1:]]
    for module, *values in rows:
        expected = [cells.get((module, layer)) for layer in layers]
        assert numbers(values) == pytest.approx(expected, rel=1e-5)
    head, *rows = files["tensors.csv"]
    assert len(rows) == len(bf16.tensors) // 2
    assert {row[0] for row in rows} == set(bf16.tensors["name"].to_pylist())
    assert len(set(head)) == len(head)


def test_a_filtered_table_saves_the_rows_that_are_shown(chromium, bf16):
    page = chromium.open(report.render("analyze", bf16))
    page.evaluate("""
    const search = document.querySelector(".filter input");
    search.value = "layers.1. up"; search.dispatchEvent(new Event("input"));
    """)
    _, *rows = table(save(page, "CSV", "#all")["tensors.csv"])
    assert [row[0] for row in rows] == ["model.layers.1.mlp.up_proj.weight"]


def test_names_in_csv_files_are_text_for_a_spreadsheet(chromium, tmp_path):
    base = {name: 0.03 * torch.randn(4, 4).bfloat16() for name in ("=1+1", "+a,b", 'say "hi"', "-5")}
    page = chromium.open(report.render("analyze", compare(tmp_path, base, 1e-3)))
    _, *rows = table(save(page, "CSV", "#all")["tensors.csv"])
    assert sorted(row[0] for row in rows) == sorted(["'=1+1", "'+a,b", 'say "hi"', "-5"])


@pytest.mark.parametrize(
    ("width", "dark", "paper", "visible"),
    [(1280, False, (255, 255, 255), (10, 102, 173)), (390, True, (26, 30, 37), (109, 181, 245))],
)
def test_pictures_are_wide_and_have_the_colours_of_the_page(chromium, bf16, width, dark, paper, visible):
    page = chromium.open(report.render("analyze", bf16), dark=dark, width=width)
    curve = Image.open(save(page, "PNG", "#sparsity figure:first-child")["sparsity.png"])
    assert curve.convert("RGB").getpixel((0, 0)) == paper
    assert visible in colours(curve)
    assert curve.width >= 2 * 500
    assert curve.height >= 2 * 270
    cells = Image.open(save(page, "PNG", "#where figure:first-of-type")["unchanged-coordinates.png"])
    assert len(colours(cells) - {paper}) >= 8  # the legend alone has nine colours


def test_a_picture_is_of_the_view_that_is_chosen(chromium, tmp_path):
    page = chromium.open(report.render("analyze", compare(tmp_path, model(2, torch.float32), 3e-5)))
    visible = save(page, "PNG", "#where figure:first-of-type")["unchanged-coordinates.png"].read_bytes()
    page.evaluate("""document.querySelector('.switch button[value="stored"]').click()""")
    stored = save(page, "PNG", "#where figure:first-of-type")["unchanged-coordinates.png"].read_bytes()
    assert visible != stored
    head, *rows = table(save(page, "CSV", "#where figure:first-of-type")["unchanged-coordinates.csv"])
    assert head[:2] == ["module", "view"]
    assert {row[1] for row in rows} == {"visible", "stored"}


def test_pages_of_experiments_save_scores(chromium):
    results = result("masks", [FULL, row("changed", 0.6, 0.8, trained=0.2)])
    files = save(chromium.open(report.render("experiment", results)), "CSV")
    _, *rows = table(files["score.csv"])
    assert [cells[0] for cells in rows] == ["start", "full", "changed"]
    assert numbers(rows[2][1:]) == pytest.approx([0.6, 0.55, 0.65])
    assert set(files) == {"score.csv", "fraction-of-the-gain-retained.csv", "arms.csv"}
