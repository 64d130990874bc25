"""Models of transformers as this package uses them: hidden states before the head, and the head as `linear_divergence` takes it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from opdkernels.errors import InputError, UsageError, printable
from opdkernels.ops.divergence import Head

if TYPE_CHECKING:
    from opdkernels.distillation.rollout import Rollout

LEAST_SHARED = 16  # tokens that are worth a pass of their own
ANOTHER = "give another folder or hub id"
PLACES = "give each image one place in its prompt"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def transformers() -> Any:
    try:
        import transformers  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError(
            "distillation runs on transformers, which is not installed; pip install 'opdkernels[distill]'"
        ) from None
    return transformers


@contextlib.contextmanager
def bad_input(what: str, remedy: str) -> Iterator[None]:
    """Makes an InputError of whatever a library raises over somebody's files: `what` cannot be, why, and the `remedy`. Templates, pickles
    and images fail in as many ways as there are."""
    try:
        yield
    except (InputError, UsageError, MemoryError, torch.OutOfMemoryError):  # the last two are not of the files
        raise
    except UnpicklingError:  # whose own words advise to run what is in the file
        raise InputError(f"{what} (a pickle is damaged, or holds more than tensors); {remedy}") from None
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({printable(told)[:300]}); {remedy}") from None


@dataclass
class Text:
    """A tokenizer, and the processor of images where the model sees them."""

    tokenizer: Any
    processor: Any
    pad: int

    def encode(self, prompt: Any, images: tuple[str, ...] = ()) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Token ids of a prompt, and what else the model takes with it, such as pixel_values."""
        if images:
            return self.encode_images(prompt, images)
        if isinstance(prompt, str):
            return self.ids(prompt), {}
        with self.chat():
            return self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            ), {}

    def encode_images(self, prompt: Any, images: tuple[str, ...]) -> tuple[list[int], dict[str, torch.Tensor]]:
        if self.processor is None:
            raise InputError("a prompt has images, and the student takes none; give an image-text model")
        try:
            from PIL import Image  # type: ignore[import-not-found]
        except ImportError:
            raise UsageError("prompts with images need pillow, which is not installed; pip install pillow") from None
        with self.chat():
            text = (
                prompt
                if isinstance(prompt, str)
                else self.processor.apply_chat_template(prompt, add_generation_prompt=True)
            )
        opened = []
        for image in images:
            with bad_input(f"an image of a prompt cannot be read from {printable(image)}", "give another file"):
                opened.append(Image.open(image).convert("RGB"))
        with bad_input(f"a prompt and its {len(images)} image(s) do not fit together", PLACES):
            found = dict(
                self.processor(
                    text=[text],
                    images=opened,
                    return_tensors="pt",
                    **({} if isinstance(prompt, str) else {"add_special_tokens": False}),
                )
            )
        found.pop("attention_mask", None)
        return found.pop("input_ids")[0].tolist(), found

    @staticmethod
    def chat() -> contextlib.AbstractContextManager[None]:
        return bad_input("the student's chat template does not take a prompt", "give text, or other messages")

    def ids(self, text: str, **given: Any) -> list[int]:
        """Token ids of a text."""
        with bad_input(f"the text '{printable(text)[:80]}' cannot be split into tokens", "give Unicode characters"):
            return self.tokenizer(text, **given)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_model(place: str, dtype: str, device: torch.device) -> Any:
    """A causal or image-text model, without dropout. Raises InputError where it cannot be read."""
    hf = transformers()
    with bad_input(f"{printable(place)} cannot be loaded as a model", ANOTHER):
        config = hf.AutoConfig.from_pretrained(place)
        images = type(config) in hf.AutoModelForImageTextToText._model_mapping
        kind = hf.AutoModelForImageTextToText if images else hf.AutoModelForCausalLM
        model, found = kind.from_pretrained(place, dtype=DTYPES[dtype], output_loading_info=True)
        if found["missing_keys"]:
            raise InputError(
                f"{printable(place)} lacks {printable(sorted(found['missing_keys'])[0])} and so on; its model would begin with random weights there"
            )
        model = model.to(device).eval()
        refuse_other_head(model, place)
    return model


@torch.no_grad()
def refuse_other_head(model: Any, place: str) -> None:
    """Raises InputError where a model makes logits otherwise than `head_of` says."""
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    head, hidden = head_of(model), hidden_states(model, ids, torch.ones_like(ids), {})[0].float()
    logits = logits_of(hidden, head)
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    if not (logits - own).abs().max() <= 0.02 * own.abs().max() and torch.isfinite(own).all():
        raise InputError(
            f"{printable(place)} makes its logits in a way that is not known here ({type(model).__name__}); choose another model"
        )


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """fp32 [n, vocabulary]: a head's logits of hidden states [n, width]."""
    logits = hidden.float() @ head.weight[: head.vocab].float().T
    if head.bias is not None:
        logits = logits + head.bias[: head.vocab].float()
    logits = logits * head.scale
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def positions(model: Any) -> int:
    """How many positions a model, or that of a configuration, has, prompt and completion together."""
    return getattr(text_config(model), "max_position_embeddings", None) or 1 << 30


def shared_ids(student: Any, teachers: Iterable[Any]) -> int:
    """How many ids all models, or those of configurations, have: families of one tokenizer pad their heads to other sizes."""
    return min(
        len(head_of(one).weight) if isinstance(one, torch.nn.Module) else text_config(one).vocab_size
        for one in (student, *teachers)
    )


def text_config(model: Any) -> Any:
    """The configuration of a model's language part; model: it, or its configuration."""
    return getattr(unwrapped(model), "config", model).get_text_config()


