"""Makes the character-level student and teacher that ship in opdkernels/distillation/addition: two Qwen2 models over thirteen characters
and an end token, trained on "07+45=052". Some four minutes on two cores.

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
STEPS, RATE, BATCH, WARMUP = {"student": 200, "teacher": 900}, {"student": 2e-3, "teacher": 1e-3}, 128, 50


def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}, unk_token="<pad>")
    )
    own.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    own.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<end>")


def model(which: str):
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


def batch(task: Addition, text, step: int) -> torch.Tensor:
    entries = [task.entry(step * BATCH + i) for i in range(BATCH)]
    return torch.tensor([[*text(entry.prompt + entry.answer)["input_ids"], text.eos_token_id] for entry in entries])


def accuracy(trained, text, task: Addition) -> float:
    entries = task.held_out(2000)
    prompts = torch.tensor([text(entry.prompt)["input_ids"] for entry in entries])
    found = trained.generate(prompts, max_new_tokens=4, do_sample=False)[:, prompts.shape[1] :]
    return sum(
        text.decode(row, skip_special_tokens=True) == entry.answer for row, entry in zip(found, entries, strict=True)
    ) / len(entries)


def make(which: str, folder: Path) -> None:
    torch.manual_seed(0)
    text, trained, task = tokenizer(), model(which), Addition(0, "exact")
    optimizer = torch.optim.AdamW(trained.parameters(), lr=RATE[which], weight_decay=0.01)
    began = time.perf_counter()
    for step in range(STEPS[which]):
        left = 1 - step / STEPS[which]
        for group in optimizer.param_groups:
            group["lr"] = RATE[which] * min(1.0, (step + 1) / WARMUP, 2 * left)
        ids = batch(task, text, step)
        logits = trained(ids).logits[:, 5:-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 6:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(
                f"{which}: step {step + 1} of {STEPS[which]}, loss {loss.item():.4f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    trained = trained.bfloat16()
    print(
        f"{which}: {sum(p.numel() for p in trained.parameters()):,} parameters, accuracy {accuracy(trained, text, task):.4f} on 2,000 held-out sums"
    )
    trained.save_pretrained(folder / which)
    text.save_pretrained(folder / which)


if __name__ == "__main__":
    for name in sys.argv[2:] or SHAPES:
        make(name, Path(sys.argv[1]))
