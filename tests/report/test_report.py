"""The report of `analyze`: self-contained, complete in every special case, and correct in a real browser."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from opdkernels import analyze, report
from opdkernels.analysis.analyze import run_analyze
from opdkernels.analysis.result import Analysis, load
from opdkernels.config import AnalyzeOptions
from opdkernels.errors import printable
from opdkernels.report import typography
from tests.report.browser import brightness, probe
from tests.report.pages import HOSTILE, Page, assert_self_contained, model, rows_of, update

SECTIONS = [
    "summary",
    "sparsity",
    "near-zero",
    "where",
    "geometry",
    "steps",
    "groups",
    "all",
    "left-out",
    "run",
    "glossary",
]


def pairs() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    layered, one, single = model(3), model(1), model(2, torch.float32)
    coarse = {k: v.bfloat16().float() for k, v in single.items()}
    flat = {f"net{i}.weight": torch.randn(9, 7, generator=torch.Generator().manual_seed(i)) for i in range(60)}
    broken_trained = update(layered, 5e-5, 1)
    broken_trained["model.layers.0.mlp.up_proj.weight"][0, :3] = float("nan")
    broken_trained["model.norm.weight"][0] = float("inf")
    empty, scalar = torch.zeros(0, 7), torch.tensor(1.0)
    hostile = {name: torch.randn(8, 8, generator=torch.Generator().manual_seed(9)) for name in HOSTILE}
    nan = {"w": torch.full((4, 4), float("nan"))}
    return {
        "layers": (layered, update(layered, 5e-5, 2)),
        "one layer": (one, update(one, 5e-5, 3)),
        "fp32": (single, update(single, 3e-5, 4)),
        "no layers": (flat, {k: v + 1e-3 * (i % 2) for i, (k, v) in enumerate(flat.items())}),
        "identical": (layered, layered),
        "invisible": (coarse, {k: v * (1 + 2**-20) for k, v in coarse.items()}),
        "non-finite": (
            {**layered, "empty": empty, "scalar": scalar},
            {**broken_trained, "empty": empty, "scalar": scalar + 1},
        ),
        "all NaN": (nan, nan),
        "empty": ({"w": empty}, {"w": empty}),
        "hostile": (
            {**hostile, "only<b>here": torch.zeros(3), "turned<i>": torch.zeros(3, 4)},
            {**update(hostile, 1e-2, 5), "turned<i>": torch.zeros(4, 3)},
        ),
    }


CASES = list(pairs())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Analysis]:
    result = {}
    for case, sides in pairs().items():
        folder = tmp_path_factory.mktemp("pair")
        for side, tensors in zip(("source", "trained"), sides, strict=True):
            save_file(tensors, folder / f"{side}.safetensors")
        result[case] = run_analyze(
            folder / "source.safetensors",
            folder / "trained.safetensors",
            folder / "out",
            AnalyzeOptions(),
            lambda *_: None,
        )
    return result


@pytest.fixture(scope="module")
def pages(results: dict[str, Analysis]) -> dict[str, str]:
    return {case: report.render("analyze", result) for case, result in results.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_case_has_every_section_and_valid_nesting(pages, results, case):
    page = Page(pages[case])
    known = any(record.method for record in results[case].spectrum_records)
    expected = [name for name in SECTIONS if known or name != "geometry"]
    assert [e["attrs"]["id"] for e in page.all("section")] == expected
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert link["attrs"]["href"].removeprefix("#") in ids
    assert len(page.all("h1")) == 1
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h\d", e["tag"])]
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert not re.search(r"\b(None|nan|inf)\b", "".join(e["text"] for e in page.all("td")))


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_self_contained(pages, case):
    assert_self_contained(Page(pages[case]))


def test_hostile_names_are_shown_as_text(pages):
    page = Page(pages["hostile"])
    names = {e["text"] for e in page.all("th", scope="row")}
    for name in HOSTILE:
        assert typography.name(name) in names
    assert "only<b>here" in page.section("left-out")
    assert "turned<i>" in page.section("left-out")
    shown = "".join(e["text"] for e in page.all("html"))
    assert "\x1b" not in shown
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in shown


@pytest.mark.parametrize(
    ("case", "headline"),
    [
        ("identical", "Identical"),
        ("empty", "Not comparable"),
        ("invisible", "No visible change"),
        ("layers", "Sparse as rounding alone"),
        ("fp32", "Sparse as rounding alone"),
    ],
)
def test_headline_of_each_case(pages, case, headline):
    assert headline in Page(pages[case]).all("h1")[0]["text"]


@pytest.mark.parametrize(("case", "heading"), [("layers", "Main metrics"), ("fp32", "Main metrics, in both views")])
def test_first_table_has_both_views_where_they_differ(pages, case, heading):
    captions = [element["text"] for element in Page(pages[case]).all("caption")]
    assert captions[0] == heading
    assert ("Both checkpoints are bf16" in Page(pages[case]).section("summary")) == (case == "layers")


def test_first_screen_names_the_module_with_the_largest_share_of_the_update(results, pages):
    rows = [row for row in results["layers"].groups.to_pylist() if row["by"] == "module" and row["view"] == "stored"]
    largest = max(rows, key=lambda row: row["energy_share"])
    _, _, where = Page(pages["layers"]).section("summary").partition("Where the update is")
    assert largest["module"] in where.split("layer")[0]
    assert typography.percent(largest["energy_share"]) in where


def test_pages_have_no_absolute_paths(tmp_path):
    tensors = {"w": torch.randn(8, 8).bfloat16()}
    for name in ("base", "trained"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        save_file(tensors, tmp_path / "deep" / name / "model.safetensors")
    analyze(tmp_path / "deep" / "base", tmp_path / "deep" / "trained", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "…/deep/base" in page
    assert str(tmp_path) not in page


def test_an_invisible_change_is_reported_as_invisible(pages):
    assert "no visible update to compare" in Page(pages["invisible"]).section("summary")


def test_left_out_lists_tensors_and_reasons(results, pages):
    page = Page(pages["non-finite"])
    for entry in results["non-finite"].summary["nonfinite"]:
        assert entry["name"] in page.section("left-out")
    assert "NaN or Inf 2" in page.section("summary").replace(typography.THIN, " ")
    assert "Nothing: every tensor" in Page(pages["layers"]).section("left-out")


def close(cell: dict, value: float | None) -> bool:
    shown = cell["attrs"]["data-v"]
    return shown == "" if value is None else float(shown) == pytest.approx(value, rel=1e-5)


ONE_VIEW = ("layers", "identical")  # both sides are bf16


@pytest.mark.parametrize("case", ["layers", "fp32", "no layers", "non-finite", "identical"])
def test_tensor_rows_equal_the_table(results, pages, case):
    heads, rows = rows_of(Page(pages[case]), "tensors")
    table = {(r["name"], r["view"]): r for r in results[case].tensors.to_pylist()}
    assert len(rows) == len(table) // 2
    for row in rows:
        at = dict(zip(heads, row, strict=True))
        unchanged = [cell for head, cell in zip(heads, row, strict=True) if head == "unchanged"]
        stored, visible = table[row[0]["text"], "stored"], table[row[0]["text"], "visible"]
        views = (visible,) if case in ONE_VIEW else (stored, visible)
        for cell, value in zip(unchanged, [view["frac_zero"] for view in views], strict=True):
            assert close(cell, value)
            assert cell["text"] == typography.percent(value)
        for head, key in (
            ("changed / expected", "changed_over_null"),
            ("near-zero / expected", "near_zero_coverage_10pct_over_null"),
            ("|Δ| ≤ 1e-5", "frac_le_1e-5"),
        ):
            assert close(at[head], visible[key])


def test_group_rows_and_summary_equal_the_tables(results, pages):
    page, result = Page(pages["layers"]), results["layers"]
    for by in ("block", "module", "layer"):
        heads, rows = rows_of(page, f"by-{by}")
        groups = {str(r[by]): r for r in result.groups.to_pylist() if r["by"] == by and r["view"] == "visible"}
        assert len(rows) == len(groups)
        for row in rows:
            name = row[0]["attrs"].get("data-v", row[0]["text"])
            assert close(row[heads.index("changed / expected")], groups[name]["changed_over_null"])
            assert close(row[heads.index("parameters")], groups[name]["numel"])
    answer = page.section("summary")
    for view in ("stored", "visible"):
        figures = result.summary["views"][view]
        assert typography.percent(1 - figures["frac_zero"]) in answer
        assert typography.percent(figures["relative_norm"]) in answer
    visible = result.summary["views"]["visible"]
    assert typography.times(visible["changed_over_null"]) in answer
    assert typography.times(visible["near_zero_coverage_10pct_over_null"]) in answer


def test_heat_maps_contain_every_cell_of_the_groups(results, pages):
    titles = [e["text"] for e in Page(pages["layers"]).all("title")]
    for row in results["layers"].groups.to_pylist():
        if row["by"] == "layer_module" and row["view"] == "visible" and row["layer"] >= 0:
            place = f"layer {row['layer']}, {row['module']}: "
            assert place + typography.percent(row["frac_zero"]) in titles
            assert place + typography.times(row["energy_over_parameters"]) in titles
            assert place + typography.times(row["near_zero_coverage_10pct_over_null"]) in titles


def test_models_without_layers_have_no_heat_map(pages):
    assert "no numbered layer changed" in Page(pages["no layers"]).section("where")


def test_rendering_is_byte_identical_from_result_and_from_folder(results, pages):
    result = results["layers"]
    assert report.render("analyze", result) == pages["layers"]
    assert report.render("analyze", load(result.path)) == pages["layers"]


def test_write_replaces_the_page(results, pages, tmp_path):
    (tmp_path / "report.html").write_text("old")
    path = report.write(tmp_path, "analyze", results["layers"])
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == pages["layers"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def large(result: Analysis, count: int) -> Analysis:
    """The result with its tensors repeated under long names."""
    copies = -(-count // (len(result.tensors) // 2))
    tables = []
    for i in range(copies):
        names = [f"model.language_model.tower.{i}.{n}" for n in result.tensors["name"].to_pylist()]
        tables.append(result.tensors.set_column(0, "name", pa.array(names)))
    return Analysis(pa.concat_tables(tables), result.groups, result.summary, result.run, [])


def test_pages_list_at_most_two_thousand_tensors(results):
    text = report.render("analyze", large(results["layers"], 2000))
    assert len(text.encode()) < 3_000_000
    _, rows = rows_of(Page(text), "tensors")
    assert len(rows) == 2000
    energies = results["layers"].tensors.to_pylist()
    first = max((r for r in energies if r["view"] == "stored"), key=lambda r: r["delta_energy"])
    assert rows[0][0]["text"].endswith(first["name"])
    text = report.render("analyze", large(results["layers"], 2400))
    assert len(rows_of(Page(text), "tensors")[1]) == 2000
    assert "more in the parquet table" in text


@pytest.mark.parametrize("value", [0.0, 1e-12, 3.3e-7, 0.00999, 0.01, 0.5, 0.99, 0.999999, 1 - 1e-12, 1.0, 1.5, 12.0])
def test_only_0_and_1_print_as_0_and_100_percent(value):
    shown = typography.percent(value).replace(typography.THIN, "").rstrip("%")
    number = float(shown.lstrip(">"))
    assert (number == 0) == (value == 0)
    assert (number == 100) == (value == 1)
    assert number == pytest.approx(100 * value, rel=5e-3)


def test_missing_values_are_a_dash():
    for text in (typography.percent, typography.times, typography.measure, typography.count, typography.duration):
        assert text(None) == typography.MISSING
    assert typography.percent(float("nan")) == typography.MISSING


def test_names_are_short_and_printable():
    assert len(typography.name("n" * 10_000)) <= typography.LONGEST_NAME + 4
    assert typography.name("a\x00b") == printable("a\x00b")


def test_the_script_parses():
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on PATH")
    subprocess.run([node, "--check", Path(report.__file__).with_name("page.js")], check=True)


@pytest.mark.parametrize(
    ("case", "width", "dark"),
    [
        ("layers", 360, True),
        ("layers", 1280, False),
        ("fp32", 1280, False),
        ("hostile", 360, False),
        ("identical", 360, False),
    ],
)
def test_browser_no_overflow_and_working_controls(chromium, pages, case, width, dark):
    result = probe(chromium, pages[case], width, dark)
    assert result["width"] == width
    assert result["scroll"] <= width
    assert result["dark"] == dark
    assert (brightness(result["paper"]) < brightness(result["ink"])) == dark
    assert result["sort"] == "descending"
    assert result["down"] == sorted(result["down"], reverse=True)
    assert result["up"] == sorted(result["up"])
    assert result["panels"] == 1
    if case == "layers":
        assert result["kept"] == ["model.layers.1.mlp.up_proj.weight"]
        assert result["names"][0] == "model.embed_tokens.weight"
        assert result["before"] == result["after"] == []  # one view
        assert result["tooltip"] == result["title"]
    if case == "fp32":
        assert all("view-visible" in v for v in result["before"])
        assert all("view-stored" in v for v in result["after"])
        assert len(result["after"]) == len(result["before"]) == 2


@pytest.mark.parametrize("case", ["layers", "hostile"])
def test_browser_runs_the_script_under_the_policy_of_the_page(chromium, pages, case):
    page = chromium.open(pages[case])
    assert page.evaluate("return document.querySelector('.filter[data-table=\"tensors\"]').hidden") is False


def page_with(tmp_path, spectra: str) -> str:
    for side, tensors in zip(("source", "trained"), pairs()["layers"], strict=True):
        save_file(tensors, tmp_path / f"{side}.safetensors")
    return report.render(
        "analyze",
        run_analyze(
            tmp_path / "source.safetensors",
            tmp_path / "trained.safetensors",
            None,
            AnalyzeOptions(spectra=spectra),
            lambda *_: None,
        ),
    )


def test_geometry_is_in_the_summary_and_in_its_own_section(pages):
    first, rest = pages["layers"].split("<nav", 1)
    assert "median stable rank of" in first
    assert "Between the top tenths of the singular vectors" in first
    assert "Stable rank relative to a random update" in Page(pages["layers"]).section("geometry")
    assert rest.count("#geometry") == 1


def test_without_spectra_the_page_has_no_geometry(tmp_path):
    page = page_with(tmp_path, "off")
    assert "#geometry" not in page
    assert 'id="geometry"' not in page


def test_topk_spectra_show_only_the_top(tmp_path):
    page = page_with(tmp_path, "topk")
    assert "Energy of the largest directions" in page
    assert "Decay of the singular values" not in page
    assert "between their top tenths" not in page
