"""Builds opdkernels/_cpu.so, the CPU kernels. It uses the headers of neither Python nor torch, so that one build serves
every version of both, and wheels are tagged py3.

Each instruction set is one translation unit with its own flags, chosen at run time. Without a compiler the package
installs and runs on the reference.

If nvcc is present, also builds opdkernels/_cuda.so, the CUDA kernels: machine code for the GPUs below and PTX for later
ones. Neither building nor loading it needs a GPU. Without it NVRTC or Triton serves GPUs, so it never fails an install.

OPDKERNELS_NO_CUDA=1 skips nvcc, which takes most of the time of an install. With OPDKERNELS_REQUIRE_C=1 an install
without the CPU kernels fails.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The processor that is compiled for: a cross compiler sets the platform.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).lower()
X86 = MACHINE.endswith(("x86_64", "amd64"))
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"],
    "isa_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vbmi",
        "-mavx512vbmi2",
        "-mfma",
        "-mf16c",
        "-mbmi2",
        "-mpopcnt",
    ],
}
# No contraction: the reference and every instruction set agree bit for bit.
FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-g0",
]
# For `make sanitize`: "address,undefined", for example.
SANITIZERS = os.environ.get("OPDKERNELS_SANITIZERS")
SANITIZE_FLAGS = (
    [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    if SANITIZERS
    else []
)
SOURCES = [
    *sorted(str(p) for p in Path("csrc/common/cpu").glob("*.cpp") if X86 or p.stem not in ISA_FLAGS),
    *sorted(str(p) for p in Path("csrc").glob("*/cpu.cpp")),
]
CUDA_ARCHITECTURES = ("80", "90", "100")
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-shared",
    "-cudart",
    "static",
    "-Xcompiler",
    "-fPIC",
    "-Xcompiler",
    "-O2",
    "--threads",
    "0",
]
CUDA_SOURCES = [*sorted(str(p) for p in Path("csrc").glob("*/cuda.cu")), "csrc/common/cuda/runtime.cpp"]
CUDA_DEPENDS = [
    *CUDA_SOURCES,
    *sorted(str(p) for p in Path("csrc/common/cuda").glob("*.h")),
    *sorted(str(p) for p in Path("csrc").glob("*/cuda_*.inl")),
    "csrc/common/numeric.h",
    *(f"{Path(p).parent}/{Path(p).parent.name}.h" for p in CUDA_SOURCES if p.endswith(".cu")),
]


def load_sources():
    """Import opdkernels/backends/cuda/sources.py without the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("sources", "opdkernels/backends/cuda/sources.py")
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    return sources


def build_cuda(nvcc, library):
    """Compile the CUDA kernels; raises OSError or CalledProcessError."""
    supported = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES if f"compute_{a}" in supported]
    targets.append(f"arch=compute_{CUDA_ARCHITECTURES[0]},code=compute_{CUDA_ARCHITECTURES[0]}")
    sources_define = f'-DOPD_SOURCES="{load_sources().digest()}"'
    subprocess.run(
        [nvcc, *NVCC_FLAGS, sources_define, *(f"-gencode={t}" for t in targets), *CUDA_SOURCES, "-o", str(library)],
        check=True,
    )


def build_cuda_if_possible(library):
    """Compile the CUDA kernels if nvcc is present and the library is stale. Never fails: they are optional."""
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
    if (
        nvcc is None
        or SANITIZERS
        or os.environ.get("OPDKERNELS_NO_CUDA")
        or load_sources().is_built_from_sources(library)
    ):
        return
    print(f"opdkernels: compiling the CUDA kernels with {nvcc}; OPDKERNELS_NO_CUDA=1 skips this", file=sys.stderr)
    try:
        build_cuda(nvcc, library)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"opdkernels: no CUDA kernels, NVRTC or Triton will serve ({error})", file=sys.stderr)


class Build(build_ext):
    def get_ext_filename(self, name):
        return f"{name.replace('.', '/')}.so"  # no version of Python in its name

    def run(self):
        super().run()
        package = Path(self.get_ext_fullpath("opdkernels._cpu")).parent
        if not self.inplace:  # the sources, which NVRTC compiles if there is no nvcc
            for path in map(Path, CUDA_DEPENDS):
                (package / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, package / path)
        build_cuda_if_possible(package / "_cuda.so")

    def build_extensions(self):
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *ISA_FLAGS.get(Path(src).stem, [])], pp_opts)

        self.compiler._compile = compile_with_isa
        for extension in self.extensions:
            extension.extra_compile_args += FLAGS + openmp + SANITIZE_FLAGS
            extension.extra_link_args += openmp + SANITIZE_FLAGS[:1]
        try:
            super().build_extensions()
        except Exception as error:
            if os.environ.get("OPDKERNELS_REQUIRE_C"):
                raise
            print(f"opdkernels: no compiled kernels, the reference will serve ({error})", file=sys.stderr)


class Wheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


def library():
    """opdkernels/_cpu.so."""
    return Extension(
        "opdkernels._cpu",
        SOURCES,
        depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl")],
        extra_compile_args=["-std=c++17"],
        optional=not os.environ.get("OPDKERNELS_REQUIRE_C"),
        language="c++",
    )


if __name__ == "__main__":
    setup(ext_modules=[library()], cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
