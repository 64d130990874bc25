"""What a command tells its user when the input or the call is wrong: one line, with the remedy."""

from __future__ import annotations

import unicodedata


class InputError(ValueError):
    """Bad input. The message is one line that names the file, the tensor and the remedy; the command exits with 4."""


class UsageError(ValueError):
    """An option or argument that is not valid; the command exits with 2."""


def printable(text: str) -> str:
    r"""`text` with everything escaped that could act on a terminal or hide in a line: names from files are data.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else ascii(c)[1:-1] for c in str(text))
