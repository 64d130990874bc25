"""What `make gpu` measures: shared memory, calls in graphs, predictions, a large pair; with fakes in place of a GPU."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import atomics, backends, checks, graphs, packed, pair, predictions, record, timings
from benchmarks.gpu.backends import CPU, FAMILIES, Backend
from benchmarks.gpu.checks import Inconclusive
from opdkernels.backends.cuda import launch
from opdkernels.backends.cuda.sources import inline_includes
from opdkernels.benchmark.workloads import make_inputs
from tests.backends.cuda import machine_code
from tests.backends.cuda.fibers import load_kernels, needs_compiler
from tests.ops.conformance import Allocator

HERE, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = (0, 1, 31, 1025)


class FakeStream:
    """A stream; all work is complete at once."""

    def __init__(self, device):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


class FakeGraphs:
    """torch's CUDA graphs on a machine without a GPU: a capture runs the call, its end raises if `is_invalid`."""

    def __init__(self, monkeypatch):
        self.capturing, self.is_invalid, self.mode, self.ended = False, False, "default", []
        for name, fake in (
            ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: "replayed")),
            ("graph", self.capture),
            ("graph_pool_handle", lambda: (0, 1)),
            ("Stream", FakeStream),
            ("stream", contextlib.nullcontext),
            ("current_stream", FakeStream),
            ("get_sync_debug_mode", lambda: self.mode),
            ("set_sync_debug_mode", lambda mode: setattr(self, "mode", mode)),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    @contextlib.contextmanager
    def capture(self, graph, *, pool, stream):
        self.capturing = True
        yield
        self.capturing = False
        if self.is_invalid:
            raise RuntimeError("the capture was invalidated")

    def end(self, device, pool):
        self.ended.append((device, pool))


def test_calls_are_captured_after_a_warm_up(monkeypatch):
    fake, captured = FakeGraphs(monkeypatch), []

    def call():
        captured.append(fake.capturing)
        return len(captured)

    replay, result = graphs.capture(call, GPU, 3)
    assert captured == [False, False, True, True, True]
    assert (replay(), result) == ("replayed", 5)
    assert not fake.ended


@pytest.mark.parametrize("error", [RuntimeError("not permitted\nin a capture"), torch.OutOfMemoryError("full")])
def test_failed_capture_names_the_first_error_and_ends(monkeypatch, error):
    """The end of the capture raises another error, and leaves torch's allocator in the capture."""
    fake = FakeGraphs(monkeypatch)
    fake.is_invalid = True

    def call():
        if fake.capturing:
            raise error

    with pytest.raises((graphs.NotCapturable, torch.OutOfMemoryError)) as raised:
        graphs.capture(call, GPU)
    assert str(raised.value) == {RuntimeError: "RuntimeError: not permitted"}.get(type(error), "full")
    assert fake.ended == [(0, (0, 1))]


def test_call_that_is_not_capturable_has_no_time_in_a_graph(monkeypatch):
    def capture(*arguments):
        raise graphs.NotCapturable("RuntimeError: it waits")

    monkeypatch.setattr(timings, "on_gpu", lambda device: True)
    monkeypatch.setattr(graphs, "capture", capture)
    assert timings.seconds_in_graph(pytest.fail, HERE, 1e-3) == (None, "not capturable: RuntimeError: it waits")


def test_call_that_waits_for_the_gpu_is_not_captured(monkeypatch):
    fake = FakeGraphs(monkeypatch)

    def call():
        assert not fake.capturing
        if fake.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(graphs.NotCapturable, match="synchronizing"):
        graphs.capture(call, GPU)
    assert fake.mode == "default"
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 // 0, GPU)


def test_operator_that_ignores_new_inputs_is_detected():
    """As a graph does whose kernel got values, not addresses, when it was captured."""
    first = {}

    def kernel(operator):
        def call(values, *arguments):
            return CPU.kernel(operator)(first.setdefault(values.data_ptr(), values.clone()), *arguments)

        return call

    with pytest.raises(AssertionError, match="replay 1 of quantile gives another result"):
        checks.replays_in_graph(FAMILIES["quantile"], Backend("stale", kernel, CPU.serves), HERE, SIZES)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"null"}))  # which has no kernels for GPUs
