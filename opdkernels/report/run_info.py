"""What was left out of a run, the files it read, and when, where and with what it ran: common to all pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opdkernels.checkpoint.coverage import coverage_sentence
from opdkernels.errors import printable
from opdkernels.report import typography

MAX_LISTED = 200
NONFINITE_NOTE = "These coordinates are left out of every metric; the run ends with status 3."


class Item(NamedTuple):
    """A line of a list: the name of a tensor or checkpoint, details, the reason."""

    name: str = ""
    details: str = ""
    reason: str = ""


def section(heading: str, note: str, items: Sequence[Item]) -> dict[str, Any]:
    """A list of what was left out, cut to what a page can hold."""
    return {
        "heading": heading,
        "note": note,
        "total": len(items),
        "rows": items[:MAX_LISTED],
        "more": max(0, len(items) - MAX_LISTED),
    }


def non_empty(*sections: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in sections if one["total"]]


def tensor(name: str, reason: str = "", details: str = "") -> Item:
    """A line that names a tensor, safe to print."""
    return Item(typography.name(name), details, printable(reason))


def nonfinite(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tensors with NaN or Inf."""
    items = [tensor(entry["name"], typography.plural(entry["coordinates"], "coordinate")) for entry in entries]
    return section("NaN or Inf", NONFINITE_NOTE, items)


def left_out(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the metrics of an `analyze` run do not cover, and why."""

    def unmatched(entries: Sequence[Mapping[str, Any]]) -> list[Item]:
        items = []
        for entry in entries:
            shape = " × ".join(map(str, entry["shape"])) or "scalar"
            details = f"{entry['side']}, {entry['dtype']} {shape}" if entry["dtype"] else entry["side"]
            items.append(tensor(entry["name"], entry["reason"], details))
        return items

    return non_empty(
        section(
            "Excluded",
            "In both checkpoints but not compared; the run ends with status 3.",
            unmatched(summary["excluded"]),
        ),
        section(
            "Failed",
            "Could not be counted; the run ends with status 3. Rerun the same command to retry them.",
            [tensor(entry["name"], entry["reason"]) for entry in summary["failed"]],
        ),
        nonfinite(summary["nonfinite"]),
        section(
            "Not in both",
            "In one checkpoint only, or of a dtype that has no difference.",
            unmatched(summary["unmatched"]),
        ),
        section("Tied", "One matrix under two names, counted once.", [tensor(name) for name in summary["tied"]]),
        section(
            "Buffers",
            "Constants and statistics that are no parameters: masks, positions, rotary frequencies, running means.",
            [tensor(entry["name"], buffer_state(entry)) for entry in summary["buffers"]],
        ),
        section("Notes", "", [Item(reason=printable(note)) for note in summary["notes"]]),
    )


def buffer_state(buffer: Mapping[str, Any]) -> str:
    """How a buffer of one side compares with that of the other."""
    if buffer["sides"] != "both":
        return f"in the {buffer['sides']} checkpoint only"
    return {True: "the same bits", False: "other bits", None: "another shape or dtype"}[buffer["equal"]]


def coverage(summary: Mapping[str, Any]) -> dict[str, Any]:
    """How much of each side was compared, as a sentence, and whether that is enough."""
    fractions = summary["coverage"]
    return {"sentence": coverage_sentence(fractions), "sufficient": fractions["sufficient"]}


def files(run: Mapping[str, Any]) -> list[dict[str, str]]:
    """The files of each input as they were read."""
    return [
        {
            "role": role,
            "name": typography.name(file["name"]),
            "size": typography.byte_size(file["bytes"]),
            "time": typography.timestamp(file["mtime_ns"]),
            "digest": typography.name(file["header_digest"]),
        }
        for role, side in run["inputs"].items()
        for file in side["files"][:MAX_LISTED]
    ]


def num_bytes(side: Mapping[str, Any]) -> int:
    """Size of an input's files in bytes."""
    return sum(file["bytes"] for file in side["files"])


def run_info(run: Mapping[str, Any], matched: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """The run as pairs of label and text: inputs, matches, time, machine, versions, options.

    Args:
        run: Content of run.json.
        matched: `matched` of an `analyze` run's summary.
    """
    inputs, machine = run["inputs"], run["machine"]
    resumed = run.get("resumed_tensors") or 0
    info = [
        (
            role,
            f"{typography.location(side['path'])} ({typography.name(side['kind'])}, "
            f"{typography.plural(len(side['files']), 'file')}, {typography.byte_size(num_bytes(side))})",
        )
        for role, side in inputs.items()
    ]
    if matched is not None:
        ways = ", ".join(f"{typography.count(n)} {typography.name(way)}" for way, n in matched["how"].items())
        dtypes = ", ".join(
            f"{typography.name(dtype)} in {typography.count(n)}" for dtype, n in matched["dtypes"].items()
        )
        info += [("matched", ways or typography.MISSING), ("dtypes", dtypes or typography.MISSING)]
    duration = (
        f"{typography.duration(run.get('seconds'))} for {typography.byte_size(sum(map(num_bytes, inputs.values())))}"
    )
    if resumed:
        duration += f"; {typography.plural(resumed, 'tensor')} from before the interruption"
    options = ", ".join(
        f"{name} {typography.byte_size(value) if name == 'memory' else typography.name(str(value))}"
        for name, value in run["options"].items()
        if value not in (None, False)
    )
    return [
        *info,
        ("started", run["started"].replace("T", " ").replace("+00:00", " UTC")),
        ("duration", duration),
        (
            "machine",
            f"{typography.name(machine['processor'])}, {typography.plural(machine['threads'], 'thread')}, "
            f"{typography.name(machine['instruction_set'])}",
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        ("options", options or typography.MISSING),
        ("identity", typography.name(run["identity"])),
    ]
