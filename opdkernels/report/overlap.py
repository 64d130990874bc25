"""What the page of an `overlap` run holds."""

from __future__ import annotations

from typing import Any

from opdkernels.analysis.overlap import Overlaps
from opdkernels.errors import printable
from opdkernels.report import charts, typography
from opdkernels.report.content import MODULE_ORDER
from opdkernels.report.facts import MOST_LISTED, files
from opdkernels.report.glossary import glossary
from opdkernels.report.tables import Cell, Column, build

MOST_ROWS, MOST_LAYERS = 2000, 200
STRATA = ("row", "column")
SHARED = 1.2  # over chance within |W|: below, the overlap is not far from what magnitudes give

COUNTS = [
    Column("changed_a", "count"),
    Column("changed_b", "count"),
    Column("coverage_a", "percent"),
    Column("coverage_b", "percent"),
    Column("jaccard", "percent"),
]
CHANCE = [
    Column("over_uniform", "times", span="over chance"),
    Column("over_magnitude", "times", span="over chance"),
    Column("z_magnitude", "measure", span="over chance"),
]


def content(result: Overlaps) -> dict[str, Any]:
    """The template's variables."""
    summary, run = result.summary, result.run
    rows = result.tensors.to_pylist()
    finer = [s for s in STRATA if any(f"over_{s}" in p for p in summary["pairs"])]
    extra = [
        Column(f"{kind}_{s}", "times" if kind == "over" else "measure", span="over chance")
        for s in finer
        for kind in ("over", "z")
    ]
    columns = [*COUNTS, Column("over_uniform_global", "times", span="over chance"), *CHANCE, *extra]
    pair = Column("pair")
    listed = sorted(rows, key=lambda r: -r["changed_both"])[:MOST_ROWS]
    tables = {
        "pairs": build(
            "pairs", "Pairs of runs, whole model", [pair, *columns], [{"": named(p)} for p in summary["pairs"]]
        ),
        "modules": build(
            "modules",
            "By module",
            [Column("module"), pair, *COUNTS, *CHANCE, *extra],
            [{"": named(p)} for p in summary["by_module"]],
        ),
        "layers": build(
            "layers",
            "By layer",
            [Column("layer"), pair, *COUNTS, *CHANCE, *extra],
            [{"": by_layer(p)} for p in summary["by_layer"]],
        ),
        "tensors": build(
            "tensors",
            "Tensors, largest overlap first",
            [Column("name"), pair, Column("numel", "count"), *COUNTS, *CHANCE, *extra],
            [{"": named(r)} for r in listed],
            len(rows) - len(listed),
        ),
    }
    used = [c.key for t in tables.values() for c in t.columns]
    return {
        "title": "What runs changed together",
        "sides": [
            ("source", typography.name(summary["source"])),
            *((f"run {k}", typography.name(v)) for k, v in summary["runs"].items()),
        ],
        "headline": headline(summary),
        "detail": f"{typography.count(summary['coordinates'])} coordinates in {typography.plural(summary['tensors'], 'tensor')}; "
        f"changed where the visible |Δ| exceeds {typography.measure(summary['atol'])}.",
        "reading": reading(summary, finer),
        "exactly": exactly(summary),
        "maps": maps(rows),
        "left_out": left_out(summary),
        "run": run,
        "files": files(run),
        "facts": facts(run),
        "glossary": glossary(["visible", *used]),
        **tables,
    }


def named(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "pair": f"{row['run_a']} {row['run_b']}"}


def by_layer(row: dict[str, Any]) -> dict[str, Any]:
    layer = row["layer"]
    return {**named(row), "layer": Cell(str(layer) if layer >= 0 else typography.MISSING, str(layer))}


def headline(summary: dict[str, Any]) -> str:
    first = summary["pairs"][0]
    if first["coverage_a"] is None or first["coverage_b"] is None:
        return "A run changed nothing"
    share = typography.percent(first["coverage_a"])
    return f"{share} of what run {first['run_a']} changed, run {first['run_b']} changed too"


