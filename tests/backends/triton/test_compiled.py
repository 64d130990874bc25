"""Every Triton kernel compiled as its launcher starts it: registers, spills, loads, rounding, addresses."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from opdkernels.backends import gpu
from opdkernels.backends.triton import tables
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS
from opdkernels.ops.delta import triton as delta
from opdkernels.ops.divergence import triton as divergence
from opdkernels.ops.gram import triton as gram
from opdkernels.ops.overlap import triton as overlap
from opdkernels.ops.patch import triton as patch
from opdkernels.ops.patch.layout import blocks_of
from opdkernels.ops.quantile import triton as quantile
from opdkernels.ops.step import triton as step
from tests.backends.cuda.test_budgets import Instructions, code_of, loops_of
from tests.backends.triton.aot import (
    POINTERS,
    TARGETS,
    Compiled,
    assert_64_bit_offsets,
    assert_each_byte_is_read_once,
    assert_fits,
    assert_rounds_as_the_reference,
    compiled,
    launches,
    machine_code,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
N = 1 << 24


def on_cuda(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def call_delta(source: torch.dtype, trained: torch.dtype, n: int = N) -> None:
    mask = on_cuda((n + 7) // 8, dtype=torch.uint8)
    outputs = (on_cuda(8, 32768), on_cuda(49), on_cuda(4, 44), on_cuda(1, dtype=FP64), mask)
    delta.delta_(on_cuda(n, dtype=source), on_cuda(n, dtype=trained), DEFAULT_THRESHOLD_BITS, THRESHOLDS, *outputs)


DELTA = [
    *((target, BF16, BF16, 176 if target == "gfx942" else 160) for target in TARGETS),
    *((target, FP32, FP32, 160) for target in ("sm_90", "gfx942")),
    ("sm_90", FP64, FP64, 255),
    ("sm_90", BF16, FP32, 255),
]


@pytest.mark.parametrize(("target", "source", "trained", "registers"), DELTA, ids=str)
def test_delta(monkeypatch, target, source, trained, registers):
    count, fold, carry = launches(monkeypatch, lambda: call_delta(source, trained))
    code = compiled(count, target)
    assert_fits(code, registers)
    assert_each_byte_is_read_once(code, count, count.constants["TILE"] * (source.itemsize + trained.itemsize))
    assert_rounds_as_the_reference(code)
    assert_64_bit_offsets(code, POINTERS[source][1:].replace("fp", "f"))
    if source == trained == BF16:
        assert_fits(compiled(fold, target), 128)
        assert_fits(compiled(carry, target), 96)


def test_delta_launches_fit_the_registers(monkeypatch):
    launched = launches(monkeypatch, lambda: call_delta(BF16, BF16, 2**31 + 11))
    assert [one.name for one in launched] == ["count", "fold", "count", "fold", "count", "fold", "propagate_carry"]
    sizes = [one.arguments[9] for one in launched if one.name == "count"]
    assert (sum(sizes), max(sizes) < 2**31) == (2**31 + 11, True)
    assert launches(monkeypatch, lambda: call_delta(BF16, BF16, 0)) == []


def copied_carried_values(source: str) -> list[str]:
    """What loops assign from a name that they give a new value further down."""
    result = []
    for loop in (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.For, ast.While))):
        inside = [node for node in ast.walk(loop) if isinstance(node, ast.Assign)]
        arguments = {
            (one.id, node.lineno)
            for node in inside
            for target in node.targets
            for one in ast.walk(target)
            if isinstance(one, ast.Name)
        }
        handed = [node for node in inside if isinstance(node.value, ast.Name)]
        result += [
            ast.unparse(node)
            for node in handed
            if any(name == node.value.id and line > node.lineno for name, line in arguments)
        ]
    return result


@pytest.mark.parametrize(
    "module",
    [delta, divergence, gram, overlap, patch, quantile, step],
    ids=lambda module: module.__name__.rsplit(".", 1)[-1],
)
def test_no_loop_copies_a_carried_value(module):
    """No loop assigns `a = b` before b's new value.

    If both are equal at the start, the compiler, which traces the body once, treats `a` as a constant and does not
    carry it to the next iteration; the interpreter does.
    """
    assert copied_carried_values(inspect.getsource(module)) == []


def test_copied_carried_value_is_found():
    assert copied_carried_values("for part in range(2):\n    even = odd\n    odd, n = count(part)\n") == ["even = odd"]
    assert copied_carried_values("for part in range(2):\n    odd, n = count(part)\n    even = odd\n") == []


def call_quantile(dtype: torch.dtype, ranks: int = 3, n: int = N) -> None:
    quantile.quantile(on_cuda(n, dtype=dtype), [n // 10] * ranks, True, on_cuda(n // 8, dtype=torch.uint8))


QUANTILE = [*((target, BF16) for target in TARGETS), *(("sm_90", dtype) for dtype in (FP32, FP64)), ("gfx942", FP32)]


@pytest.mark.parametrize(("target", "dtype"), QUANTILE, ids=str)
def test_quantile(monkeypatch, target, dtype):
    passes = launches(monkeypatch, lambda: call_quantile(dtype))
    assert len(passes) == dtype.itemsize // 2
    for one in {passes[0].constants["FIRST"]: passes[0], passes[-1].constants["FIRST"]: passes[-1]}.values():
        code = compiled(one, target)
        assert_fits(code, quantile.MAXNREG)
        assert_each_byte_is_read_once(code, one, quantile.TILE_BYTES)
        assert_64_bit_offsets(code, POINTERS[dtype][1:].replace("fp", "f"))


def call_overlap(dtypes: tuple[torch.dtype, ...], n: int = N) -> None:
    runs = len(dtypes) - 1
    outputs = (on_cuda(32768), on_cuda(runs, 32768), on_cuda(runs, runs), on_cuda(runs + 1), on_cuda(2))
    overlap.overlap_(on_cuda(n, dtype=dtypes[0]), [on_cuda(n, dtype=dtype) for dtype in dtypes[1:]], 0x3728, *outputs)


OVERLAP = [
    *((target, (BF16,) * 3, 128) for target in TARGETS),
    ("sm_90", (BF16,) * 17, 255),
    ("sm_90", (FP64,) * 17, 255),
    ("sm_90", (FP32, BF16, FP64), 128),
    ("gfx942", (FP32,) * 9, 255),
]


@pytest.mark.parametrize(("target", "dtypes", "registers"), OVERLAP, ids=lambda x: str(x)[:30])
def test_overlap(monkeypatch, target, dtypes, registers):
    (count,) = launches(monkeypatch, lambda: call_overlap(dtypes))
    code = compiled(count, target)
    assert_fits(code, registers)
    assert_each_byte_is_read_once(code, count, count.constants["TILE"] * sum(dtype.itemsize for dtype in dtypes))
    assert_64_bit_offsets(code, POINTERS[dtypes[0]][1:].replace("fp", "f"))


def main_loop(code: Compiled, folder: Path) -> Instructions:
    """Instructions of the loop over whole tiles, by class; rare code included."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code.asm["cubin"])
    (kernel,) = code_of(cubin).values()
    return max(loops_of(kernel), key=Instructions.total)


