"""The GPU command: its checks pass on the CPU and on fibers, detect broken kernels and need few packages.

Where there is a GPU, they also run on it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import backends, build, checks, record, timings
from benchmarks.gpu.backends import CPU, FAMILIES, REFERENCE, Backend, launched_by, serves
from benchmarks.gpu.checks import CHECKS, Inconclusive
from benchmarks.gpu.graphs import NotCapturable
from benchmarks.gpu.worker import gpu_is_lost
from opdkernels.backends.cuda.sources import inline_includes
from tests.backends.cuda.fibers import launch_on_fibers, load_kernels, needs_compiler
from tests.ops.conformance import Allocator
from tests.test_structure import FAMILIES as FAMILY_NAMES

ROOT = Path(__file__).parent.parent
HERE = torch.device("cpu")
SIZES = (0, 1, 31, 1025)
BACKENDS = {backend.name: backend for backend in backends.available_backends(HERE)[0]}
UNITS = [
    (check, family.name, backend.name)
    for check, family, backend in checks.units(list(FAMILIES.values()), list(BACKENDS.values()))
]
BLOCKED = (
    "pyarrow",
    "pydantic",
    "typer",
    "rich",
    "jinja2",
    "safetensors",
    "pytest",
    "pandas",
    "huggingface_hub",
    "hypothesis",
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: `make gpu` on a machine that has one")
@pytest.mark.parametrize(("check", "family"), [(check, name) for check, name, backend in UNITS if backend == "package"])
def test_checks_on_gpu(check, family):
    device = torch.device("cuda", torch.cuda.current_device())
    for name, tested, backend in checks.units([FAMILIES[family]], backends.available_backends(device)[0]):
        if name == check:
            try:
                CHECKS[check](tested, backend, device)
            except (Inconclusive, NotCapturable) as why:
                print(f"{backend.name}: {why}")


@pytest.mark.parametrize(("check", "family", "backend"), UNITS)
def test_checks_on_cpu(check, family, backend):
    CHECKS[check](FAMILIES[family], BACKENDS[backend], HERE, SIZES)


@needs_compiler
@pytest.mark.parametrize("family", [name for name in FAMILIES if (ROOT / f"csrc/{name}/cuda.cu").is_file()])
def test_checks_on_fibers(monkeypatch, family):
    """The checks launch CUDA C++ as on a GPU, from the library that they name."""
    from opdkernels.backends.cuda import launch

    kernels = load_kernels(family)
    launch_on_fibers(monkeypatch, kernels)
    backend = Backend("fibers", launched_by(kernels), serves("cuda"))
    monkeypatch.setattr(launch, "kernels", lambda: pytest.fail("another library was launched"))
    assert backend.serves_all(FAMILIES[family])
    checks.matches_cpu(FAMILIES[family], backend, HERE, (0, 31, 300))
    checks.accepts_misaligned_views(FAMILIES[family], backend, HERE, (31, 300))


def test_every_family_and_operator_has_cases():
    assert set(FAMILIES) == set(FAMILY_NAMES)
    assert {operator for family in FAMILIES.values() for operator in family.operators} == set(backends.OPERATORS)


def broken(name: str, spoil) -> Backend:
    """A correct backend, except that `spoil` changes the outputs of the operator `name`."""

    def kernel(operator):
        def call(*arguments):
            result = CPU.kernel(operator)(*arguments)
            if operator == name:
                spoil(arguments, result)
            return result

        return call

    return Backend("broken", kernel, CPU.serves)


@pytest.mark.parametrize(
    ("family", "operator", "spoil"),
    [
        ("delta", "delta_", lambda a, r: a[4][0, 5].add_(1)),
        ("delta", "delta_", lambda a, r: a[8] is not None and a[8][-1:].bitwise_xor_(1)),
        ("overlap", "overlap_", lambda a, r: a[5][0, 1].add_(1)),
        ("quantile", "quantile", lambda a, r: r[1][-1:].add_(1)),
        ("gram", "gram_", lambda a, r: a[5][1, -1:].mul_(1.001)),
        ("gram", "gram_", lambda a, r: a[5][0, :1].fill_(float("inf"))),
        ("patch", "patch_gather_", lambda a, r: a[6][0, -1:].add_(1)),
        ("patch", "patch_scatter_", lambda a, r: a[5][-1:].add_(1)),
        ("patch", "patch_check", lambda a, r: r.add_(1)),
        ("step", "masked_adamw_", lambda a, r: a[5][0][-1:].neg_()),
        ("divergence", "divergence_scan", lambda a, r: r[0][4, -1:].add_(1)),
        ("divergence", "divergence_means", lambda a, r: r[2].mul_(1.2)),
        ("divergence", "divergence_backward", lambda a, r: r[1][-1:].fill_(1)),
        ("divergence", "divergence_top", lambda a, r: r[:, -1:].zero_()),
        ("step", "masked_scatter_", lambda a, r: a[0][-1:].add_(1)),
        ("step", "masked_gather_", lambda a, r: a[3][-1:].add_(1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_output_is_detected(family, operator, spoil):
    with pytest.raises(AssertionError, match=r"differ|off|NaN|finite"):
        checks.matches_cpu(FAMILIES[family], broken(operator, spoil), HERE, (1025,))


def test_out_of_bounds_write_is_detected():
    def beyond(arguments, result):
        mask = arguments[8]
        torch.as_strided(mask, (1,), (1,), mask.storage_offset() + mask.numel()).fill_(7)

    with pytest.raises(AssertionError, match="outside a tensor"):
        checks.accepts_misaligned_views(FAMILIES["delta"], broken("delta_", beyond), HERE, (31, 300))


def test_nondeterminism_is_detected():
    calls = []

    def every_seventh(arguments, result):
        calls.append(1)
        arguments[4][0, 0] += len(calls) % 7 == 0

    with pytest.raises(AssertionError, match="run 6 differs"):
        checks.is_deterministic(FAMILIES["delta"], broken("delta_", every_seventh), HERE, SIZES)


def test_unprocessed_part_is_detected():
    def last_part(arguments, result):
        arguments[0][0][-5:] = 7

    with pytest.raises(AssertionError, match="not the same in every part"):
        checks.indexes_beyond_32_bits(FAMILIES["step"], broken("masked_adamw_", last_part), HERE, SIZES)


def test_allocator_offsets_misalign_tensors():
    allocator = Allocator(HERE, (1,))
    (w,) = allocator.put([torch.arange(9, dtype=torch.bfloat16)])
    assert w.data_ptr() % 16 == 2
    assert w.tolist() == list(range(9))
    assert allocator.put(torch.arange(6.0).view(2, 3).T).stride() == (1, 3)


class FakeStream:
    """A stream or an event of a GPU; all work is complete at once."""

    def __init__(self, *arguments, **options):
        pass

    def record(self, *arguments):
        pass

    def synchronize(self):
        pass

    def query(self):
        return False

    def elapsed_time(self, other):
        return 2.0


@pytest.fixture
def fake_gpu(monkeypatch):
    """GPU calls are replaced by fakes, and the CPU computes."""
    monkeypatch.setattr(checks, "on_gpu", lambda device: True)
    monkeypatch.setattr(timings, "on_gpu", lambda device: True)
    for name, fake in (
        ("get_device_properties", lambda device: SimpleNamespace(name="NVIDIA H200")),
        ("Stream", FakeStream),
        ("Event", FakeStream),
        ("stream", contextlib.nullcontext),
        ("mem_get_info", lambda device: (1 << 33, 1 << 34)),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("_sleep", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)


@pytest.mark.usefixtures("fake_gpu")
def test_calls_to_a_gpu(monkeypatch):
    family = FAMILIES["delta"]
    checks.uses_current_stream(family, CPU, HERE, SIZES)
    monkeypatch.setattr(checks, "BEYOND", 1 << 18)
    checks.indexes_beyond_32_bits(family, CPU, HERE, SIZES)
    with pytest.raises(Inconclusive, match="reference"):
        checks.indexes_beyond_32_bits(family, REFERENCE, HERE, SIZES)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 34))
    with pytest.raises(Inconclusive, match="1 GB of 4 GB are free"):
        checks.indexes_beyond_32_bits(family, CPU, HERE, SIZES)
    assert timings.seconds(lambda: None, HERE) == 0.002
    assert timings.seconds_in_graph(lambda: None, HERE, 1e-3) == (0.002 / timings.GRAPH_CALLS, "")
    assert timings.seconds_in_graph(lambda: pytest.fail("captured"), HERE, 1.0) == (
        None,
        "a call takes more than 10 ms",
    )
    assert timings.coordinates(HERE) == 1 << 22
    monkeypatch.setattr(FakeStream, "query", lambda event: True)
    with pytest.raises(Inconclusive, match="the default stream finished first"):
        checks.uses_current_stream(family, CPU, HERE, SIZES)


@pytest.mark.usefixtures("fake_gpu")
def test_missing_stream_synchronization_is_detected():
    """A kernel on another stream would count the previous contents."""

    def too_early(arguments, result):
        arguments[4].zero_()

    with pytest.raises(AssertionError, match="differ"):
        checks.uses_current_stream(FAMILIES["delta"], broken("delta_", too_early), HERE, SIZES)


def test_available_backends_of_a_gpu(monkeypatch):
    from opdkernels.backends import triton
    from opdkernels.backends.cuda import launch

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(launch, "LibraryKernels", lambda path: "built")
    monkeypatch.setattr(launch, "NvrtcKernels", lambda: "compiled")
    monkeypatch.setattr(launch, "library_is_stale", lambda: False)
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "")
    for library, cupy, names in (
        (13, 13, ["CUDA library", "NVRTC", "Triton"]),
        (12, None, ["Triton"]),
        (None, 13, ["NVRTC", "Triton"]),
    ):
        monkeypatch.setattr(launch, "library_cuda_major", lambda library=library: library)
        monkeypatch.setattr(launch, "cupy_cuda_major", lambda cupy=cupy: cupy)
        available, missing = backends.available_backends(gpu)
        assert [backend.name for backend in available] == [*names, "reference", "package"]
        assert len(missing) == 3 - len(names)
    assert missing == ["CUDA library: not installed, torch is for CUDA 13"]

    def broken():
        raise OSError("no libnvrtc")

    monkeypatch.setattr(launch, "NvrtcKernels", broken)
    monkeypatch.setattr(triton, "unavailable_reason", lambda: "Triton is not installed")
    assert backends.available_backends(gpu)[1] == [
        "CUDA library: not installed, torch is for CUDA 13",
        "NVRTC: no libnvrtc",
        "Triton is not installed",
    ]


def test_unit_reports_its_status(monkeypatch):
    from benchmarks.gpu import worker

    def raises(error):
        raise error

    for error, status in (
        (None, "passed"),
        (AssertionError("off"), "failed"),
        (Inconclusive("no"), "inconclusive"),
        (NotCapturable("waits"), "not capturable"),
        (torch.OutOfMemoryError("full"), "inconclusive"),
    ):
        unit = worker.Unit("check", "a", "b", "c", lambda error=error: raises(error) if error else [])
        (line,) = worker.run(unit, HERE)
        assert (line["status"], line["name"]) == (status, "a")
        assert str(error or "") in line["detail"]
    monkeypatch.setattr(worker, "gpu_is_lost", lambda device: True)
    lines = worker.run(unit, HERE)
    assert next(lines)["status"] == "inconclusive"
    with pytest.raises(SystemExit) as left:
        next(lines)
    assert left.value.code == worker.GPU_LOST == command.GPU_LOST
    assert not gpu_is_lost(HERE)
    assert gpu_is_lost(torch.device("cuda", 99))


@pytest.mark.parametrize("workload", timings.WORKLOADS, ids=lambda workload: workload.name)
def test_every_implementation_is_timed_and_compared(workload):
    limits = dict.fromkeys(("copy", "fp64 product", "bf16 product"), 1e9)
    rows = [*timings.time_workload(workload, list(BACKENDS.values()), HERE, limits, 4096)]
    rows += (
        timings.time_compiled(workload, HERE, limits, functools.partial(torch.compile, backend="eager"), 4096)
        if workload.fuses
        else []
    )
    assert [row["implementation"] for row in rows] == [
        *(name for name in BACKENDS if name not in ("package", "reference")),
        "eager PyTorch",
        *["torch.compile"] * workload.fuses,
    ]
    for row in rows:
        rate = row[timings.unit_of(workload)]
        assert rate == pytest.approx(row["fraction_of_limit"] * 1e9)
        assert rate * row["median_s"] == pytest.approx(rows[0][timings.unit_of(workload)] * rows[0]["median_s"])


def test_wrong_output_is_not_timed():
    wrong = broken("delta_", lambda arguments, result: arguments[4][0, 5].add_(1))
    with pytest.raises(AssertionError, match="broken gives a different result for delta of a bf16 pair"):
        list(timings.time_workload(timings.WORKLOADS[0], [CPU, wrong], HERE, {"copy": 1.0}, 4096))


def test_command_checks_measures_and_writes_one_file(tmp_path, capfd):
    """Checks and measurements run separately: each keeps the results of the other."""
    common = ["--device", "cpu", "--small", "--no-build", "--out", str(tmp_path)]
    assert command.main([*common, "--tests", "--only", "uses_current_stream,memcheck"]) == 0
    assert command.main([*common, "--bench", "--only", "limits,backends"]) == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert {unit["group"] for unit in report["units"]} == {"check", "sanitizer", "time"}
    printed = capfd.readouterr().out
    for line in ("| delta | CPU | yes |", "| delta of a bf16 pair | eager PyTorch |"):
        assert line in record.table(report)
        assert line in printed


def test_parallel_checks_equal_those_of_one_process(tmp_path):
    """Each check runs once, some of them alone, and no measurement runs in parallel."""
    runs = []
    for jobs in ("1", "3"):
        arguments = ["--device", "cpu", "--small", "--no-build", "--jobs", jobs, "--out", str(tmp_path / jobs)]
        assert command.main([*arguments, "--only", "matches_cpu,uses_current_stream,limits"]) == 0
        (path,) = (tmp_path / jobs).iterdir()
        runs.append(
            [
                (unit["name"], unit["workload"], unit["backend"], unit["status"])
                for unit in json.loads(path.read_text())["units"]
            ]
        )
    assert sorted(runs[0]) == sorted(runs[1])
    assert {name for name, *_ in runs[1][: -3 * len(FAMILIES) - 1]} == {"matches_cpu"}


def test_checks_that_use_all_the_time_are_kept(tmp_path, monkeypatch, capfd):
    """And units that could not start after them are reported."""

    def checked(command_line, jobs, deadline):
        results = command.Results()
        results.take({"plan": [], "machine": {"name": "a gpu", "torch": "2", "cuda": "13"}, "missing": []})
        results.take(
            {
                "group": "check",
                "name": "matches_cpu",
                "workload": "delta",
                "backend": "Triton",
                "status": "passed",
                "rows": [],
                "detail": "",
                "seconds": 1.0,
            }
        )
        return results, ""

    def first_only(command_line, deadline, results):
        if "first" not in command_line:
            return "late"
        results.take({"plan": [], "machine": {"name": "a gpu", "torch": "2", "cuda": "13"}, "missing": []})
        return ""

    monkeypatch.setattr(command, "supervise_parallel", checked)
    monkeypatch.setattr(command, "supervise", first_only)
    assert command.main(["--device", "cpu", "--small", "--no-build", "--jobs", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert [unit["status"] for unit in json.loads(path.read_text())["units"]] == ["passed"]
    assert "not reached: units that run alone: late" in capfd.readouterr().out


def test_without_gpu_one_line_and_status_4(tmp_path):
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--no-build", "--out", str(tmp_path)]
    if not torch.cuda.is_available():
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 4
        assert done.stderr.count("\n") == 1
        assert "nothing was checked on cuda:" in done.stderr
    assert not list(tmp_path.iterdir())


WORKER = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
unit = lambda i: {"group": "check", "name": "matches_cpu", "workload": f"family {i}", "backend": "a kernel"}
print(json.dumps({"plan": [unit(i) for i in range(5)], "machine": {}}), flush=True)
for i in range(first, 5):
    if i == 1: os._exit(7)
    if i == HANGS:
        print("hangs", flush=True)
        time.sleep(600)
    failed = i == 3
    status = "failed" if failed else "passed"
    print(json.dumps({**unit(i), "status": status, "rows": [], "detail": "lost" * failed, "seconds": 0}), flush=True)
    if failed: sys.exit(3)
"""


