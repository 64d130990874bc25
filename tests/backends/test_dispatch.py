"""Backend selection: the measured order, OPDKERNELS_BACKEND, missing packages; torch's dispatcher follows it."""

from __future__ import annotations

import importlib
import shutil
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from opdkernels import doctor
from opdkernels.backends import cuda, dispatch, triton
from opdkernels.backends.cuda import sources
from opdkernels.errors import UsageError
from opdkernels.ops import all_operators
from opdkernels.ops.delta import DEFAULT_THRESHOLD_BITS, THRESHOLDS, Tally
from tests.conftest import ISAS
from tests.ops.conformance import make_pair

ARRAYS = ("tables", "counts", "sums", "maximum")
OPERATORS = all_operators()
FAMILIES = sorted({operator.family for operator in OPERATORS.values()})
ON_GPU = {name: operator for name, operator in OPERATORS.items() if operator.family != "null"}
ON_CUDA = {"delta", "overlap", "patch", "quantile", "step"}


@pytest.fixture(autouse=True)
def no_backend_named(monkeypatch):
    monkeypatch.delenv("OPDKERNELS_BACKEND", raising=False)


def with_triton(monkeypatch, version: str | None) -> None:
    def installed(package):
        if version is None:
            raise PackageNotFoundError(package)
        return version

    monkeypatch.setattr(triton, "version", installed)


def with_cuda(
    monkeypatch,
    *,
    torch_for: str | None = "13.0",
    library: int | None = None,
    cupy: int | None = None,
    stale: bool = False,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_for)
    monkeypatch.setattr(cuda.launch, "library_cuda_major", lambda: library)
    monkeypatch.setattr(cuda.launch, "cupy_cuda_major", lambda: cupy)
    monkeypatch.setattr(cuda.launch, "library_is_stale", lambda: stale)


@pytest.mark.parametrize("operator", ON_GPU.values(), ids=list(ON_GPU))
def test_triton_is_selected_on_cuda(monkeypatch, operator):
    for version, backend in (
        ("3.6.0", "triton"),
        ("3.10.0+git1", "triton"),
        ("3.5.1", "reference"),
        (None, "reference"),
    ):
        with_triton(monkeypatch, version)
        assert dispatch.select_backend(operator.family, "cuda") == backend
        assert ("CUDA" in dispatch.kernels(operator.family, operator.name)) == (backend == "triton")


@pytest.mark.parametrize("family", sorted({operator.family for operator in ON_GPU.values()}))
def test_cuda_kernels_precede_triton(monkeypatch, family):
    with_triton(monkeypatch, "3.7.1")
    first = "cuda" if family in ON_CUDA else "triton"
    for has, backend in (
        ({"library": 13}, first),
        ({"cupy": 13}, first),
        ({"library": 12, "cupy": 12}, "triton"),
        ({"torch_for": None}, "triton"),
        ({}, "triton"),
    ):
        with_cuda(monkeypatch, **has)
        assert dispatch.select_backend(family, "cuda") == backend
    with_cuda(monkeypatch, library=13)
    monkeypatch.setenv("OPDKERNELS_BACKEND", "triton")
    assert dispatch.select_backend(family, "cuda") == "triton"


def test_doctor_reports_why_cuda_kernels_are_unavailable(monkeypatch):
    with_triton(monkeypatch, "3.7.1")
    with_cuda(monkeypatch, library=12, cupy=12)
    printed = "\n".join(doctor.format_text(doctor.examine()))
    assert "Triton runs" in printed
    assert (
        "torch is built for CUDA 13, the kernels built at install are for CUDA 12 and CuPy is for CUDA 12: "
        "pip install cupy-cuda13x" in printed
    )
    for has, origin in (({"library": 13}, "built at install"), ({"cupy": 13}, "compiled by NVRTC at the first call")):
        with_cuda(monkeypatch, **has)
        assert f"CUDA C++, {origin}, runs for tensors on a GPU" in doctor.examine()["cuda_kernels"]
    monkeypatch.setenv("OPDKERNELS_BACKEND", "triton")
    assert "OPDKERNELS_BACKEND=triton" in doctor.examine()["cuda_kernels"]


def test_doctor_lists_gpus_or_the_reason_for_none(monkeypatch):
    """With a CuPy for another CUDA than torch's, Triton is used, and the remedy is printed."""
    with_triton(monkeypatch, "3.7.1")
    with_cuda(monkeypatch, cupy=12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"GPU\x1b{i}", major=9, minor=i)
    )
    printed = "\n".join(doctor.format_text(doctor.examine()))
    assert "GPU\\x1b0 (9.0), GPU\\x1b1 (9.1); torch is built for CUDA 13.0" in printed
    assert "Triton runs for tensors on a GPU; not CUDA C++: torch is built for CUDA 13" in printed
    assert "CuPy is for CUDA 12: pip install cupy-cuda13x" in printed
    assert set(doctor.examine()["cuda_operators"].values()) == {"triton"}

    def none():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (environment version 11040). Please update it.\nMore."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", none)
    assert "no devices: The NVIDIA driver on your system is too old (environment version 11040); torch" in "\n".join(
        doctor.format_text(doctor.examine())
    )


