"""The layouts that Python, Triton, C++ and CUDA share: every constant has the value that the C headers give it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from opdkernels.backends import layout as common
from opdkernels.ops.delta import layout as delta
from opdkernels.ops.gram import layout as gram
from opdkernels.ops.null import layout as null
from opdkernels.ops.overlap import layout as overlap
from opdkernels.ops.patch import layout as patch
from opdkernels.ops.quantile import layout as quantile

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32, "FP64": torch.float64}


def evaluate(expression: str, constants: dict[str, int]) -> int:
    """An integer constant expression of C without casts."""
    python = re.sub(r"\b(0x[0-9A-Fa-f]+|\d+)[uUlL]+\b", r"\1", expression).replace("/", "//")
    return int(eval(python, {"__builtins__": {}}, constants))


def constants_of(*headers: str) -> dict[str, int]:
    """Every `#define NAME integer` and enumerator of headers, in order; later ones may use earlier ones."""
    constants: dict[str, int] = {}
    for header in headers:
        text = re.sub(r"//[^\n]*", "", (CSRC / header).read_text())
        for match in re.finditer(r"^#define (\w+) +(\S.*)$|\benum \w+ \{([^}]*)\}", text, re.MULTILINE):
            name, value, enumerators = match.groups()
            if name:
                try:
                    constants[name] = evaluate(value, constants)
                except (NameError, SyntaxError):
                    continue  # not an integer
            else:
                following = 0
                for enumerator in filter(None, (e.strip() for e in enumerators.split(","))):
                    name, _, value = (part.strip() for part in enumerator.partition("="))
                    constants[name] = evaluate(value, constants) if value else following
                    following = constants[name] + 1
    return constants


NUMERIC = "common/numeric.h"
C: dict[str, dict[str, int]] = {
    "common": constants_of(NUMERIC, "common/cuda/grid.h", "common/cuda/active.h"),
    "delta": constants_of(NUMERIC, "delta/delta.h"),
    "overlap": constants_of(NUMERIC, "overlap/overlap.h"),
    "quantile": constants_of(NUMERIC, "quantile/quantile.h"),
    "gram": constants_of(NUMERIC, "gram/gram.h"),
    "null": constants_of(NUMERIC, "null/null.h"),
    "patch": constants_of(NUMERIC, "common/cuda/grid.h", "common/cuda/active.h", "patch/patch.h", "patch/cuda.cu"),
}
# Names of C constants that differ from the Python name.
RENAMED = {
    "common": {
        "BINS": "OPD_BINS",
        "INFINITY_BITS": "OPD_INFINITY_BITS",
        "SUM_LIMBS": "OPD_SUM_LIMBS",
        "SUM_SHIFT": "OPD_SUM_SHIFT",
        "WARP": "OPD_WARP",
        "SMEM_HEADER_BYTES": "OPD_SMEM_HEADER_BYTES",
        "SMEM_BINS": "OPD_SMEM_BINS",
        "QUEUE_SIZE": "OPD_MASK_BLOCK",
        "QUEUE_BLOCKS_PER_SM": "OPD_QUEUE_BLOCKS",
    },
    "delta": {
        "MAX_VISIBLE_THRESHOLDS": "OPD_MAX_VISIBLE_THRESHOLDS",
        "NUM_STORED_THRESHOLDS": "OPD_STORED_THRESHOLDS",
        "ULP_BINS": "OPD_ULP_BINS",
        "MANTISSAS": "OPD_MANTISSAS",
        "NUM_LIMITS": "OPD_LIMITS",
    },
    "overlap": {
        "MAX_RUNS": "OPD_MAX_RUNS",
        "GROUP": "OPD_GROUP",
        "GROUP_SETS": "OPD_GROUP_SETS",
        "COUNT_NUMEL": "OVERLAP_COUNT_NUMEL",
        "COUNT_NONFINITE": "OVERLAP_COUNT_NONFINITE",
        "NUM_COUNTS": "OVERLAP_NUM_COUNTS",
    },
    "quantile": {
        **{f"COUNT_{x}": f"QUANTILE_COUNT_{x}" for x in ("ABOVE", "TIED", "ABOVE_MASKED", "TIED_MASKED", "NAN")},
        "NUM_COUNTS": "QUANTILE_NUM_COUNTS",
        "DIGIT_BITS": "OPD_DIGIT_BITS",
        "DIGITS": "OPD_DIGITS",
        "SMEM_DIGITS": "OPD_SMEM_DIGITS",
    },
    "gram": {f"PART_{x}": f"GRAM_PART_{x}" for x in ("BASE", "CROSS", "DELTA")} | {"MAX_BLOCK": "OPD_GRAM_BLOCK"},
    "null": {x: f"NULL_{x}" for x, value in vars(null).items() if isinstance(value, int)},
    "patch": {x: f"OPD_{x}" for x in vars(patch) if x.startswith("HASH_")}
    | {"BLOCK": "OPD_PATCH_BLOCK", "VALID": "OPD_PATCH_VALID"},
}
# Derived in Python alone.
PYTHON_ONLY = {"SMEM_TABLE_BYTES", "SMEM_DIGIT_BYTES", "ULP_REACH"}
PYTHON_ONLY |= {"PARAM_VISIBLE", "PARAM_LIMITS", "PARAM_COUNTS", "NUM_PARAMS"}


def integers_of(module: Any) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, int)}


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("common", common),
        ("delta", delta),
        ("overlap", overlap),
        ("quantile", quantile),
        ("gram", gram),
        ("null", null),
        ("patch", patch),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_constant_equals_the_header(family, module):
    constants = integers_of(module)
    assert constants
    for name, value in constants.items():
        if name not in PYTHON_ONLY:
            assert C[family][RENAMED[family].get(name, name)] == value, name


def test_dtype_codes_equal_the_enum():
    assert {name: C["common"][name] for name in DTYPES} == {n: common.DTYPE_CODES[d] for n, d in DTYPES.items()}


def test_secret_of_the_digest_equals_the_header():
    text = (CSRC / "patch" / "patch.h").read_text()
    assert bytes(int(byte, 16) for byte in re.findall(r"\b0x([0-9a-f]{2})\b", text)) == patch.HASH_SECRET
    assert len(patch.HASH_SECRET) == patch.HASH_SECRET_BYTES


def test_derived_constants():
    assert common.SMEM_TABLE_BYTES == 4 * common.SMEM_BINS
    assert quantile.SMEM_DIGIT_BYTES == 4 * quantile.SMEM_DIGITS
    assert delta.ULP_BINS == 2 * delta.ULP_REACH + 3


def test_layouts_import_neither_triton_nor_the_extension():
    for path in [*Path(delta.__file__).parents[1].glob("*/layout.py"), Path(common.__file__)]:
        assert not re.search(r"import (triton|.*native\b)|from triton", path.read_text()), path


@pytest.mark.parametrize("layout", [delta, patch], ids=["delta", "patch"])
def test_triton_uses_the_layouts(layout):
    pytest.importorskip("triton")
    triton = importlib.import_module(layout.__name__.replace(".layout", ".triton"))
    shared = [name for name in integers_of(layout) if name in vars(triton)]
    assert shared
    for name in shared:
        assert getattr(triton, name).value == getattr(layout, name), name


def test_cuda_launches_match_the_kernels():
    from opdkernels.backends.cuda import launch
    from opdkernels.ops.delta import cuda
    from opdkernels.ops.overlap import cuda as overlap_cuda
    from opdkernels.ops.patch import cuda as patch_cuda
    from opdkernels.ops.quantile import cuda as quantile_cuda

    shared = (NUMERIC, "common/cuda/grid.h", "common/cuda/queue.h")
    kernels = constants_of(*shared, "delta/delta.h", "delta/cuda.cu", "delta/cuda_pair.inl")
    for name, c_name in {
        "WORK_ROWS": "WORK_ROWS",
        "PAIR_THREADS": "OPD_PAIR_THREADS",
        "PAIR_STEP": "OPD_PAIR_STEP",
        "PAIR_BYTES": "PAIR_CLASSES",
        "WORKSPACE_WORDS": "WORKSPACE_WORDS",
    }.items():
        assert kernels[c_name] == getattr(cuda, name), name
    assert kernels["OPD_PAIR_QUEUE_BYTES"] == launch.change_queue_bytes(cuda.PAIR_STEP)
    kernels = constants_of(*shared, "overlap/overlap.h", "overlap/cuda.cu")
    for name in ("BF16_THREADS", "MIXED_THREADS", "BF16_STEP", "MIXED_STEP"):
        assert kernels[f"OPD_{name}"] == getattr(overlap_cuda, name), name
    assert kernels["AT_ROWS"] == overlap_cuda.ROWS_OFFSET
    assert kernels["OPD_BF16_QUEUE_BYTES"] == launch.change_queue_bytes(overlap_cuda.BF16_STEP)
    assert kernels["OPD_MIXED_QUEUE_BYTES"] == launch.change_queue_bytes(overlap_cuda.MIXED_STEP)
    kernels = constants_of(*shared, "quantile/quantile.h", "quantile/cuda.cu")
    assert kernels["OPD_MAX_RANKS"] == quantile_cuda.MAX_RANKS
    assert kernels["NUM_RANK_STATES"] == quantile_cuda.RANK_STATES
    assert C["patch"]["OPD_PATCH_THREADS"] == patch_cuda.THREADS
    assert C["patch"]["OPD_QUEUE_THREADS"] == patch_cuda.QUEUE_THREADS
    assert C["patch"]["OPD_PATCH_CHUNKS"] == patch_cuda.CHUNKS
