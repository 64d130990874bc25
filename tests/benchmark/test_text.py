"""The table: every workload, also those where this package is slower, and what a reader has to know."""

from __future__ import annotations

import pytest

from opdkernels.benchmark.machine import line
from opdkernels.benchmark.text import format_text, markdown, notes
from tests.benchmark.conftest import make_result

GPU = {"name": "Some GPU", "capability": "9.0", "memory_bytes": 80_000_000_000, "cuda": "13.0"}


def table_rows(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]


def test_markdown_has_every_row_and_marks_those_that_are_slower():
    text = markdown(make_result())
    heading, rule, *rows = table_rows(text)
    assert len(rule) == len(heading)
    assert heading[-4:] == ["of the limit", "speed over PyTorch", "speed over torch.compile", "extra memory"]
    assert rows == [
        [
            "delta of a bf16 pair",
            "1,000 coordinates",
            "cpu",
            "1.00 ms",
            "4.00 GB/s",
            "50 % of read",
            "42.5x",
            "3.00x",
            "2 MB / 1.5 GB",
        ],
        [
            "gram of a bf16 pair",
            "[4,864, 896]",
            "cpu",
            "1.50 s",
            "20.0 GFLOP/s",
            "40 % of fp64 product",
            "**0.800x**",
            "-",
            "-",
        ],
        ["scatter of a bf16 pair", "1,000 coordinates", "cpu", "-", "-", "-", "-", "-", "-"],
    ]
    assert text.startswith(
        "Some CPU, 2 cores, avx2, torch 2.11.0; measured limits: read 8.00 GB/s, fp64 product 50.0 GFLOP/s"
    )
    assert "scatter of a bf16 pair, opdkernels: not measured: the result differs" in text


def test_terminal_table_is_aligned():
    lines = format_text(make_result())
    assert lines[0] == "Some CPU, 2 cores, avx2, torch 2.11.0"
    heading = next(text for text in lines if text.startswith("workload"))
    first = lines[lines.index(heading) + 1]
    assert heading.index("speed over PyTorch") + len("speed over PyTorch") == first.index("42.5x") + 5
    assert "sizes: 1,000 coordinates; [4,864, 896]" in lines
    assert max(map(len, lines[3:8])) < 140


def test_only_what_was_compared_has_a_column():
    result = make_result(options={**make_result()["options"], "against": []})
    assert "speed" not in markdown(result)
    for row in result["rows"]:
        row["timings"].pop("eager", None)
    assert table_rows(markdown(result))[2][-1] == "2 MB"


def test_gpu_is_in_the_line_of_the_machine():
    assert line({**make_result()["machine"], "gpu": GPU}).startswith(
        "Some GPU (9.0, 80 GB), CUDA 13.0, Some CPU, 2 cores"
    )


@pytest.mark.parametrize(
    ("machine", "note"),
    [
        ({"load_average": 1.9}, "The machine was busy before the measurement (load 1.9, 2 cores)"),
        ({"instruction_set": "reference"}, "The compiled kernels are missing"),
    ],
)
def test_notes_say_what_affects_the_numbers(machine, note):
    assert not any(note in line for line in notes(make_result()))
    result = make_result()
    result["machine"].update(machine)
    assert any(line.startswith(note) for line in notes(result))


def test_line_names_threads_where_they_are_not_the_cores():
    machine = {**make_result()["machine"], "threads": 1}
    assert line(machine).endswith(", 1 thread")
