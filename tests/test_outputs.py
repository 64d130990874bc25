"""What a command may write: never an input, never what this package did not write."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from opdkernels import InputError, UsageError, analyze, files, outputs, overlap, patch, trajectory
from opdkernels.cli import main
from opdkernels.masks import MaskSet, changed
from opdkernels.masks.mask_set import from_bools
from opdkernels.outputs import ANALYSIS, DISTILLATION, MASKS, PATCH, validate_file, validate_run_folder

WRITERS = {
    "mask changed": ("mask", "changed", "base", "trained"),
    "mask top-changed": ("mask", "top-changed", "base", "trained"),
    "mask near-zero": ("mask", "near-zero", "base"),
    "mask principal": ("mask", "principal", "base"),
    "mask safe": ("mask", "safe", "base"),
    "mask random": ("mask", "random", "base"),
    "mask magnitude-matched": ("mask", "magnitude-matched", "m", "base"),
    "mask combine": ("mask", "combine", "m", "xor", "m"),
    "patch create": ("patch", "create", "base", "trained"),
    "patch apply": ("patch", "apply", "base", "p"),
    "graft": ("graft", "base", "trained", "--select", "mlp"),
    "analyze": ("analyze", "base", "trained", "--spectra", "off"),
    "overlap": ("overlap", "base", "trained", "third"),
    "trajectory": ("trajectory", "base", "trained", "third", "--spectra", "off"),
}
NEW_FOLDERS = ("patch apply", "graft")
FILES = [name for name in WRITERS if name.startswith("mask") or name == "patch create"]
FOLDERS = [name for name in WRITERS if name not in FILES]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with checkpoints in `base`, `trained` and `third`, masks `m` and a patch `p`."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "self_attn.q_proj")]
    for i, folder in enumerate(("base", "trained", "third")):
        (tmp_path / folder).mkdir()
        tensors = {name: torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) for name in names}
        if i:
            tensors = {n: w + (torch.rand(8, 8, generator=generator) < 0.3) * 0.1 for n, w in tensors.items()}
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_text("{}")
    changed("base", "trained").save("m")
    patch.create("base", "trained", "p")
    return tmp_path


def command(name, out, *more):
    """Runs a command. Returns its exit status and what it wrote to stderr."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main([*WRITERS[name], "-o", str(out), *more])
    return int(end.value.code), error.getvalue()


def flags(name):
    """With --overwrite, where a command has it, and without."""
    return [()] if name in NEW_FOLDERS else [(), ("--overwrite",)]