def supervised(monkeypatch, hangs: int, seconds: float) -> list[str]:
    """Statuses of the units of `WORKER`. Time passes only while it hangs: results do not depend on its speed."""
    now = [0.0]

    class Lines(queue.Queue):
        def get(self, *, timeout):
            line = super().get()
            if line == "hangs\n":
                now[0] += timeout
                raise queue.Empty
            return line

    monkeypatch.setattr(command, "queue", SimpleNamespace(Queue=Lines, Empty=queue.Empty))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0]))
    results = command.Results()
    assert command.supervise([sys.executable, "-c", WORKER.replace("HANGS", str(hangs))], seconds, results) == ""
    return [unit["status"] for unit in results.finish()["units"]]


def test_crash_or_hang_costs_one_unit(monkeypatch):
    assert supervised(monkeypatch, -1, 600) == ["passed", "failed", "passed", "failed", "passed"]
    assert supervised(monkeypatch, 2, 600) == ["passed", "failed", "failed", "failed", "passed"]


def test_units_beyond_the_deadline_are_reported(monkeypatch):
    assert supervised(monkeypatch, 2, 4) == ["passed", "failed", *["not reached"] * 3]


def test_sanitizer_runs_the_equality_checks(tmp_path, monkeypatch):
    """With a fake tool: its error fails the unit, and so does a failed check."""
    from benchmarks.gpu import worker

    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    arguments = worker.options(["--device", "cpu"])
    for script, wrong in (("exit 9", "Invalid __global__ read"), ("exit 0", None), ("exit 1", "crashed")):
        report = "echo '========= Invalid __global__ read'"
        tool.write_text(f'#!/bin/sh\n{report}\necho "$@" > {tmp_path}/call\n{script}\n')
        tool.chmod(0o755)
        if wrong:
            with pytest.raises(AssertionError, match=wrong):
                worker.sanitized("memcheck", "delta", arguments)
        else:
            assert worker.sanitized("memcheck", "delta", arguments) == []
    call = (tmp_path / "call").read_text()
    assert call.startswith("--tool memcheck ")
    assert " --family delta " in call
    arguments.until = worker.time.monotonic() + worker.MIN_SANITIZER_S
    with pytest.raises(Inconclusive, match="no time is left"):
        worker.sanitized("memcheck", "delta", arguments)


