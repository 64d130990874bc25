"""CUDA C++ kernels for NVIDIA GPUs (csrc/<family>/cuda.cu). The public functions validate the arguments.

The kernels come from a library that the install builds if nvcc is present: machine code for sm_80, sm_90 and sm_100,
and PTX for later GPUs. Otherwise NVRTC compiles them at the first call, through CuPy; the result is cached in the
user's cache directory by source and architecture. Without either, this backend is unavailable.
"""

from __future__ import annotations

import torch

from opdkernels.backends.cuda import launch


def unavailable_reason() -> str:
    """Why CUDA C++ kernels cannot be used, and the remedy; empty if they can."""
    if torch.version.hip is not None:
        return "torch is built for AMD GPUs, which Triton serves"
    if torch.version.cuda is None:
        return "torch is built without CUDA: install a CUDA build of torch"
    if launch.kernel_source():
        return ""
    major = torch.version.cuda.split(".")[0]
    library, cupy = launch.library_cuda_major(), launch.cupy_cuda_major()
    built = (
        f"the kernels built at install are for CUDA {library}"
        if library
        else "no kernels were built at install, where nvcc was missing"
    )
    if launch.library_is_stale():
        built = "the library was built from other sources"
    other = f"CuPy is for CUDA {cupy}" if cupy else "CuPy is not installed"
    return (
        f"torch is built for CUDA {major}, {built} and {other}: "
        f"pip install cupy-cuda{major}x, or reinstall with CUDA {major}'s nvcc"
    )
