"""Tests that break a kernel run in forked processes, so that their out-of-bounds writes cannot affect other tests."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import pytest
import torch

from tests.backends.cuda.fibers import ROOT, build_dir
from tests.backends.summary import BROKEN_KERNEL_WORD

CPU_LIMIT_S = 300  # CPU time, which other processes do not affect, of a kernel that hangs


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Forks for a test with BROKEN_KERNEL_WORD in its name; a crash of the kernel counts as detection."""
    if (
        sys.platform != "linux"
        or "cuda" not in str(pyfuncitem.path.relative_to(ROOT))
        or BROKEN_KERNEL_WORD not in pyfuncitem.name
    ):
        return None
    build_dir()  # created and removed by the parent process
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
            torch.set_num_threads(1)  # threads do not outlive a fork
            pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, how = os.waitpid(child, 0)
    crashed = os.WIFSIGNALED(how) and os.WTERMSIG(how) in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL)
    assert crashed or how == 0, f"the test failed in its process ({how}); its trace is above"
    return True
