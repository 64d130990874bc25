from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from opdkernels.distillation.examples import Example
from opdkernels.distillation.loop import train
from opdkernels.distillation.models import load_config, load_model
from opdkernels.distillation.rollout import encode, load_completions
from opdkernels.distillation.text import MODEL_REMEDY, TextProcessor, input_errors, load_text_processor
from opdkernels.errors import InputError
from tests.checkpoint.test_pickle_data import nested_tuples
from tests.distillation.conftest import tokenizer

CPU = torch.device("cpu")
TEXT = TextProcessor(tokenizer(), None, 0)


class Code:
    """An object whose pickle calls a function."""

    def __reduce__(self):
        return print, ("run",)


@pytest.fixture
def student(places, tmp_path):
    """A copy of the student's folder, to spoil."""
    return shutil.copytree(places / "student", tmp_path / "s")


def refused(function, *given):
    with pytest.raises(InputError) as caught:
        function(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is truncated within its pickle"),
        (b"garbage" * 99, "pickle"),
        (pickle.dumps({"a": Code()}, 2), "builtins.print"),
        (b"\x80\x02}" + nested_tuples(40) + b"K\x01s.", "pickle"),  # hashing the key would take 2^40 steps
    ],
    ids=["empty", "garbage", "code", "nested"],
)
def test_invalid_weights_raise_one_line_error(student, capfd, content, says):
    (student / "model.safetensors").unlink()
    (student / "pytorch_model.bin").write_bytes(content)
    message = refused(load_model, str(student), "bfloat16", CPU)
    assert "/s/pytorch_model.bin" in message
    assert says in message
    assert "; " in message
    assert "run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "big"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"model_type": None},
        {"vocab_size": 2},
    ],
)
def test_invalid_configuration_raises_one_line_error(student, change):
    file = student / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert "/s cannot be loaded as a model" in refused(load_model, str(student), "bfloat16", CPU)
    if "hidden_size" in change:
        assert "cannot be loaded as a model" in refused(load_config, str(student))
        assert "has no tokenizer that can be loaded" in refused(load_text_processor, str(student))


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "[]"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")]
)
def test_invalid_tokenizer_raises_one_line_error(student, file, content):
    (student / file).write_text(content)
    assert "/s has no tokenizer that can be loaded" in refused(load_text_processor, str(student))


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",)])
def test_folder_without_tokenizer_is_named(student, options, tmp_path, files):
    """transformers builds one of special tokens only, which splits every prompt into nothing."""
    for file in files:
        (student / file).unlink()
    says = "/s has no tokenizer: its vocabulary has only special tokens; copy tokenizer.json"
    assert says in refused(load_text_processor, str(student))
    for side in ("student", "teacher"):
        assert says in refused(train, options(**{side: str(student)}), tmp_path / side)


def test_invalid_processor_is_none(student):
    (student / "preprocessor_config.json").write_text("[]")
    assert load_text_processor(str(student)).processor is None


@pytest.mark.parametrize(
    "given",
    [{"prompt": "1\ud800="}, {"prompt": "1=", "teacher_context": "\udfff"}, {"prompt": "1=", "completion": "\ud800"}],
)
def test_invalid_unicode_raises_one_line_error(given):
    message = refused(
        lambda: load_completions(
            TEXT,
            encode(TEXT, [Example(**{"completion": "1", **given})], 9, with_teacher_context=True),
            max_length=9,
            end_ids=[1],
            device=CPU,
        )
    )
    assert "cannot be split into tokens" in message
    assert "\\ud" in message


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] + 'x' }}", "{{ 1 // 0 }}", "{{ raise_exception('no') }}", "{%"]
)
def test_failing_chat_template_raises_one_line_error(template):
    text = TextProcessor(tokenizer(chat_template=template), None, 0)
    message = refused(text.encode, [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}])
    assert "the student's chat template does not take a prompt" in message


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError()], ids=lambda error: type(error).__name__)
def test_out_of_memory_is_not_an_input_error(error):
    with pytest.raises(type(error)), input_errors("m cannot be loaded as a model", MODEL_REMEDY):
        raise error
