"""The page of a run: one file of HTML that needs nothing else, made from an Analysis alone.

Everything from files passes through `typography.name` or jinja2's escaping, and a content security policy lets the browser
run and apply only the script and style that this package ships.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from opdkernels.analysis.overlap import Overlaps
from opdkernels.analysis.result import Analysis
from opdkernels.analysis.trajectory import Trajectory
from opdkernels.files import write_atomically
from opdkernels.report import typography
from opdkernels.version import __version__

HERE = Path(__file__).parent
FILTERS = ("percent", "times", "measure", "count", "plural", "name", "breakable")


def write(folder: Path, result: Analysis) -> Path:
    """Writes report.html to the folder of a run and returns its path."""
    path = folder / "report.html"
    write_atomically(path, render(result).encode())
    return path


def render(result: Analysis) -> str:
    """The page of an `analyze` run as HTML; the same bytes for the same result."""
    from opdkernels.report.content import content

    return render_page("page.html", content(result))


def write_overlap(folder: Path, result: Overlaps) -> Path:
    """Writes report.html to the folder of an `overlap` run and returns its path."""
    path = folder / "report.html"
    write_atomically(path, render_overlap(result).encode())
    return path


def render_overlap(result: Overlaps) -> str:
    """The page of an `overlap` run as HTML; the same bytes for the same result."""
    from opdkernels.report.overlap import content

    return render_page("overlap.html", content(result))


def write_trajectory(folder: Path, result: Trajectory) -> Path:
    """Writes report.html to the folder of a `trajectory` run and returns its path."""
    path = folder / "report.html"
    write_atomically(path, render_trajectory(result).encode())
    return path


def render_trajectory(result: Trajectory) -> str:
    """The page of a `trajectory` run as HTML; the same bytes for the same result."""
    from opdkernels.report.trajectory import content

    return render_page("trajectory.html", content(result))


def write_experiment(folder: Path, result: dict[str, Any]) -> Path:
    """Writes report.html to the folder of an experiment and returns its path."""
    from opdkernels.report.experiment import content

    path = folder / "report.html"
    write_atomically(path, render_page("experiment.html", content(result)).encode())
    return path


def render_page(template: str, variables: dict[str, Any]) -> str:
    """A page from a template that extends base.html."""
    style, script = _asset("style.css"), _asset("page.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=style,
            script=script,
            style_hash=_digest(style),
            script_hash=_digest(script),
            version=__version__,
            **variables,
        )
    )


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update({name: getattr(typography, name) for name in FILTERS})
    return environment


@cache
def _asset(name: str) -> Any:
    from markupsafe import Markup

    return Markup((HERE / name).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    """As a content security policy names a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
