"""A tiny Llama model and a tokenizer of words, for tests with the trainers of other libraries."""

from __future__ import annotations

import pytest
import torch

WITHOUT_TOKENIZERS = "tokenizers is not installed; `make trainers` installs it"


def tiny_llama(vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, dtype: torch.dtype):
    """A model of tied embeddings with random weights, the same ones each time."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def word_tokenizer(vocab_size: int):
    """A tokenizer of the words w3, w4 and so on, separated by spaces; the first three ids are special tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers", reason=WITHOUT_TOKENIZERS)
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
