"""Results as lines of text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opdkernels.analysis.headers import rough_duration
from opdkernels.analysis.overlap import Overlaps
from opdkernels.analysis.result import Analysis
from opdkernels.analysis.trajectory import Trajectory
from opdkernels.analysis.trajectory_tables import mean
from opdkernels.checkpoint.coverage import coverage_sentence
from opdkernels.errors import printable
from opdkernels.formatting import byte_size, measure, percent, times
from opdkernels.metrics.registry import VIEWS
from opdkernels.metrics.trajectory import SIMILARITY
from opdkernels.metrics.verdict import UNRELATED, all_bits_equal

MAX_LISTED = 10
MEASURES = ("stable_rank", "drift", "rotation_left_10pct", "rotation_right_10pct")  # no fractions


def format_analysis(result: Analysis) -> list[str]:
    """Both views in columns, what is expected from bf16 rounding alone, and what was left out."""
    summary, names = result.summary, {record.index: record.name for record in result.records}
    matched = summary["matched"]
    text = [summary["verdict"]["text"], f"{matched['tensors']} tensors: {coverage_sentence(summary['coverage'])}"]
    if summary["views"] and not all_bits_equal(summary):
        text += format_views(summary)
    text += format_comparisons(summary["verdict"]["comparisons"])
    for title, items in (
        ("excluded", [f"{tensor['name']} ({tensor['side']}): {tensor['reason']}" for tensor in summary["excluded"]]),
        (
            "not in both",
            [f"{tensor['name']} ({tensor['side']}): {tensor['reason']}" for tensor in summary["unmatched"]],
        ),
        ("failed", [f"{tensor['name']}: {tensor['reason']}" for tensor in summary["failed"]]),
        ("without spectra", [f"{names[record.index]}: {record.reason}" for record in result.uncomputed]),
        ("NaN or Inf", [nonfinite_line(tensor) for tensor in summary["nonfinite"]]),
        ("note", [*buffer_lines(summary["buffers"]), *summary["notes"]]),
    ):
        text += [f"{title}: {printable(item)}" for item in items[:MAX_LISTED]]
        if len(items) > MAX_LISTED:
            text.append(f"{title}: {len(items) - MAX_LISTED} more in summary.json")
    if result.path is not None:
        num_bytes = sum(file["bytes"] for checkpoint in result.run["inputs"].values() for file in checkpoint["files"])
        text.append(f"{byte_size(num_bytes)} in {result.run['seconds']:.2f} s; {written_to(result)}")
    return text


def format_views(summary: dict[str, Any]) -> list[str]:
    """The main metrics of the whole model in the stored and the visible view."""
    stored, visible = summary["views"]["stored"], summary["views"]["visible"]
    bit_equal = percent(stored["bit_equal"] / max(1, stored["numel"]))
    text = [
        f"{stored['bit_equal_tensors']} of {stored['tensors']} tensors are bit-identical, "
        f"and {bit_equal} of the coordinates",
        f"{'':34}{'stored':>12}{'visible':>12}   (visible: both rounded to bf16)",
    ]
    for label, key in (
        ("unchanged", "frac_zero"),
        ("|delta| <= 1e-5", "frac_le_1e-5"),
        ("relative norm", "relative_norm"),
        ("energy of the top 1 %", "top_energy_1pct"),
        ("near-zero coverage at 10 %", "near_zero_coverage_10pct"),
    ):
        text.append(f"{label:34}{percent(stored[key]):>12}{percent(visible[key]):>12}")
    return text


def format_comparisons(comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """Metrics against what rounding alone gives: of coordinates for the whole model, of matrices the median."""
    if not comparisons:
        return []
    width = max(34, *(len(entry["label"]) + 2 for entry in comparisons))
    columns = f"{'observed':>12}{'rounding':>12}{'ratio':>9}   (95 % interval; medians for metrics of matrices)"
    text = [f"{'':{width}}{columns}"]
    for entry in comparisons:
        show = measure if entry["metric"] in MEASURES else percent
        ends = f"({times(entry['low'])} to {times(entry['high'])})"
        text.append(
            f"{entry['label']:{width}}{show(entry['observed']):>12}{show(entry['expected']):>12}"
            f"{times(entry['ratio']):>9}   {ends:22}{entry['words']}"
        )
    return text


def format_overlap(result: Overlaps) -> list[str]:
    """One line per pair of runs, and what was left out."""
    summary = result.summary
    numel = summary["coordinates"]
    text = [coverage_sentence(summary["coverage"])]
    text += [f"run {name}: {printable(path)}" for name, path in summary["runs"].items()]
    text.append(f"{summary['tensors']} tensors, {numel:,} coordinates; changed: visible |delta| > {summary['atol']:g}")
    text.append(f"{'runs':6}{'changed':>18}{'coverage':>20}{'Jaccard':>9}{'over uniform':>14}{'over |W|':>10}{'z':>10}")
    for pair in summary["pairs"]:
        densities = " ".join(percent(pair[name] / numel if numel else None) for name in ("changed_a", "changed_b"))
        coverage = f"{percent(pair['coverage_a'])} {percent(pair['coverage_b'])}"
        text.append(
            f"{pair['run_a']} {pair['run_b']:4}{densities:>18}{coverage:>20}{percent(pair['jaccard']):>9}"
            f"{times(pair['over_uniform_global']):>14}{times(pair['over_magnitude']):>10}"
            f"{measure(pair['z_magnitude']):>10}"
        )
        text += [
            f"  within {stratum}s and |W|: {times(pair[f'over_{stratum}'])} chance, z {measure(pair[f'z_{stratum}'])}"
            for stratum in ("row", "column")
            if f"over_{stratum}" in pair
        ]
    text += [f"note: {note}" for note in summary["notes"]]
    text += excluded_lines(summary["excluded"])
    text += [f"NaN or Inf: {printable(nonfinite_line(tensor))}" for tensor in summary["nonfinite"][:MAX_LISTED]]
    return text + finished_line(result)


def format_trajectory(result: Trajectory) -> list[str]:
    """One line per checkpoint, and what was left out."""
    summary = result.summary
    text = [
        coverage_sentence(summary["coverage"]),
        f"base: {printable(summary['base'])}",
        f"{'step':>8}{'unchanged':>11}{'visible':>10}{'rel. norm':>11}{'stable rank':>13}{'cosine':>9}{'Sim_16':>8}"
        f"{'coverage':>10}{'since':>9}  checkpoint",
    ]
    for step in summary["steps"]:
        stored, visible = (step["views"].get(view, {}) for view in VIEWS)
        similarity = mean([stored.get(name) for name in SIMILARITY])
        text.append(
            f"{step['label']:>8}{percent(stored.get('frac_zero')):>11}{percent(visible.get('frac_zero')):>10}"
            f"{percent(stored.get('relative_norm')):>11}{measure(stored.get('stable_rank')):>13}"
            f"{measure(stored.get('cosine_final')):>9}{measure(similarity):>8}"
            f"{percent(visible.get('recall_vs_final')):>10}{percent(visible.get('frac_changed_since_previous')):>9}"
            f"  {printable(step['path'])}"
        )
    text += [
        "unchanged: in the stored and in the visible view; cosine, Sim_16 (mean of left and right) and coverage "
        f"(of what the last checkpoint changed by more than {summary['atol']:g}): with the last checkpoint;",
        "since: fraction of coordinates that visibly changed since the previous checkpoint",
    ]
    text += [f"note: {note}" for note in summary["notes"]]
    text += excluded_lines(summary["excluded"])
    text += [
        f"{step_title(step)}: tensors were excluded, failed or contain NaN or Inf; see its own report"
        for step in summary["steps"]
        if step["exit_status"]
    ]
    return text + finished_line(result)


def step_title(step: dict[str, Any]) -> str:
    """A checkpoint of a trajectory in a sentence: step 20, or its name."""
    return step["label"] if step["step"] is None else f"step {step['step']}"


def format_lineage(result: dict[str, Any]) -> list[str]:
    """Which candidate is the base, and one line per candidate, nearest first."""
    base = result["base"]
    copies = [row["path"] for row in result["candidates"] if row["bit_equal"] == 1 and row["plausible"]]
    text = [
        f"{printable(result['child'])}: none of the candidates is plausible as its base"
        if base is None
        else f"{printable(result['child'])}: {printable(base)} has the same bits in every sampled coordinate"
        if base in copies
        else f"{printable(result['child'])}: {printable(base)} is the nearest candidate for its base",
        f"{'relative norm':>14}{'same bits':>12}{'compared':>12}  candidate",
    ]
    for row in result["candidates"]:
        ending = "" if row["plausible"] else f"; not plausible: {row['reason'] or reason_of(row)}"
        numbers = f"{percent(row['relative_norm']):>14}{percent(row['bit_equal']):>12}{percent(row['compared']):>12}"
        text.append(f"{numbers}  {printable(row['path'])}{printable(ending)}")
    return text


def reason_of(row: dict[str, Any]) -> str:
    """Why a candidate that can be compared is not plausible."""
    return "too far away" if row["relative_norm"] >= UNRELATED else "too little of it matches"


def format_inspection(content: dict[str, Any]) -> list[str]:
    """What `inspect` returns; how much is compared comes first where it is too little."""
    coverage = content.get("coverage", {"sufficient": True})
    text = [] if coverage["sufficient"] else [coverage_sentence(coverage)]
    for side in ("a", "b"):
        if side in content:
            checkpoint = content[side]
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in checkpoint["dtypes"].items())
            size = f"{checkpoint['files']} file{'s' * (checkpoint['files'] != 1)}, {byte_size(checkpoint['bytes'])}"
            text.append(f"{printable(checkpoint['path'])}: {checkpoint['kind']}, {size}")
            text.append(f"  {checkpoint['tensors']} tensors ({dtypes}), {checkpoint['parameters']:,} parameters")
    return text + format_plan(content) if "plan" in content else text


def format_plan(content: dict[str, Any]) -> list[str]:
    """What matches between two checkpoints, and the planned cost of `analyze`."""
    plan, spectra = content["plan"], content["plan"]["spectra"]
    how = ", ".join(f"{count} {kind}" for kind, count in content["how"].items())
    text = [f"matched: {content['matched']} tensors ({how}), {content['coordinates']:,} coordinates"]
    if content["coverage"]["sufficient"]:
        text.append(coverage_sentence(content["coverage"]))
    text += [
        f"not compared: {printable(tensor['name'])} ({tensor['side']}): {printable(tensor['reason'])}"
        for tensor in content["unmatched"]
    ]
    text += [f"tied, counted once: {printable(name)}" for name in content["tied"]]
    text += [f"note: {printable(note)}" for note in [*buffer_lines(content["buffers"]), *content["notes"]]]
    text.append(
        f"analyze would read {byte_size(plan['bytes'])}, use up to {byte_size(plan['memory_bytes'])} "
        "besides torch itself, "
        f"and take about {plan['seconds_one_core']:g} s on one core once the files are in memory"
    )
    if spectra["matrices"]:
        text.append(
            f"spectra of {spectra['matrices']} matrices: about {rough_duration(spectra['seconds_one_core'])} "
            f"more on one core ({spectra['flops']:.2g} operations), {byte_size(spectra['memory_bytes'])} "
            "for the largest; "
            "--spectra off omits them"
        )
    if spectra["beyond_memory"]:
        text.append(
            f"{spectra['beyond_memory']} matrices need more memory than allowed; raise --memory, or pass --spectra topk"
        )
    return text


def buffer_lines(buffers: Sequence[dict[str, Any]]) -> list[str]:
    """One line on the buffers, if there are any."""
    if not buffers:
        return []
    differ = sum(buffer["equal"] is False for buffer in buffers)
    state = f"{differ} differ between the checkpoints" if differ else "none differs"
    return [f"{len(buffers)} buffers, such as {buffers[0]['name']}, are no parameters and left out; {state}"]


def nonfinite_line(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']}: {tensor['coordinates']} coordinates left out"


def excluded_lines(excluded: Sequence[dict[str, str]]) -> list[str]:
    return [f"excluded: {printable(tensor['name'])}: {printable(tensor['reason'])}" for tensor in excluded[:MAX_LISTED]]


def finished_line(result: Overlaps | Trajectory) -> list[str]:
    return [] if result.path is None else [f"{result.run['seconds']:.2f} s; {written_to(result)}"]


def written_to(result: Analysis | Overlaps | Trajectory) -> str:
    return f"written to {printable(str(result.path))}"
