"""What commands print: JSON or text, on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer


def emit(result: Any, text: Iterable[str], *, as_json: bool, quiet: bool = False) -> None:
    """Prints a result as JSON if asked for, and otherwise as text unless quiet."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    elif not quiet:
        for line in text:
            typer.echo(line)