@pytest.mark.parametrize(
    ("line", "error", "text"),
    [
        (json.dumps({"backend": "NVRTC", "status": "passed"}), Inconclusive, r"stopped after 60 s; passed: NVRTC$"),
        ("========= Invalid __global__ read", AssertionError, r"^Invalid __global__ read$"),
    ],
    ids=["passed", "error"],
)
def test_sanitizer_is_stopped_with_its_children(tmp_path, monkeypatch, line, error, text):
    """And what it had found until then is reported."""
    from benchmarks.gpu import worker

    tool, printed = tmp_path / "compute-sanitizer", tmp_path / "printed"
    os.mkfifo(printed)
    tool.write_text(
        f"#!/bin/sh\necho '========= COMPUTE-SANITIZER'\necho '{line}'\necho > {printed}\nsleep 600 &\nwait\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    communicate = subprocess.Popen.communicate

    def time_passes(process, timeout=None):
        if timeout:
            printed.read_text()
            raise subprocess.TimeoutExpired("compute-sanitizer", timeout)
        return communicate(process)  # returns once every process that could write is gone

    monkeypatch.setattr(subprocess.Popen, "communicate", time_passes)
    with pytest.raises(error, match=text):
        worker.sanitized("memcheck", "delta", worker.options(["--device", "cpu"]))


def test_command_needs_torch_and_numpy_only():
    """A machine with a GPU may have nothing else: no packages of the analysis, no pytest."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        "from benchmarks.gpu import __main__, worker, record\n"
        "import importlib, pathlib\n"
        "folders = 'opdkernels/ops', 'opdkernels/backends'\n"
        "for path in (path for folder in folders for path in pathlib.Path(folder).glob('[a-z]*.py')):\n"
        "    importlib.import_module('.'.join(path.with_suffix('').parts))\n"
        "from opdkernels import doctor\n"
        "units = worker.plan(worker.options(['--device', 'cpu', '--small']), worker.torch.device('cpu'))\n"
        "print(len(doctor.format_text(doctor.examine())), len(units))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 50


def test_failed_build_is_reported_and_continues(monkeypatch):
    messages = []
    monkeypatch.setattr(
        build.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "opdkernels: no compiled kernels (no space)\n"),
    )
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    build.build(messages.append, 5)
    assert any("no nvcc: NVRTC or Triton is used" in line for line in messages)
    assert any("no compiled kernels (no space)" in line for line in messages)
    assert "exit status 1" in messages[-1]


def test_checks_line_names_what_did_not_pass():
    statuses = ("passed", "passed", "failed", "inconclusive", "not reached")
    units = [
        {"group": "check", "name": f"check_{i}", "workload": "delta", "backend": "Triton", "status": status}
        for i, status in enumerate(statuses)
    ]
    (line,) = record.checks_line([*units, {"group": "time", "status": "passed"}])
    assert line.startswith(
        "2 of 5 checks passed; **failed**: check 2 (Triton); inconclusive: check 3 (Triton); "
        "not reached: check 4 (Triton) ("
    )
    assert not record.checks_line([{"group": "time", "status": "passed"}])


def test_row_of_changed_kernels_is_marked():
    row = {
        "workload": "a pass",
        "family": "delta",
        "median_s": 1e-3,
        "bytes_per_s": 1e9,
        "fraction_of_limit": 0.5,
        "extra_bytes": None,
    }

    def of(sources):
        return {
            "group": "time",
            "name": "backends",
            "workload": "a pass",
            "status": "passed",
            "rows": [{**row, "implementation": "Triton", "sources": sources}],
        }

    same, other = (
        "\n".join(record.timings_table([of(sources)])) for sources in (record.sources_of("delta", "Triton"), "0")
    )
    assert record.CHANGED not in same
    assert f"| Triton{record.CHANGED} |" in other
    assert "changed since" in other
    assert (
        record.sources_of("delta", "Triton")
        != record.sources_of("delta", "NVRTC")
        != record.sources_of("delta", "eager PyTorch")
        == ""
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if (ROOT / f"csrc/{name}/cuda.cu").is_file()])
def test_digest_of_sources_covers_every_included_file(family):
    """So a change of any of them marks the measured rows."""
    included: set[Path] = set()
    inline_includes(ROOT / f"csrc/{family}/cuda.cu", included)
    assert included
    assert included <= {ROOT / name.format(family) for name in record.CUDA}
