"""Builds opdkernels._C, the CPU kernels: no torch headers, so one build serves every torch. Each instruction set is one
translation unit with its own flags, chosen at run time. Without a compiler the package installs and runs on the reference."""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    "isa_avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"],
    "isa_avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vbmi2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"],
}
# No contraction: reference and every instruction set agree bit for bit.
FLAGS = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden", "-g0"]
SOURCES = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp") if X86 or p.stem not in ISA_FLAGS)]


class Build(build_ext):
    def build_extensions(self):
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *ISA_FLAGS.get(Path(src).stem, [])], pp_opts)

        self.compiler._compile = compile_with_isa
        for extension in self.extensions:
            extension.extra_compile_args += FLAGS + openmp
            extension.extra_link_args += openmp
        try:
            super().build_extensions()
        except Exception as error:
            if os.environ.get("OPDKERNELS_REQUIRE_C"):
                raise
            print(f"opdkernels: no compiled kernels, the reference will serve ({error})", file=sys.stderr)


depends = [str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".inl")]
setup(
    ext_modules=[Pybind11Extension("opdkernels._C", SOURCES, depends=depends, cxx_std=17, optional=not os.environ.get("OPDKERNELS_REQUIRE_C"))],
    cmdclass={"build_ext": Build},
)