def test_changed_inputs_change_every_result(name):
    """So a replay that does nothing is detected."""
    calls = checks.first_calls(FAMILIES[name], 1025)
    assert set(calls) == set(FAMILIES[name].operators)
    for operator, arguments in calls.items():
        results = []
        for change in (0, 1, 2):
            changed = Allocator().put(checks.changed_arguments(operator, arguments, change))
            parameters = checks.parameters_of(operator)
            written = [argument for argument, p in zip(changed, parameters, strict=True) if checks.is_written(p)]
            results.append(checks.tensors_of([CPU.kernel(operator)(*changed), written]))
        for result in results[1:]:
            same = [
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(result, results[0], strict=True)
            ]
            assert not all(same), operator


def test_operators_that_a_graph_cannot_capture_are_reported(monkeypatch):
    """The other operators of the family are checked all the same."""
    captured = []

    def capture(call, device):
        captured.append(call)
        if len(captured) == 2:
            raise graphs.NotCapturable("RuntimeError: it waits")
        return graphs.repeat(call, 1)

    monkeypatch.setattr(checks.graphs, "capture", capture)
    with pytest.raises(graphs.NotCapturable, match=r"^patch_check: RuntimeError: it waits$"):
        checks.replays_in_graph(FAMILIES["patch"], CPU, HERE, SIZES)
    assert len(captured) == len(FAMILIES["patch"].operators)


CLOCK = "static inline long long clock64() { static long long now = 0; return now += 12; }\n"


@pytest.fixture
def small_atomics(monkeypatch):
    """Three blocks of two warps, which fibers can run."""
    monkeypatch.setattr(launch, "device_limits", lambda device: (3, 48 << 10))
    monkeypatch.setattr(atomics, "THREADS", 64)


@functools.cache
def atomics_on_fibers():
    """The kernels of atomics.cu on fibers; their clock advances by twelve for each thread that reads it."""
    text = inline_includes(atomics.SOURCE)
    return load_kernels("atomics", CLOCK + text)


@needs_compiler
@pytest.mark.usefixtures("small_atomics")
def test_atomics_count_every_change():
    rows = atomics.measure(atomics_on_fibers(), HERE)
    assert [(row["instruction"], row["pattern"]) for row in rows] == [
        (instruction, pattern) for instruction in atomics.INSTRUCTIONS.values() for pattern in atomics.patterns()
    ]
    assert {row["cycles"] for row in rows} == {64 * 12 / (2 * atomics.ADDRESSES * atomics.REPEATS)}


@needs_compiler
@pytest.mark.usefixtures("small_atomics")
def test_atomics_that_lose_a_change_are_not_measured(monkeypatch):
    expected = atomics.expected_table
    monkeypatch.setattr(atomics, "expected_table", lambda *arguments: expected(*arguments) + 1)
    with pytest.raises(AssertionError, match=r"another table after ATOMS\.POPC\.INC"):
        atomics.measure(atomics_on_fibers(), HERE)


def test_wavefronts_are_the_words_of_the_fullest_bank():
    lanes = np.arange(32)
    assert atomics.wavefronts(lanes) == atomics.wavefronts(np.zeros(32, int)) == 1
    assert atomics.wavefronts(32 * lanes) == 32
    assert atomics.wavefronts(np.where(lanes < 5, 32 * lanes, lanes)) == 5
    assert atomics.wavefronts(np.concatenate([lanes, 32 * lanes])) == 16.5
    counts = {name: atomics.wavefronts(words) for name, words in atomics.patterns().items()}
    assert counts[atomics.OWN_BANK] == counts[atomics.ONE_WORD] == 1
    assert 3 < counts[atomics.HISTOGRAM] < 4
    assert 27 < counts[atomics.ONE_BANK] < 30
    words = atomics.patterns()[atomics.OWN_BANK]
    assert atomics.predicted_cycles("increment", atomics.OWN_BANK, words) == [1, 2]
    assert atomics.predicted_cycles("store", atomics.OWN_BANK, words) == [1, 1]
    assert atomics.predicted_cycles("add", atomics.ONE_WORD, words) is None


