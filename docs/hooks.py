"""What is generated when the site is built: the reference of the command line, and links to files of the source."""

from __future__ import annotations

import re
from typing import Any

import click
import typer

from opdkernels.cli import app

MARKER = "<!-- commands -->"


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """The Markdown of a page, with the reference of the command line and with links that work outside of the source."""
    if MARKER in markdown:
        group = typer.main.get_command(app)
        markdown = markdown.replace(MARKER, "\n\n".join(command_text(group, "opdkernels")))
    return (
        re.sub(r"\]\(\.\./((?!\.\.)[^)]*)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)
        if is_top(page)
        else markdown
    )


def is_top(page: Any) -> bool:
    """Whether a page is directly in docs/, so that a link to ../ leaves the documentation."""
    return "/" not in page.file.src_uri


def command_text(command: click.Command, name: str) -> list[str]:
    """A section for a command and for each of those below it."""
    sections = []
    if isinstance(command, click.Group):
        for child_name, child in command.commands.items():
            sections += command_text(child, f"{name} {child_name}")
        return sections
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join([name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
    lines = [f"## `{name}`", "", *(command.help or "").splitlines(), "", "```", usage, "```", ""]
    lines += ["| argument or option | default | description |", "|---|---|---|"]
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
            continue
        lines.append(
            f"| {flag_text(parameter)} | {default_text(parameter)} | {escape(getattr(parameter, 'help', '') or '')} |"
        )
    return [*sections, "\n".join(lines)]


def flag_text(parameter: click.Parameter) -> str:
    """An argument or an option with its values."""
    if isinstance(parameter, click.Argument):
        return f"`{parameter.metavar or (parameter.name or '').upper()}`"
    names = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
    choices = getattr(parameter.type, "choices", None)
    values = " \\| ".join(f"`{choice}`" for choice in choices) if choices else escape(parameter.metavar or "")
    return f"{names} {values}".strip()


def default_text(parameter: click.Parameter) -> str:
    """The default of an option; empty where there is none."""
    default = parameter.default
    return "" if default in (None, "", False, ()) or callable(default) else f"`{default}`"


def escape(text: str) -> str:
    """Text in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
