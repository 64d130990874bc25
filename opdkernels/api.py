"""Functions that write a run directory and its report; docs/outputs.md defines every file and column."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opdkernels import report as reports
from opdkernels.analysis.analyze import run_analyze
from opdkernels.analysis.lineage import rank_candidates
from opdkernels.analysis.overlap import Overlaps, load_overlap, run_overlap
from opdkernels.analysis.result import Analysis, load
from opdkernels.analysis.trajectory import Trajectory, load_trajectory, run_trajectory
from opdkernels.checkpoint.open import checkpoint_bytes
from opdkernels.compat import paper_csv as paper_files
from opdkernels.config import (
    AnalyzeOptions,
    BenchOptions,
    LineageOptions,
    OverlapOptions,
    TrajectoryOptions,
    validate_options,
)
from opdkernels.files import write_atomically, write_json
from opdkernels.outputs import EXPERIMENT, RUN_FILE, new_folder, read_json_object
from opdkernels.progress import Progress, no_progress
from opdkernels.runs.run_dir import load_finished

if TYPE_CHECKING:
    from opdkernels.distillation.options import DistillOptions

MAX_EXACT_BYTES = 100 * 10**6  # size of a checkpoint up to which exact spectra take seconds


def analyze(
    base: str | os.PathLike[str],
    trained: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    memory: str | int = "4GB",
    threads: int | None = None,
    device: str = "cpu",
    spectra: Literal["exact", "topk", "off"] = "exact",
    io: Literal["auto", "mmap", "read"] = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    csv: bool = False,
    paper_csv: bool = False,
    report: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Measure what training changed between two checkpoints, per coordinate.

    Source of the metrics: arXiv 2606.13657.

    Args:
        base: Checkpoint before training: a folder, a file or a hub id (org/name@revision).
        trained: Checkpoint after training.
        out: Run directory for tables, summary and report; the same call resumes an interrupted run. Without it,
            nothing is written.
        memory: Memory limit, such as "2GB" or a number of bytes; memory-mapped files do not count.
        threads: Threads of the kernels, 1 to 4096; torch's own number if None.
        device: "cpu", "cuda" or "cuda:N": where coordinates are counted and Gram matrices are computed. Counts are
            bit-identical on every device.
        spectra: "exact": spectra of every matrix, and where its update is in the geometry of the base; "topk": only
            the top of the update's spectrum, with bounds and in less memory; "off": no spectra.
        io: How files are read: "mmap", "read" (positioned reads), or "auto".
        revision: Revision of hub ids.
        allow_missing: Continue without shards that the index lists but the folder does not contain.
        csv: Also write the tables as CSV.
        paper_csv: Also write the files of the paper's reference script.
        report: Write report.html.
        overwrite: Replace another run in `out`.
        progress: Called with bytes done, total bytes and the name of the current tensor.

    Returns:
        The result, with Arrow tables per tensor, group and matrix, and a summary.

    Raises:
        InputError: Input is missing, unreadable or not comparable, or there is no such GPU.
        UsageError: An option is not valid.

    Examples:
        >>> import tempfile, torch, opdkernels
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.ones(4)}, f"{folder}/base.safetensors")
        >>> save_file({"w": torch.tensor([1.0, 1.0, 1.0, 2.0])}, f"{folder}/trained.safetensors")
        >>> result = opdkernels.analyze(f"{folder}/base.safetensors", f"{folder}/trained.safetensors")
        >>> result.tensors.select(["name", "view", "changed"]).to_pylist()[0]
        {'name': 'w', 'view': 'stored', 'changed': 1}
    """
    options = validate_options(
        AnalyzeOptions,
        {
            "memory": memory,
            "threads": threads,
            "device": device,
            "spectra": spectra,
            "io": io,
            "revision": revision,
            "allow_missing": allow_missing,
            "csv": csv,
            "paper_csv": paper_csv,
            "report": report,
            "overwrite": overwrite,
        },
    )
    write_extra = paper_files.write if options.paper_csv else None
    result = run_analyze(base, trained, out, options, progress or no_progress, write_extra)
    if result.path is not None and options.report:
        reports.write(result.path, "analyze", result)
    return result