COUNTING = {  # instructions and atomics of the loop per coordinate; of `delta`, four atomics are of rare coordinates
    "delta": (lambda: call_delta(BF16, BF16), 366, 7),
    "overlap": (lambda: call_overlap((BF16,) * 3), 158, 1),
    "quantile": (lambda: call_quantile(BF16), 120, 1),
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("call", "instructions", "atomics"), COUNTING.values(), ids=COUNTING)
def test_instructions_of_counting(monkeypatch, tmp_path, call, instructions, atomics, target):
    """No tile is redistributed through shared memory, which tl.histogram and the bytes of a mask use."""
    count = launches(monkeypatch, call)[0]
    loop = main_loop(machine_code(count, target), tmp_path)
    per_thread = count.constants["TILE"] // (32 * count.num_warps)
    assert loop["global atomics"] == atomics * per_thread
    assert loop.total() <= instructions * per_thread, loop
    assert loop["shared stores"] <= per_thread, loop


@pytest.mark.parametrize("n", [1 << 20, 1 << 28, 1 << 31])
def test_tables_in_memory_are_bounded(monkeypatch, n):
    calls = (
        lambda: call_delta(BF16, BF16, n),
        *(lambda runs=runs: call_overlap((BF16,) * (runs + 1), n) for runs in (2, 4, 16)),
        lambda: call_quantile(FP32, n=n),
    )
    for call in calls:
        for one in launches(monkeypatch, call):
            copies = [a for a in one.arguments if isinstance(a, torch.Tensor) and a.ndim >= 3]
            assert sum(a.nbytes for a in copies) <= tables.TABLE_BYTES