def test_constants_of_atomics_are_those_of_the_kernels():
    text = atomics.SOURCE.read_text()
    for name in ("ADDRESSES", "REPEATS", "TABLE_WORDS"):
        assert f"#define OPD_{name} {getattr(atomics, name)} " in text
    assert text.count(f"__launch_bounds__({atomics.THREADS}, 1)") == len(atomics.INSTRUCTIONS)


def compiled(source, target, folder):
    """The kernels of a source as nvcc compiles them for a GPU."""
    cubin = folder / f"{source.stem}.cubin"
    command = [machine_code.NVCC, *launch.OPTIONS, f"-arch={target}", "-cubin", source, "-o", cubin]
    subprocess.run(command, check=True)
    return machine_code.kernels_of(cubin)


@pytest.mark.skipif(machine_code.NVCC is None or machine_code.tools() is None, reason="no nvcc, or no disassembler")
@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_atomics_are_compiled_to_the_instructions_that_they_name(tmp_path, target):
    """Each address is one instruction in the loop: sixteen, and for the stores one that clears the table."""
    kernels = compiled(atomics.SOURCE, target, tmp_path)
    assert set(kernels) == {f"atomics_{name}" for name in atomics.INSTRUCTIONS}
    for name, instruction in (("increment", r"ATOMS\.POPC\.INC"), ("add", r"ATOMS\.ADD")):
        assert kernels[f"atomics_{name}"].count(instruction) == atomics.ADDRESSES
        assert kernels[f"atomics_{name}"].count("ATOMS") == atomics.ADDRESSES
    stores = kernels["atomics_store"]
    assert stores.count("ATOMS") == 0
    assert stores.count(r"\bSTS\b") - kernels["atomics_add"].count(r"\bSTS\b") == atomics.ADDRESSES
    assert all(code.count(machine_code.SPILL) == 0 for code in kernels.values())


@pytest.mark.skipif(machine_code.NVCC is None or machine_code.tools() is None, reason="no nvcc, or no disassembler")
@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_packed_functions_are_compiled(tmp_path, target):
    """With the instructions of GPUs, not the plain C."""
    code = compiled(packed.SOURCE, target, tmp_path)["packed_functions"]
    assert code.count(r"\bSHFL\b") > 0
    assert code.count(r"\bIDP\.2A\b") > 0
    assert code.count(machine_code.SPILL) == 0


@pytest.mark.skipif(machine_code.nvrtc() is None or machine_code.tools() is None, reason="no NVRTC, or no disassembler")
@pytest.mark.parametrize("source", [atomics.SOURCE, packed.SOURCE], ids=lambda path: path.stem)
def test_nvrtc_compiles(monkeypatch, source):
    monkeypatch.setattr(machine_code, "family_source", lambda family: inline_includes(source))
    assert machine_code.by_nvrtc.__wrapped__(source.stem, "sm_90")


def test_sources_of_their_own_need_a_gpu_and_cupy(monkeypatch):
    with pytest.raises(Inconclusive, match="compiled for GPUs"):
        backends.compiled_from(atomics.SOURCE, HERE)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(launch, "cupy_cuda_major", lambda: 12)
    with pytest.raises(Inconclusive, match="CuPy for CUDA 13, which compiles it, is not installed"):
        backends.compiled_from(atomics.SOURCE, GPU)
    monkeypatch.setattr(launch, "cupy_cuda_major", lambda: 13)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: name)
    kernels = backends.compiled_from(atomics.SOURCE, GPU)
    assert "atomics_increment(" in kernels.source_of("atomics")
    assert "shared_increment(" in kernels.source_of("atomics")


