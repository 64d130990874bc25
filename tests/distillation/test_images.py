"""An image-text model of two small layers, image tokens included."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from opdkernels.config import validate_options
from opdkernels.distillation import evaluation, state
from opdkernels.distillation.loop import train
from opdkernels.distillation.options import DistillOptions
from opdkernels.experiments.runner import run_experiment
from tests.distillation.conftest import CHARACTERS, tokenizer
from tests.distillation.test_loop import log

SPECIAL = ("<image>", "<vision_start>", "<vision_end>", "<video>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a student and a teacher of Qwen2.5-VL's architecture, and of prompts with images of two sizes."""
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("images")
    text = tokenizer()
    text.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    ids = dict(zip(SPECIAL, text.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(CHARACTERS) + 6,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 128,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
                "initializer_range": 0.2,
                "eos_token_id": 1,
                "pad_token_id": 0,
                "bos_token_id": None,
                "tie_word_embeddings": False,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
            vision_start_token_id=ids["<vision_start>"],
            vision_end_token_id=ids["<vision_end>"],
            tie_word_embeddings=False,
        )
        Qwen2_5_VLForConditionalGeneration(config).bfloat16().save_pretrained(folder / name)
        text.save_pretrained(folder / name)
    rows = []
    for i, size in enumerate(((28, 28), (56, 56), (56, 28))):
        Image.new("RGB", size, (40 * i, 20, 200)).save(folder / f"{i}.png")
        rows.append(
            {"prompt": f"<vision_start><image><vision_end>{i}+1=", "answer": str(i + 1), "images": [f"{i}.png"]}
        )
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


class Processor:
    """What Qwen2_5_VLProcessor does with images, without its videos, which need torchvision."""

    def __init__(self, tokenizer):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer, self.image_processor = (
            tokenizer,
            Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 4),
        )

    def __call__(self, text, images, return_tensors):
        result = self.image_processor(images=images, return_tensors=return_tensors)
        text = text[0]
        for grid in result["image_grid_thw"]:
            text = text.replace("<image>", "<>" * (int(grid.prod()) // 4), 1)
        ids = self.tokenizer([text.replace("<>", "<image>")], return_tensors=return_tensors)["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids("<image>")).long()
        return {"input_ids": ids, "attention_mask": ids > 0, "mm_token_type_ids": kinds, **result}

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(("name", "density"), [("masks", 0.0), ("masks", 0.2), ("grafts", 0.0), ("grafts", 0.2)])
def test_experiments_match_renamed_checkpoint_tensors(folders, tmp_path, name, density):
    """Checkpoints of this model have another prefix than its parameters."""
    chosen = validate_options(
        DistillOptions,
        {
            "student": str(folders / "student"),
            "teacher": str(folders / "teacher"),
            "prompts": str(folders / "p.jsonl"),
            "eval_prompts": str(folders / "p.jsonl"),
            "max_steps": 10,
            "batch_size": 2,
            "max_completion_length": 2,
            "num_eval_prompts": 2,
            "learning_rate": 1e-3,
            "snapshot_every": 10,
        },
    )
    arms = {
        "masks": ["changed", "random", "magnitude-matched"],
        "grafts": ["largest alone", "magnitude-matched alone", "mlp alone"],
    }[name]
    result = run_experiment(name, chosen, tmp_path, density=density, arms=arms)
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["start", "full", *arms]
    if name == "masks":
        assert rows["changed"]["mask_recall"] == 1
        assert rows["changed"]["trained"] == pytest.approx(rows["random"]["trained"], abs=1e-3)
        assert 0 < rows["random"]["mask_recall"] < 1 if density else rows["random"]["mask_recall"] <= 1


@pytest.fixture(autouse=True)
def processors(monkeypatch):
    plain = state.load_text_processor

    def with_images(place):
        text = plain(place)
        text.processor = Processor(text.tokenizer)
        return text

    for module in (state, evaluation):
        monkeypatch.setattr(module, "load_text_processor", with_images)


def test_image_text_model_trains_its_vision_weights(options, folders, tmp_path):
    chosen = options(
        student=str(folders / "student"),
        teacher=str(folders / "teacher"),
        prompts=str(folders / "p.jsonl"),
        eval_prompts=str(folders / "p.jsonl"),
        batch_size=3,
        max_steps=3,
        learning_rate=1e-2,
        micro_batch_size=2,
        num_eval_prompts=3,
    )
    train(chosen, tmp_path)
    before, after = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (0, 3))
    vision = [name for name in before if "visual" in name and name.endswith("weight")]
    assert vision
    assert any(not torch.equal(before[name], after[name]) for name in vision)
    rows = [row for row in log(tmp_path) if row["step"]]
    assert all(row["tokens"] and row["reverse_kl"] > 0 for row in rows)


def test_missing_image_is_named(options, folders, tmp_path):
    from opdkernels.errors import InputError

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "<image>1=", "images": ["gone.png"]}))
    with pytest.raises(InputError, match=r"an image of a prompt cannot be read .*gone\.png"):
        train(
            options(
                student=str(folders / "student"), teacher=str(folders / "teacher"), prompts=str(tmp_path / "p.jsonl")
            ),
            tmp_path / "run",
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": "1+1="},
            "does not take prompts with their images.*; give each image one placeholder in its prompt",
        ),
        (
            {"prompt": "<vision_start><image><vision_end>1=", "images": ["0.png", "1.png"]},
            "does not take prompts with their images",
        ),
        (
            {"prompt": "<vision_start><image><vision_end>1=", "images": ["broken.png"]},
            r"cannot be read from .*broken\.png",
        ),
        (
            {"prompt": "<vision_start><image><vision_end>1=", "images": ["large.png"]},
            r"cannot be read from .*large\.png .*decompression bomb",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "chat template does not take a prompt"),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_mismatched_images_raise_one_line_error(options, folders, tmp_path, monkeypatch, given, message, recorded):
    from PIL import Image

    from opdkernels.errors import InputError

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    for name, size in (("0.png", (28, 28)), ("1.png", (28, 28)), ("large.png", (300, 300))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    completion = {"completion": "2"} if recorded else {}
    (tmp_path / "p.jsonl").write_text(json.dumps({"images": ["0.png"], **given, **completion}))
    with pytest.raises(InputError, match=message) as caught:
        train(
            options(
                student=str(folders / "student"),
                teacher=str(folders / "teacher"),
                prompts=str(tmp_path / "p.jsonl"),
                on_policy_fraction=float(not recorded),
                batch_size=1,
            ),
            tmp_path / "run",
        )
    assert "\n" not in str(caught.value)


def test_image_text_model_trains_on_text_with_shared_prefix(options, folders, tmp_path):
    rows = [{"prompt": f"12+13=25+41+29=70+{i}+1=", "answer": "1"} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(
        options(
            student=str(folders / "student"),
            teacher=str(folders / "teacher"),
            prompts=str(tmp_path / "p.jsonl"),
            batch_size=6,
            micro_batch_size=2,
            max_steps=2,
        ),
        tmp_path / "run",
    )
    assert all(row["tokens"] for row in log(tmp_path / "run") if row["step"])
