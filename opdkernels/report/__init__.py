"""The report of a run: one self-contained HTML file, rendered from the result alone.

Everything from files passes through `typography.name` or jinja2's escaping, and a content security policy allows the
browser only the script and style of this package.

>>> from opdkernels import report
>>> html = report.render("analyze", opdkernels.load("out"))  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from opdkernels.files import write_atomically
from opdkernels.report import typography
from opdkernels.version import __version__

Kind = Literal["analyze", "overlap", "trajectory", "experiment", "bench"]
TEMPLATES = Path(__file__).parent
FILTERS = ("percent", "times", "measure", "count", "plural", "name", "breakable")


def write(folder: Path, kind: Kind, result: Any) -> Path:
    """Writes the report to report.html in a folder.

    Args:
        folder: The folder of the run.
        kind: The command that made the result.
        result: `Analysis`, `Overlaps`, `Trajectory`, or the content of an experiment's results.json or of a
            benchmark.json.

    Returns:
        The path of the page.
    """
    return write_page(folder, render(kind, result))


def write_page(folder: Path, page: str) -> Path:
    """Writes a page to report.html in a folder and returns its path."""
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def render(kind: Kind, result: Any) -> str:
    """The report as HTML, byte-identical for the same result; arguments as for `write`.

    Each kind has a module `opdkernels.report.KIND` with `page_context(result)`, the variables of template KIND.html.
    """
    context = import_module(f"opdkernels.report.{kind}").page_context(result)
    style, script = _asset("style.css"), _asset("page.js")
    return (
        _environment()
        .get_template(f"{kind}.html")
        .render(
            style=style,
            script=script,
            style_hash=_csp_hash(style),
            script_hash=_csp_hash(script),
            version=__version__,
            **context,
        )
    )


@cache
def _environment() -> Any:
    """The jinja2 environment of the templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update({name: getattr(typography, name) for name in FILTERS})
    return environment


@cache
def _asset(name: str) -> Any:
    """A file of this package as markup that is not escaped."""
    from markupsafe import Markup

    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _csp_hash(text: str) -> str:
    """The name of a script or style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
