"""What of a path is uploaded, and which of the names in a repository belong to it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdkernels import patch
from opdkernels.analysis.result import load
from opdkernels.errors import InputError, printable
from opdkernels.masks import MaskSet
from opdkernels.outputs import ANALYSIS, MASKS, PATCH, RUN_FILE, file_format
from opdkernels.runs.run_dir import load_finished
from opdkernels.untrusted import read_json

CACHES = ("factors",)  # folders of a run that only save time when it is extended


@dataclass(frozen=True)
class Product:
    """What is uploaded.

    Attributes:
        kind: "patch", "masks" or the command of the run, such as "analyze".
        format: Value of "format" in the file's header or in run.json.
        noun: What messages call it.
        files: Local path of each file by its name in the repository.
        facts: What the card says about it.
        owns: Whether a file of this name in a repository belongs to a product of this kind.
    """

    kind: str
    format: str
    noun: str
    files: dict[str, Path]
    facts: dict[str, Any] = field(default_factory=dict)
    owns: Callable[[str], bool] = lambda name: False

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def format_file(self) -> str:
        """The name of the file that has the format."""
        return RUN_FILE if self.format == ANALYSIS.format else next(iter(self.files))


def product_of(path: str | os.PathLike[str]) -> Product:
    """A patch, a file of masks, or the folder of a finished run of analyze, overlap or trajectory, validated.

    Raises:
        InputError: There is nothing at the path, it is something else, or it is damaged or not finished.
    """
    shown, local = printable(os.fspath(path)), Path(path)
    if not local.exists():
        raise InputError(f"{shown} does not exist; give a patch, a file of masks, or the folder of a run")
    if local.is_dir():
        return analysis_product(local)
    format = file_format(local)
    if format == PATCH.format:
        return Product("patch", format, PATCH.noun, {local.name: local}, patch.info(local))
    if format == MASKS.format:
        masks = MaskSet.load(local)
        facts = {
            "tensors": len(masks),
            "active": masks.num_active,
            "numel": masks.numel,
            "density": masks.density,
            "digest": masks.digest,
        }
        return Product("masks", format, MASKS.noun, {local.name: local}, facts)
    raise InputError(
        f"{shown} is neither a patch nor a file of masks; give a file of `opdkernels patch create` or "
        "`opdkernels mask`, or the folder of a run of analyze, overlap or trajectory"
    )


def analysis_product(folder: Path) -> Product:
    """The folder of a finished run; caches and files that the run did not write are left out."""
    run = load_finished(folder)
    summary = load(folder).summary if run["command"] == "analyze" else read_json(folder / "summary.json")
    files = {name: folder / name for name in run_files(folder)}
    return Product(run["command"], ANALYSIS.format, ANALYSIS.noun, files, {"run": run, "summary": summary}, is_run_file)


def run_files(folder: Path) -> Iterator[str]:
    """The files in a folder that a run wrote and that are uploaded, by their path in the folder."""
    for directory, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            relative = (Path(directory) / name).relative_to(folder).as_posix()
            if is_run_file(relative):
                yield relative


def is_run_file(name: str) -> bool:
    """Whether a run writes a file of this path to its folder, caches aside.

    >>> is_run_file("report.html"), is_run_file("steps/000020/run.json"), is_run_file("README.md")
    (True, True, False)
    """
    first, _, rest = name.partition("/")
    if not rest:
        return name == RUN_FILE or name in ANALYSIS.files
    if first in ANALYSIS.nested:
        return is_run_file(rest.partition("/")[2])
    pattern = ANALYSIS.folders.get(first)
    return pattern is not None and first not in CACHES and re.fullmatch(pattern, rest) is not None
