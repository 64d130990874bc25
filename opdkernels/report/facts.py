"""What was left out of a run, the files it read, and where, when and with what it ran: the same on every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkernels.errors import printable
from opdkernels.report import typography

MOST_LISTED = 200


def left_out(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figures do not cover, and why; each list cut to what a page can hold."""

    def unmatched(items: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
        return [
            (
                typography.name(u["name"]),
                f"{u['side']}, {u['dtype']} {' × '.join(map(str, u['shape'])) or 'scalar'}"
                if u["dtype"]
                else u["side"],
                printable(u["reason"]),
            )
            for u in items[:MOST_LISTED]
        ]

    lists = [
        (
            "Excluded",
            "In both checkpoints and yet not compared; the run ends with status 3.",
            len(summary["excluded"]),
            unmatched(summary["excluded"]),
        ),
        (
            "Failed",
            "Could not be counted; the run ends with status 3. The same command again retries them.",
            len(summary["failed"]),
            [(typography.name(f["name"]), "", printable(f["reason"])) for f in summary["failed"][:MOST_LISTED]],
        ),
        (
            "NaN or Inf",
            "These coordinates are left out of every figure; the run ends with status 3.",
            len(summary["nonfinite"]),
            [
                (typography.name(f["name"]), "", typography.plural(f["coordinates"], "coordinate"))
                for f in summary["nonfinite"][:MOST_LISTED]
            ],
        ),
        (
            "Not in both",
            "On one side only, or without a difference to take.",
            len(summary["unmatched"]),
            unmatched(summary["unmatched"]),
        ),
        (
            "Tied",
            "The same matrix under two names, counted once.",
            len(summary["tied"]),
            [(typography.name(t), "", "") for t in summary["tied"][:MOST_LISTED]],
        ),
        ("Notes", "", len(summary["notes"]), [("", "", printable(n)) for n in summary["notes"][:MOST_LISTED]]),
    ]
    return [
        {"heading": h, "note": n, "total": total, "rows": rows, "more": total - len(rows)}
        for h, n, total, rows in lists
        if total
    ]


def files(run: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "role": role,
            "name": typography.name(f["name"]),
            "size": typography.byte_size(f["bytes"]),
            "time": typography.timestamp(f["mtime_ns"]),
            "digest": typography.name(f["header_digest"]),
        }
        for role, side in run["inputs"].items()
        for f in side["files"][:MOST_LISTED]
    ]


def facts(summary: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in pairs of words: inputs, how they matched, machine, versions, time."""
    inputs, machine = run["inputs"], run["machine"]
    bytes_read = sum(f["bytes"] for side in inputs.values() for f in side["files"])
    resumed = run.get("resumed_tensors") or 0
    found = [
        (
            role,
            f"{typography.name(side['path'])} ({typography.name(side['kind'])}, "
            f"{typography.plural(len(side['files']), 'file')}, "
            f"{typography.byte_size(sum(f['bytes'] for f in side['files']))})",
        )
        for role, side in inputs.items()
    ]
    found += [
        (
            "matched",
            ", ".join(f"{typography.count(n)} {typography.name(how)}" for how, n in summary["matched"]["how"].items())
            or typography.MISSING,
        ),
        (
            "dtypes",
            ", ".join(
                f"{typography.name(dtype)} in {typography.count(n)}"
                for dtype, n in summary["matched"]["dtypes"].items()
            )
            or typography.MISSING,
        ),
        ("started", run["started"].replace("T", " ").replace("+00:00", " UTC")),
        (
            "took",
            f"{typography.duration(run.get('seconds'))} for {typography.byte_size(bytes_read)}"
            + (f"; {typography.plural(resumed, 'tensor')} from an earlier start" if resumed else ""),
        ),
        (
            "machine",
            f"{typography.name(machine['processor'])}, {typography.plural(machine['threads'], 'thread')}, "
            f"{typography.name(machine['instruction_set'])}",
        ),
        ("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())),
        (
            "options",
            ", ".join(
                f"{k} {typography.byte_size(v) if k == 'memory' else typography.name(str(v))}"
                for k, v in run["options"].items()
                if v not in (None, False)
            )
            or typography.MISSING,
        ),
        ("identity", typography.name(run["identity"])),
    ]
    return found
