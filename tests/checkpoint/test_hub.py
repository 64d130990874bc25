"""Hub ids: only the needed files are downloaded, and every error is one line."""

from __future__ import annotations

import fnmatch
import json
import sys
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch

from opdkernels.checkpoint import hub
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("no_guard")


class FakeHub(types.ModuleType):
    """`snapshot_download` from a dictionary of files; records the requested revisions."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.files, self.revisions = folder, files, set()
        self.fail: Exception | None = None

    def snapshot_download(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == "org/name"
        if self.fail:
            raise self.fail
        self.revisions.add(revision)
        for file, content in self.files.items():
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (self.folder / file).write_bytes(content)
        return str(self.folder)

    @property
    def fetched(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


W = safetensors.torch.save({"w": torch.ones(2)})


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    module = FakeHub(tmp_path, {"config.json": b"{}", "model.safetensors": W, "pytorch_model.bin": W, "README.md": b""})
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_only_one_format_is_downloaded(fake: FakeHub) -> None:
    opened = open_checkpoint("org/name@v1.0")
    assert opened.path == "org/name@v1.0"
    assert list(opened.tensors) == ["w"]
    assert fake.fetched == {"config.json", "model.safetensors"}
    assert fake.revisions == {"v1.0"}


def test_torch_files_are_downloaded_if_there_is_no_safetensors(fake: FakeHub) -> None:
    del fake.files["model.safetensors"]
    open_checkpoint("org/name", revision="abc")
    assert fake.fetched == {"config.json", "pytorch_model.bin"}
    assert fake.revisions == {"abc"}


def test_an_index_determines_what_is_downloaded(fake: FakeHub) -> None:
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": {"w": shard}}).encode()
    del fake.files["model.safetensors"]
    fake.files |= {shard: W, "model.safetensors.index.json": index, "consolidated.safetensors": W}
    open_checkpoint("org/name")
    assert fake.fetched == {"config.json", shard, "model.safetensors.index.json"}


def test_the_usual_single_file_is_downloaded_instead_of_shards(fake: FakeHub) -> None:
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": {"w": shard}}).encode()
    fake.files |= {shard: W, "model.safetensors.index.json": index}
    with pytest.warns(UserWarning, match="as transformers loads it"):
        open_checkpoint("org/name")
    assert fake.fetched == {"config.json", "model.safetensors", "model.safetensors.index.json"}


def test_a_hostile_index_is_rejected_before_its_shards_are_requested(fake: FakeHub) -> None:
    fake.files["model.safetensors.index.json"] = b'{"weight_map": {"w": "../../x"}}'
    with pytest.raises(InputError, match="not a plain file name"):
        open_checkpoint("org/name")


def test_a_failed_download_is_one_line(fake: FakeHub) -> None:
    fake.fail = ConnectionError("no route\nto\x1b host")
    with pytest.raises(InputError) as caught:
        open_checkpoint("org/name")
    assert str(caught.value).isprintable()
    assert "ConnectionError: no route" in str(caught.value)


def test_two_revisions_are_rejected(fake: FakeHub) -> None:
    with pytest.raises(UsageError, match="give one of them"):
        open_checkpoint("org/name@v1", revision="v2")


def test_without_the_library_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen2.5-0.5B", True),
        ("org/name@refs/pr/3", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("a/b/c", False),
        ("org/name@", False),
        ("../name", False),
        ("org/na me", False),
        ("org/name\n", False),
    ],
)
def test_looks_like_id(text: str, expected: bool) -> None:
    assert hub.looks_like_id(text) is expected