def call_gram(source: torch.dtype, trained: torch.dtype, *, visible=False, block=64, parts=7, across=False) -> None:
    shape = (1024, 5120) if across else (5120, 1024)
    pair = [on_cuda(*shape, dtype=dtype) for dtype in (source, trained)]
    w, v = (t.T for t in pair) if across else pair
    gram.gram_(w, v, parts, visible, block, on_cuda(parts.bit_count(), 1024, 1024, dtype=FP64))


GRAM = [
    *((target, BF16, BF16, True) for target in TARGETS),
    ("sm_90", BF16, FP32, False),
]


BF16_UNITS = {
    "sm_80": "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
    "sm_90": r"wgmma.mma_async.sync.aligned.m64n\d+k16.f32.bf16",
    "sm_100": "tcgen05.mma.cta_group::1.kind::f16",
    "gfx942": r"v_mfma_f32_\w+_bf16",
}


def assert_multiplies(code: Compiled, unit: str, registers: int = 128) -> None:
    """Asserts that products use the target's matrix unit, and 16-byte loads or copies to shared memory."""
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    assert_fits(code, registers)
    assert re.search(unit, text)
    assert code.wide_loads or re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", text)


@pytest.mark.parametrize(("target", "source", "trained", "visible"), GRAM, ids=str)
def test_gram_in_blocks(monkeypatch, target, source, trained, visible):
    launched = launches(monkeypatch, lambda: call_gram(source, trained, visible=visible))
    assert [one.name for one in launched] == ["pack", "multiply_blocks"]
    pack, blocks = (compiled(one, target) for one in launched)
    assert_fits(pack, 128)
    assert pack.wide_loads
    assert_rounds_as_the_reference(pack)
    assert_64_bit_offsets(pack, POINTERS[source][1:].replace("fp", "f"))
    assert_multiplies(blocks, BF16_UNITS[target])
    assert_64_bit_offsets(blocks, "bf16")


@pytest.mark.parametrize(("target", "across"), [("sm_80", False), ("sm_90", True), ("sm_100", True), ("gfx942", False)])
def test_gram_in_fp64(monkeypatch, target, across):
    (pack,) = (
        compiled(one, target) for one in launches(monkeypatch, lambda: call_gram(FP64, BF16, block=0, across=across))
    )
    assert_fits(pack, 128)
    assert pack.wide_loads


