"""`analyze` end to end: outputs, resume, errors."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opdkernels import InputError, UsageError, analyze, load
from opdkernels.files import write_json
from opdkernels.metrics.tallies import TallyRecord, open_tallies
from opdkernels.ops.delta import delta, exact_float
from tests.analysis.conftest import save, trained, weights

DETERMINISTIC = ("tensors.parquet", "groups.parquet", "summary.json")


def contents(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in DETERMINISTIC]


def test_tensor_rows_have_both_views_in_file_order(pair, tmp_path):
    result = analyze(*pair, tmp_path / "out", csv=True)
    rows = result.tensors.to_pylist()
    assert [r["view"] for r in rows] == ["stored", "visible"] * 14
    assert {r["name"] for r in rows} == set(weights())
    read = pq.read_table(tmp_path / "out" / "tensors.parquet")
    assert read.equals(result.tensors)
    assert (tmp_path / "out" / "tensors.csv").read_text().count("\n") == len(rows) + 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "complete"
    again = load(tmp_path / "out")
    assert again.summary == result.summary
    assert again.tally("lm_head.weight") == result.tally("lm_head.weight")


def test_group_metrics_match_concatenated_tensors(pair):
    result = analyze(*pair)
    source, after = weights(), trained(weights())
    for group in result.groups.to_pylist():
        if group["by"] != "module" or group["view"] != "stored":
            continue
        names = [n for n in source if group["module"] in n and not (n.endswith("bias") and group["module"] != "bias")]
        tally = delta(torch.cat([source[n].flatten() for n in names]), torch.cat([after[n].flatten() for n in names]))
        assert group["numel"] == tally.numel
        assert group["delta_energy"] == pytest.approx(exact_float(tally.sum_delta_sq), rel=1e-12)
        assert group["frac_zero"] == pytest.approx(tally.hist_delta[0] / tally.numel, rel=1e-12)
        assert group["parameter_share"] == pytest.approx(tally.numel / sum(w.numel() for w in source.values()))
    model = result.summary["views"]["stored"]
    assert model["energy_share"] == model["energy_over_parameters"] == 1.0
    shares = [g["energy_share"] for g in result.groups.to_pylist() if g["by"] == "module" and g["view"] == "visible"]
    assert sum(shares) == pytest.approx(1)


def test_curve_matches_rows_and_bounds_hold(tmp_path):
    source = weights(torch.float32)
    after = trained(source)
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after))
    curve = result.summary["curve"]
    size = torch.cat([(after[n] - w).abs().flatten() for n, w in source.items()]).double()
    for eps, lower, upper in zip(curve["eps"], curve["stored_lower"], curve["stored_upper"], strict=True):
        assert lower <= float((size <= eps).double().mean()) + 1e-12
        assert float((size <= eps).double().mean()) <= upper + 1e-12
    at = min(range(len(curve["eps"])), key=lambda i: abs(curve["eps"][i] - 1e-5))
    assert curve["visible"][at] == pytest.approx(result.summary["views"]["visible"]["frac_le_1e-5"], abs=1e-12)
    assert all(a <= b for a, b in zip(curve["null"], curve["null"][1:], strict=False))


def test_results_do_not_depend_on_threads_slices_or_io(pair, tmp_path):
    analyze(*pair, tmp_path / "a", threads=1)
    analyze(*pair, tmp_path / "b", threads=2, memory="64MB")
    analyze(*pair, tmp_path / "c", io="read")
    analyze(*pair, tmp_path / "d", io="mmap")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c") == contents(tmp_path / "d")


def test_reference_backend_is_bit_identical_but_for_the_null(pair, tmp_path):
    analyze(*pair, tmp_path / "kernels")
    program = f"import opdkernels; opdkernels.analyze({pair[0]!r}, {pair[1]!r}, {str(tmp_path / 'reference')!r})"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "OPDKERNELS_BACKEND": "reference"}, check=True)
    assert json.loads((tmp_path / "reference" / "run.json").read_text())["machine"]["instruction_set"] == "reference"
    for name in ("tensors", "groups"):
        ours, reference = (pq.read_table(tmp_path / run / f"{name}.parquet") for run in ("kernels", "reference"))
        assert ours.column_names == reference.column_names
        for column in ours.column_names:
            if "null" in column and ours[column].type == pa.float64():
                values = [table[column].to_numpy() for table in (ours, reference)]
                np.testing.assert_allclose(*values, rtol=1e-8, atol=1e-12, err_msg=column)
            else:
                assert ours[column].equals(reference[column]), column
    ours, reference = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("kernels", "reference"))
    for summary in (ours, reference):
        views = summary.pop("views")["visible"]
        metrics = summary["spectra"]["metrics"]
        summary["spectra"]["metrics"] = {name: value for name, value in metrics.items() if "null" not in name}
        summary["null"] = [views[name] for name in sorted(views) if "null" in name] + summary["curve"].pop("null")
    assert ours.pop("null") == pytest.approx(reference.pop("null"), rel=1e-8, abs=1e-12)
    assert ours.keys() == reference.keys()
    for name in ours.keys() - {"verdict"}:
        assert ours[name] == reference[name], name
    assert ours["verdict"]["text"] == reference["verdict"]["text"]


def test_a_finished_run_is_not_read_again(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    before = contents(tmp_path / "out")
    seen = []
    analyze(*pair, tmp_path / "out", progress=lambda done, total, name: seen.append(name))
    assert len(seen) == 14  # one per tensor that is skipped; no slice is read
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("seed", range(3))
def test_resume_is_bit_exact(pair, tmp_path, seed):
    """SIGKILL after a random number of tensors, each of which is written at once."""
    num_tensors = random.Random(seed).randint(2, 13)
    program = (
        "import os, signal\n"
        "from opdkernels.runs import store\n"
        "store.FLUSH_EVERY_S = -1\n"
        "from opdkernels import analyze\n"
        "seen = []\n"
        "def show(done, total, name):\n"
        "    seen.append(name)\n"
        f"    if len(seen) == {num_tensors}: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"analyze({pair[0]!r}, {pair[1]!r}, {str(tmp_path / 'out')!r}, progress=show)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "running"
    result = analyze(*pair, tmp_path / "out")
    assert result.run["resumed_tensors"] > 0
    analyze(*pair, tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_interrupted_run_keeps_finished_tensors(pair, tmp_path):
    def interrupt(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(*pair, tmp_path / "out", progress=interrupt)
    result = analyze(*pair, tmp_path / "out")
    assert 0 < result.run["resumed_tensors"] < 14


def test_directory_of_another_run_is_error_and_untouched(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"holds another run .* choose another folder, or pass --overwrite"):
        analyze(pair[0], pair[0], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert analyze(pair[0], pair[0], tmp_path / "out", overwrite=True).summary["identical"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_inputs_that_changed_are_another_run(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    save(tmp_path / "trained", trained(weights(), seed=7))
    with pytest.raises(InputError, match="another run"):
        analyze(*pair, tmp_path / "out")


def test_an_input_that_changed_in_place_with_its_old_time_is_another_run(pair, tmp_path):
    analyze(*pair, tmp_path / "out", spectra="off")
    path = tmp_path / "trained" / "model.safetensors"
    status = path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # until the clock of the file system has moved on
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match="another run"):
        analyze(*pair, tmp_path / "out", spectra="off")


def test_file_changed_during_the_run_is_input_error(pair, tmp_path):
    changed = []

    def touch(done, total, name):
        if not changed:
            changed.append(time.time())
            os.utime(tmp_path / "trained" / "model.safetensors", (0, 0))

    with pytest.raises(InputError, match=r"model\.safetensors"):
        analyze(*pair, tmp_path / "out", progress=touch)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("io", ["mmap", "read"])
def test_file_truncated_while_open_is_input_error(tmp_path, io):
    source = {"w": torch.zeros(1 << 20, dtype=torch.bfloat16), "z": torch.zeros(1 << 20, dtype=torch.bfloat16)}
    paths = [save(tmp_path / "a", source), save(tmp_path / "b", source)]

    def cut(done, total, name):
        os.truncate(tmp_path / "b" / "model.safetensors", 5000)

    with pytest.raises(InputError, match=r"model\.safetensors"):
        analyze(*paths, tmp_path / "out", io=io, progress=cut)


def test_identical_checkpoints_are_reported(pair):
    result = analyze(pair[0], pair[0])
    assert result.summary["identical"]
    assert result.exit_status == 0
    assert result.summary["views"]["stored"]["relative_norm"] == 0
    assert result.summary["views"]["visible"]["changed_over_null"] is None


def test_non_finite_coordinates_are_counted_and_excluded(tmp_path):
    source = weights()
    after = trained(source)
    after["lm_head.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after))
    assert result.exit_status == 3
    assert result.summary["nonfinite"] == [{"name": "lm_head.weight", "coordinates": 3}]
    json.dumps(result.summary, allow_nan=False)


def test_failed_tensor_is_recorded_and_retried(pair, tmp_path, monkeypatch):
    from opdkernels.analysis import tallying

    def failing(source, trained, **options):
        if source.numel() == 96 * 32:
            raise MemoryError("no room")
        return delta(source, trained, **options)

    def failing_many(source, trained, **options):
        raise MemoryError("no room for all")

    monkeypatch.setattr(tallying, "delta", failing)
    monkeypatch.setattr(tallying, "delta_many", failing_many)  # the tensors are then tallied one by one
    result = analyze(*pair, tmp_path / "out")
    assert result.exit_status == 3
    assert len(result.summary["failed"]) == 4
    assert result.summary["failed"][0]["reason"] == "MemoryError: no room"
    monkeypatch.undo()
    repaired = analyze(*pair, tmp_path / "out")
    assert repaired.exit_status == 0
    analyze(*pair, tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_shape_mismatch_is_reported_with_status_3(tmp_path):
    source = weights()
    after = trained(source)
    after["model.layers.0.mlp.gate_proj.weight"] = after["model.layers.0.mlp.gate_proj.weight"].T
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after))
    assert result.exit_status == 3
    assert any("transpose" in e["reason"] for e in result.summary["excluded"])


@pytest.mark.parametrize("options", [{"memory": "3"}, {"memory": "lots"}, {"threads": 0}, {"io": "fast"}])
def test_invalid_options_are_named(pair, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        analyze(*pair, **options)


def test_unknown_options_are_named(pair):
    with pytest.raises(TypeError, match="colour"):
        analyze(*pair, colour=1)


def test_unreadable_records_are_input_error(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    next((tmp_path / "out" / "tallies").glob("*.arrow")).write_bytes(b"not arrow")
    with pytest.raises(InputError, match=r"\.arrow cannot be read"):
        load(tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is not JSON"):
        load(tmp_path / "out")
    with pytest.raises(InputError, match="holds no run"):
        load(tmp_path)


def test_unwritable_output_is_input_error(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        analyze(*pair, tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        analyze(*pair, tmp_path / "file" / "below")


def test_names_are_escaped_in_csv_and_html(tmp_path):
    names = ["=cmd|'/c calc'!A0", "../../escape", "<script>alert(1)</script>", "a\x1b[31mred\nline", ""]
    source = {n: torch.ones(4) for n in names}
    result = analyze(
        save(tmp_path / "a", source),
        save(tmp_path / "b", {n: 2 * w for n, w in source.items()}),
        tmp_path / "out",
        csv=True,
    )
    assert {r["name"] for r in result.tensors.to_pylist()} == set(names)
    text = (tmp_path / "out" / "tensors.csv").read_text()
    assert "\n=cmd" not in text
    assert "'=cmd" in text
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "out"}
    assert "<script>" not in result._repr_html_()


def test_failed_atomic_write_keeps_old_content(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_stored_tallies_answer_new_thresholds(pair, tmp_path):
    analyze(*pair, tmp_path / "out")
    shutil.rmtree(pair[0])
    tally = load(tmp_path / "out").tally("lm_head.weight")
    source, after = weights()["lm_head.weight"], trained(weights())["lm_head.weight"]
    from opdkernels.ops.delta import magnitudes

    for threshold in (2e-6, 3.7e-5):
        visible = (after - source).abs()
        assert tally.hist_delta[magnitudes <= float(torch.tensor(threshold).bfloat16())].sum() == int(
            (visible <= threshold).sum()
        )


def test_summary_matches_its_schema(pair, tmp_path):
    from opdkernels.analysis import summary

    source = weights()
    after = trained(source)
    after["lm_head.weight"][0, 0] = float("nan")
    after["extra"] = torch.ones(2)
    after["model.layers.0.mlp.gate_proj.weight"] = after["model.layers.0.mlp.gate_proj.weight"].T
    result = analyze(save(tmp_path / "a", source), save(tmp_path / "b", after))
    parsed = summary.Summary.model_validate_json(json.dumps(result.summary), strict=False)
    assert parsed.model_dump() == result.summary
    described = json.loads(summary.schema())["properties"]["views"]["properties"]
    for view, metrics in result.summary["views"].items():
        assert set(metrics) == set(described[view]["properties"]) == set(described[view]["required"])


@pytest.mark.parametrize("change", [
    lambda views: views.pop("stored"),
    lambda views: views.update(other=views["stored"]),
    lambda views: views["visible"].popitem(),
    lambda views: views["visible"].update(other=1.0),
    lambda views: views["visible"].update(numel=None),
    lambda views: views["stored"].update(nonfinite=-1),
])  # fmt: skip
def test_a_summary_with_other_views_is_refused(pair, tmp_path, change):
    from opdkernels.analysis import summary

    analyze(*pair, tmp_path)
    content = json.loads((tmp_path / "summary.json").read_text())
    assert summary.read_summary(tmp_path) == content
    change(content["views"])
    (tmp_path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"summary\.json is not valid: .*; run the command again with --overwrite"):
        summary.read_summary(tmp_path)


@pytest.mark.parametrize("change", [
    lambda content: content.pop("spectra"),
    lambda content: content.update(spectra=None),
    lambda content: content.update(views={}),
])  # fmt: skip
def test_a_summary_of_other_tables_is_refused(pair, tmp_path, change):
    analyze(*pair, tmp_path)
    content = json.loads((tmp_path / "summary.json").read_text())
    change(content)
    text = json.dumps(content).encode()
    (tmp_path / "summary.json").write_bytes(text)
    run = json.loads((tmp_path / "run.json").read_text())
    run["outputs"]["summary.json"] = hashlib.blake2b(text, digest_size=16).hexdigest()
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"has a summary\.json of other tables"):
        load(tmp_path)


def test_records_keep_counts_of_any_size():
    from opdkernels.ops.delta.many import SparseTally

    tally = delta(torch.ones(4), torch.tensor([1.0, 1, 1, 2]))
    for factor in (1, 1 << 40):
        tally.tables *= factor
        record = TallyRecord(0, "w", "w", (4,), "fp32", "fp32", "exact", SparseTally.of(tally))
        store = open_tallies(None)
        (back,) = store.decode(store.encode([record]))
        assert back.tally.dense() == tally
