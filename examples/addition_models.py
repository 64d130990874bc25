"""Train the character-level student and teacher that ship in opdkernels/distillation/addition.

Two Qwen2 models over thirteen characters and an end token, trained on sums such as "07+45=052". About four minutes on
two cores.

    pip install 'opdkernels[distill]'
    python examples/addition_models.py opdkernels/distillation/addition
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from opdkernels.distillation.tasks import Addition

CHARACTERS = "0123456789+=\n"
SHAPES = {
    "student": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "teacher": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
MAX_STEPS = {"student": 200, "teacher": 900}
LEARNING_RATE = {"student": 2e-3, "teacher": 1e-3}
BATCH_SIZE, WARMUP_STEPS = 128, 50


def make_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_model(which: str):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(CHARACTERS) + 2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
        **SHAPES[which],
    )
    return Qwen2ForCausalLM(config)


def make_batch(task: Addition, tokenizer, step: int) -> torch.Tensor:
    """Token ids of one batch of sums, [batch_size, 10]."""
    examples = [task.example(step * BATCH_SIZE + i) for i in range(BATCH_SIZE)]
    return torch.tensor(
        [[*tokenizer(example.prompt + example.answer)["input_ids"], tokenizer.eos_token_id] for example in examples]
    )


def accuracy(model, tokenizer, task: Addition) -> float:
    examples = task.eval_examples(2000)
    prompts = torch.tensor([tokenizer(example.prompt)["input_ids"] for example in examples])
    completions = model.generate(prompts, max_new_tokens=4, do_sample=False)[:, prompts.shape[1] :]
    return sum(
        tokenizer.decode(row, skip_special_tokens=True) == example.answer
        for row, example in zip(completions, examples, strict=True)
    ) / len(examples)


def train(which: str, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer, model, task = make_tokenizer(), make_model(which), Addition(0, "exact")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[which], weight_decay=0.01)
    start = time.perf_counter()
    for step in range(MAX_STEPS[which]):
        remaining = 1 - step / MAX_STEPS[which]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE[which] * min(1.0, (step + 1) / WARMUP_STEPS, 2 * remaining)
        ids = make_batch(task, tokenizer, step)
        logits = model(ids).logits[:, 5:-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 6:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(
                f"{which}: step {step + 1} of {MAX_STEPS[which]}, loss {loss.item():.4f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model = model.bfloat16()
    parameters = sum(p.numel() for p in model.parameters())
    correct = accuracy(model, tokenizer, task)
    print(f"{which}: {parameters:,} parameters, accuracy {correct:.4f} on 2,000 held-out sums")
    model.save_pretrained(folder / which)
    tokenizer.save_pretrained(folder / which)


if __name__ == "__main__":
    for name in sys.argv[2:] or SHAPES:
        train(name, Path(sys.argv[1]))
