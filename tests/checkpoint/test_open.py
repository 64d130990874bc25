"""The content decides the format of a file, and every format that is not read is rejected by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.errors import UsageError
from tests.checkpoint.conftest import error_message

pytestmark = pytest.mark.usefixtures("no_guard")

W = {"w": torch.ones(2)}


def save(folder: Path, *names: str) -> None:
    for name in names:
        if name.endswith(".safetensors"):
            safetensors.torch.save_file(W, folder / name)
        else:
            torch.save(W, folder / name)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], "model.safetensors"),
        (["weights.safetensors"], "weights.safetensors"),
        (
            ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"],
            "pytorch_model.bin",
        ),
        (["final.pt", "optimizer.pt"], "final.pt"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*a later pytorch_model.bin")
def test_the_model_file_of_a_folder_is_found(tmp_path: Path, names: list[str], chosen: str) -> None:
    save(tmp_path, *names)
    opened = open_checkpoint(tmp_path)
    assert [fact.name for fact in opened.files] == [chosen]
    assert opened.path == str(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("index", [False, True])
def test_a_later_model_in_another_format_is_named(tmp_path: Path, index: bool) -> None:
    save(tmp_path, "model.safetensors", "pytorch_model.bin")
    os.utime(tmp_path / "pytorch_model.bin", ns=(0, 0))
    chosen = "model.safetensors"
    if index:
        (tmp_path / chosen).rename(tmp_path / "model-00001-of-00001.safetensors")
        chosen = "model.safetensors.index.json"
        (tmp_path / chosen).write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    open_checkpoint(tmp_path).close()
    os.utime(tmp_path / chosen, ns=(0, 0))
    os.utime(tmp_path / "pytorch_model.bin", ns=(1, 1))
    with pytest.warns(UserWarning, match=f"{chosen} is read, .* the path of pytorch_model.bin to read that"):
        open_checkpoint(tmp_path).close()


MAIN, BIN, INDEX, BIN_INDEX = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


@pytest.mark.filterwarnings("ignore:.* and shards of ")
@pytest.mark.parametrize(
    ("single", "listed", "chosen", "later"),
    [
        ([MAIN], {BIN_INDEX: "pytorch_model-00001-of-00001.bin"}, MAIN, BIN_INDEX),
        ([BIN], {INDEX: "model-00001-of-00001.safetensors"}, INDEX, BIN),
        ([], {INDEX: "model-00001-of-00001.safetensors", BIN_INDEX: "pytorch_model-1.bin"}, INDEX, BIN_INDEX),
        ([MAIN, BIN], {INDEX: MAIN}, INDEX, BIN),
        ([MAIN, BIN], {INDEX: "model-00001-of-00001.safetensors"}, MAIN, BIN),
    ],
)
def test_a_later_sharded_or_single_model_in_another_format_is_named(tmp_path, single, listed, chosen, later) -> None:
    save(tmp_path, *{*single, *listed.values()})
    for index, shard in listed.items():
        (tmp_path / index).write_text(json.dumps({"weight_map": {"w": shard}}))
    os.utime(tmp_path / chosen, ns=(0, 0))
    os.utime(tmp_path / later, ns=(1, 1))
    with pytest.warns(UserWarning, match=f"a later {later}; {chosen} is read, .* the path of {later} to read that"):
        open_checkpoint(tmp_path).close()


@pytest.mark.parametrize("names", [["checkpoint-9", "checkpoint-100", "logs"], ["snapshots/0a1b", "refs"], ["final"]])
def test_the_folder_around_checkpoints_names_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        if name not in ("logs", "refs"):
            save(tmp_path / name, "model.safetensors")
    expected = tmp_path / {"checkpoint-9": "checkpoint-100"}.get(names[0], names[0])
    message = error_message(open_checkpoint, tmp_path)
    assert message.endswith(f"holds no checkpoint itself; give a folder in it that does, such as {expected}")


def test_a_configuration_that_cannot_be_found_is_no_absent_one(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors")
    (tmp_path / "config.json").symlink_to("blobs/nowhere")
    assert "config.json does not exist; download it again" in error_message(open_checkpoint, tmp_path)


@pytest.mark.parametrize("names", [["a.safetensors", "b.safetensors"], ["a.pt", "b.pt"], ["a.bin", "b.pth"]])
def test_two_models_in_a_folder_are_ambiguous(tmp_path: Path, names: list[str]) -> None:
    save(tmp_path, *names)
    message = error_message(open_checkpoint, tmp_path)
    assert all(name in message for name in names)
    assert "give the path" in message


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    torch.save(W, tmp_path / "odd.safetensors")
    assert open_checkpoint(tmp_path / "odd.safetensors").kind == "torch"
    safetensors.torch.save_file(W, tmp_path / "odd.weights")
    assert open_checkpoint(tmp_path / "odd.weights").kind == "safetensors"


def test_config_is_read_from_the_folder_of_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors")
    assert open_checkpoint(tmp_path).config == {}
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert open_checkpoint(tmp_path).config == open_checkpoint(tmp_path / "model.safetensors").config != {}
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in error_message(open_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter"),
        (["adapter_model.bin"], "a LoRA adapter"),
        (["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"], "FSDP shards (world size 2)"),
        (["model_world_size_2_rank_0.pt", "model_world_size_4_rank_0.pt"], "FSDP shards (world size 2, 4)"),
        (["optim_world_size_2_rank_0.pt"], "an optimizer's state"),
        ([".metadata", "__0_0.distcp"], "a torch.distributed.checkpoint"),
        (["adapter_config.json", "model.safetensors"], "give the path of model.safetensors"),
        (["model_world_size_1_rank_0.pt", "model.safetensors"], "give the path of model.safetensors"),
        (["model-00001-of-00002.safetensors"], "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
        (["optimizer.pt"], "and no model"),
        (["model.gguf"], "a format that is not read"),
        (["README.md"], "holds no checkpoint"),
        ([], "holds no checkpoint"),
    ],
)
def test_folders_of_other_formats_are_rejected_by_name(tmp_path: Path, names: list[str], says: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert says in error_message(open_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model_world_size_2_rank_0.pt", b"PK\x03\x04", "FSDP shards"),
        ("__0_0.distcp", b"PK\x03\x04", "torch.distributed.checkpoint"),
        ("optimizer.pt", b"PK\x03\x04", "not a model"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        ("model.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("notes.txt", b"hello", "is not a checkpoint"),
        ("empty.safetensors", b"", "is empty"),
    ],
)
def test_files_of_other_formats_are_rejected_by_name(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = error_message(open_checkpoint, tmp_path / name)
    assert says in message
    assert name in message


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"l.q_proj.lora_A.weight": W["w"]}, "LoRA adapter"),
        ({"l.q_proj.lora_B.default.weight": W["w"]}, "LoRA adapter"),
        ({"l.q_proj.base_layer.weight": W["w"], "l.q_proj.ia3_l.default": torch.ones(2)}, "PEFT adapter"),
        ({"l.q_proj.vera_lambda_b.default": W["w"]}, "PEFT adapter"),
        ({"embed_tokens.token_adapter.trainable_tokens_delta.default": W["w"]}, "PEFT adapter"),
        ({"l.weight": torch.ones(2, 2, dtype=torch.int8)}, "quantised"),
        (
            {"l.weight": torch.ones(8, 1, dtype=torch.uint8), "l.weight.quant_state.bitsandbytes__nf4": W["w"]},
            "quantised",
        ),
        # bitsandbytes with bnb_4bit_quant_storage=torch.bfloat16, for FSDP: the packed weight is not of integers
        ({"l.weight": torch.ones(8, 1).bfloat16(), "l.weight.quant_state.bitsandbytes__nf4": W["w"]}, "quantised"),
        ({"l.q_proj.weight.exp_avg_sq": W["w"]}, "an optimizer's state"),
        ({"l.weight": W["w"], "l.weight_scale_inv": torch.ones(1)}, "fp8 or quantised"),
        ({"l.qweight": torch.ones(2, dtype=torch.int32), "l.qzeros": torch.ones(2, dtype=torch.int32)}, "quantised"),
        ({"l.Qidxs": torch.ones(2, 2, dtype=torch.int64), "l.SU": torch.ones(2)}, "quantised"),
        ({"l.packed": torch.ones(32, 32, dtype=torch.int64), "l.SU": torch.ones(2)}, "(i64) belongs to an fp8 or qu"),
        ({"l.weight": torch.ones(2).to(torch.float8_e4m3fn)}, "(f8_e4m3)"),
        ({"l.weight": torch.ones(2).to(torch.float8_e5m2)}, "(f8_e5m2)"),
        (
            {"e.up_blocks": torch.ones(2, dtype=torch.uint8), "e.up_scales": torch.ones(1, dtype=torch.uint8)},
            "quantised",
        ),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_adapter_optimizer_and_quantised_tensors_are_rejected_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], says: str, name: str
) -> None:
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        safetensors.torch.save_file(tensors, tmp_path / name)
    message = error_message(open_checkpoint, tmp_path)
    assert says in message
    assert name in message
    assert "tensor " in message


def test_scales_without_quantisation_are_read(tmp_path: Path) -> None:
    tensors = {"l.k_scale": W["w"], "norm.scale": torch.ones(3), "conv_blocks": torch.ones(1)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)


@pytest.mark.parametrize("path", ["s3://bucket/model", "hf://org/name", "https://example.org/x\x1b[31m"])
def test_urls_are_rejected(path: str) -> None:
    assert "addresses are not read" in error_message(open_checkpoint, path)


@pytest.mark.parametrize("path", ["no/such/deep/path", "/no/such", "nothing", "bad\0path", "x\x1b]0;title\x07"])
def test_a_path_that_does_not_exist_is_rejected(path: str) -> None:
    assert "does not exist; give" in error_message(open_checkpoint, path)


def test_a_missing_path_under_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "runs/step20 does not exist; give" in error_message(open_checkpoint, "runs/step20")


def test_a_local_path_has_no_revision(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors")
    with pytest.raises(UsageError, match="no revision"):
        open_checkpoint(tmp_path, revision="main")
