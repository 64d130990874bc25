"""CUDA C++ kernels (csrc/cuda), for NVIDIA GPUs: one file a family. The operators check their arguments before they come here.

Kernels come from a library that the install builds where nvcc is: machine code for sm_80, sm_90 and sm_100 and PTX for what
comes after. Without it NVRTC compiles them at the first call, through CuPy; the result is kept in the user's cache by source and
architecture. Where neither is at hand this backend serves nothing.
"""

from __future__ import annotations

import torch

from opdkernels.backends.cuda import launch


def why_not() -> str:
    """Why CUDA C++ kernels cannot serve here, and the remedy; empty where they can."""
    if torch.version.hip is not None:
        return "torch is built for AMD's GPUs, which Triton serves"
    if torch.version.cuda is None:
        return "torch is built without CUDA: install a CUDA build of torch"
    if launch.source_at_hand():
        return ""
    major = torch.version.cuda.split(".")[0]
    library, cupy = launch.cuda_of_library(), launch.cuda_of_cupy()
    built = (
        f"the kernels built at install are for CUDA {library}"
        if library
        else "no kernels were built at install, where nvcc was missing"
    )
    if launch.library_is_stale():
        built = "the library was built from other sources"
    other = f"CuPy is for CUDA {cupy}" if cupy else "CuPy is not installed"
    return f"torch is built for CUDA {major}, {built} and {other}: pip install cupy-cuda{major}x, or reinstall with CUDA {major}'s nvcc"
