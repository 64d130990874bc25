"""A patch gives back the trained checkpoint byte for byte, from any layout of the base, on disk or alive."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import opdkernels
from opdkernels import InputError
from opdkernels.ops.patch import bits
from opdkernels.patch import apply, apply_to, create, info, output
from tests.patch.conftest import after, before, changed, hashes, save, some


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (3, 1), (2, 3)], ids=str)
def test_applied_files_equal_the_trained_files(tmp_path, shards, zstd, short_segments):
    base = before()
    a = save(tmp_path / "a", base, shards[0], config__json=b"{}")
    b = save(tmp_path / "b", after(base), shards[1], config__json=b"{}", generation_config__json=b"{1}")
    create(a, b, tmp_path / "p", zstd=zstd)
    result = apply(a, tmp_path / "p", tmp_path / "out")
    assert result["left_out"] == []
    assert hashes(tmp_path / "out") == hashes(b)


@pytest.mark.parametrize("io", ["read", "mmap"])
def test_patch_is_independent_of_the_reading_method(pair, tmp_path, io, short_segments):
    create(*pair, tmp_path / "p")
    create(*pair, tmp_path / "q", io=io)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    apply(pair[0], tmp_path / "p", tmp_path / "out", io=io)
    assert hashes(tmp_path / "out") == hashes(pair[1])


def test_patch_is_independent_of_threads_and_instruction_set(isa, threads, pair, tmp_path, zstd):
    create(*pair, tmp_path / "p", zstd=zstd)
    torch.set_num_threads(3)
    create(*pair, tmp_path / "q", zstd=zstd)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()


def test_the_reference_reads_and_writes_the_same_patch(pair, tmp_path):
    create(*pair, tmp_path / "p")
    program = (
        "import sys, opdkernels\na, b, p, out = sys.argv[1:]\n"
        "opdkernels.patch.create(a, b, p)\nopdkernels.patch.apply(a, p, out)\n"
    )
    environment = {**os.environ, "OPDKERNELS_BACKEND": "reference"}
    subprocess.run(
        [sys.executable, "-c", program, *pair, str(tmp_path / "q"), str(tmp_path / "out")], check=True, env=environment
    )
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    assert hashes(tmp_path / "out") == hashes(pair[1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_small_checkpoint_round_trips(tmp_path_factory, data):
    dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.float8_e5m2])
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
    shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
    layout = data.draw(st.dictionaries(names, st.tuples(shapes, dtypes), min_size=1, max_size=4))
    base = {name: some(*what, 1) for name, what in layout.items()}
    trained = {name: changed(tensor, data.draw(st.sampled_from([0.0, 0.1, 1.0])), 2) for name, tensor in base.items()}
    folder = tmp_path_factory.mktemp("any")
    a, b = save(folder / "a", base), save(folder / "b", trained)
    create(a, b, folder / "p", zstd=data.draw(st.booleans()))
    apply(a, folder / "p", folder / "out")
    assert hashes(folder / "out") == hashes(b)


def test_equal_tensors_are_free_and_incompatible_ones_are_stored_in_full(pair, tmp_path):
    result = create(*pair, tmp_path / "p")
    assert result["tensors_whole"] == ["new", "recast", "reshaped"]
    assert result == info(tmp_path / "p")
    assert create(pair[0], pair[0], tmp_path / "q")["changed"] == 0
    apply(pair[0], tmp_path / "q", tmp_path / "out")
    assert hashes(tmp_path / "out")["model.safetensors"] == hashes(pair[0])["model.safetensors"]
    stored = load_file(tmp_path / "p")
    assert same(stored["whole:new"], load_file(Path(pair[1]) / "model.safetensors")["new"])


def test_extra_files_come_from_the_patch_or_the_base(pair, tmp_path):
    (Path(pair[1]) / "modeling.py").write_text("import os")
    result = create(*pair, tmp_path / "p")
    assert result["extra_files"] == {"config.json": "from the base", "tokenizer.json": "stored"}
    (Path(pair[0]) / "config.json").write_text("{}")
    result = apply(pair[0], tmp_path / "p", tmp_path / "out")
    assert result["left_out"] == ["config.json"]
    assert sorted(hashes(tmp_path / "out")) == ["model.safetensors", "tokenizer.json"]


def test_patch_of_a_single_file_has_no_extra_files(pair, tmp_path):
    create(*(f"{folder}/model.safetensors" for folder in pair), tmp_path / "p")
    apply(f"{pair[0]}/model.safetensors", tmp_path / "p", tmp_path / "out")
    assert hashes(tmp_path / "out") == {"model.safetensors": hashes(pair[1])["model.safetensors"]}


def test_quantised_checkpoints_and_adapters_round_trip(tmp_path):
    base = {
        "w.weight": some((64, 64), torch.float8_e4m3fn, 0),
        "w.weight_scale_inv": some((1, 1), torch.float32, 1),
        "x.lora_A.weight": some((4, 9), torch.bfloat16, 2),
    }
    a = save(tmp_path / "a", base)
    b = save(tmp_path / "b", {name: changed(tensor, 0.2, 3) for name, tensor in base.items()})
    create(a, b, tmp_path / "p")
    apply(a, tmp_path / "p", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(b)


@pytest.mark.parametrize("which", ["base", "trained", "both"])
def test_pytorch_files_are_written_as_safetensors(tmp_path, which, short_segments):
    """Every tensor is bit-identical; the files have other headers, as PyTorch files have none to restore."""
    base = {name: tensor for name, tensor in before().items() if "float8" not in name}
    trained = after(base)
    trained["strided"] = some((40, 30), torch.float64, 6).T
    base["strided"] = some((30, 40), torch.float64, 5)
    trained["tied"] = trained["equal"]
    for name, tensors, as_torch in (("a", base, which != "trained"), ("b", trained, which != "base")):
        if as_torch:
            (tmp_path / name).mkdir()
            torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        else:
            save(tmp_path / name, {n: t.contiguous().clone() for n, t in tensors.items()})
    result = create(tmp_path / "a", tmp_path / "b", tmp_path / "p")
    assert ("tied" in result["tensors_whole"]) == (which == "base")  # one storage under two names is stored once
    apply(tmp_path / "a", tmp_path / "p", tmp_path / "out")
    assert sorted(hashes(tmp_path / "out")) == ["model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == trained.keys()
    assert all(same(written[name], tensor) for name, tensor in trained.items())


def test_sharded_pytorch_files_keep_their_layout(tmp_path):
    base = before()
    del base["of torch.float8_e4m3fn"]
    trained = after(base)
    names = list(trained)
    (tmp_path / "b").mkdir()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for i, file in enumerate(files):
        torch.save({name: trained[name] for name in names[i::2]}, tmp_path / "b" / file)
    (tmp_path / "b" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {name: files[i % 2] for i, name in enumerate(names)}})
    )
    a = save(tmp_path / "a", base)
    create(a, tmp_path / "b", tmp_path / "p")
    apply(a, tmp_path / "p", tmp_path / "out")
    assert sorted(hashes(tmp_path / "out")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    create(tmp_path / "b", tmp_path / "out", tmp_path / "none")
    assert info(tmp_path / "none")["changed"] == 0
    assert info(tmp_path / "none")["tensors_whole"] == []


def other_source(pair, tmp_path, change) -> str:
    tensors = load_file(Path(pair[0]) / "model.safetensors")
    change(tensors)
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors["size 70001"].view(torch.int16)[70_000] ^= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            flip,
            r"other differs from the base: its digest is [0-9a-f]{32}, that of the base [0-9a-f]{32} \(size 70001\):"
            r" .*p is a patch for another base, with digest [0-9a-f]{32}",
        ),
        (lambda tensors: tensors.pop("scalar"), r"lacks a tensor that the patch changes \(scalar\)"),
        (
            lambda tensors: tensors.update({"size 31": torch.zeros(32)}),
            r"has a tensor of F32 \[32\] where the patch changes BF16 \[31\] \(size 31\)",
        ),
    ],
    ids=["a bit", "a tensor", "a shape"],
)
def test_different_base_is_rejected_and_nothing_is_left(pair, tmp_path, change, message):
    create(*pair, tmp_path / "p")
    other = other_source(pair, tmp_path, change)
    there = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as error:
        apply(other, tmp_path / "p", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == there


def test_base_may_have_more_tensors(pair, tmp_path):
    create(*pair, tmp_path / "p")
    apply(
        other_source(pair, tmp_path, lambda tensors: tensors.update(more=torch.zeros(3))),
        tmp_path / "p",
        tmp_path / "out",
    )
    assert hashes(tmp_path / "out")["model.safetensors"] == hashes(pair[1])["model.safetensors"]


def test_existing_outputs_are_not_modified(pair, tmp_path):
    (tmp_path / "p").write_bytes(b"mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="exists and is not a patch; choose another name"):
            create(*pair, tmp_path / "p", overwrite=overwrite)
    assert (tmp_path / "p").read_bytes() == b"mine"
    (tmp_path / "p").unlink()
    create(*pair, tmp_path / "p")
    before = (tmp_path / "p").read_bytes()
    with pytest.raises(InputError, match="exists; choose another name, or pass --overwrite"):
        create(pair[0], pair[0], tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before
    create(*pair, tmp_path / "p", overwrite=True)
    assert (tmp_path / "p").read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        apply(pair[0], tmp_path / "p", tmp_path / "out")
    assert sorted(hashes(tmp_path / "out")) == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    apply(pair[0], tmp_path / "p", tmp_path / "out")


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = ["opdkernels", "patch", *sys.argv[1:]]
runpy.run_module("opdkernels", run_name="__main__")
"""


