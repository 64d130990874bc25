"""Models of two small layers over a dozen characters, and runs of a few steps with them."""

from __future__ import annotations

import functools
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CHARACTERS = "0123456789+=\n"


def tokenizer(characters: str = CHARACTERS, **special):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word_tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(["<pad>", "<end>", *characters])}, unk_token="<pad>")
    )
    word_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    word_tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer, **{"pad_token": "<pad>", "eos_token": "<end>", **special}
    )


def model(seed: int, width: int = 32, characters: str = CHARACTERS, **more):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(characters) + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
        **more,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Folders of a student and of two teachers of other widths, bf16."""
    folder = tmp_path_factory.mktemp("models")
    for i, (name, width) in enumerate((("student", 32), ("teacher", 48), ("other", 64))):
        model(i, width, initializer_range=0.2).bfloat16().save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    return folder


def make_options(places, **given):
    """Options of a run of three short steps with the models in `places`."""
    from opdkernels.distillation.options import options_from

    usual = {
        "student": str(places / "student"),
        "teacher": str(places / "teacher"),
        "prompts": "addition",
        "max_steps": 3,
        "batch_size": 8,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "snapshot_every": 1,
        "threads": 1,
    }
    return options_from(None, {**usual, **given})


@pytest.fixture
def options(places):
    """`make_options` with the models of the session."""
    return functools.partial(make_options, places)
