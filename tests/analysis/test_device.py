"""`analyze --device`: the GPU code path on the CPU, and the errors without a GPU."""

from __future__ import annotations

import json
import os

import pytest
import torch

from opdkernels import InputError, UsageError, analyze
from opdkernels.analysis import analyze as analyze_module
from opdkernels.analysis import matrix_spectra, tallying
from opdkernels.analysis.matrix_spectra import SpectraConfig
from opdkernels.backends import devices
from opdkernels.checkpoint import streaming
from opdkernels.ops.delta import delta
from tests.analysis.conftest import save, trained
from tests.analysis.test_run import contents
from tests.cli.test_commands import run as command

HERE = torch.device("cpu")


@pytest.fixture
def staging(monkeypatch):
    """Slices are staged on the CPU as they are for a GPU."""
    used = []

    def staged(source, slices):
        slices = list(slices)
        used.append(len(slices))
        return streaming.stage_slices(source, slices, 1 << 21, HERE)

    monkeypatch.setattr(tallying, "SMALL", -1)
    monkeypatch.setattr(streaming, "read_slices", staged)
    monkeypatch.setattr(streaming, "slice_limit", lambda memory, device: 1 << 21)
    return used


@pytest.fixture
def large(tmp_path):
    """Tensors of several slices and small ones."""
    generator = torch.Generator().manual_seed(0)
    source = {
        f"layers.{i}.w": torch.randn(shape, generator=generator).bfloat16()
        for i, shape in enumerate(((300,), (700_000,), (5,), (0, 8), (1_300_001,)))
    }
    return save(tmp_path / "a", source), save(tmp_path / "b", trained(source, size=1e-3))


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_staged_slices_are_bit_identical(large, tmp_path, staging, monkeypatch, io):
    analyze(*large, tmp_path / "staged", spectra="off", io=io)
    assert staging == [8]
    monkeypatch.undo()
    analyze(*large, tmp_path / "plain", spectra="off", io=io)
    assert contents(tmp_path / "staged") == contents(tmp_path / "plain")


def test_truncated_file_is_input_error(large, tmp_path, staging):
    def cut(done, total, name):
        os.truncate(tmp_path / "b" / "model.safetensors", 5000)

    with pytest.raises(InputError, match=r"model\.safetensors"):
        analyze(*large, tmp_path / "out", io="read", spectra="off", progress=cut)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"


def test_interrupt_keeps_finished_tensors(large, tmp_path, staging, monkeypatch):
    def interrupt(done, total, name):
        if name == "layers.4.w":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(*large, tmp_path / "out", spectra="off", progress=interrupt)
    result = analyze(*large, tmp_path / "out", spectra="off")
    assert result.run["resumed_tensors"] == 4
    monkeypatch.undo()
    analyze(*large, tmp_path / "plain", spectra="off")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def out_of_memory(beyond: int, fails: str = "", error=torch.OutOfMemoryError):
    """A device without memory for more than `beyond` elements at once."""
    sizes = []

    def counted(source, trained, **options):
        sizes.append(source.numel())
        if source.numel() > beyond:
            raise error("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")
        return delta(source, trained, **options)

    counted.sizes = sizes
    return counted


def test_out_of_memory_retries_smaller_slices_bit_identically(large, tmp_path, staging, monkeypatch):
    counted = out_of_memory(300_000)
    monkeypatch.setattr(tallying, "delta", counted)
    result = analyze(*large, tmp_path / "out", spectra="off")
    assert result.exit_status == 0
    assert max(counted.sizes) > 300_000
    assert max(counted.sizes[-4:]) <= 300_000
    monkeypatch.undo()
    analyze(*large, tmp_path / "plain", spectra="off")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_failing_tensor_does_not_affect_others(large, tmp_path, staging, monkeypatch, error):
    monkeypatch.setattr(tallying, "delta", out_of_memory(1000, error=error))
    result = analyze(*large, tmp_path / "out", spectra="off")
    assert result.exit_status == 3
    assert {one["name"] for one in result.summary["failed"]} == {"layers.1.w", "layers.4.w"}
    assert all(
        one["reason"].endswith("CUDA out of memory. Tried to allocate 1.00 GiB") for one in result.summary["failed"]
    )
    assert result.tally("layers.0.w").numel == 300