def call_patch(dtype: torch.dtype, n: int = N) -> None:
    blocks = blocks_of(n)
    w, v, values = (on_cuda(n, dtype=dtype) for _ in range(3))
    counts, positions = on_cuda(blocks, dtype=torch.int32), on_cuda(n // 8, dtype=torch.uint8)
    patch.patch_gather_(w, v, True, counts, positions, values, on_cuda(2, blocks, 2))
    patch.patch_scatter_(w, counts, positions, values, True, v, on_cuda(blocks, 2))
    patch.patch_digest(w)
    patch.patch_check(counts, positions, n, n)


PATCH = [
    *((target, torch.int16) for target in TARGETS),
    *(("sm_90", dtype) for dtype in (torch.uint8, torch.int64)),
]


@pytest.mark.parametrize(("target", "dtype"), PATCH, ids=str)
def test_patch(monkeypatch, target, dtype):
    launched = launches(monkeypatch, lambda: call_patch(dtype))
    assert [one.name for one in launched] == [
        "compare",
        "compress",
        "finish",
        "decode",
        "restore",
        "finish",
        "digest",
        "finish",
        "decode",
    ]
    for one, sides in ((launched[i], sides) for i, sides in ((0, 2), (1, 2), (2, 0), (3, 0), (4, 1), (6, 1))):
        if dtype != torch.int16 and one.name == "finish":
            continue  # the same whatever the width
        code = compiled(one, target)
        assert_fits(code, 176 if (one.name, dtype) == ("compress", torch.uint8) else 128)
        if sides:
            assert_each_byte_is_read_once(code, one, sides * patch.TILE_BYTES)
        if one.name in ("compare", "digest") and dtype == torch.int16:  # no other tensor has this element
            assert_64_bit_offsets(code, "i16")


@pytest.fixture(autouse=True)
def addresses(monkeypatch):
    """Tensors that have no data have no address either."""
    monkeypatch.setattr(gpu, "address", lambda tensor: 16)


def call_step(
    param: torch.dtype = BF16,
    masks: torch.dtype = torch.uint8,
    *,
    sgd=False,
    precision=1,
    everything=True,
    changed=False,
    tensors=1,
    n: int = N,
) -> None:
    """A step of AdamW with amsgrad, or of SGD with momentum, with step groups and initial values, or without."""
    active, bits = n // 5, masks == torch.uint8

    def many(size, dtype=FP32, there=True):
        return [on_cuda(size, dtype=dtype) for _ in range(tensors if there else 0)]

    shared = (
        many(active, torch.int16),
        many(active, param, everything),
        many(active, torch.uint8, everything),
        many((n if bits else active) // 8 + 1, torch.uint8, changed),
        on_cuda(3, 8, dtype=FP32),
        *[list(range(tensors))] * 3,
        *([on_cuda(1, dtype=FP32)] * 3 if everything else [None] * 3),
        False,
    )
    common = (
        many(n, param),
        many(n, param),
        many(n // 8 if bits else active, masks),
        many(n // 2048 + 1 if bits else 0, torch.int64),
        many(active),
    )
    if sgd:
        step.masked_sgd_(*common, *shared, True, precision, 7)
    else:
        step.masked_adamw_(*common, many(active), many(active, there=everything), *shared, precision, 7)


STEP = [  # and how many products of a coordinate are fused with a sum
    *((target, {}, 3) for target in TARGETS),
    *((target, {"changed": True}, 3) for target in ("sm_90", "gfx942")),
    ("sm_90", {"everything": False}, 2),
    ("sm_90", {"precision": 3}, 3),
    *(("sm_90", {"param": FP32, "masks": torch.int64, "changed": on}, 3) for on in (False, True)),
    *((target, {"sgd": True, "precision": 2}, 4) for target in ("sm_90", "gfx942")),
]


def assert_fuses(code: Compiled, products: int) -> None:
    """The compiler fuses no more products with sums than the source; quotients, roots and subnormals are correct."""
    llir = code.asm["llir"]
    assert len(re.findall(r"\bmath\.fma\b", code.asm["ttir"])) == products
    assert not re.search(r"llvm\.fmuladd|\b(?:fast|contract|reassoc|afn|arcp)\b|!fpmath", llir)
    if "ptx" in code.asm:
        arithmetic = re.findall(r"\b((?:add|sub|mul|div|sqrt|fma)\.[\w.]*f32(?:x2)?)\b", code.asm["ptx"])
        assert arithmetic
        assert all(".rn" in one and ".ftz" not in one for one in arithmetic)
    else:
        assert "amdhsa_float_denorm_mode_32 3" in code.sass
        assert "v_div_fixup_f32" in code.sass or not re.search(r"\bfdiv\b", llir)


@pytest.mark.parametrize(("target", "options", "fused"), STEP, ids=str)
def test_step(monkeypatch, target, options, fused):
    (one,) = launches(monkeypatch, lambda: call_step(**options))
    code = compiled(one, target)
    assert_fits(code, 128)
    assert_fuses(code, fused)


def test_step_of_any_number_of_tensors_is_one_launch(monkeypatch):
    (one,) = launches(monkeypatch, lambda: call_step(tensors=5))
    tensors, tiles = one.arguments[0], one.arguments[5]
    assert (tuple(tensors.shape), tiles) == ((5, step.COLUMNS.value), 5 * N // step.TILE)


def call_gather_and_scatter(dtype: torch.dtype, masks: torch.dtype = torch.uint8, n: int = N) -> None:
    bits = masks == torch.uint8
    held = (
        on_cuda(n, dtype=dtype),
        on_cuda(n // 8 if bits else n // 5, dtype=masks),
        on_cuda(n // 2048 + 1 if bits else 0),
    )
    for add in (False, True):
        step.masked_gather_(*held, on_cuda(n // 5, dtype=FP32), add)
    step.masked_scatter_(*held, on_cuda(n // 5, dtype=FP32))


@pytest.mark.parametrize(
    ("target", "dtype", "masks"),
    [("sm_80", BF16, torch.uint8), ("sm_90", FP32, torch.int32), ("gfx942", BF16, torch.uint8)],
    ids=str,
)
def test_gather_and_scatter(monkeypatch, target, dtype, masks):
    launched = launches(monkeypatch, lambda: call_gather_and_scatter(dtype, masks))
    assert [one.name for one in launched] == ["gather", "gather", "scatter"]
    for one in launched[1:]:
        code = compiled(one, target)
        assert_fits(code, 64)
        assert_rounds_as_the_reference(code)


def call_divergence(
    dtype: torch.dtype,
    *,
    kind=1,
    count=0,
    tail_k=0,
    softcap=0.0,
    bias=False,
    with_argmax=False,
    width=896,
    n=4096,
    vocab=151936,
) -> None:
    """A student and a wider teacher, forward and backward."""

    def side(w):
        return [
            on_cuda(n, w, dtype=dtype),
            on_cuda(vocab, w, dtype=dtype),
            *([on_cuda(vocab, dtype=dtype)] if bias else []),
        ]

    sides, ids = (side(width), side(2 * width)), on_cuda(n, count)
    params, beta = ([1.0, softcap, 1.0], [1.0, softcap, 1.0]), 0.5
    moments, at, _, _ = divergence.divergence_scan(*sides, ids, tail_k, vocab, *params, with_argmax)
    if kind in (2, 3):
        divergence.divergence_means(*sides, moments, vocab, *params, beta, kind)
    divergence.divergence_backward(
        *sides,
        on_cuda(9 if tail_k else 7, n, dtype=FP32),
        ids,
        at.select(0, 0),
        vocab,
        *params,
        beta,
        kind,
        [True, True, False],
    )


EVERYTHING = {"kind": 2, "count": 20, "softcap": 30.0, "bias": True, "with_argmax": True}
DIVERGENCE = [
    *((target, BF16, {}) for target in TARGETS),
    *((target, BF16, EVERYTHING) for target in TARGETS if target != "sm_80"),
    ("sm_80", FP32, {"kind": 0}),
    ("sm_90", torch.float16, {"kind": 3}),
    ("sm_90", BF16, {"kind": 4, "count": 1, "width": 450}),
    ("sm_90", BF16, {"kind": 4, "count": 20, "tail_k": 20}),
]


@pytest.mark.parametrize(("target", "dtype", "options"), DIVERGENCE, ids=lambda x: str(x)[:30])
def test_divergence(monkeypatch, target, dtype, options):
    """No spills, logits loaded 16 bytes at once and each once."""
    seen = {one.name: one for one in reversed(launches(monkeypatch, lambda: call_divergence(dtype, **options)))}
    kind = options.get("kind", 1)
    assert set(seen) == {"scan", "gradient", *(["means"] if kind in (2, 3) else [])}
    for name, one in seen.items():
        code = compiled(one, target)
        assert_fits(code, 128)
        sides = 1 if name == "gradient" and kind == 4 else 2
        assert code.wide_loads >= sides * one.constants["COLUMNS"] * 4 // (16 * 32 * one.num_warps)
        assert_64_bit_offsets(code, "f32")


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_divergence_of_an_odd_vocabulary(monkeypatch, dtype):
    """Rows of a chunk begin at any alignment."""
    launched = launches(
        monkeypatch, lambda: call_divergence(dtype, kind=2, count=1, bias=True, with_argmax=True, vocab=4095)
    )
    assert {one.name for one in launched} == {"scan", "means", "gradient"}
    for one in launched:
        assert_fits(compiled(one, "sm_90"), 128)


def test_divergence_workspace_is_bounded(monkeypatch):
    for n, vocab in ((10, 151936), (4096, 151936), (1 << 17, 20_000)):
        launched = launches(monkeypatch, lambda n=n, vocab=vocab: call_divergence(BF16, n=n, vocab=vocab))
        sizes = [one.arguments[0].shape[1] for one in launched if one.name == "gradient"]
        assert sum(sizes) == vocab
        assert n * max(sizes) * divergence.BYTES_AN_ID <= max(
            divergence.WORKSPACE_BYTES, n * divergence.LEAST_COLUMNS * divergence.BYTES_AN_ID
        )
        assert (
            2 * 896 * max(sizes) * 4 <= divergence.WORKSPACE_BYTES
        )  # a part of the wider head, or of its gradient, in fp32


CALLS = {
    "divergence": lambda: call_divergence(BF16, **EVERYTHING),
    "take and put": lambda: call_gather_and_scatter(BF16),
    "step": lambda: call_step(),
    "patch": lambda: call_patch(torch.int16),
    "delta": lambda: call_delta(BF16, FP32),
    "quantile": lambda: call_quantile(FP32),
    "overlap": lambda: call_overlap((BF16,) * 6),
    "gram": lambda: call_gram(BF16, FP32),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_argument_is_specialized(monkeypatch, call):
    """Other sizes and thresholds launch the same machine code."""
    for one in launches(monkeypatch, call):
        numbers = [
            name for name, a in zip(one.kernel.arg_names, one.arguments, strict=False) if isinstance(a, (int, float))
        ]
        assert set(numbers) <= set(one.kernel.do_not_specialize)
