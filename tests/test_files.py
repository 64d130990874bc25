"""Atomic files and folders: complete or absent, under separate temporary names; killed runs leave no files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opdkernels import files
from opdkernels.files import atomic_file, atomic_folder, is_temporary, remove_leftovers, write_atomically

LEFTOVER = ".{}.opdkernels-0123456789abcdef.tmp"


@pytest.mark.parametrize("names", ["random", "equal"])
def test_two_writers_of_one_file_never_share_a_temporary_file(tmp_path, monkeypatch, names):
    """As in two containers with one volume: process and thread have the same numbers. The file is created exclusively,
    so that equal random numbers on a file system without locks do no harm either."""
    if names == "equal":
        draws = iter(["0" * 16, "0" * 16, "f" * 16])
        monkeypatch.setattr(files.secrets, "token_hex", lambda num_bytes: next(draws))
        monkeypatch.setattr(files, "try_lock", lambda descriptor: None)
    path = tmp_path / "p"
    with atomic_file(path) as first:
        first.write_bytes(b"first")
        with atomic_file(path) as second:
            assert first != second
            second.write_bytes(b"second, unfinished")
            assert first.read_bytes() == b"first"
        assert path.read_bytes() == b"second, unfinished"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_while_it_is_written_is_kept(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    path = tmp_path / "p"

    def write():
        with atomic_file(path, replace=False) as temporary:
            temporary.write_bytes(b"mine")
            path.write_bytes(b"theirs")

    with pytest.raises(FileExistsError):
        write()
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    with atomic_file(path, replace=False) as temporary:
        temporary.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "p", b"old")

    def write():
        with atomic_file(tmp_path / "p") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "\udcff" * 80])
def test_names_of_any_length(tmp_path, name):
    write_atomically(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_leftovers_of_killed_processes_are_removed_and_other_files_kept(tmp_path):
    (tmp_path / LEFTOVER.format("a")).write_bytes(b"half")
    (tmp_path / LEFTOVER.format("b")).mkdir()
    (tmp_path / LEFTOVER.format("b") / "model.safetensors").write_bytes(b"half")
    kept = [".a.tmp", ".a.opdkernels-0.tmp", "a.opdkernels-0123456789abcdef.tmp", ".notes.swp", ".a.1.2.tmp", "a.part"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    os.symlink(tmp_path / "a.part", tmp_path / LEFTOVER.format("link"))
    remove_leftovers(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, LEFTOVER.format("b"), LEFTOVER.format("link")])
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, LEFTOVER.format("link")])
    assert (tmp_path / "a.part").read_bytes() == b"mine"


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_leftovers_of_a_live_process_are_kept(tmp_path, atomic):
    with atomic(tmp_path / "p") as temporary:
        assert is_temporary(temporary.name)
        program = (
            "import sys, pathlib\nfrom opdkernels.files import remove_leftovers\n"
            "remove_leftovers(pathlib.Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
        remove_leftovers(tmp_path)
        assert temporary.exists()


def test_leftovers_stay_on_a_file_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "try_lock", lambda descriptor: None)
    (tmp_path / LEFTOVER.format("a")).write_bytes(b"of a process that may be alive")
    remove_leftovers(tmp_path)
    write_atomically(tmp_path / "a", b"x")
    assert sorted(os.listdir(tmp_path)) == [LEFTOVER.format("a"), "a"]


def test_a_temporary_file_that_was_taken_for_a_leftover_is_created_again(tmp_path, monkeypatch):
    """Another process removes it after its creation and before it is locked."""
    create_file, created = files.create_file, []

    def removed_at_once(path):
        descriptor = create_file(path)
        if not created:
            path.unlink()
        created.append(path)
        return descriptor

    monkeypatch.setattr(files, "create_file", removed_at_once)
    write_atomically(tmp_path / "p", b"x")
    assert len(set(created)) == 2
    assert (tmp_path / "p").read_bytes() == b"x"


def test_new_folder_is_complete_or_absent(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "half").write_bytes(b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert not any(tmp_path.iterdir())
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "model").write_bytes(b"x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_a_folder_that_appears_while_it_is_written_is_kept(tmp_path, there):
    out = tmp_path / "out"

    def write():
        with atomic_folder(out) as temporary:
            (temporary / "model").write_bytes(b"x")
            if there == "file":
                out.write_bytes(b"theirs")
            else:
                out.mkdir()
                (out / "theirs").touch()

    with pytest.raises(FileExistsError):
        write()
    assert list(tmp_path.iterdir()) == [out]
    assert out.is_file() or os.listdir(out) == ["theirs"]


def test_an_existing_empty_folder_stays_the_same_folder(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    order, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(Path(b).name), rename(a, b)))
    with atomic_folder(out) as temporary:
        for name in ("model.safetensors.index.json", "model-1.safetensors", "config.json", "model-2.safetensors"):
            (temporary / name).write_bytes(b"x")
        assert [is_temporary(name) for name in os.listdir(out)] == [True]
    assert out.stat().st_ino == inode
    assert order == ["model-1.safetensors", "model-2.safetensors", "config.json", "model.safetensors.index.json"]
    assert sorted(os.listdir(out)) == sorted(order)
    assert list(tmp_path.iterdir()) == [out]


def test_killed_while_files_are_moved_to_an_existing_folder(tmp_path, monkeypatch):
    """Whatever was moved is removed by the next run; a file that somebody else put there in the meantime is not."""
    out, rename = tmp_path / "out", os.rename
    for moves in range(4):
        out.mkdir()
        pid = os.fork()
        if pid == 0:
            done = []

            def dying(a, b, done=done, moves=moves):
                if len(done) == moves:
                    os._exit(9)
                done.append(rename(a, b))

            os.rename = dying
            with atomic_folder(out) as temporary:
                for name in "abc":
                    (temporary / name).write_bytes(b"x" + name.encode())
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (9 if moves < 3 else 0)
        names = sorted(name for name in os.listdir(out) if not is_temporary(name))
        assert names == list("abc"[:moves])
        if moves == 2:
            (out / "a").unlink()
            (out / "a").write_bytes(b"mine now")
        remove_leftovers(out)
        assert sorted(os.listdir(out)) == [[], [], ["a"], ["a", "b", "c"]][moves]
        for name in os.listdir(out):
            (out / name).unlink()
        out.rmdir()


def test_modes_follow_the_umask(tmp_path):
    for mask, file_mode, folder_mode in ((0o077, 0o600, 0o700), (0o022, 0o644, 0o755)):
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / f"file-{mask}", b"x")
            with atomic_folder(tmp_path / f"folder-{mask}"):
                pass
        finally:
            os.umask(before)
        assert (tmp_path / f"file-{mask}").stat().st_mode & 0o777 == file_mode
        assert (tmp_path / f"folder-{mask}").stat().st_mode & 0o777 == folder_mode