def test_gram_matrices_use_the_configured_device(pair, monkeypatch):
    """Tensors are moved to the device: "meta" replaces a GPU, and nothing can be computed there."""
    asked = []
    device = torch.device("meta")

    def raise_error(base, trained=None, **options):
        asked.append(base.device.type)
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(analyze_module, "probe_device", lambda name: HERE)
    monkeypatch.setattr(
        analyze_module, "SpectraConfig", lambda *args, **options: SpectraConfig(*args, **{**options, "device": device})
    )
    monkeypatch.setattr(matrix_spectra, "gram", raise_error)
    result = analyze(*pair)
    assert set(asked) == {"meta"}
    assert {record.reason for record in result.spectrum_records} == {"RuntimeError: no kernel here"}


def test_gpu_lock_is_shared_and_cpu_has_none():
    gpu = torch.device("cuda", 0)
    assert devices.device_lock(gpu) is devices.device_lock(gpu) is devices.gpu_lock
    with devices.device_lock(HERE), devices.device_lock(HERE):
        pass


def with_gpus(monkeypatch, count: int, error: str = "", built: str | None = "13.0") -> None:
    def init():
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_device_index_is_local_rank_or_the_given_one(monkeypatch):
    with_gpus(monkeypatch, 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert devices.resolve_device("cuda") == torch.device("cuda", 0)
    assert devices.resolve_device("cuda:3") == torch.device("cuda", 3)
    for rank, index in (("2", 2), ("5", 1), ("x", 0)):  # a launcher may show each rank one GPU alone
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert devices.resolve_device("cuda") == torch.device("cuda", index)
    assert devices.resolve_device("cpu") == HERE


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."


@pytest.mark.parametrize(
    ("count", "error", "built", "name", "said"),
    [
        (
            0,
            "",
            None,
            "cuda",
            r"torch .* is built without CUDA; install a build of torch for this machine's GPU, or omit --device",
        ),
        (
            0,
            "Found no NVIDIA driver on your system. Please check.",
            "13.0",
            "cuda",
            "Found no NVIDIA driver on your system; check nvidia-smi, or omit --device",
        ),
        (0, TOO_OLD, "13.0", "cuda", r"too old \(found version 11040\); check nvidia-smi"),
        (0, "", "13.0", "cuda", "no GPU is visible; check nvidia-smi"),
        (2, "", "13.0", "cuda:2", "only 2 GPUs are visible; use cuda:1 or lower, or omit --device"),
    ],
)
def test_missing_gpu_is_input_error(monkeypatch, count, error, built, name, said):
    with_gpus(monkeypatch, count, error, built)
    with pytest.raises(InputError, match=rf"^--device {name}: .*{said}") as raised:
        devices.resolve_device(name)
    assert "\n" not in str(raised.value)


def test_too_old_driver_is_input_error_before_any_tensor(pair, tmp_path, monkeypatch):
    def too_old(*sides):
        raise RuntimeError(
            "delta_count_bf16 did not start on cuda:0: CUDA driver version is insufficient; "
            "update the NVIDIA driver\ndetails"
        )

    monkeypatch.setattr(tallying, "delta", too_old)
    with pytest.raises(
        InputError,
        match=r"^--device cpu: delta_count_bf16 did not start .* update the NVIDIA driver; `opdkernels doctor`",
    ) as error:
        analyze(*pair, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:99999", "meta", "cuda:0\n"])
def test_invalid_device_name_is_usage_error(pair, name):
    with pytest.raises(UsageError, match=r"option device is .*: give cpu, cuda or cuda:1"):
        analyze(*pair, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_reports_missing_gpu_in_one_line(pair, tmp_path):
    done = command("analyze", *pair, "-o", tmp_path / "out", "--device", "cuda")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "--device cuda: " in done.stderr
    assert "or omit --device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_counts_are_bit_identical(large, tmp_path):
    analyze(*large, tmp_path / "gpu", spectra="off", device="cuda")
    analyze(*large, tmp_path / "cpu", spectra="off")
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("spectra", ["exact", "topk"])
def test_gpu_spectra_agree_within_rounding(pair, spectra):
    there, here = (analyze(*pair, spectra=spectra, device=device) for device in ("cuda", "cpu"))
    for a, b in zip(there.spectra.to_pylist(), here.spectra.to_pylist(), strict=True):
        assert a["stable_rank"] == pytest.approx(b["stable_rank"], rel=1e-6)
