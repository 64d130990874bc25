"""InputError and UsageError are ValueErrors, and code that turns other ValueErrors into messages lets them pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from pydantic import BaseModel, field_validator
from safetensors.torch import save_file

from opdkernels import untrusted
from opdkernels.config import validate_options
from opdkernels.distillation.options import DistillOptions
from opdkernels.distillation.text import image_input_errors
from opdkernels.errors import InputError, UsageError
from opdkernels.masks import MaskSet
from opdkernels.masks.mask_set import FORMAT
from opdkernels.runs.store import ArrowStore


@pytest.mark.parametrize("error", [InputError, UsageError])
def test_errors_are_value_errors(error):
    assert issubclass(error, ValueError)


def test_large_file_keeps_its_own_message(tmp_path):
    path = tmp_path / "index.json"
    path.write_text("{}" + " " * 20)
    with pytest.raises(InputError, match=r"has 22 bytes, more than the 10 allowed; download it again$"):
        untrusted.read_file(str(path), max_bytes=10, remedy="download it again")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"format": "pt"}, "m holds no masks; give"), ({"format": FORMAT, "version": "9"}, "m has version 9")],
)
def test_mask_file_keeps_its_own_message(tmp_path, metadata, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "m", metadata)
    with pytest.raises(InputError, match=message) as raised:
        MaskSet.load(tmp_path / "m")
    assert "cannot be read as masks" not in str(raised.value)


def test_records_keep_their_own_message(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Row:
        key: int

    store = ArrowStore(tmp_path, Row, schema_version=1)
    store.add(Row(1))
    store.flush()

    def decode(self, content):
        raise InputError("another version wrote it")

    monkeypatch.setattr(ArrowStore, "decode", decode)
    with pytest.raises(InputError, match=r"^another version wrote it$"):
        ArrowStore(tmp_path, Row, schema_version=1)


@pytest.mark.parametrize("error", [InputError, UsageError])
def test_model_inputs_keep_their_own_message(error):
    with pytest.raises(error, match=r"^no such head$"), image_input_errors({"pixel_values": torch.zeros(1)}):
        raise error("no such head")


@pytest.mark.parametrize("error", [InputError, UsageError])
def test_validators_keep_their_own_error(error):
    class Model(BaseModel):
        size: int

        @field_validator("size")
        @classmethod
        def validate_size(cls, size: int) -> int:
            raise error(f"size {size} does not fit; choose another")

    with pytest.raises(error, match=r"^size 3 does not fit; choose another$"):
        validate_options(Model, {"size": 3})


def test_divergence_error_of_distill_options_is_a_usage_error():
    with pytest.raises(UsageError, match=r"^kind is kl; choose one of"):
        validate_options(DistillOptions, {"student": "a", "teacher": "b", "prompts": "addition", "divergence": "kl"})


def test_validation_error_names_the_option():
    with pytest.raises(UsageError, match=r"^option max_steps is 0: Input should be greater"):
        validate_options(DistillOptions, {"student": "a", "teacher": "b", "prompts": "addition", "max_steps": 0})
    with pytest.raises(UsageError, match=r"^there is no option 'max_step'; did you mean max_steps"):
        validate_options(DistillOptions, {"student": "a", "teacher": "b", "prompts": "addition", "max_step": 1})
