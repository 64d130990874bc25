"""doctor."""

from __future__ import annotations

from opdkernels.cli.options import Json, command
from opdkernels.cli.output import emit


@command()
def doctor(*, json: Json = False) -> None:
    """Print which kernels run on this machine and why: compiler, instruction sets, threads, torch, triton, CUDA.

    Example: opdkernels doctor
    """
    from opdkernels.doctor import examine, lines

    result = examine()
    emit(result, lines(result), as_json=json)
