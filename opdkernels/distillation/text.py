"""Tokenizers and image processors: prompts to token ids, token ids to text."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.untrusted import open_regular

IMAGE_REMEDY = "give each image one placeholder in its prompt"
MODEL_REMEDY = "give another folder or hub id"
ALL_IDS = 1 << 60  # more than any vocabulary has


def transformers() -> Any:
    """The transformers package. Raises UsageError if it is not installed."""
    try:
        import transformers  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            "distillation needs transformers, which is not installed; pip install 'opdkernels[distill]'"
        ) from None
    return transformers


@contextlib.contextmanager
def input_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns any exception that a library raises for a user's file into an InputError of one line: `what`, the reason,
    the `remedy`. Templates, pickles and images fail with arbitrary exception types."""
    try:
        yield
    except (
        InputError,
        UsageError,
        MemoryError,
        torch.OutOfMemoryError,
    ):  # running out of memory is not the file's fault
        raise
    except UnpicklingError:  # its own message advises to run the code in the file
        raise InputError(f"{what} (a pickle is damaged, or holds more than tensors); {remedy}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({printable(reason)[:300]}); {remedy}") from None


@contextlib.contextmanager
def image_input_errors(model_inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Raises InputError if a model rejects its image inputs, for example because the prompt has no placeholder tokens
    for them."""
    try:
        yield
    except (ValueError, LookupError, RuntimeError, StopIteration) as error:
        if not model_inputs or isinstance(error, (torch.OutOfMemoryError, InputError, UsageError)):
            raise
        with input_errors("the model does not take prompts with their images", IMAGE_REMEDY):
            raise


def continuation(messages: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Options of a chat template: the completion continues a last message of the assistant, else it begins one."""
    is_begun = messages[-1]["role"] == "assistant"
    return {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}


@dataclass
class TextProcessor:
    """A tokenizer, and the image processor of an image-text model (else None)."""

    tokenizer: Any
    processor: Any
    pad_id: int

    def encode(self, prompt: Any, images: tuple[str, ...] = ()) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Token ids of a prompt, and what the model takes besides them, such as pixel_values."""
        if images:
            return self.encode_images(prompt, images)
        if isinstance(prompt, str):
            return self.ids(prompt), {}
        with self.chat_template_errors():
            ids = self.tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, **continuation(prompt))
        return ids, {}

    def encode_images(self, prompt: Any, images: tuple[str, ...]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """`encode` of a prompt with image files."""
        if self.processor is None:
            raise InputError("a prompt has images, and the student takes none; give an image-text model")
        try:
            from PIL import Image  # type: ignore[import-not-found]
        except ImportError:
            raise UsageError("prompts with images need pillow, which is not installed; pip install pillow") from None
        is_text = isinstance(prompt, str)
        with self.chat_template_errors():
            text = prompt if is_text else self.processor.apply_chat_template(prompt, **continuation(prompt))
        pictures = []
        for image in images:
            with (
                input_errors(f"an image of a prompt cannot be read from {printable(image)}", "give another file"),
                os.fdopen(open_regular(image, remedy="give another file"), "rb") as file,
            ):
                pictures.append(Image.open(file).convert("RGB"))
        with input_errors(f"a prompt and its {len(images)} image(s) do not fit together", IMAGE_REMEDY):
            special = {} if is_text else {"add_special_tokens": False}
            inputs = dict(self.processor(text=[text], images=pictures, return_tensors="pt", **special))
        inputs.pop("attention_mask", None)
        return inputs.pop("input_ids")[0].tolist(), inputs

    @staticmethod
    def chat_template_errors() -> contextlib.AbstractContextManager[None]:
        return input_errors("the student's chat template does not take a prompt", "give text, or other messages")

    def ids(self, text: str, **tokenizer_options: Any) -> list[int]:
        """Token ids of a text."""
        with input_errors(f"the text '{printable(text)[:80]}' cannot be split into tokens", "give Unicode characters"):
            return self.tokenizer(text, **tokenizer_options)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @classmethod
    def of(cls, tokenizer: Any, processor: Any = None) -> TextProcessor:
        """Pads with the pad token, or with the end token if there is none (padding is masked)."""
        if not hasattr(processor, "image_processor"):
            processor = None
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(tokenizer, processor, pad_id if pad_id is not None else 0)


def load_text_processor(path: str) -> TextProcessor:
    """The tokenizer and image processor of a model's folder or hub id."""
    hf = transformers()
    with input_errors(f"{printable(path)} has no tokenizer that can be loaded", MODEL_REMEDY):
        tokenizer = hf.AutoTokenizer.from_pretrained(path)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what is built where its files are missing
        raise InputError(
            f"{printable(path)} has no tokenizer: its vocabulary has only special tokens; copy tokenizer.json and "
            f"tokenizer_config.json of the model into it, or {MODEL_REMEDY}"
        )
    try:
        processor = hf.AutoProcessor.from_pretrained(path)
    except Exception:  # text models have none, and fail with arbitrary exception types
        processor = None
    return TextProcessor.of(tokenizer, processor)


def num_shared_ids(student: Any, teacher: Any, teacher_name: str) -> int:
    """Number of leading ids that mean the same to two tokenizers. Ids beyond the last token are padding of the heads
    and mean the same to both; tokens that only the teacher has, after all of the student's, do not.

    Raises InputError unless the teacher has all tokens of the student, with the same ids: distributions over them could
    not be compared."""
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    last_id = max(student_vocab.values(), default=-1)
    extra = {token: i for token, i in teacher_vocab.items() if token not in student_vocab}
    different = (token for token in sorted(student_vocab) if teacher_vocab.get(token) != student_vocab[token])
    between = (token for token in sorted(extra) if extra[token] <= last_id)
    if (token := next(different, None)) is not None or (token := next(between, None)) is not None:
        ids = [vocab.get(token, "missing") for vocab in (student_vocab, teacher_vocab)]
        raise InputError(
            f"{teacher_name} has another tokenizer: token {printable(repr(token))} "
            f"is {ids[0]} for the student and {ids[1]} for the teacher; choose models of one family"
        )
    return min(extra.values(), default=ALL_IDS)
