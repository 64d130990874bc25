"""Files that change while they are open, and guarded mappings."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from opdkernels.checkpoint import io as checkpoint_io
from opdkernels.checkpoint.io import Buffer, OpenFile
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import UsageError
from tests.checkpoint.conftest import error_message

VALUES = torch.arange(5000, dtype=torch.float32)
FORMATS = {
    "model.safetensors": lambda path: safetensors.torch.save_file({"w": VALUES}, path),
    "pytorch_model.bin": lambda path: torch.save({"w": VALUES}, path),
}


@pytest.fixture(params=sorted(FORMATS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    FORMATS[request.param](path)
    return path


@pytest.mark.usefixtures("no_guard")
def test_a_truncated_file_is_rejected_with_its_size(saved: Path) -> None:
    size = saved.stat().st_size
    os.truncate(saved, size - 100)
    message = error_message(open_checkpoint, saved)
    assert str(size - 100) in message
    assert saved.name in message
    if saved.suffix == ".safetensors":  # a zip archive's table is at its end: the expected length is lost with it
        assert f"{size} bytes expected" in message


@pytest.mark.usefixtures("no_guard")
def test_truncation_while_open_is_reported_with_expected_and_actual_bytes(saved: Path) -> None:
    opened = open_checkpoint(saved)
    size = saved.stat().st_size
    opened.read("w", 0, 10)
    opened.check()
    os.truncate(saved, 4000)
    assert "bytes expected, it has 4000" in error_message(opened.read, "w", 0, 5000)
    assert f"{size} bytes expected, it has 4000" in error_message(opened.check)


@pytest.mark.usefixtures("no_guard")
def test_replacement_while_open_is_detected_and_the_old_file_still_read(saved: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(saved)
    before = saved.stat()
    other = tmp_path / "other"
    other.write_bytes(saved.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, saved)
    assert torch.equal(opened.read("w", 0, 5000), VALUES)
    assert "changed while it was open" in error_message(opened.check)


@pytest.mark.usefixtures("no_guard")
def test_modification_and_removal_while_open_are_detected(saved: Path) -> None:
    opened = open_checkpoint(saved)
    status = saved.stat()
    os.utime(saved, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "changed while it was open" in error_message(opened.check)
    saved.unlink()
    assert "was removed while it was open" in error_message(opened.check)


@pytest.mark.usefixtures("no_guard")
def test_a_file_that_is_changed_in_place_with_its_old_time_is_detected(saved: Path) -> None:
    opened = open_checkpoint(saved)
    status = saved.stat()
    while saved.stat().st_ctime_ns == status.st_ctime_ns:  # until the clock of the file system has moved on
        with open(saved, "r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(content)
        os.utime(saved, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert saved.stat().st_mtime_ns == status.st_mtime_ns
    assert "changed while it was open" in error_message(opened.check)
    assert open_checkpoint(saved).files != opened.files


def test_a_mapping_is_guarded_as_long_as_a_view_of_it_exists(saved: Path, fake_guard: object) -> None:
    opened = open_checkpoint(saved, io="mmap")
    ((address, nbytes),) = fake_guard.live.values()
    assert nbytes == saved.stat().st_size
    view = opened.read("w", 1, 4000)
    assert address <= view.data_ptr() < address + nbytes
    other = opened.read("w", 0, 5000)
    assert view.tolist() == VALUES[1:4000].tolist()
    assert torch.equal(other, VALUES)
    opened.close()
    assert fake_guard.live
    assert view[0] == 1.0
    del view, other
    gc.collect()
    assert not fake_guard.live


def test_a_fault_in_a_mapping_is_an_input_error(saved: Path, fake_guard: object) -> None:
    opened = open_checkpoint(saved, io="mmap")
    opened.check()
    fake_guard.faults = 1
    assert "was truncated while it was open" in error_message(opened.check)
    opened.close()


def test_a_rejected_file_leaves_no_mapping_and_no_open_file(tmp_path: Path, fake_guard: object) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((9).to_bytes(8, "little") + b"{" + b"x" * 8)
    before = set(os.listdir("/proc/self/fd"))
    error_message(lambda: open_checkpoint(path, io="mmap"))
    gc.collect()
    assert not fake_guard.live
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("no_guard")
def test_without_a_guard_nothing_is_mapped(saved: Path) -> None:
    assert checkpoint_io.choose_io("auto", str(saved)) == "read"
    with pytest.raises(UsageError, match="io='read'"):
        open_checkpoint(saved, io="mmap")
    with pytest.raises(UsageError, match="give 'auto', 'mmap' or 'read'"):
        open_checkpoint(saved, io="direct")


@pytest.mark.parametrize(
    ("kind", "io"), [("nfs4", "read"), ("fuse.sshfs", "read"), ("ext4", "mmap"), ("overlay", "mmap")]
)
def test_network_file_systems_are_read_and_local_ones_are_mapped(
    tmp_path: Path, fake_guard: object, monkeypatch: pytest.MonkeyPatch, kind: str, io: str
) -> None:
    device = os.stat(tmp_path).st_dev
    table = tmp_path / "mountinfo"
    table.write_text(
        "21 1 999:999 / / rw - nfs elsewhere rw\n"
        f"22 21 {os.major(device)}:{os.minor(device)} / /data\\040x rw,relatime shared:1 - {kind} server:/data rw\n"
    )
    monkeypatch.setattr(checkpoint_io, "MOUNT_TABLE", str(table))
    assert checkpoint_io.choose_io("auto", str(tmp_path)) == io


def test_a_buffer_grows_and_is_reused() -> None:
    buffer = Buffer()
    first = buffer.take(100)
    assert first.numel() == 100
    assert first.data_ptr() % 64 == 0
    assert buffer.take(10).data_ptr() == first.data_ptr()
    assert buffer.take(1000).numel() == 1000


def test_a_pipe_is_rejected_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    assert "not a regular file" in error_message(OpenFile, str(path), "read")
    assert "neither a file nor a folder" in error_message(open_checkpoint, path)
