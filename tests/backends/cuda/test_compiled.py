"""Every CUDA kernel as nvcc and NVRTC compile it: registers, spills, loads, rounding, addresses."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from opdkernels.backends.cuda import launch
from tests.backends.cuda import machine_code
from tests.backends.cuda.fibers import ROOT
from tests.backends.cuda.machine_code import NVCC, TARGETS, Code

pytestmark = [
    pytest.mark.skipif(machine_code.tools() is None, reason="no nvdisasm and cuobjdump (Triton's wheel brings them)"),
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_nvrtc = pytest.mark.skipif(machine_code.nvrtc() is None, reason="no NVRTC (pip install nvidia-cuda-nvrtc)")

# Registers per thread, so that a block fits the 65,536 of a multiprocessor; and the minimum of 16-byte loads: a vector
# of each tensor at two places, before the loop and in it, or of both halves of a unit. Gathered values are loaded one
# coordinate per lane.
KERNELS = {
    "delta_count_bf16": (80, 8),
    "delta_count_bf16_limited": (80, 4),
    "delta_count_float": (128, 4),
    "delta_count_double": (128, 4),
    "quantile_count_2": (64, 2),
    "quantile_count_4": (64, 2),
    "quantile_count_8": (64, 2),
    "quantile_find": (64, 0),
    **{f"overlap_count_bf16_{runs}": (96, 2 * (runs + 1)) for runs in (2, 3, 4)},
    "overlap_count": (64, 14),  # base and run; bf16 or fp16, fp32 and fp64, of which eight are 1, 2 and 4 loads
    **dict.fromkeys(("step_adamw", "step_adamw_changed", "step_sgd", "step_sgd_changed"), (64, 0)),
    "step_gather": (64, 0),
    "step_scatter": (64, 0),
    **{f"patch_compare_{width}": (64, 4) for width in (1, 2, 4, 8)},
    **{f"patch_compress_{width}": (64, 0) for width in (1, 2, 4, 8)},
    **{f"patch_restore_{width}": (64, 2) for width in (1, 2, 4, 8)},
    "patch_plan": (64, 0),
    "patch_decode": (64, 0),
    "patch_digest": (64, 2),
}
# As the reference; quotients and square roots consist of fused steps too.
FUSING = ("step_adamw", "step_adamw_changed", "step_sgd", "step_sgd_changed")
FAMILIES = sorted({name.split("_")[0] for name in KERNELS})
GLOBAL_ACCESS = r"\b(?:LDG|STG|RED|REDG|ATOMG)\b\S*"
FLUSHED = r"\b(?:FADD|FMUL|FSETP|FMNMX|F2F)\S*\.FTZ\b"  # not F2I, by which integers are divided


def assert_kernel_holds(name: str, code: Code) -> None:
    registers, wide_loads = KERNELS[name]
    assert code.stack_bytes == 0
    assert code.count(machine_code.SPILL) == 0, "spills"
    assert code.registers <= registers
    assert code.count(machine_code.WIDE_LOAD) >= wide_loads
    if name not in FUSING:
        assert code.count(machine_code.FMA) == 0, "a product is fused with a sum"
        assert code.count(FLUSHED) == 0, "subnormals are lost"
    for access in re.findall(GLOBAL_ACCESS, code.sass):
        assert ".E" in access, f"an address of 32 bits: {access}"


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nvcc(kernel, target):
    assert_kernel_holds(kernel, machine_code.built(target)[kernel])


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_restored_values_take_16_byte_stores(width, target):
    assert machine_code.built(target)[f"patch_restore_{width}"].count(r"\bSTG\.E\.(?:\w+\.)*128\b") >= 1


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_checked(target):
    assert set(machine_code.built(target)) == set(KERNELS)


@needs_nvcc
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_fusion_beyond_the_source(kernel):
    """Every product, sum, quotient and root names its rounding, which also forbids an assembler to fuse it."""
    code = machine_code.ptx()[kernel]
    assert not re.findall(machine_code.UNROUNDED, code)
    assert bool(re.search(r"fma\.rn\.f(?:32|64)", code)) == (kernel in FUSING)


@needs_nvcc
def test_contraction_is_detected(tmp_path):
    ptx = tmp_path / "step.ptx"
    subprocess.run(
        [NVCC, "-std=c++17", "--fmad=true", "-arch=sm_80", "-ptx", str(ROOT / "csrc/step/cuda.cu"), "-o", str(ptx)],
        check=True,
    )
    assert re.findall(machine_code.UNROUNDED, ptx.read_text())


@needs_nvcc
def test_library_has_ptx_for_later_gpus_and_reports_missing_driver():
    assert "sm_80.ptx" in machine_code.run_tool("cuobjdump", "-lptx", machine_code.library())
    if not torch.cuda.is_available():
        with pytest.raises(
            RuntimeError,
            match=r"delta_count_bf16 did not start on cpu: .*(driver|device).*; update the NVIDIA driver, "
            r"or set OPDKERNELS_BACKEND=triton",
        ):
            launch.LibraryKernels(machine_code.library()).launch(
                "delta_count_bf16", [0] * 25, 1, 32, 0, torch.device("cpu")
            )


@needs_nvrtc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nvrtc(family, target):
    kernels = machine_code.by_nvrtc(family, target)
    assert set(kernels) == {name for name in KERNELS if name.startswith(family)}
    for name, code in kernels.items():
        assert_kernel_holds(name, code)