def reading(summary: dict[str, Any], finer: list[str]) -> list[str]:
    """How to take the first pair's figures."""
    p = summary["pairs"][0]
    if p["over_magnitude"] is None:
        return ["Nothing that both runs could share was changed."]
    said = [
        f"By uniform chance, the paper's baseline, that is {typography.times(p['over_uniform_global'])}. But in bf16 only small weights visibly move, so two "
        f"unrelated runs overlap too: among coordinates of the same |W| it is {typography.times(p['over_magnitude'])}, z = {typography.measure(p['z_magnitude'])}."
    ]
    if p["over_magnitude"] < SHARED:
        said.append("So most of the overlap is that of magnitudes, not a choice that the runs share.")
    else:
        said.append("So the runs share more than the magnitudes of the weights explain.")
    said += [
        f"Within the {s}s of each matrix, and |W| in them: {typography.times(p[f'over_{s}'])}, z = {typography.measure(p[f'z_{s}'])}."
        for s in finer
        if p.get(f"over_{s}") is not None
    ]
    return said


def exactly(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    total = summary["coordinates"] or 1
    return [
        (typography.plural(int(j), "run"), typography.count(n), typography.percent(n / total))
        for j, n in summary["changed_in_exactly"].items()
    ]


def maps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layer × module, for each pair: overlap over chance within |W|, pooled over a module's tensors."""
    layers = sorted({r["layer"] for r in rows})[:MOST_LAYERS]
    modules = sorted({r["module"] for r in rows}, key=lambda m: (MODULE_ORDER.get(m, 99), m))
    found = []
    for pair in dict.fromkeys((r["run_a"], r["run_b"]) for r in rows):
        sums: dict[tuple[str, int], list[float]] = {}
        for r in rows:
            if (r["run_a"], r["run_b"]) == pair:
                total = sums.setdefault((r["module"], r["layer"]), [0.0, 0.0])
                total[0] += r["changed_both"]
                total[1] += r["expected_magnitude"]
        cells = {at: both / expected if expected else None for at, (both, expected) in sums.items()}
        values = [v for v in cells.values() if v]
        if values and layers[-1] >= 0:
            scale = charts.ratio_scale(values)
            names, drawing = charts.heat_map(cells, modules, layers, scale, "Overlap over chance within |W|")
            found.append(
                {
                    "heading": f"{pair[0]} and {pair[1]}",
                    "names": names,
                    "drawing": drawing,
                    "legend": charts.legend(scale),
                }
            )
    return found


def left_out(summary: dict[str, Any]) -> list[dict[str, Any]]:
    lists = [
        (
            "Excluded",
            "Not in every run in the same shape; the run ends with status 3.",
            [(typography.name(e["name"]), "", printable(e["reason"])) for e in summary["excluded"]],
        ),
        (
            "NaN or Inf",
            "These coordinates are left out of every figure; the run ends with status 3.",
            [
                (typography.name(e["name"]), "", typography.plural(e["coordinates"], "coordinate"))
                for e in summary["nonfinite"]
            ],
        ),
    ]
    return [
        {"heading": h, "note": n, "total": len(r), "rows": r[:MOST_LISTED], "more": len(r) - len(r[:MOST_LISTED])}
        for h, n, r in lists
        if r
    ]


def facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        *(
            (
                role,
                f"{typography.name(side['path'])} ({typography.name(side['kind'])}, {typography.plural(len(side['files']), 'file')})",
            )
            for role, side in run["inputs"].items()
        ),
        ("started", run["started"].replace("T", " ").replace("+00:00", " UTC")),
        ("took", typography.duration(run.get("seconds"))),
        (
            "machine",
            f"{typography.name(run['machine']['processor'])}, {typography.plural(run['machine']['threads'], 'thread')}, {typography.name(run['machine']['instruction_set'])}",
        ),
        ("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items())),
        ("identity", typography.name(run["identity"])),
    ]
