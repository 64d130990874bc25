"""Exit statuses: the same cause gives the same status in every command.

| status | cause |
|---:|---|
| 0 | done |
| 2 | a command, argument or option value that is not valid |
| 3 | done in part: too little was compared, tensors were excluded, failed or hold NaN or Inf, files not written |
| 4 | input that is missing, unreadable, damaged or not comparable; output that cannot be written, such as a full disk |
| 130 | interrupted (Ctrl-C) |
| 143 | `distill` was stopped by SIGTERM, after it saved a checkpoint |
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import NoReturn

from opdkernels.errors import InputError, UsageError, printable

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExitStatus(IntEnum):
    DONE = 0
    USAGE = 2
    PARTIAL = 3
    INPUT = 4
    INTERRUPTED = 130


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the process with one line on the error stream and the exit status of the cause."""
    try:
        yield
    except InputError as error:
        fail(str(error), ExitStatus.INPUT)
    except UsageError as error:
        fail(str(error), ExitStatus.USAGE)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it: click ends the process quietly
        raise
    except OSError as error:  # a full disk, or a folder where a file should be
        where = f" at {error.filename}" if error.filename else ""
        remedy = "free some space or " if error.errno in NO_SPACE else ""
        fail(
            f"{error.strerror or error}{where}; {remedy}choose another folder, and run the same command again",
            ExitStatus.INPUT,
        )
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to resume", ExitStatus.INTERRUPTED)


def fail(message: str, status: ExitStatus) -> NoReturn:
    print(f"opdkernels: {printable(message)}", file=sys.stderr)
    sys.exit(status)