def lineage(
    child: str | os.PathLike[str],
    *candidates: str | os.PathLike[str],
    io: Literal["auto", "mmap", "read"] = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Find out which of several checkpoints another one was trained from.

    Reads a sample of at most 32 tensors, 65,536 coordinates of each, so that the time does not grow with the models.

    Args:
        child: The trained checkpoint: a folder, a file or a hub id.
        *candidates: One or more checkpoints that may be its base.
        io: How files are read: "mmap", "read" (positioned reads), or "auto".
        revision: Revision of hub ids.
        allow_missing: Continue without shards that the index lists but the folder does not contain.

    Returns:
        child; base: path of the nearest plausible candidate, None if there is none; candidates: nearest first, each
        with path, relative_norm (median over sampled tensors, >= 0), bit_equal and compared (fractions, 0 to 1),
        sampled (coordinates), plausible, and the reason if it cannot be compared.

    Raises:
        InputError: The child is missing or unreadable.
        UsageError: There is no candidate, one is given twice, or one is the child itself.

    Examples:
        >>> import tempfile, torch, opdkernels
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> for name, value in (("child", 1.001), ("near", 1.0), ("far", -3.0)):
        ...     save_file({"w": torch.full((2, 2), value)}, f"{folder}/{name}.safetensors")
        >>> found = opdkernels.lineage(*(f"{folder}/{name}.safetensors" for name in ("child", "far", "near")))
        >>> found["base"].endswith("near.safetensors")
        True
    """
    options = validate_options(LineageOptions, {"io": io, "revision": revision, "allow_missing": allow_missing})
    return rank_candidates(child, candidates, options)


def overlap(
    base: str | os.PathLike[str],
    *runs: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    atol: float = 1e-5,
    strata: Sequence[Literal["row", "column"]] = (),
    memory: str | int = "4GB",
    threads: int | None = None,
    io: Literal["auto", "mmap", "read"] = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    csv: bool = False,
    report: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Overlaps:
    """Compare which coordinates several runs from one base changed, with the chance level next to each overlap.

    Source of coverage and of the uniform chance level: arXiv 2606.13657.

    Args:
        base: Checkpoint that the runs were trained from: a folder, a file or a hub id.
        *runs: 2 to 16 trained checkpoints.
        out: Run directory; the same call resumes an interrupted run. Without it, nothing is written.
        atol: A coordinate is changed if its visible |delta| exceeds this threshold, which is rounded to bf16.
        strata: Also condition the chance level on |W| within the rows ("row") or columns ("column") of each matrix.
        memory: Memory limit, such as "2GB" or a number of bytes; memory-mapped files do not count.
        threads: Threads of the kernels, 1 to 4096; torch's own number if None.
        io: How files are read: "mmap", "read" (positioned reads), or "auto".
        revision: Revision of hub ids.
        allow_missing: Continue without shards that the index lists but the folder does not contain.
        csv: Also write the tables as CSV.
        report: Write report.html.
        overwrite: Replace another run in `out`.
        progress: Called with bytes done, total bytes and the name of the current tensor.

    Returns:
        The result, with an Arrow table with one row per pair of runs and tensor or group, and a summary.

    Raises:
        InputError: Input is missing, unreadable or not comparable.
        UsageError: An option is not valid, or there are not 2 to 16 runs.

    Examples:
        >>> import tempfile, torch, opdkernels
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> weights = {"base": [1.0, 1.0, 1.0], "a": [2.0, 2.0, 1.0], "b": [1.0, 2.0, 2.0]}
        >>> for name, values in weights.items():
        ...     save_file({"w": torch.tensor(values)}, f"{folder}/{name}.safetensors")
        >>> result = opdkernels.overlap(*(f"{folder}/{name}.safetensors" for name in weights))
        >>> result.summary["pairs"][0]["jaccard"]
        0.3333333333333333
    """
    options = validate_options(
        OverlapOptions,
        {
            "atol": atol,
            "strata": strata,
            "memory": memory,
            "threads": threads,
            "io": io,
            "revision": revision,
            "allow_missing": allow_missing,
            "csv": csv,
            "report": report,
            "overwrite": overwrite,
        },
    )
    result = run_overlap(base, runs, out, options, progress or no_progress)
    if result.path is not None and options.report:
        reports.write(result.path, "overlap", result)
    return result


def trajectory(
    base: str | os.PathLike[str],
    *checkpoints: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    steps: Sequence[int] | str = (),
    spectra: Literal["exact", "topk", "off"] = "exact",
    atol: float = 1e-5,
    memory: str | int = "4GB",
    threads: int | None = None,
    io: Literal["auto", "mmap", "read"] = "auto",
    revision: str | None = None,
    allow_missing: bool = False,
    csv: bool = False,
    report: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trajectory:
    """Follow a run over two or more of its checkpoints: all metrics of `analyze`, and how similar each is to the last.

    Args:
        base: Checkpoint that the run was trained from: a folder, a file or a hub id.
        *checkpoints: Checkpoints of the run, sorted by their steps.
        out: Run directory, with the analysis of each checkpoint in steps/. The same call with more checkpoints extends
            the run. factors/ caches what depends only on the base: 0.2 to 0.8 times the size of the base, more for
            square matrices; it may be deleted between runs. Without `out`, nothing is written.
        steps: The training step of each checkpoint, or a text with commas between them. Without it, steps come from the
            names (checkpoint-200, step_0040) or from trainer_state.json; checkpoints without a step come last and get
            no number.
        spectra: As in `analyze`, for every checkpoint.
        atol: A coordinate is changed if its visible |delta| exceeds this threshold, which is rounded to bf16.
        memory: Memory limit, such as "2GB" or a number of bytes; memory-mapped files do not count.
        threads: Threads of the kernels, 1 to 4096; torch's own number if None.
        io: How files are read: "mmap", "read" (positioned reads), or "auto".
        revision: Revision of hub ids.
        allow_missing: Continue without shards that the index lists but the folder does not contain.
        csv: Also write the tables as CSV.
        report: Write report.html, also for every checkpoint.
        overwrite: Replace another run in `out`.
        progress: Called with bytes done, total bytes and the name of the current tensor.

    Returns:
        The result, with an Arrow table with one row per checkpoint, group and view, and a summary.

    Raises:
        InputError: Input is missing, unreadable or not comparable.
        UsageError: An option is not valid, there are fewer than two checkpoints, or one is given twice.

    Examples:
        >>> import tempfile, torch, opdkernels
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> weights = {"base": [1.0, 1.0, 1.0], "step_1": [2.0, 1.0, 1.0], "step_2": [2.0, 2.0, 1.0]}
        >>> for name, values in weights.items():
        ...     save_file({"w": torch.tensor(values)}, f"{folder}/{name}.safetensors")
        >>> result = opdkernels.trajectory(*(f"{folder}/{name}.safetensors" for name in weights))
        >>> [step["step"] for step in result.summary["steps"]]
        [1, 2]
    """
    options = validate_options(
        TrajectoryOptions,
        {
            "steps": steps,
            "spectra": spectra,
            "atol": atol,
            "memory": memory,
            "threads": threads,
            "io": io,
            "revision": revision,
            "allow_missing": allow_missing,
            "csv": csv,
            "report": report,
            "overwrite": overwrite,
        },
    )
    result = run_trajectory(base, checkpoints, out, options, progress or no_progress)
    if result.path is not None and options.report:
        for folder in result.folders:
            reports.write(folder, "analyze", load(folder))
        reports.write(result.path, "trajectory", result)
    return result


def experiment(
    name: str,
    options: DistillOptions,
    out: str | os.PathLike[str],
    *,
    seeds: int = 1,
    density: float | None = None,
    arms: Sequence[str] = (),
    quiet: bool = True,
) -> dict[str, Any]:
    """Run an experiment on how on-policy distillation changes weights, analyse one of its runs, and write a report.

    Args:
        name: "masks", "sgd", "on-policy", "precision", "trajectory", "subspace" or "grafts".
        options: Options of the runs.
        out: Output folder; finished runs in it are reused.
        seeds: Number of seeds, starting at `options.seed`.
        density: Fraction of the coordinates in each mask, 0 to 1; 0: all that a run changed visibly in bf16; None: the
            default of the experiment.
        arms: Names of the arms to run; empty: all.
        quiet: Print no progress.

    Returns:
        The content of results.json: `experiment`, `rows` (one per arm) and the settings.

    Raises:
        InputError: Input is missing or unreadable.
        UsageError: An option is not valid, or options do not fit together.

    Examples:
        options = DistillOptions(student="Qwen2.5-0.5B", teacher="Qwen2.5-1.5B", prompts="prompts.jsonl")
        rows = opdkernels.experiment("masks", options, "masks", density=0.2)["rows"]
    """
    from opdkernels.experiments.runner import reference_pair, run_experiment

    folder = Path(out)
    result = run_experiment(name, options, folder, seeds=seeds, density=density, arms=arms, quiet=quiet)
    start, end = reference_pair(folder, result)
    analyze(
        start,
        end,
        folder / "analysis",
        spectra="exact" if checkpoint_bytes(end) < MAX_EXACT_BYTES else "off",
        overwrite=True,
    )
    reports.write(folder, "experiment", {**result, "analysis": True})
    return result


def bench(
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    against: Sequence[str] = ("eager",),
    family: Sequence[str] = (),
    threads: int | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the kernels on this machine against plain PyTorch, and as a fraction of what the machine can do.

    Implementations take turns; times are medians. Each kernel is compared with its reference before it is timed. On two
    cores it takes about a minute and 2 GB of memory; on a GPU at most half of the free memory.

    Args:
        out: Folder to write, new or empty: benchmark.json, table.md, chart.svg and report.html. Without it, nothing is
            written.
        device: "cpu", "cuda" or "cuda:N".
        against: "eager" (plain PyTorch) and "compile" (torch.compile, which takes minutes to compile).
        family: Names of kernel families; all if empty.
        threads: Threads of the kernels and of torch, 1 to 4096; torch's own number if None.
        quick: Smaller sizes and fewer rounds.
        progress: Called with steps done, total steps and the name of the current one.

    Returns:
        The content of benchmark.json: `machine`, `limits`, and `rows`, one per workload.

    Raises:
        InputError: There is no such GPU, or `out` cannot be written or is not empty.
        UsageError: An option is not valid.

    Examples:
        >>> import opdkernels
        >>> result = opdkernels.bench(family=["quantile"], quick=True)
        >>> [row["family"] for row in result["rows"]], result["rows"][0]["timings"]["opdkernels"]["median_s"] > 0
        (['quantile'], True)
    """
    from opdkernels.benchmark import result as files
    from opdkernels.benchmark.run import run_benchmark
    from opdkernels.benchmark.text import markdown
    from opdkernels.report.bench import chart_file

    options = validate_options(
        BenchOptions, {"device": device, "against": against, "family": family, "threads": threads, "quick": quick}
    )
    if out is None:
        return run_benchmark(options, progress=progress or no_progress)
    with new_folder(out) as folder:
        result = run_benchmark(options, progress=progress or no_progress)
        write_json(folder / files.FILE, result)
        write_atomically(folder / files.TABLE_FILE, markdown(result).encode())
        if chart := chart_file(result):
            write_atomically(folder / files.CHART_FILE, chart.encode())
        reports.write(folder, "bench", result)
    return result


def write_report(out: str | os.PathLike[str]) -> Path:
    """Write report.html again from the tables of a finished run.

    Args:
        out: Run directory of `analyze`, `overlap` or `trajectory`, or output folder of `experiment`.

    Returns:
        The path of the report.

    Raises:
        InputError: `out` contains no finished run, or its files are damaged.

    Examples:
        >>> import tempfile, torch, opdkernels
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.ones(4)}, f"{folder}/base.safetensors")
        >>> _ = opdkernels.analyze(f"{folder}/base.safetensors", f"{folder}/base.safetensors", f"{folder}/out")
        >>> opdkernels.write_report(f"{folder}/out").name
        'report.html'
    """
    folder = Path(out)
    if read_json_object(folder / RUN_FILE).get("format") == EXPERIMENT.format:
        from opdkernels.experiments.results import read_results

        has_analysis = (folder / "analysis" / "report.html").exists()
        return reports.write(folder, "experiment", {**read_results(folder), "analysis": has_analysis})
    about = load_finished(folder)
    if about["command"] == "overlap":
        page = reports.render("overlap", load_overlap(folder, about))
    elif about["command"] == "trajectory":
        page = reports.render("trajectory", load_trajectory(folder, about))
    else:
        page = reports.render("analyze", load(folder))
    return reports.write_page(folder, page)
