"""doctor."""

from __future__ import annotations

from opdkernels.cli.options import Json, command
from opdkernels.cli.output import emit


@command()
def doctor(*, json: Json = False) -> None:
    """Print which kernels run on this machine and why: compiler, instruction sets, threads, torch, triton, CUDA.

    Example: opdkernels doctor
    """
    from opdkernels.doctor import examine, format_text

    result = examine()
    emit(result, format_text(result), as_json=json)
