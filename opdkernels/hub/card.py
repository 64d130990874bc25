"""The model card: a section of README.md for each product, and what a new README.md begins with.

An upload replaces the section of the same product. Text outside of its two markers is never changed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from opdkernels.errors import InputError
from opdkernels.formatting import byte_size, measure, percent, times
from opdkernels.hub.products import Product
from opdkernels.version import __version__

PLACEHOLDER = "BASE"  # where the id of the base is not known
URL = "https://github.com/opdkernels/opdkernels"
TAGS = {"patch": "sparse-patch", "masks": "weight-mask"}
LOADERS = {
    "analyze": "opdkernels.load(folder)",
    "overlap": 'pyarrow.parquet.read_table(f"{folder}/overlap.parquet")',
    "trajectory": 'pyarrow.parquet.read_table(f"{folder}/trajectory.parquet")',
}


def markers(product: Product) -> tuple[str, str]:
    """The comments before and after the section of a product: one per file, and one for a run."""
    name = "run" if product.kind in LOADERS else re.sub(r"[^A-Za-z0-9._]", "_", next(iter(product.files)))
    return (
        f"<!-- opdkernels {name}: this section is generated, and replaced by the next push of it -->",
        f"<!-- opdkernels {name}: end -->",
    )


def merge_card(readme: str | None, product: Product, repo_id: str, base_model: str | None, repo_type: str) -> str:
    """README.md with the section of a product.

    Args:
        readme: README.md in the repository; None if there is none.
        product: What is uploaded.
        repo_id: The repository.
        base_model: Id of the base model on the Hub; None if it is not known.
        repo_type: "model" or "dataset".

    Returns:
        The new text: the section is replaced where it is, and otherwise appended; a new text gets metadata too.

    Raises:
        InputError: The markers in `readme` are not one pair.
    """
    begin, end = markers(product)
    section = f"{begin}\n{section_of(product, repo_id, base_model, repo_type).strip()}\n{end}\n"
    if readme is None or not readme.strip():
        return f"{metadata(product, base_model)}\n# {repo_id.rpartition('/')[2]}\n\n{section}"
    counts = (readme.count(begin), readme.count(end))
    if counts == (0, 0):
        return f"{readme.rstrip()}\n\n{section}"
    start, stop = readme.find(begin), readme.find(end)
    if counts != (1, 1) or stop < start:
        raise InputError(
            f"README.md of {repo_id} does not have the markers of the generated section once each, in order; "
            "correct or remove them, and push again"
        )
    return readme[:start] + section + readme[stop + len(end) :].removeprefix("\n")


def metadata(product: Product, base_model: str | None) -> str:
    """The YAML block at the start of a new README.md."""
    lines = ["---", "library_name: opdkernels"]
    if base_model:
        lines.append(f"base_model: {base_model}")
    tags = ["opdkernels", TAGS.get(product.kind, "weight-analysis")]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def section_of(product: Product, repo_id: str, base_model: str | None, repo_type: str) -> str:
    """The generated section: what the upload is, its numbers, and how it is used."""
    name = next(iter(product.files))
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "not given"
    if product.kind == "patch":
        text = patch_section(product.facts, name, repo_id, base_model, base, repo_type)
    elif product.kind == "masks":
        text = masks_section(product.facts, name, repo_id, base, repo_type)
    else:
        text = run_section(product, repo_id, base_model, base, repo_type)
    return f"{text}\n\nMade with [opdkernels]({URL}) {__version__}."


def table(rows: dict[str, str]) -> str:
    """A Markdown table with two columns."""
    cells = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def download_call(function: str, repo_id: str, repo_type: str, *names: str) -> str:
    """A call of a function of huggingface_hub."""
    arguments = [json.dumps(value) for value in (repo_id, *names)]
    if repo_type != "model":
        arguments.append(f"repo_type={json.dumps(repo_type)}")
    return f"{function}({', '.join(arguments)})"


def code(*lines: str) -> str:
    """A block of Python."""
    return "\n".join(["```python", *lines, "```"])


def patch_section(
    facts: dict[str, Any], name: str, repo_id: str, base_model: str | None, base: str, repo_type: str
) -> str:
    rows = {
        "base": base,
        "digest of the base's tensors": f"`{facts['base_digest']}`",
        "digest of the trained tensors": f"`{facts['trained_digest']}`",
        "changed": f"{facts['changed']:,} of {facts['items']:,} values, {percent(facts['density'])}",
        "size": f"{byte_size(facts['bytes'])}, {percent(facts['fraction'])} of the trained checkpoint",
    }
    example = code(
        "import opdkernels",
        "from huggingface_hub import hf_hub_download",
        f"patch = {download_call('hf_hub_download', repo_id, repo_type, name)}",
        f'opdkernels.patch.apply("{base_model or PLACEHOLDER}", patch, "trained")',
    )
    return (
        f"## Patch\n\n{escape(name)} has what training changed in the base. Applied to it, it gives the trained "
        f"checkpoint byte for byte; both are verified by their digests.\n\n{table(rows)}\n\n{example}\n\n"
        "`opdkernels.patch.apply_to(model.state_dict(), patch)` does the same to a loaded model."
    )


def masks_section(facts: dict[str, Any], name: str, repo_id: str, base: str, repo_type: str) -> str:
    rows = {
        "model": base,
        "tensors": f"{facts['tensors']}",
        "active": f"{facts['active']:,} of {facts['numel']:,} coordinates, {percent(facts['density'])}",
        "digest": f"`{facts['digest']}`",
    }
    example = code(
        "import opdkernels",
        "from huggingface_hub import hf_hub_download",
        f"masks = opdkernels.MaskSet.load({download_call('hf_hub_download', repo_id, repo_type, name)})",
        "optimizer = opdkernels.MaskedAdamW(model.named_parameters(), masks=masks, lr=1e-6)",
    )
    return (
        f"## Masks\n\n{escape(name)} has one bit for each coordinate of the model: whether it is active, that is, "
        f"trained.\n\n{table(rows)}\n\n{example}"
    )


def run_section(product: Product, repo_id: str, base_model: str | None, base: str, repo_type: str) -> str:
    run, summary = product.facts["run"], product.facts["summary"]
    if base_model is None:
        base = escape(short_path(summary["base"]))
    rows = {"base": base, **(analysis_rows(summary) if product.kind == "analyze" else {})}
    rows["identity of the run"] = f"`{run['identity']}`"
    rows["written by"] = f"opdkernels {escape(run['versions']['opdkernels'])}"
    load_call = LOADERS[product.kind]
    example = code(
        f"import {load_call.partition('(')[0].rpartition('.')[0]}",
        "from huggingface_hub import snapshot_download",
        f"folder = {download_call('snapshot_download', repo_id, repo_type)}",
        f"result = {load_call}",
    )
    verdict = f"{escape(summary['verdict']['text'])}\n\n" if product.kind == "analyze" else ""
    report = "`report.html` is a page to read. " if "report.html" in product.files else ""
    return (
        f"## Result of `opdkernels {product.kind}`\n\n{verdict}{report}The tables are Parquet, `summary.json` is the "
        f"whole model.\n\n{table(rows)}\n\n{example}"
    )


def short_path(path: str) -> str:
    """The last two parts of an absolute path, since a card is read by others; other paths as they are.

    >>> short_path("/home/someone/models/base"), short_path("org/name@main")
    ('models/base', 'org/name@main')
    """
    return "/".join(path.rstrip("/").split("/")[-2:]) if path.startswith("/") else path


def analysis_rows(summary: dict[str, Any]) -> dict[str, str]:
    """The main numbers of an analysis."""
    rows = {"compared": f"{summary['matched']['tensors']} tensors, {summary['matched']['parameters']:,} parameters"}
    view = summary["views"].get("visible") or {}
    unchanged = view.get("frac_zero")
    for name, text in (
        ("changed, visible in bf16", percent(None if unchanged is None else 1 - unchanged)),
        ("changed over the rounding null", times(view.get("changed_over_null"))),
        ("relative norm of the update", measure(view.get("relative_norm"))),
    ):
        rows[name] = text
    return rows
