from __future__ import annotations

import pytest
import torch

from opdkernels.distillation import forward
from opdkernels.distillation.examples import Example
from opdkernels.distillation.forward import (
    completion_hidden_states,
    hidden_states,
    make_kv_cache,
    prefill_shared_prefix,
)
from opdkernels.distillation.models import unwrap_peft
from opdkernels.distillation.rollout import Prompts, collate, encode, load_completions, pad_rollout, until_end
from opdkernels.distillation.sampling import sample
from opdkernels.distillation.text import TextProcessor
from opdkernels.errors import InputError
from tests.distillation.conftest import model, tokenizer

TEXT = TextProcessor(tokenizer(), None, 0)
CPU = torch.device("cpu")


def prompts(*texts):
    return encode(TEXT, [Example(text) for text in texts], 100)


def test_completion_mask_selects_completion_tokens():
    rollout = pad_rollout(
        prompts("1+1=", "12+13="), [[4, 1], [5, 6, 7]], [True, False], on_policy=True, pad_id=0, device=CPU
    )
    assert rollout.tokens.tolist() == [4, 1, 5, 6, 7]
    assert rollout.attention_mask.sum(1).tolist() == [6, 9]
    assert rollout.completions() == [[4, 1], [5, 6, 7]]
    part = rollout.select([0])
    assert part.ids.shape == (1, 6)
    assert part.tokens.tolist() == [4, 1]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty_completions_have_no_tokens(lengths):
    rollout = pad_rollout(
        prompts(*["1="] * len(lengths)),
        [[] for _ in lengths],
        [False] * len(lengths),
        on_policy=True,
        pad_id=0,
        device=CPU,
    )
    assert rollout.tokens.tolist() == []
    assert rollout.lengths.tolist() == lengths


def test_rows_of_a_batch_are_independent():
    student_model, rollout = (
        model(0).eval(),
        pad_rollout(
            prompts("1+1=", "12+13=25+1="), [[4, 1], [5, 6, 7]], [True, False], on_policy=True, pad_id=0, device=CPU
        ),
    )
    together = hidden_states(student_model, *rollout.batch())[:, :-1][rollout.completion_mask]
    alone = torch.cat(
        [
            hidden_states(student_model, *part.batch())[:, :-1][part.completion_mask]
            for part in (rollout.select([0]), rollout.select([1]))
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


PREFIX = "12+13=25\n41+29=70\n"


def with_examples(*, prefix=PREFIX):
    texts = [prefix + "1+1=", prefix + "12+13=", prefix + "1+10="]
    return pad_rollout(
        prompts(*texts), [[4, 1], [5, 6, 7], [5]], [True, False, False], on_policy=True, pad_id=0, device=CPU
    )


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["12=3", "12=4"], 3),
        (["12=3", "12=3"], 3),
        (["12", "12=4"], 1),
        (["2=3", "12=4"], 0),
        (["12=3"], 0),
        ([], 0),
        (["1", "1"], 0),
    ],
)
def test_shared_prefix_length(texts, shared):
    assert (
        pad_rollout(
            prompts(*texts), [[4, 5]] * len(texts), [False] * len(texts), on_policy=True, pad_id=0, device=CPU
        ).shared_prefix_length
        == shared
    )


