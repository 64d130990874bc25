"""The layout in csrc/step/step.h is that of opdkernels/ops/step/layout.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opdkernels.ops.step import layout
from opdkernels.ops.step.args import ADAMW_FIELDS, SCHEMA_TYPES, SGD_FIELDS, StepArgs

HEADER = (Path(__file__).parents[3] / "csrc" / "step" / "step.h").read_text()
SIZES = {"opd_i64": 8, "opd_u32": 4}  # pointers take 8 bytes


def struct_fields(name: str) -> list[tuple[str, int]]:
    """Names and offsets of the fields of a struct, one per line."""
    body = re.search(rf"struct {name} {{\n(.*?)\n}};", HEADER, re.DOTALL).group(1)
    fields, offset = [], 0
    for line in body.splitlines():
        kind, field = re.fullmatch(r"\s*([\w ]+?\*?)\s*(\w+);.*", line).groups()
        size = 8 if kind.endswith("*") else SIZES[kind]
        assert offset % size == 0
        fields.append((field, offset))
        offset += size
    return fields


def constants(prefix: str) -> dict[str, int]:
    """Enumerators with a prefix, without it."""
    return {name: int(value) for name, value in re.findall(rf"\b{prefix}(\w+) = (\d+)", HEADER)}


def macro(name: str) -> int:
    return int(re.search(rf"#define {name} (\d+)", HEADER).group(1))


def test_row_has_the_fields_of_the_header():
    assert struct_fields("StepRow") == [(name, layout.STEP_ROW.fields[name][1]) for name in layout.STEP_ROW.names]
    assert layout.STEP_ROW.itemsize == macro("OPD_STEP_ROW_BYTES")


def test_sizes_are_those_of_the_header():
    assert macro("OPD_STEP_BLOCK") == layout.BLOCK
    assert macro("OPD_STEP_SCALARS") == layout.NUM_SCALARS


def test_codes_are_those_of_the_header():
    codes = constants("STEP_")
    assert [codes[name.upper()] for name in layout.PRECISIONS] == list(range(len(layout.PRECISIONS)))
    flags = ("PARAM_BF16", "GRAD_BF16", "GRAD_COMPACT", "MASK_INDICES", "MASK_INDICES_64")
    optional = ("HAS_INIT_VALUE", "HAS_STEP_GROUP", "HAS_MAX_EXP_AVG_SQ", "HAS_CHANGED")
    assert {name: codes[name] for name in (*flags, *optional)} == {
        name: getattr(layout, name) for name in (*flags, *optional)
    }


def test_kinds_are_those_of_the_header():
    cpu = pytest.importorskip("opdkernels.ops.step.cpu")
    codes = constants("STEP_")
    for name in ("ADAMW", "SGD", "GATHER", "GATHER_ADD", "SCATTER"):
        assert codes[name] == getattr(cpu, name)


@pytest.mark.parametrize(
    ("struct", "function"), [("AdamWScalars", "step_adamw_scalars"), ("SgdScalars", "step_sgd_scalars")]
)
def test_scalar_columns_are_those_of_the_header(struct, function):
    names = (
        re.search(rf"struct {struct} {{\s*float (.*?);\s*}};", HEADER, re.DOTALL).group(1).replace("\n", " ").split(",")
    )
    columns = re.search(rf"{function}\(const float\* row\) {{\s*return {{(.*?)}};", HEADER, re.DOTALL).group(1)
    assert [getattr(layout, name.strip().upper()) for name in names] == [int(c) for c in re.findall(r"\d+", columns)]
    assert "row[OPD_STEP_SCALARS - 1]" in HEADER  # step_count
    assert layout.STEP == layout.NUM_SCALARS - 1


def test_schemas_have_the_fields_of_the_arguments():
    assert tuple(SCHEMA_TYPES) == StepArgs._fields
    assert set(ADAMW_FIELDS) | set(SGD_FIELDS) == set(StepArgs._fields)