def test_full_disk_is_a_one_line_error_and_leaves_no_output(pair, tmp_path):
    create(*pair, tmp_path / "p")
    there = set(tmp_path.iterdir())
    for arguments in (
        ["create", *pair, "-o", tmp_path / "q"],
        ["apply", pair[0], tmp_path / "p", "-o", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 4
        assert done.stderr.count("\n") == 1, done.stderr
        assert "File too large" in done.stderr
        assert "free some space" in done.stderr
        assert str(arguments[-1]) in done.stderr
        assert set(tmp_path.iterdir()) == there


@pytest.mark.parametrize("command", ["create", "apply"])
def test_killed_command_leaves_no_output(pair, tmp_path, command):
    create(*pair, tmp_path / "p")
    arguments = {"create": [*pair, tmp_path / "q"], "apply": [pair[0], tmp_path / "p", tmp_path / "out"]}[command]
    program = (
        "import sys, time, opdkernels.patch as patch\nfrom opdkernels.patch import output\n"
        "output.Writer.write_at = output.Writer.rewrite = lambda *_: (print('stuck', flush=True), time.sleep(600))\n"
        "getattr(patch, sys.argv[1])(*sys.argv[2:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, command, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path(arguments[-1]).exists()
    {"create": create, "apply": apply}[command](*arguments)


def live(base: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model: those that both have, as parameters where they can be."""
    names = [
        name
        for name in trained
        if name in base and base[name].shape == trained[name].shape and base[name].dtype == trained[name].dtype
    ]
    return {name: base[name].clone() for name in names}


@pytest.fixture
def alive(tmp_path, zstd) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path]:
    base, trained = before(), after(before())
    model = live(base, trained)
    wanted = {name: trained[name] for name in model}
    create(save(tmp_path / "a", base), save(tmp_path / "b", wanted), tmp_path / "p", zstd=zstd)
    return model, wanted, tmp_path / "p"


def test_apply_to_changes_a_state_dict_in_place(alive, short_segments):
    model, wanted, path = alive
    held = dict(model)
    model["more"] = torch.ones(3)
    wide = torch.zeros(70_001, 2, dtype=torch.bfloat16)
    wide[:, 0] = model["size 70001"]
    model["size 70001"] = held["size 70001"] = wide[:, 0]  # of strides
    model["of torch.float32"] = held["of torch.float32"] = torch.nn.Parameter(model["of torch.float32"])
    version = model["of torch.float32"]._version
    assert sorted(apply_to(model, path)) == sorted(wanted)
    assert all(model[name] is held[name] and same(model[name].detach(), wanted[name]) for name in wanted)
    assert model["of torch.float32"]._version > version
    assert not wide[:, 1].any()
    assert model["more"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="already has the trained"):
        apply_to(model, path)


def test_mismatched_state_dict_is_not_modified(alive):
    model, _, path = alive
    model["size 70001"][3] = 1.0
    untouched = {name: tensor.clone() for name, tensor in model.items()}
    with pytest.raises(InputError, match="the state dict differs from the base: its digest is"):
        apply_to(model, path)
    assert all(same(model[name], untouched[name]) for name in model)
    scalar = model.pop("scalar")
    with pytest.raises(InputError, match=r"has no tensor scalar of F32 \[\]"):
        apply_to(model, path)
    model["scalar"] = scalar.double()
    with pytest.raises(
        InputError, match=r"scalar is F64 \[\] in the state dict and F32 \[\] in the patch; load the model"
    ):
        apply_to(model, path)


def test_tied_tensors_of_a_state_dict_change_once(tmp_path, zstd):
    """Differences that are applied twice would give wrong values."""
    w = some((300, 40), torch.bfloat16, 0)
    v = changed(w, 0.2, 1)
    for name, tensor in (("a", w), ("b", v)):
        (tmp_path / name).mkdir()
        torch.save({"embed": tensor, "head": tensor}, tmp_path / name / "pytorch_model.bin")
    create(tmp_path / "a", tmp_path / "b", tmp_path / "p", zstd=zstd)
    tied = {"embed": w.clone()}
    tied["head"] = tied["embed"]
    assert apply_to(tied, tmp_path / "p") == ["embed"]
    assert same(tied["head"], v)
    untied = {"embed": w.clone(), "head": w.clone()}
    assert sorted(apply_to(untied, tmp_path / "p")) == ["embed", "head"]
    assert same(untied["head"], v)
    assert same(untied["embed"], v)
    create(
        save(tmp_path / "c", {"embed": w.clone(), "head": w.clone()}),
        save(tmp_path / "d", {"embed": v, "head": w.clone()}),
        tmp_path / "q",
        zstd=zstd,
    )
    tied = {"embed": w.clone()}
    tied["head"] = tied["embed"]
    with pytest.raises(InputError, match="are one tensor in the state dict and two in the patch"):
        apply_to(tied, tmp_path / "q")
    assert same(tied["head"], w)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (lambda x: x[:32], "w and x in the state dict share memory"),
        (lambda x: x.view(-1), "w and x in the state dict share memory"),
        (lambda x: torch.zeros(1, 4, dtype=x.dtype).expand(32, 4), "elements of x in the state dict share memory"),
    ],
    ids=["a part", "flat", "expanded"],
)
def test_tensors_that_share_memory_are_rejected_before_anything_changes(tmp_path, view, message, zstd):
    w = torch.zeros(64, 4)
    model = {"w": w, "x": view(w)}
    base = {name: tensor.clone() for name, tensor in model.items()}
    trained = {name: tensor + 1 for name, tensor in base.items()}
    create(save(tmp_path / "a", base), save(tmp_path / "b", trained), tmp_path / "p", zstd=zstd)
    with pytest.raises(InputError, match=message):
        apply_to(model, tmp_path / "p")
    assert all(torch.equal(model[name], base[name]) for name in model)


def test_nothing_is_written_after_an_error(tmp_path, monkeypatch):
    """Workers that still restore pieces when the main thread fails have ended before the file is closed."""
    w = torch.zeros(3 * (1 << 22), dtype=torch.bfloat16)  # three segments
    create(save(tmp_path / "a", {"w": w}), save(tmp_path / "b", {"w": w + 1}), tmp_path / "p")
    failed, closed, late = threading.Event(), threading.Event(), []
    write_at, close = output.Writer.write_at, output.Writer.close

    def slow_write(self, offset, content):
        if offset > 1 << 22:  # not the header and the first piece
            failed.wait()
            closed.wait(0.2)
        late.append(closed.is_set())
        write_at(self, offset, content)

    def noted_close(self):
        closed.set()
        close(self)

    def progress(done, total, name):
        failed.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(output.Writer, "write_at", slow_write)
    monkeypatch.setattr(output.Writer, "close", noted_close)
    with pytest.raises(KeyboardInterrupt):
        apply(tmp_path / "a", tmp_path / "p", tmp_path / "out", progress=progress)
    assert len(late) > 1
    assert not any(late)


def test_examples_of_the_docstrings():
    for module in ("opdkernels.patch", "opdkernels.patch.create"):
        assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_importing_patch_is_enough(pair, tmp_path):
    assert opdkernels.patch.create(*pair, tmp_path / "p")["version"] == 1


def test_memory_is_bounded_by_the_segment_size(tmp_path):
    """200 MB in one tensor; memory without mapped files is a fraction of it."""
    program = """
import sys, threading, time, opdkernels
opdkernels.patch
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
import opdkernels.ops.patch
begun = most = anonymous()
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
a, b, p, out = sys.argv[1:]
opdkernels.patch.create(a, b, p)
opdkernels.patch.apply(a, p, out)
print(most - begun)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc")
    n = 100_000_000
    base = torch.zeros(n, dtype=torch.bfloat16)
    trained = base.clone()
    trained[::5] = 1.0
    for name, tensor in (("a", base), ("b", trained)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
    paths = [str(tmp_path / name) for name in ("a", "b", "p", "out")]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert int(done.stdout) < 150e6


def test_apply_to_takes_a_state_dict_and_no_module(tmp_path):
    with pytest.raises(TypeError, match=r"Linear; give model.state_dict\(\)"):
        apply_to(torch.nn.Linear(2, 2), tmp_path / "patch")
