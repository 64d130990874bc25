"""The commands as a user runs them: output, exit statuses and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.analysis.conftest import pair, save, trained, weights  # noqa: F401
from tests.in_process import run_cli as run


def run_process(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs a command in a separate process, with its exit status as the shell sees it and its two streams."""
    return subprocess.run(
        [sys.executable, "-m", "opdkernels", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_analyze_prints_both_views_and_writes_its_files(pair, tmp_path):  # noqa: F811
    done = run_process("analyze", *pair, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "stored" in done.stdout
    assert "visible" in done.stdout
    assert {"run.json", "summary.json", "tensors.parquet", "groups.parquet", "report.html", "tallies"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    again = run("report", tmp_path / "out")
    assert again.returncode == 0
    assert again.stdout.strip() == str(tmp_path / "out" / "report.html")


def test_json_is_only_the_summary(pair, tmp_path):  # noqa: F811
    done = run("analyze", *pair, "-o", tmp_path / "out", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "summary.json").read_text())


def test_identical_checkpoints_are_reported(pair, tmp_path):  # noqa: F811
    done = run("analyze", pair[0], pair[0], "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "identical: every coordinate has the same bits" in done.stdout


def test_overlap_prints_a_row_per_pair(pair, tmp_path):  # noqa: F811
    third = save(tmp_path / "third", trained(weights(), seed=9))
    done = run("overlap", *pair, third, "-o", tmp_path / "out", "--strata", "row,column", "--atol", "0")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(p["run_a"], p["run_b"]) for p in summary["pairs"]] == [("A", "B")]
    assert "within rows and |W|" in done.stdout
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert run("report", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == page


def test_inspect_reads_headers_and_plans(pair):  # noqa: F811
    done = run("inspect", *pair, "--json")
    result = json.loads(done.stdout)
    assert result["matched"] == 14
    assert result["plan"]["bytes"] == 2 * sum(w.nbytes for w in weights().values())
    spectra = result["plan"]["spectra"]
    assert spectra["matrices"] == sum(w.ndim == 2 for w in weights().values())
    assert spectra["flops"] > 0
    assert spectra["beyond_memory"] == 0
    assert "--spectra off" in run("inspect", *pair).stdout
    assert run("inspect", pair[0]).returncode == 0


def test_doctor_names_the_active_kernels():
    done = run("doctor")
    assert done.returncode == 0
    assert "CPU kernels" in done.stdout
    assert json.loads(run("doctor", "--json").stdout)["torch"] == torch.__version__


def test_error_of_a_process_is_one_line_and_its_exit_status(tmp_path):
    done = run_process("inspect", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("opdkernels: nowhere does not exist")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["analyze", "nowhere", "nowhere", "-o", "out"], 4, "nowhere does not exist"),
        (["inspect", "nowhere"], 4, "nowhere does not exist"),
        (["report", "nowhere"], 4, "holds no run"),
        (["overlap", "nowhere", "a", "b", "-o", "out"], 4, "nowhere does not exist"),
        (["overlap", "nowhere", "a", "-o", "out"], 2, "2 to 16 runs"),
        (["patch", "create", "nowhere", "nowhere", "-o", "out"], 4, "nowhere does not exist"),
        (
            ["patch", "apply", "nowhere", "nowhere", "-o", "out"],
            4,
            "nowhere does not exist; give a file that patch create wrote",
        ),
        (["patch", "info", "nowhere"], 4, "nowhere does not exist"),
        (["patch", "create", "a", "b"], 2, "--out"),
        (["patch", "repair"], 2, "repair"),
        (["graft", "nowhere", "nowhere", "--select", "mlp", "-o", "out"], 4, "nowhere does not exist"),
        (["graft", "nowhere", "nowhere", "-o", "out"], 2, "give masks, or"),
        (["analyze", "a", "b", "-o", "out", "--memory", "1"], 2, "the minimum is 64MB"),
        (["analyze", "a", "b", "-o", "out", "--threads", "0"], 2, "threads"),
        (["overlap", "a", "b", "c", "-o", "out", "--strata", "diagonal"], 2, "strata"),
        (["analyze", "a", "b"], 2, "--out"),
        (["colour"], 2, "colour"),
    ],
)
def test_errors_are_one_line_with_their_exit_status(tmp_path, arguments, status, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_warnings_are_one_line(tmp_path):
    done = run(
        "distill",
        "--student",
        "nowhere",
        "--teacher",
        "nowhere",
        "--prompts",
        "addition",
        "--divergence",
        "jsd",
        "--beta",
        "0.01",
        "-o",
        tmp_path / "out",
        env={"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 4
    first, _ = done.stderr.splitlines()
    assert (
        first == "opdkernels: warning: jsd with beta 0.01 is close to 0 for any two models: at 0 and 1 it is a KL, "
        "but not near them"
    )


def test_excluded_tensors_end_with_status_3(tmp_path):
    source = weights()
    after = trained(source)
    after["lm_head.weight"] = after["lm_head.weight"].T.contiguous()[:, :5]
    done = run("analyze", save(tmp_path / "a", source), save(tmp_path / "b", after), "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "excluded: lm_head.weight" in done.stdout


def test_hostile_names_do_not_reach_the_terminal(tmp_path):
    name = "w\x1b[2Jx\u202e"
    a, b = (
        save(tmp_path / "a", {name: torch.ones(3)}),
        save(tmp_path / "b", {name: torch.tensor([1.0, float("nan"), 1])}),
    )
    done = run("analyze", a, b, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "\x1b" not in done.stdout + done.stderr
    assert "\u202e" not in done.stdout
    assert "w\\x1b[2Jx\\u202e: 1 coordinates left out" in done.stdout


def test_patch_round_trip_is_byte_exact(pair, tmp_path):  # noqa: F811
    done = run("patch", "create", *pair, "-o", tmp_path / "p", "--zstd")
    assert done.returncode == 0, done.stderr
    assert "changed" in done.stdout
    result = json.loads(run("patch", "info", tmp_path / "p", "--json").stdout)
    assert (result["tensors"], result["files"], result["tensors_whole"]) == (14, ["model.safetensors"], [])
    assert result["base_digest"] in done.stdout
    done = run("patch", "apply", pair[0], tmp_path / "p", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = [(Path(folder) / "model.safetensors").read_bytes() for folder in (pair[1], tmp_path / "out")]
    assert written[0] == written[1]
    assert f"{tmp_path / 'out'}: restored model.safetensors" in done.stdout
    assert result["trained_digest"] in done.stdout
    done = run("patch", "apply", pair[1], tmp_path / "p", "-o", tmp_path / "other")
    assert done.returncode == 4
    assert "already has the trained" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_graft_and_its_inverse_add_up(pair, tmp_path):  # noqa: F811
    result = json.loads(run("graft", *pair, "--select", "mlp", "-o", tmp_path / "out", "--json").stdout)
    assert 0 < result["kept"] < result["changed"]
    other = run("graft", *pair, "--select", "mlp", "--invert", "-o", tmp_path / "rest").stdout
    assert (
        f"{result['changed'] - result['kept']:,} of the {result['changed']:,} changed coordinates are from TRAINED"
        in other
    )


def test_files_that_the_base_lacks_end_with_status_3(pair, tmp_path):  # noqa: F811
    for folder in pair:
        for name in ("config.json", "tokenizer.json"):
            (Path(folder) / name).write_text("{}")
    assert run("patch", "create", *pair, "-o", tmp_path / "p", "-q").stdout == ""
    (Path(pair[0]) / "config.json").unlink()
    done = run("patch", "apply", pair[0], tmp_path / "p", "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "left out: config.json" in done.stdout
    assert "files   tokenizer.json (from the base)\n" in done.stdout


def test_folder_in_place_of_a_file_is_one_line(pair, tmp_path):  # noqa: F811
    assert run("analyze", *pair, "-o", tmp_path / "out", "--spectra", "off").returncode == 0
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").mkdir()
    done = run("analyze", *pair, "-o", tmp_path / "out", "--spectra", "off")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "run the same command again" in done.stderr


def test_lists_are_separated_by_commas(run, inputs, tmp_path):
    checkpoints = [inputs[name] for name in ("base", "trained", "later")]
    status, _, _ = run("trajectory", *checkpoints, "--spectra", "off", "--steps", "20, 40", "-o", tmp_path / "t", "-q")
    assert status == 0
    assert [step["step"] for step in json.loads((tmp_path / "t" / "summary.json").read_text())["steps"]] == [20, 40]
    status, _, error = run("overlap", *checkpoints, "--strata", "row,column", "-o", tmp_path / "o", "-q")
    assert (status, error) == (0, "")
    status, _, error = run("trajectory", *checkpoints, "--steps", "20,forty", "-o", tmp_path / "x", "-q")
    assert status == 2
    assert "forty" in error
