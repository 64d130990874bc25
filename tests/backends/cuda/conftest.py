"""Spoilt kernels run in processes of their own: what they write beyond a tensor must not be found later, by another test."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import pytest
import torch

from tests.backends.cuda.host import ROOT, folder
from tests.backends.shown import NEGATIVE

MOST_S = 300


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Forks for a test that is named after a fault that it makes; one whose kernel crashes has caught it too."""
    if (
        sys.platform != "linux"
        or "cuda" not in str(pyfuncitem.path.relative_to(ROOT))
        or not any(word in pyfuncitem.name for word in NEGATIVE)
    ):
        return None
    folder()  # made, and removed, by this process
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(MOST_S)
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
    assert crashed or how == 0, f"the test failed in its own process ({how}); its trace is above"
    return True
