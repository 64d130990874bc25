"""The result of a benchmark as a table: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdkernels.benchmark.machine import counted, line
from opdkernels.benchmark.result import OURS
from opdkernels.formatting import MISSING, byte_size, percent, significant, times

Row = Mapping[str, Any]
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
OTHERS = {"eager": "PyTorch", "compile": "torch.compile"}
MEMORY = "extra memory"
LEFT_ALIGNED = ("workload", "size", "backend")


def time_text(seconds: float) -> str:
    """A time with its unit.

    >>> time_text(2.5), time_text(0.0421), time_text(4.2e-5)
    ('2.50 s', '42.1 ms', '0.0420 ms')
    """
    return f"{significant(seconds, 3)} s" if seconds >= 1 else f"{significant(1000 * seconds, 3)} ms"


def rate_text(per_s: float, unit: str) -> str:
    """A rate with its unit.

    >>> rate_text(4.206e12, "bytes"), rate_text(6.2e10, "operations")
    ('4.21 TB/s', '62.0 GFLOP/s')
    """
    scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if per_s >= scale), (1e6, "M"))
    return f"{significant(per_s / scale, 3)} {prefix}{'B' if unit == 'bytes' else 'FLOP'}/s"


def limits_text(result: Mapping[str, Any]) -> str:
    """The measured limits in one line."""
    limits = [f"{name} {rate_text(limit['per_s'], limit['unit'])}" for name, limit in result["limits"].items()]
    return f"measured limits: {', '.join(limits)}"


def columns(result: Mapping[str, Any]) -> list[str]:
    """The headings of the table: a speed for each of what the kernels are compared with."""
    speeds = [f"speed over {OTHERS[name]}" for name in result["options"]["against"]]
    return ["workload", "size", "backend", "time", "rate", "of the limit", *speeds, MEMORY]


def cells(row: Row, result: Mapping[str, Any]) -> list[str]:
    """A row of the table. A speed below 1 says that the kernel is slower."""
    ours = row["timings"].get(OURS)
    texts = [row["workload"], row["size"], row["backend"]]
    if ours is None:
        texts += [MISSING] * 3
    else:
        texts += [
            time_text(ours["median_s"]),
            rate_text(ours["per_s"], row["unit"]),
            f"{percent(ours['fraction_of_limit'], 0)} of {row['limit']}",
        ]
    texts += [times(row["timings"].get(name, {}).get("speedup")) for name in result["options"]["against"]]
    return [*texts, memory_text(row)]


def memory_text(row: Row) -> str:
    """Extra memory of the kernel, and of plain PyTorch if it was measured."""
    known = [row["timings"].get(name, {}).get("extra_bytes") for name in (OURS, "eager")]
    if "eager" not in row["timings"]:
        known = known[:1]
    texts = [MISSING if num_bytes is None else byte_size(num_bytes) for num_bytes in known]
    return " / ".join(texts) if set(texts) != {MISSING} else MISSING


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know: how it is meant, what failed, whether the machine was busy."""
    machine, lines = result["machine"], []
    if result["options"]["against"]:
        lines.append("A speed below 1x says that this package is slower. Extra memory per call: opdkernels / PyTorch.")
    if "compile" in result["options"]["against"]:
        lines.append("torch.compile is measured where plain PyTorch has passes that a compiler can fuse.")
    if machine["instruction_set"] == "reference" and not machine["gpu"]:
        lines.append("The compiled kernels are missing: the plain PyTorch reference ran. See opdkernels doctor.")
    if machine["load_average"] is not None and machine["load_average"] > machine["cores"] / 2:
        lines.append(
            f"The machine was busy before the measurement (load {machine['load_average']:g}, "
            f"{counted(machine['cores'], 'core')}): times may be longer than on an idle one."
        )
    for row in result["rows"]:
        for name, error in row["errors"].items():
            lines.append(f"{row['workload']}, {OTHERS.get(name, name)}: not measured: {error}")
    return lines


def format_text(result: Mapping[str, Any]) -> list[str]:
    """The table as lines of text; sizes, which few rows do not share, are in a line of their own."""
    table = [columns(result), *(cells(row, result) for row in result["rows"])]
    shown = [column for column in zip(*table, strict=True) if column[0] != "size"]
    aligned = [align(column) for column in shown]
    sizes = dict.fromkeys(row["size"] for row in result["rows"])
    return [
        line(result["machine"]),
        limits_text(result),
        f"sizes: {'; '.join(sizes)}",
        "",
        *("  ".join(texts).rstrip() for texts in zip(*aligned, strict=True)),
        "",
        *notes(result),
    ]


def align(column: Sequence[str]) -> list[str]:
    """The texts of a column with one width: names to the left, numbers to the right."""
    width = max(map(len, column))
    return [text.ljust(width) if column[0] in LEFT_ALIGNED else text.rjust(width) for text in column]


def markdown(result: Mapping[str, Any]) -> str:
    """The table in Markdown; speeds below 1, where this package is slower, are bold."""
    headings = columns(result)
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(LEFT_ALIGNED)}{'---:|' * (len(headings) - len(LEFT_ALIGNED))}",
    ]
    first = headings.index("of the limit") + 1
    for row in result["rows"]:
        texts = cells(row, result)
        for i, name in enumerate(result["options"]["against"], first):
            speedup = row["timings"].get(name, {}).get("speedup")
            texts[i] = f"**{texts[i]}**" if speedup is not None and speedup < 1 else texts[i]
        lines.append(f"| {' | '.join(texts)} |")
    about = f"{line(result['machine'])}; {limits_text(result)}. opdkernels {result['machine']['opdkernels']}."
    return "\n".join([about, "", *lines, "", *(f"{note}\n" for note in notes(result))]).rstrip() + "\n"