def lora(own):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(own, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("wrap", [lambda own: own, lora])
def test_shared_prefix_runs_once_with_equal_states_and_gradients(wrap, monkeypatch):
    own, rollout = wrap(model(0).eval()), with_examples()
    result, lengths = {}, []
    unwrap_peft(own).base_model.register_forward_hook(
        lambda module, args, given, out: lengths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for least in (16, 1000):
        monkeypatch.setattr(forward, "MIN_SHARED_PREFIX", least)
        hidden = completion_hidden_states(own, rollout)
        trained = [p for p in own.parameters() if p.requires_grad]
        result[least] = [
            hidden,
            *torch.autograd.grad(
                (hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum(),
                trained,
                allow_unused=True,
                materialize_grads=True,
            ),
        ]
    assert lengths == [(1, 19), (3, 8), (3, 27)]
    for a, b in zip(*result.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_continues_from_shared_prefix(temperature, monkeypatch):
    student_model, lengths, result = model(3, initializer_range=0.3).eval(), [], []
    student_model.base_model.register_forward_hook(
        lambda module, args, given, out: lengths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for least, texts in ((16, ("12", "34", "56")), (1000, ("12", "34", "56")), (16, ("1", "34", "56"))):
        monkeypatch.setattr(forward, "MIN_SHARED_PREFIX", least)
        torch.manual_seed(0)
        result.append(
            sample(
                student_model,
                TEXT,
                prompts(*(PREFIX + text + "+1=" for text in texts)),
                max_length=3,
                end_ids=[],
                vocab_size=15,
                temperature=temperature,
                on_policy=True,
            )
        )
    assert result[0].completions() == result[1].completions()
    assert lengths[:2] == [(1, 18), (3, 5)]
    assert (3, 23) in lengths  # complete rows, also where they are padded
    assert lengths.count((1, 18)) == 1


def test_no_kv_cache_for_position_dependent_models():
    sliding = model(0, use_sliding_window=True, sliding_window=4, max_window_layers=0).eval()
    assert make_kv_cache(sliding) is None
    assert make_kv_cache(model(0).eval()) is not None
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert make_kv_cache(model(0, rope_parameters=scaled).eval()) is None
    recomputing = model(0)
    recomputing.gradient_checkpointing_enable()
    assert make_kv_cache(recomputing) is None


def test_model_without_kv_cache_has_no_shared_prefix():
    from transformers import RwkvConfig, RwkvModel

    torch.manual_seed(0)
    student_model = RwkvModel(
        RwkvConfig(
            vocab_size=15,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=64,
            context_length=64,
        )
    ).eval()
    assert prefill_shared_prefix(student_model, torch.ones(1, 20, dtype=torch.long), 3) == {}


def test_greedy_samples_do_not_depend_on_the_batch():
    student_model, texts = model(3, initializer_range=0.3).eval(), ("1+1=", "12+13=", "7=")
    limits = {"max_length": 6, "end_ids": [1], "vocab_size": 15, "temperature": 0.0, "on_policy": True}
    together = sample(student_model, TEXT, prompts(*texts), **limits)
    for i, text in enumerate(texts):
        assert sample(student_model, TEXT, prompts(text), **limits).completions()[0] == together.completions()[i]


def test_sampled_tokens_follow_model_probabilities():
    student_model = model(3, initializer_range=0.3).eval()
    rollout = sample(
        student_model,
        TEXT,
        prompts(*["1+1="] * 4000),
        max_length=1,
        end_ids=[],
        vocab_size=15,
        temperature=1.0,
        on_policy=True,
    )
    ids = torch.tensor([prompts("1+1=").ids[0]])
    expected = student_model(ids).logits[0, -1].double().softmax(0).detach()
    seen = torch.bincount(rollout.tokens, minlength=15) / 4000
    assert (seen - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_generation_config_penalties_are_ignored():
    student_model = model(3, initializer_range=0.3).eval()
    student_model.generation_config.update(repetition_penalty=1.5, min_p=0.2, no_repeat_ngram_size=2)
    limits = {"max_length": 1, "end_ids": [], "vocab_size": 15, "on_policy": True}
    rollout = sample(student_model, TEXT, prompts(*["1+1="] * 4000), temperature=1.0, **limits)
    expected = student_model(torch.tensor([prompts("1+1=").ids[0]])).logits[0, -1].double().softmax(0).detach()
    assert (torch.bincount(rollout.tokens, minlength=15) / 4000 - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert student_model.generation_config.repetition_penalty == 1.5


def test_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="has no token"):
        prompts("1=", "")


def test_loaded_completions_end_with_the_tokenizers_eos():
    arguments = encode(TEXT, [Example("1=", completion="12")], 100)
    assert load_completions(TEXT, arguments, max_length=9, end_ids=[0, 1, 14], device=CPU).completions() == [[3, 4, 1]]


def test_ids_beyond_common_vocabulary_are_never_sampled():
    rollout = sample(
        model(3), TEXT, prompts(*["1+1="] * 64), max_length=4, end_ids=[], vocab_size=5, temperature=1.0, on_policy=True
    )
    assert int(rollout.tokens.max()) < 5


@pytest.mark.parametrize(
    ("row", "ends", "kept"),
    [
        ([], [1], ([], False)),
        ([1, 1], [1], ([1], True)),
        ([4, 5], [1], ([4, 5], False)),
        ([4, 9, 5], [1, 9], ([4, 9], True)),
    ],
)
def test_completions_end_with_their_first_end_token(row, ends, kept):
    assert until_end(row, ends) == kept


def test_loaded_completions_are_finished():
    arguments = encode(TEXT, [Example("1=", completion="12"), Example("1=", completion="")], 100)
    rollout = load_completions(TEXT, arguments, max_length=9, end_ids=[1], device=CPU)
    assert rollout.completions() == [[3, 4, 1], [1]]
    assert rollout.finished.tolist() == [True, True]
    assert load_completions(TEXT, arguments, max_length=2, end_ids=[1], device=CPU).finished.tolist() == [False, True]


def test_long_prompts_keep_their_end():
    result = encode(TEXT, [Example("123+456="), Example("1=")], 3)
    assert result.num_truncated == 1
    assert TEXT.decode(result.ids[0]) == "56="


def test_text_model_refuses_images():
    with pytest.raises(InputError, match="give an image-text model"):
        encode(TEXT, [Example("1=", images=("x.png",))], 9)


def test_per_token_inputs_are_padded_like_ids():
    rows = [
        {"mm_token_type_ids": torch.ones(1, 2, dtype=torch.long), "pixel_values": torch.ones(3, 4)},
        {"mm_token_type_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.ones(1, 4)},
    ]
    result = collate(rows, 4, pad_left=True)
    assert result["mm_token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert result["pixel_values"].shape == (4, 4)
    assert collate(rows, 4, pad_left=False)["mm_token_type_ids"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert collate([{}, {}], 4, pad_left=True) == {}
    assert collate([{}, rows[0]], 4, pad_left=True)["mm_token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_encode_returns_prompts():
    assert isinstance(prompts("1="), Prompts)
