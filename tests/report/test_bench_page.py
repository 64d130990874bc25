"""The page and the chart of a benchmark, from handwritten results."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from opdkernels import report
from opdkernels.report import svg
from opdkernels.report.bench import chart_file, fraction_chart, headline, speed_chart
from tests.benchmark.conftest import make_result


def test_page_has_every_workload_and_note():
    page = report.render("bench", make_result())
    for row in make_result()["rows"]:
        assert page.count(row["workload"]) >= 2
    assert "the result differs" in page
    assert "benchmark.json" in page
    assert "parquet" not in page
    assert 'id="glossary"' not in page
    assert not re.search(r'(src|href)="https?:', page)


def test_headline_counts_wins_and_losses():
    text = headline(make_result()).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert text == ("Faster than plain PyTorch in 1 of 2 workloads, 21.6× in the median")
    alone = make_result()
    for row in alone["rows"]:
        row["timings"] = {name: timing for name, timing in row["timings"].items() if name == "opdkernels"}
    assert headline(alone).startswith("The kernels reach 45")
    assert headline({**alone, "rows": alone["rows"][2:]}) == "No kernel could be measured"


@pytest.mark.parametrize("frame", svg.FRAMES, ids=lambda frame: frame.kind)
def test_slower_rows_are_left_of_the_line(frame):
    drawing = str(speed_chart(make_result(), frame))
    origin = float(re.findall(r'class="baseline" x1="([\d.]+)"', drawing)[0])
    ends = [float(x) for x in re.findall(r'class="visible-dot" cx="([\d.]+)"', drawing)]
    assert ends[1] < origin < ends[0] < frame.width
    (compiled,) = re.findall(r'class="stored-dot" cx="([\d.]+)"', drawing)
    assert origin < float(compiled) < ends[0]


@pytest.mark.parametrize("speed", [1e-4, 0.3, 1.0, 5e4])
def test_any_speed_is_inside_the_drawing(speed):
    result = make_result()
    result["rows"][0]["timings"]["eager"]["speedup"] = speed
    for frame in svg.FRAMES:
        for x in re.findall(r'c?x="([\d.]+)"', str(speed_chart(result, frame))):
            assert 0 <= float(x) <= frame.width


def test_fractions_are_on_a_linear_axis():
    drawing = str(fraction_chart(make_result(), svg.FRAMES[0]))
    origin = float(re.findall(r'class="baseline" x1="([\d.]+)"', drawing)[0])
    first, second = (float(x) - origin for x in re.findall(r'class="visible-dot" cx="([\d.]+)"', drawing))
    assert first / second == pytest.approx(0.5 / 0.4, rel=0.01)


def test_chart_is_a_file_of_its_own():
    root = ElementTree.fromstring(chart_file(make_result()))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "gram of a bf16 pair" in texts
    assert "● PyTorch · ● torch.compile · Some CPU, 2 cores, avx2, torch 2.11.0" in texts
    classes = {name for element in root.iter() for name in element.get("class", "").split()}
    style = next(root.iter("{http://www.w3.org/2000/svg}style")).text
    unstyled = {"chart", "wide", "tick", "axis"}  # "text" styles these
    assert {name for name in classes if f".{name}" not in style} <= unstyled


def test_chart_without_comparisons_shows_fractions_of_the_limit():
    result = make_result()
    for row in result["rows"]:
        for timing in row["timings"].values():
            timing["speedup"] = None
    assert "fraction of the measured limit" in chart_file(result)
    assert chart_file({**result, "rows": []}) == ""