def test_library_of_other_sources_is_ignored(monkeypatch):
    with_triton(monkeypatch, "3.7.1")
    with_cuda(monkeypatch, library=13, stale=True)
    assert dispatch.select_backend("delta", "cuda") == "triton"
    environment = doctor.examine()
    assert (
        "torch is built for CUDA 13, the library was built from other sources and CuPy is not installed"
        in environment["cuda_kernels"]
    )
    assert "library built from other sources; rebuild" in "\n".join(doctor.format_text(environment))
    with_cuda(monkeypatch, library=13, cupy=13, stale=True)
    assert cuda.launch.kernel_source() == "nvrtc"
    assert "library built from other sources; rebuild" in "\n".join(doctor.format_text(doctor.examine()))


def test_library_contains_the_digest_of_its_sources(monkeypatch, tmp_path):
    root = sources.source_dir()
    copied = tmp_path / "csrc"
    shutil.copytree(root, copied)
    monkeypatch.setattr(sources, "SOURCE_DIRS", (copied,))
    digest = sources.digest.__wrapped__
    before = digest()
    library = tmp_path / "library"
    library.write_bytes(b"\0" + sources.digest().encode() + b"\0")
    assert sources.is_built_from_sources(library)
    assert before == sources.digest()
    for name in ("delta/cuda.cu", "common/cuda/grid.h", "common/cuda/runtime.cpp", "delta/delta.h", "common/numeric.h"):
        text = (copied / name).read_text()
        (copied / name).write_text(text + "// another\n")
        assert digest() != before
        (copied / name).write_text(text)
    library.write_bytes(library.read_bytes().swapcase())
    assert not sources.is_built_from_sources(library)
    assert not sources.is_built_from_sources(tmp_path / "none")


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
def test_gpu_backend_names_do_not_affect_the_cpu(monkeypatch):
    for name in (None, "cpu", "triton"):
        if name:
            monkeypatch.setenv("OPDKERNELS_BACKEND", name)
        for family in FAMILIES:  # matrix products of `divergence` are torch's own on the CPU
            assert dispatch.select_backend(family, "cpu") == ("reference" if family == "divergence" else "cpu")


def test_reference_is_used_everywhere_if_named(monkeypatch):
    monkeypatch.setenv("OPDKERNELS_BACKEND", "reference")
    assert all(dispatch.kernels(operator.family, operator.name) == {} for operator in OPERATORS.values())
    assert "OPDKERNELS_BACKEND=reference" in doctor.examine()["cuda_kernels"]


def test_unknown_backend_name_raises(monkeypatch):
    monkeypatch.setenv("OPDKERNELS_BACKEND", "cudnn")
    with pytest.raises(UsageError, match="OPDKERNELS_BACKEND is cudnn; choose one of cpu, cuda, triton, reference"):
        dispatch.select_backend("delta", "cuda")


def test_doctor_reports_backends_and_reasons(monkeypatch):
    with_triton(monkeypatch, "3.7.1")
    assert doctor.examine()["cuda_operators"] == dict.fromkeys(sorted(ON_GPU), "triton")
    with_triton(monkeypatch, None)
    environment = doctor.examine()
    assert environment["cuda_operators"] == dict.fromkeys(sorted(ON_GPU), "reference")
    assert "pip install 'triton>=3.6'" in "\n".join(doctor.format_text(environment))


def test_dispatcher_passes_cuda_tensors_to_triton(monkeypatch):
    pytest.importorskip("triton")
    launch = importlib.import_module("opdkernels.backends.triton.launch")
    started = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, *arguments, **options: started.append(kernel.__name__))
    source, trained = make_pair(100)
    outputs = [torch.from_numpy(getattr(Tally.empty(), a)) for a in ARRAYS]
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    torch.ops.opdkernels.delta_.default.redispatch(
        key, source, trained, list(DEFAULT_THRESHOLD_BITS), list(THRESHOLDS), *outputs, None
    )
    assert started == ["count", "fold", "propagate_carry"]
    for operator in ON_GPU:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"opdkernels::{operator}", "CUDA")


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_backends_implement_every_operator_of_their_families(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    for operator in OPERATORS.values():
        if dispatch.has_kernels(operator.family, backend):
            assert callable(
                getattr(importlib.import_module(f"opdkernels.ops.{operator.family}.{backend}"), operator.name)
            )