@needs_compiler
def test_packed_functions_in_plain_c_equal_numpy(monkeypatch):
    kernels = load_kernels("packed", inline_includes(packed.SOURCE))
    packed.check(kernels, HERE)
    expected = packed.expected_results

    def spoiled(words):
        results = expected(words)
        results["clamp_to"][70_000] += 1
        return results

    monkeypatch.setattr(packed, "expected_results", spoiled)
    with pytest.raises(AssertionError, match=r"^clamp_to of \['0x"):
        packed.check(kernels, HERE)


@pytest.mark.parametrize("name", ["sign_masks", "max_of_sums", "dot_halves", "add_lane_below"])
def test_numpy_equals_the_definition_of_packed_functions(name):
    """One word at a time, with integers of Python."""
    words = packed.make_words()
    results = packed.expected_results(words)[name]

    def halves(word):
        return [int(word) & 0xFFFF, int(word) >> 16]

    def signed(value, bits):
        return value - (1 << bits) * (value >> (bits - 1))

    def definition(i):
        x, y, z = (halves(word) for word in words[:, i])
        if name == "add_lane_below":
            below = i - (1 << (i // 32 % 5))
            return int(words[0, i]) + (int(words[0, below]) if below >= i - i % 32 else 0)
        if name == "dot_halves":
            factors = [signed(y[0] & 0xFF, 8), signed(y[0] >> 8, 8)]
            return sum(signed(a, 16) * b for a, b in zip(x, factors, strict=True)) + (signed(int(words[2, i]), 32) >> 8)
        pairs = zip(x, y, z, strict=True)
        low, high = (0xFFFF * (a >> 15) if name == "sign_masks" else max((a + b) & 0xFFFF, c) for a, b, c in pairs)
        return low | high << 16

    for i in (*range(500), *range(70_000, 70_500)):
        assert int(results[i]) == definition(i) & 0xFFFFFFFF


def test_predictions_are_of_workloads_on_one_gpu():
    names = {workload.name for workload in timings.WORKLOADS}
    predicted = {name for name, _ in predictions.EXPECTED_MS}
    assert predicted <= names
    first = timings.WORKLOADS[0].name
    assert predictions.expected_s(first, "NVRTC", "NVIDIA H200", 1 << 28) == pytest.approx([0.26e-3, 0.38e-3])
    for workload, implementation, gpu, n in (
        (first, "eager PyTorch", "NVIDIA H200", 1 << 28),
        (first, "NVRTC", "NVIDIA L4", 1 << 28),
        (first, "NVRTC", "NVIDIA H200", 1 << 20),
        ("another", "NVRTC", "NVIDIA H200", 1 << 28),
    ):
        assert predictions.expected_s(workload, implementation, gpu, n) is None
    for measured, missed in ((0.74, True), (0.76, False), (1.5, False), (2.4, False), (2.6, True)):
        assert predictions.is_missed(measured, [1, 2]) == missed


@pytest.mark.parametrize("percent", [12, *timings.UPDATES])
def test_updates_change_the_stated_part(percent):
    base, trained = make_inputs(1 << 18, HERE, **({"update": timings.UPDATES[percent]} if percent != 12 else {}))
    assert float((base != trained).float().mean()) == pytest.approx(percent / 100, abs=0.01)


def timed_unit(**fields):
    row = {"workload": "a pass", "family": "delta", "implementation": "eager PyTorch", "sources": "", "median_s": 2e-3}
    row |= {"bytes_per_s": 1e9, "fraction_of_limit": 0.5, "extra_bytes": None, **fields}
    return {"group": "time", "name": "backends", "workload": "a pass", "status": "passed", "rows": [row]}


def test_timings_of_earlier_runs_have_no_columns_of_graphs():
    header, rule, row = record.timings_table([timed_unit()])
    assert "graph" not in header
    assert "predicted" not in header
    assert rule == "|---|---|---:|---:|---:|---:|---:|"
    assert row == "| a pass | eager PyTorch | 2 ms | 1 GB/s | 50 % | 1 |  |"


def test_prediction_is_beside_the_measurement_and_its_miss_is_marked():
    in_graph = {"graph_s": 1e-3, "graph_fraction_of_limit": 0.8, "expected_s": [0.9e-3, 1.2e-3]}
    header, _, *rows = record.timings_table([timed_unit(**in_graph), timed_unit()])
    assert header.startswith("| workload | implementation | median | in a graph | predicted |")
    assert rows[0].startswith("| a pass | eager PyTorch | 2 ms | 1 ms, 80 % | 0.9–1.2 ms | 1 GB/s |")
    assert rows[1].startswith("| a pass | eager PyTorch | 2 ms |  |  | 1 GB/s |")
    refused = timed_unit(graph_s=None, graph_note="not capturable: RuntimeError: it waits")
    assert record.timings_table([refused])[2].startswith("| a pass | eager PyTorch | 2 ms | not capturable | 1 GB/s |")
    text = "\n".join(record.timings_table([timed_unit(expected_s=[1e-3, 1e-3], graph_s=None)]))
    assert f"| 2 ms | 1 ms{record.MISSED} |" in text
    assert "More than 25 % outside the predicted range." in text


def test_results_of_shared_memory_and_of_the_pair_are_shown():
    row = {"instruction": "STS", "pattern": "one bank", "wavefronts": 28.3}
    rows = [row | {"cycles": 28.9, "predicted_cycles": [28.3, 28.3]}, row | {"cycles": 99.0, "predicted_cycles": None}]
    lines = record.atomics_table([{"rows": rows}])
    assert lines[2:] == ["| STS, one bank | 28.9 | 28.3 | 28.3 |", "| STS, one bank | 99 | 28.3 |  |"]
    (row,) = pair.measure(HERE, pair.SMALL)
    (line,) = record.pair_lines([{"rows": [row]}])
    assert line.startswith("small shapes, 0.000125 G coordinates, 12 % changed: analysed")


def test_pair_has_the_shapes_of_llama():
    shapes = dict(pair.LLAMA_8B.of_tensors())
    assert len(shapes) == 291
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_030_261_248


def test_pair_is_counted_in_slices(monkeypatch):
    """Every tensor once, whatever the slices; another number of changed coordinates is detected."""
    monkeypatch.setattr(pair.streaming, "MIN_SLICE", 64)
    monkeypatch.setattr(pair.streaming, "MAX_SLICE_BYTES", 4 * 1000)
    (row,) = pair.measure(HERE, pair.SMALL)
    assert row["tensors"] == 2 * 9 + 3
    assert row["coordinates"] == sum(torch.Size(shape).numel() for _, shape in pair.SMALL.of_tensors())
    generate = pair.generate

    def spoiled(*arguments):
        made = generate(*arguments)
        made.sides[5][1][3] += 1
        return made

    monkeypatch.setattr(pair, "generate", spoiled)
    with pytest.raises(AssertionError, match=r"another number of changed coordinates of model\.layers\.0\.self"):
        pair.measure(HERE, pair.SMALL)


def test_pair_needs_memory_and_time(monkeypatch, tmp_path):
    monkeypatch.setattr(pair, "LIMIT_S", -1.0)
    with pytest.raises(Inconclusive, match="generating the pair took more than"):
        pair.measure(HERE, pair.SMALL)
    monkeypatch.setattr(pair, "available_host_bytes", lambda: 20 << 30)
    with pytest.raises(Inconclusive, match="21 GB of 36 GB of host memory are available"):
        pair.measure(HERE)
    monkeypatch.undo()
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "memory.max", "memory.current"))
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    files = {"/proc/meminfo": meminfo, "/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    monkeypatch.setattr(pair, "Path", files.__getitem__)
    assert pair.available_host_bytes() == 8192
    limit.write_text("max\n")
    assert pair.available_host_bytes() == 8192
    limit.write_text("5000\n")
    used.write_text("1000\n")
    assert pair.available_host_bytes() == 4000