def contents(folder):
    """Every file below a folder with its bytes, links as their targets, and folders."""
    return {
        os.fspath(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(place, name, out, match=""):
    before = contents(place)
    for more in flags(name):
        status, error = command(name, out, *more)
        assert status in (2, 4), (name, out, more)
        assert error.startswith("opdkernels: "), error
        assert error.count("\n") == 1, error
        assert match in error
        assert "delete" not in error
        assert contents(place) == before, (name, out, more)


@pytest.mark.parametrize("name", WRITERS)
def test_inputs_are_never_replaced(place, name):
    os.link("trained/model.safetensors", "hard-link")
    os.symlink("base/model.safetensors", "soft-link")
    os.symlink("base", "folder-link")
    for out in (
        "base",
        "folder-link",
        "base/model.safetensors",
        "base/config.json",
        "hard-link",
        "soft-link",
        "p",
        "m",
    ):
        if out in WRITERS[name]:
            assert_refused(place, name, out, "is an input of this command" if os.path.isdir(out) else "")
        elif (out == "m" and name.startswith("mask")) or (out == "p" and name == "patch create"):
            assert command(name, out, "--overwrite")[0] == 0  # of this kind, and no input
        else:
            assert_refused(place, name, out)


@pytest.mark.parametrize("name", [name for name in FILES if "base" in WRITERS[name]])
@pytest.mark.parametrize(
    "out",
    [
        *("pytorch_model.bin", "model-00002-of-00002.safetensors", "model.safetensors", "changed.safetensors"),
        *("x.safetensors.index.json", "adapter_config.json", "tokenizer.json", "adapter_model.x", ".metadata"),
    ],
)
def test_a_new_file_is_not_one_that_an_input_would_be_read_from(place, name, out):
    """`model.safetensors` comes before shards and other formats: the next command would read it as the model."""
    for folder in ("base", "trained"):
        (place / folder / "model.safetensors").rename(place / folder / "weights.safetensors")
    assert_refused(place, name, f"base/{out}", "would be read as a file of the checkpoint")
    assert command(name, f"third/{out}.masks", "--overwrite")[0] == 0
    assert command(name, "base/changed.safetensors.masks")[0] == 0


def test_a_new_file_next_to_a_file_of_weights_is_not_its_configuration(place):
    for folder in ("base", "trained"):
        shutil.move(f"{folder}/model.safetensors", f"{folder}.safetensors")
    masks = ("mask", "changed", "base.safetensors", "trained.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(WRITERS, "mask changed", masks)
        assert_refused(place, "mask changed", "config.json", "would be read as a file of the checkpoint")
        assert command("mask changed", "changed.safetensors")[0] == 0


def test_an_input_of_the_same_kind_is_named_as_an_input(place):
    os.link("m", "m-link")
    for name in ("mask combine", "mask magnitude-matched"):
        for out in ("m", "m-link", "./trained/../m"):
            assert_refused(place, name, out, "is an input of this command (MASKS)")


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_are_never_replaced(place, name):
    (place / "notes.txt").write_text("mine")
    (place / "empty").touch()
    (place / "header").write_bytes((10).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}')
    (place / "folder").mkdir()
    os.mkfifo(place / "fifo")
    others = ["third/model.safetensors", "notes.txt", "empty", "header", "folder"]
    for out in [*others, "p" if name.startswith("mask") else "m"]:
        assert_refused(place, name, out)
    for more in ((), ("--overwrite",)):
        assert command(name, "fifo", *more)[0] == 4


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_others_are_never_touched(place, name):
    for folder, contained in {
        "foreign": {"run.json": '{"mine": 1}', "summary.json": "mine", "steps/precious": "x"},
        "broken": {"run.json": "{", "tallies/000001.0.arrow": "x"},
        "distilled": {"run.json": json.dumps({"format": DISTILLATION.format, "command": "distill"}), "log.jsonl": "{}"},
        "tables": {"summary.json": "mine"},
        "pages": {"report.html": "mine"},
        "steps-of-mine": {"steps/precious": "x"},
    }.items():
        for file, content in contained.items():
            (place / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (place / folder / file).write_text(content)
        assert_refused(place, name, folder, "choose another")
    (place / "mine").write_text("x")
    assert_refused(place, name, "mine")
    assert_refused(place, name, "mine/below")


@pytest.mark.parametrize("name", WRITERS)
def test_outputs_that_no_file_can_be(place, name):
    assert_refused(place, name, "", "the output has no name; give one to -o")
    assert_refused(place, name, "/", "is the root of the file system")
    assert_refused(place, name, "a\0b", "NUL")
    assert_refused(place, name, "-", "the output is -, but")
    for out in ("~", "~/out"):
        assert_refused(place, name, out, "begins with ~, which the shell has not replaced")
    assert command(name, "./-")[0] == 0


@pytest.mark.parametrize("name", FILES)
def test_the_current_folder_is_no_file(place, name):
    for out in (".", "..", "third/", "base/..", "new/", "new/.", "new/deep/"):
        assert_refused(place, name, out, "is a folder; give the name of a file")


@pytest.mark.parametrize("name", [*FILES, *NEW_FOLDERS])
def test_a_place_that_cannot_be_written_is_refused(place, name, monkeypatch):
    (place / "notes.txt").write_text("mine")
    (place / "sealed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != "sealed")  # root may write anywhere
    for out in ("notes.txt/out", "notes.txt/deep/out"):
        assert_refused(place, name, out, "notes.txt is not a folder; choose another place")
    for out in ("sealed/out", "sealed/deep/out"):
        assert_refused(place, name, out, "sealed is not writable; choose another place")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_to_a_folder_that_does_not_exist_yet_stays_a_link(place, name):
    os.symlink("elsewhere", "link")
    assert command(name, "link")[0] == 0
    assert os.readlink("link") == "elsewhere"
    assert any((place / "elsewhere").iterdir())


@pytest.mark.parametrize("name", FOLDERS)
def test_the_current_folder_may_be_the_output(place, name, monkeypatch):
    work = place / "work"
    work.mkdir()
    for entry in ("base", "trained", "third", "m", "p"):
        monkeypatch.setitem(WRITERS, name, tuple(f"../{a}" if a == entry else a for a in WRITERS[name]))
    inode = work.stat().st_ino
    monkeypatch.chdir(work)
    assert command(name, ".")[0] == 0
    assert (work.stat().st_ino, os.stat(".").st_ino) == (inode, inode)
    assert any(work.iterdir())
    assert not list(place.rglob("*.tmp"))


@pytest.mark.parametrize("name", FOLDERS)
def test_links_to_empty_folders_and_empty_file_systems(place, name):
    (place / "target" / "lost+found").mkdir(parents=True)
    os.symlink("target", place / "link")
    assert command(name, "link")[0] == 0
    assert os.readlink("link") == "target"
    assert (place / "target" / "lost+found").is_dir()
    assert len(os.listdir("target")) > 1
    assert not list(place.rglob("*.tmp"))


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_file_stays_a_link(place, name):
    (place / "elsewhere").mkdir()
    os.symlink("elsewhere/new", "link")
    assert command(name, "link")[0] == 0
    assert os.readlink("link") == "elsewhere/new"
    assert (place / "elsewhere" / "new").is_file()


@pytest.mark.parametrize("name", FILES)
def test_existing_outputs_need_overwrite(place, name):
    assert command(name, "out")[0] == 0
    first = (place / "out").read_bytes()
    if name == "patch create":
        patch.create("trained", "base", "other")
    else:
        from_bools({"w": torch.tensor([True, False])}).save("other")
    shutil.copy("other", "out")
    status, error = command(name, "out")
    assert (status, "out exists; choose another name, or pass --overwrite" in error) == (4, True)
    assert (place / "out").read_bytes() == (place / "other").read_bytes()
    assert command(name, "out", "--overwrite")[0] == 0
    assert (place / "out").read_bytes() == first


@pytest.mark.parametrize("name", [name for name in WRITERS if name.startswith("mask")])
def test_the_same_mask_command_twice_gives_the_same_bytes(place, name):
    assert command(name, "first")[0] == command(name, "second")[0] == 0
    assert (place / "first").read_bytes() == (place / "second").read_bytes()
    before = (place / "first").stat()
    assert command(name, "first")[0] == 0  # nothing to do
    assert (place / "first").stat() == before


def test_leftovers_of_the_same_output_are_removed(place):
    leftover = ".out.opdkernels-0123456789abcdef.tmp"
    for name in WRITERS:
        shutil.rmtree("out", ignore_errors=True)
        (place / "out").unlink(missing_ok=True)
        if name in FILES or name in NEW_FOLDERS:
            (place / leftover).write_bytes(b"half")
        else:
            assert command(name, "out")[0] == 0
            (place / "out" / "tallies").mkdir(exist_ok=True)
            (place / "out" / leftover).write_bytes(b"half")
            (place / "out" / "tallies" / leftover).write_bytes(b"half")
        assert command(name, "out")[0] == 0
        assert not list(place.rglob("*.tmp")), name


@pytest.mark.parametrize("name", FILES)
def test_a_leftover_of_a_finished_output_is_removed(place, name):
    """The process was killed after the output got its name and before its temporary name was removed."""
    assert command(name, "out")[0] == 0
    os.link("out", ".out.opdkernels-0123456789abcdef.tmp")
    assert command(name, "out")[0] == (4 if name == "patch create" else 0)
    assert not list(place.rglob("*.tmp"))


def test_python_functions_follow_the_same_rules(place):
    for write in (
        lambda out: changed("base", "trained").save(out, overwrite=True),
        lambda out: patch.create("base", "trained", out, overwrite=True),
    ):
        before = contents(place)
        with pytest.raises(InputError, match=r"exists and is not|is an input"):
            write("base/model.safetensors")
        assert contents(place) == before
    for write in (
        lambda out: patch.apply("base", "p", out),
        lambda out: patch.graft("base", "trained", out, select="mlp"),
        lambda out: analyze("base", "trained", out, spectra="off", overwrite=True),
        lambda out: overlap("base", "trained", "third", out=out, overwrite=True),
        lambda out: trajectory("base", "trained", "third", out=out, spectra="off", overwrite=True),
    ):
        with pytest.raises(InputError, match="is an input of this command"):
            write("base")
        with pytest.raises(UsageError, match="no name"):
            write("")


def test_an_input_where_a_run_writes_is_refused(place):
    (place / "out" / "steps").mkdir(parents=True)
    shutil.copytree("trained", "out/steps/trained")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"out/steps/trained is inside out/steps, which the run writes to"):
            analyze("base", "out/steps/trained", "out", spectra="off", overwrite=overwrite)
    assert (place / "out" / "steps" / "trained" / "model.safetensors").exists()


def test_a_folder_next_to_or_inside_an_input_may_be_written(place):
    assert analyze("base", "trained", "base/analysis", spectra="off").exit_status == 0
    assert analyze("base", "trained", ".", spectra="off").exit_status == 0


def test_examples():
    for module in (files, outputs):
        assert doctest.testmod(module).failed == 0


def test_markers_are_those_that_are_written(place):
    """Whatever is written is recognised again; the decision reads only the first bytes."""
    assert validate_file("m", MASKS, overwrite=True) == place / "m"
    assert validate_file("p", PATCH, overwrite=True) == place / "p"
    masks = MaskSet.load("m")
    masks.in_model_order = True
    masks.save("ordered")
    assert validate_file("ordered", MASKS, overwrite=True).name == "ordered"
    assert MaskSet.load("ordered").in_model_order
    analyze("base", "trained", "out", spectra="off")
    assert validate_run_folder("out", ANALYSIS)["command"] == "analyze"
    with pytest.raises(InputError, match="not of a run of distill"):
        validate_run_folder("out", DISTILLATION)


def test_overwrite_removes_all_that_runs_write(place):
    """The names that a kind of folder owns are those that its commands write: no file of an earlier run remains."""
    trajectory("base", "trained", "third", out="out", csv=True)
    analyze("base", "trained", "out", csv=True, paper_csv=True, overwrite=True)
    fresh = place / "fresh"
    analyze("base", "trained", fresh, csv=True, paper_csv=True)

    def names(folder):
        return {path.split(os.sep)[0] for path in contents(folder)}

    assert names(place / "out") == names(fresh)
    overlap("base", "trained", "third", out="out", overwrite=True)
    assert names(place / "out") == {"run.json", "summary.json", "overlap.parquet", "report.html"}
