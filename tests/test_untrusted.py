"""Files of users: special files never block a reader, and JSON is bounded and strict."""

from __future__ import annotations

import json
import os
import socket

import pytest
import safetensors.torch
import torch

from opdkernels.api import write_report
from opdkernels.checkpoint import io as checkpoint_io
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.torch_pickle import load_plain
from opdkernels.distillation.examples import read_examples
from opdkernels.distillation.jsonl import read_rows
from opdkernels.distillation.options import read_toml
from opdkernels.errors import InputError
from opdkernels.masks import MaskSet
from opdkernels.metrics.groups import read_parquet
from opdkernels.outputs import EXPERIMENT
from opdkernels.patch import info
from opdkernels.runs.run_dir import load_finished
from opdkernels.untrusted import parse_json, read_file, read_json

W = {"w": torch.ones(4)}


def in_folder(name, reader, **files):
    """A reader of a folder in which the file `name` is the special one."""

    def read(path):
        for other, content in files.items():
            (path.parent / other.replace("_", ".", 1)).write_text(content)
        path.rename(path.with_name(name))
        reader(path.parent)

    return read


def read_with_config(path):
    safetensors.torch.save_file(W, path.parent / "model.safetensors")
    path.rename(path.with_name("config.json"))
    open_checkpoint(path.parent)


RUN = json.dumps({"format": EXPERIMENT.format})
READERS = {
    "a checkpoint": open_checkpoint,
    "an index": in_folder("model.safetensors.index.json", open_checkpoint),
    "the weights of a folder": in_folder("model.safetensors", open_checkpoint),
    "config.json": read_with_config,
    "masks": MaskSet.load,
    "a patch": info,
    "prompts": lambda path: read_examples(str(path)),
    "options": read_toml,
    "rows": read_rows,
    "a table": read_parquet,
    "a training state": lambda path: load_plain(str(path)),
    "results.json": in_folder("results.json", write_report, run_json=RUN),
    "run.json": in_folder("run.json", load_finished),
    "JSON": read_json,
}


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


SPECIAL = {
    "pipe": make_pipe,
    "socket": make_socket,
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_special_files_are_refused_without_waiting(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = tmp_path / "x.safetensors"
    if kind == "socket":
        make_socket("x.safetensors")
    else:
        SPECIAL[kind](path)
    with pytest.raises(InputError) as caught:
        READERS[name](path)
    assert str(caught.value).isprintable()
    assert ";" in str(caught.value)


def test_files_are_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert read_file(tmp_path / "a", max_bytes=100, remedy="cut it") == b"x" * 100
    with pytest.raises(InputError, match="has 100 bytes, more than the 99 allowed; cut it"):
        read_file(tmp_path / "a", max_bytes=99, remedy="cut it")
    with pytest.raises(InputError, match="does not exist; cut it"):
        read_file(tmp_path / "b", remedy="cut it")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "a": 2}', "key a appears twice"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"a": "\\uDfff"}', "unpaired surrogate"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 10_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"  <!DOCTYPE html><html>", "HTML or XML page"),
    ],
)
def test_bad_json_is_refused_in_one_line(content, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_json(content, "x.json", remedy="download it again")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_json_that_other_readers_take_is_read():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x", remedy="") == {"a": 1}
    assert parse_json(b'{"a": 1, "a": 2}', "x", remedy="", allow_duplicates=True) == {"a": 2}
    assert parse_json(rb'{"a": "\ud83d\ude00"}', "x", remedy="") == {"a": "\U0001f600"}
    assert parse_json(rb'{"a": "\\ud800"}', "x", remedy="") == {"a": "\\ud800"}


def test_config_may_have_a_key_twice(tmp_path):
    safetensors.torch.save_file(W, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16", "torch_dtype": "bfloat16"}')
    assert open_checkpoint(tmp_path).config == {"torch_dtype": "bfloat16"}


LEFT_BY_DOWNLOADS = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n", "Git LFS pointer"),
    (b"<!doctype html><html><head><title>Access is restricted</title>", "HTML or XML page"),
]


@pytest.mark.parametrize(("content", "says"), LEFT_BY_DOWNLOADS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_what_a_download_left_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "says"), LEFT_BY_DOWNLOADS)
@pytest.mark.parametrize("read", [MaskSet.load, info, load_plain])
def test_what_a_download_left_of_masks_patches_and_states_is_named(tmp_path, content, says, read):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(str(tmp_path / "file"))


def header_file(path, header, data=b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("num_dims", [65, 4_000, 400_000])
def test_headers_with_many_dimensions_are_refused(tmp_path, num_dims):
    shape = ",".join(["1"] * (num_dims - 1) + ["0"])
    header = f'{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}'.encode()
    with pytest.raises(InputError, match=r"more than the limit of 64|more dimensions or entries than"):
        open_checkpoint(header_file(tmp_path / "model.safetensors", header))


def test_headers_with_long_texts_are_read(tmp_path):
    """Commas, brackets and escaped quotes in metadata are no structure."""
    tensors = {f"w{i}": torch.full((2,), float(i)) for i in range(3)}
    note = '["a,\\"b", {"c": [1, 2]}]' * 5_000
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"note": note})
    opened = open_checkpoint(tmp_path)
    assert opened.read("w2", 0, 2).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.experts.gate_up_proj", "layers.0.A_log"])
def test_zero_3_placeholders_are_named(tmp_path, name):
    weights = {name: torch.zeros(0, dtype=torch.bfloat16), "model.norm.weight": torch.ones(4)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"{name} .* ZeRO-3, .* zero_to_fp32\.py"):
        open_checkpoint(tmp_path)


def test_empty_buffers_and_empty_rows_are_no_placeholders(tmp_path):
    tensors = {"rotary_emb.cos_cached": torch.zeros(0), "steps": torch.zeros(0, dtype=torch.int64)}
    tensors |= {"unused.weight": torch.zeros(0, 4), "model.norm.weight": torch.ones(4)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)


def test_files_beyond_the_guarded_mappings_are_read(tmp_path, monkeypatch):
    class Full:
        @staticmethod
        def guard_mapping(address, nbytes):
            raise RuntimeError("too many mapped files")

    monkeypatch.setattr(checkpoint_io, "guard", lambda: Full)
    safetensors.torch.save_file(W, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path, io="mmap")
    assert opened.read("w", 0, 4).tolist() == [1, 1, 1, 1]
    opened.check()


@pytest.mark.parametrize("content", [{(1, 2): 3}, {"a": {1, 2}}, {"a": b"x"}, {2.5: 1}, {"a": 2**80}])
def test_training_states_have_plain_objects_only(tmp_path, content):
    state = {"step": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, None)}}
    torch.save(state, tmp_path / "training.pt")
    loaded = load_plain(str(tmp_path / "training.pt"))
    assert loaded["optimizer"]["state"][0]["exp_avg"].tolist() == [1, 1, 1]
    assert loaded["optimizer"]["betas"] == (0.9, None)
    torch.save({**state, "other": content}, tmp_path / "training.pt")
    with pytest.raises(InputError, match=r"training\.pt"):
        load_plain(str(tmp_path / "training.pt"))