def load_config(place: str) -> Any:
    """A model's configuration. Raises InputError where it cannot be read."""
    with bad_input(f"{printable(place)} cannot be loaded as a model", ANOTHER):
        return transformers().AutoConfig.from_pretrained(place)


def load_text(place: str) -> Text:
    """The tokenizer of a model's folder, and its processor. Without a pad token, padding takes an end token's id; it is masked."""
    hf = transformers()
    with bad_input(f"{printable(place)} has no tokenizer that can be loaded", ANOTHER):
        tokenizer = hf.AutoTokenizer.from_pretrained(place)
    try:
        processor = hf.AutoProcessor.from_pretrained(place)
    except Exception:  # models of text have none, and say so in many ways
        processor = None
    if not hasattr(processor, "image_processor"):
        processor = None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Text(tokenizer, processor, pad if pad is not None else 0)


def refuse_other_tokens(student: Any, teacher: Any, named: str) -> None:
    """Raises InputError where two tokenizers give a text other ids: distributions over them cannot be compared."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = next((token for token in sorted(ours) if theirs.get(token) != ours[token]), None) or next(
        token for token in sorted(theirs) if token not in ours
    )
    raise InputError(
        f"{named} has another tokenizer: {printable(repr(token))} is {ours.get(token, 'not there')} of the student's and {theirs.get(token, 'not there')} of the teacher's; choose models of one family"
    )


def end_tokens(model: torch.nn.Module, text: Text, stop_token: str) -> list[int]:
    """Ids that end a completion: the model's own, the tokenizer's, and that of `stop_token`."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = set(own if isinstance(own, (list, tuple)) else [own]) | {text.tokenizer.eos_token_id}
    if stop_token:
        ids = text.ids(stop_token, add_special_tokens=False)
        if len(ids) != 1:
            raise UsageError(
                f"stop_token is {stop_token!r}, which is {len(ids)} tokens of the student; choose a text of one token"
            )
        found.add(ids[0])
    return sorted(i for i in found if i is not None)


def hidden_states(
    model: Any, ids: torch.Tensor, attention: torch.Tensor, extras: dict[str, torch.Tensor]
) -> torch.Tensor:
    """[batch, length, width]: what the head takes, of right-padded ids [batch, length]."""
    body = unwrapped(model).base_model
    with taken(extras):
        return body(input_ids=ids, attention_mask=attention.long(), use_cache=False, **extras).last_hidden_state


@contextlib.contextmanager
def taken(extras: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Raises InputError where a model does not take what came with prompts beside their ids: images that no token stands for."""
    try:
        yield
    except (InputError, UsageError):
        raise
    except (ValueError, LookupError, RuntimeError, StopIteration) as error:
        if not extras or isinstance(error, torch.OutOfMemoryError):
            raise
        with bad_input("the model does not take prompts with their images", PLACES):
            raise


def states_at_completions(model: Any, rollout: Rollout) -> torch.Tensor:
    """[n, width]: what the head takes at the n positions whose next token is of a completion. What all prompts begin with, such as
    instructions and examples, runs once, in one row, and has its gradient from every row."""
    ids, attention, extras = rollout.inputs()
    shared = rollout.shared
    begun = begin(model, ids[:1, :shared], len(ids))
    if not begun:
        return hidden_states(model, ids, attention, extras)[:, :-1][rollout.targets]
    body = unwrapped(model).base_model
    hidden = body(input_ids=ids[:, shared:], attention_mask=attention.long(), use_cache=True, **begun).last_hidden_state
    return hidden[:, :-1][rollout.targets[:, shared:]]


def begin(model: Any, beginning: torch.Tensor, rows: int) -> dict[str, Any]:
    """The argument with which `rows` rows go on after a beginning [1, length] that they share; none where it is short, or the model
    would not keep all of it."""
    cache = plain_cache(model) if beginning.shape[1] >= LEAST_SHARED else None
    if cache is None:
        return {}
    body = unwrapped(model).base_model
    given = {name_of_cache(body): cache}
    body(input_ids=beginning, use_cache=True, **given)
    if cache.get_seq_length() != beginning.shape[1]:  # it holds what it knows elsewhere
        return {}
    cache.batch_repeat_interleave(rows)
    return given


def plain_cache(model: Any) -> Any:
    """An empty cache of keys and values, which a gradient goes through; None of a model that takes none, or would not keep all of it,
    as it is for every length: with images, a sliding window, states, rotations that depend on the length, activations computed again,
    or layers that several processes gather in step."""
    from torch.distributed.fsdp import FSDPModule
    from transformers.cache_utils import DynamicCache, DynamicLayer  # type: ignore[import-not-found]

    own = unwrapped(model)
    config = text_config(own)
    rotations = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in own.modules())
    if (
        config is not own.config
        or "dynamic" in rotations
        or "longrope" in rotations
        or recomputes
        or isinstance(model, FSDPModule)
        or not name_of_cache(own.base_model)
    ):
        return None
    cache = DynamicCache(config=config)
    return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def name_of_cache(body: torch.nn.Module) -> str:
    """What a model of transformers calls its cache, `past_key_values` in older ones; nothing where it takes none."""
    taken = inspect.signature(body.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), "")


def unwrapped(model: Any) -> Any:
    """The model of transformers within peft's wrapper, its factors in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: torch.nn.Module, vocab: int | None = None) -> Head:
    """The head of a model: how logits come from hidden states; of ids from `vocab` on, which others lack, none."""
    own = unwrapped(model)
    linear, config = own.get_output_embeddings(), text_config(own)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    weight = linear.weight if not hasattr(linear, "base_layer") else linear.base_layer.weight
    return Head(
        weight,
        getattr(linear, "bias", None),
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        vocab=vocab,
    )
