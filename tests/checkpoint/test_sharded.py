"""Sharded checkpoints: the index alone determines which files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import InputError
from tests.checkpoint.conftest import error_message

pytestmark = pytest.mark.usefixtures("no_guard")

FORMATS = {"safetensors": "model", "bin": "pytorch_model"}


class Shards:
    """A folder of two shards, in either format."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder, self.suffix, stem = folder, suffix, FORMATS[suffix]
        self.names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
        self.index = folder / f"{stem}.{suffix}.index.json"
        self.save(self.names[0], {"b": torch.ones(2), "a": torch.zeros(3)})
        self.save(self.names[1], {"c": torch.full((4,), 7.0)})
        self.map = {"c": self.names[1], "a": self.names[0], "b": self.names[0]}
        self.write_index()

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.suffix == "safetensors":
            safetensors.torch.save_file(tensors, self.folder / name)
        else:
            torch.save(tensors, self.folder / name)

    def write_index(self, **extra: Any) -> None:
        self.index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": self.map, **extra}))

    def open_error(self, **options: Any) -> str:
        return error_message(open_checkpoint, self.folder, **options)


@pytest.fixture(params=sorted(FORMATS))
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Shards:
    return Shards(tmp_path, request.param)


def test_a_folder_and_its_index_file_are_the_same_checkpoint(shards: Shards) -> None:
    for path in (shards.folder, shards.index):
        opened = open_checkpoint(path)
        assert next(iter(opened.tensors)) == "c"  # the index's order of shards, then the order of the bytes
        assert {name: info.file for name, info in opened.tensors.items()} == shards.map
        assert [fact.name for fact in opened.files] == shards.names[::-1]
        assert opened.read("c", 1, 3).tolist() == [7.0, 7.0]
        assert opened.read("b", 0, 2).tolist() == [1.0, 1.0]
        assert opened.kind == ("torch" if shards.suffix == "bin" else "safetensors sharded")
        opened.check()
        opened.close()


def test_a_single_shard_can_be_opened_by_its_path(shards: Shards) -> None:
    opened = open_checkpoint(shards.folder / shards.names[1])
    assert list(opened.tensors) == ["c"]


def test_files_outside_the_index_are_never_read(shards: Shards) -> None:
    shards.save(f"{FORMATS[shards.suffix]}-00003-of-00003.{shards.suffix}", {"a": torch.full((3,), 9.0)})
    (shards.folder / f"consolidated.{shards.suffix}").write_bytes(b"stale")
    opened = open_checkpoint(shards.folder)
    assert opened.read("a", 0, 3).tolist() == [0.0, 0.0, 0.0]
    assert set(opened.tensors) == {"a", "b", "c"}


def test_the_usual_single_file_takes_precedence_over_an_index_of_other_files(shards: Shards) -> None:
    main_file = "model.safetensors" if shards.suffix == "safetensors" else "pytorch_model.bin"
    shards.save(main_file, {"a": torch.full((3,), 9.0)})
    for broken in (False, True):
        with pytest.warns(UserWarning, match=rf"{main_file} is read, as transformers loads it.* {shards.index.name}"):
            opened = open_checkpoint(shards.folder)
        assert opened.read("a", 0, 1).tolist() == [9.0]
        assert [fact.name for fact in opened.files] == [main_file]
        if not broken:
            assert set(open_checkpoint(shards.index).tensors) == {"a", "b", "c"}
            shards.index.write_text("{")
    shards.write_index()
    (shards.folder / shards.names[0]).unlink()
    with pytest.raises(InputError, match=f"give the path of {main_file}"):
        open_checkpoint(shards.index)


def test_a_single_file_that_the_index_lists_is_one_of_the_shards(shards: Shards) -> None:
    main_file = "model.safetensors" if shards.suffix == "safetensors" else "pytorch_model.bin"
    shards.save(main_file, {"d": torch.full((3,), 9.0)})
    shards.map["d"] = main_file
    shards.write_index()
    assert set(open_checkpoint(shards.folder).tensors) == {"a", "b", "c", "d"}


@pytest.mark.filterwarnings("ignore:.*as transformers loads it")
def test_the_same_file_is_read_as_transformers_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes))
    model.save_pretrained(tmp_path, max_shard_size=600)
    assert (tmp_path / "model.safetensors.index.json").exists()
    weights = {name: weight + 1 for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    opened = open_checkpoint(tmp_path)
    assert set(opened.tensors) == set(loaded)
    for name, weight in loaded.items():
        assert torch.equal(opened.read(name, 0, weight.numel()), weight.flatten())


def test_a_missing_shard_is_an_error_that_names_it(shards: Shards) -> None:
    (shards.folder / shards.names[0]).unlink()
    message = shards.open_error()
    assert f"{shards.names[0]} is listed in the index but missing; download it" in message
    assert "--allow-missing" in message


def test_a_missing_shard_can_be_allowed_and_its_tensors_are_listed(shards: Shards) -> None:
    (shards.folder / shards.names[0]).unlink()
    opened = open_checkpoint(shards.folder, allow_missing=True)
    assert list(opened.tensors) == ["c"]
    assert opened.missing == {"a": shards.names[0], "b": shards.names[0]}


def test_a_checkpoint_without_any_shard_is_rejected(shards: Shards) -> None:
    for name in shards.names:
        (shards.folder / name).unlink()
    assert "no shard is there" in shards.open_error(allow_missing=True)


def test_a_tensor_in_two_listed_shards_is_an_error(shards: Shards) -> None:
    shards.save(shards.names[1], {"c": torch.ones(4), "b": torch.ones(2)})
    message = shards.open_error()
    assert "tensor b is in" in message
    assert all(name in message for name in shards.names)


def test_a_tensor_that_the_index_puts_in_the_wrong_shard_is_an_error(shards: Shards) -> None:
    shards.map["a"] = shards.names[1]
    shards.write_index()
    assert f"{shards.names[1]} does not hold tensor a" in shards.open_error()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", ".", "", "a\\b", "a\0b", 3, None, ["x"]])
def test_an_index_that_points_outside_the_folder_is_rejected(shards: Shards, shard: object) -> None:
    shards.map["a"] = shard  # type: ignore[assignment]
    shards.write_index()
    assert "not a plain file name inside the folder" in shards.open_error()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1]", "no JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "key a appears twice"),
        (b"\xff\xfe{", "is not JSON"),
        (b'{"a":' * 50_000, "is not JSON"),
    ],
)
def test_an_invalid_index_is_rejected(shards: Shards, text: bytes, says: str) -> None:
    shards.index.write_bytes(text)
    message = shards.open_error()
    assert says in message
    assert shards.index.name in message


def test_a_damaged_shard_is_named_and_leaves_no_file_open(shards: Shards) -> None:
    (shards.folder / shards.names[0]).write_bytes(b"\x80\x02")
    descriptors = set(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else set()
    assert shards.names[0] in shards.open_error()
    assert not descriptors or len(set(Path("/proc/self/fd").iterdir())) == len(descriptors)


def test_an_index_is_no_shard(shards: Shards) -> None:
    shards.map["a"] = shards.index.name
    shards.write_index()
    assert "is an index and not a shard" in shards.open_error()


def test_names_of_shards_are_escaped_in_messages(shards: Shards) -> None:
    shards.map["a"] = "x\x1b[31m.safetensors"
    shards.write_index()
    assert "x\\x1b[31m.safetensors" in shards.open_error()
