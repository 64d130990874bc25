"""Compare three ways to fine-tune SmolLM2-135M in bf16 for 50 steps at learning rate 1e-6.

AdamW with fp32 masters of all weights; MaskedAdamW on the coordinates that the first run changed visibly, with gathered
gradients; and AdamW that rounds the weights to bf16 after each step. Prints losses, the visibly changed fraction and
peak memory of each run, and writes masked_tuning.json. Each run is a separate process. About ten minutes on two cores.

    pip install transformers gguf accelerate
    python examples/masked_tuning.py smollm2
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from smollm2_run import batch, load, weights

from opdkernels.masks.mask_set import from_bools
from opdkernels.optim import MaskedAdamW, gather_active_grads

MAX_STEPS, LEARNING_RATE, MAX_GRAD_NORM = 50, 1e-6, 1.0
RUNS = ("full", "masked", "nearest")


class PeakMemory(threading.Thread):
    """Peak anonymous memory of this process since the thread was started, sampled every 5 ms (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.bytes = max(self.bytes, int(line.split()[1]) * 1024)
            time.sleep(0.005)


class FullPrecisionMasters:
    """AdamW on an fp32 copy of every weight, as in mixed-precision training."""

    def __init__(self, model: torch.nn.Module):
        self.params = list(model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for master, param in zip(self.masters, self.params, strict=True):
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for master, param in zip(self.masters, self.params, strict=True):
            param.copy_(master.bfloat16())


class Masked:
    """MaskedAdamW with gradients gathered during the backward pass."""

    def __init__(self, model: torch.nn.Module, masks, precision: str):
        self.optimizer = MaskedAdamW(
            model.named_parameters(), masks=masks, lr=LEARNING_RATE, weight_decay=0.0, precision=precision
        )
        gather_active_grads(model, self.optimizer)

    def step(self) -> None:
        self.optimizer.clip_grad_norm_(MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(run: str, folder: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load(weights(folder / "download"))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    if run == "full":
        stepper: FullPrecisionMasters | Masked = FullPrecisionMasters(model)
    elif run == "masked":
        full = torch.load(folder / "full.pt")
        stepper = Masked(model, from_bools({name: full[name] != p for name, p in base.items()}), "split_master")
    else:
        stepper = Masked(
            model, {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}, "nearest"
        )
    peak, generator, losses, seconds = PeakMemory(), random.Random(0), [], []
    for _ in range(MAX_STEPS):
        ids, labels = batch(tokenizer, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        start = time.perf_counter()
        stepper.step()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    after = {name: p.detach() for name, p in model.named_parameters()}
    num_changed = sum(int((after[name] != base[name]).sum()) for name in base)
    num_coordinates = sum(tensor.numel() for tensor in base.values())
    outside = None
    if run == "full":
        torch.save(after, folder / "full.pt")
    elif run == "masked":
        outside = sum(int(((after[n] != base[n]) & (full[n] == base[n])).sum()) for n in base)
    result = {
        "losses": losses,
        "changed": num_changed / num_coordinates,
        "peak_bytes": peak.bytes,
        "step_s": sorted(seconds)[MAX_STEPS // 2],
        "outside": outside,
    }
    (folder / f"{run}.json").write_text(json.dumps(result))


def main(folder: Path) -> int:
    for run in RUNS:
        print(f"{run}: {MAX_STEPS} steps", flush=True)
        if subprocess.run([sys.executable, __file__, str(folder), run], check=False).returncode:
            return 1
    results = {run: json.loads((folder / f"{run}.json").read_text()) for run in RUNS}

    def mean(values):
        return sum(values) / len(values)

    print(f"{'':10}{'loss, first 10':>16}{'last 10':>10}{'changed':>10}{'peak':>10}{'clip and step':>16}")
    for run, result in results.items():
        print(
            f"{run:10}{mean(result['losses'][:10]):16.3f}{mean(result['losses'][-10:]):10.3f}"
            f"{100 * result['changed']:9.2f}%{result['peak_bytes'] / 1e9:8.2f}GB{1000 * result['step_s']:13.0f} ms"
        )
    print(f"changed coordinates outside the mask: {results['masked']['outside']}")
    Path("masked_tuning.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    if len(sys.argv) > 2:
        train(sys.argv[2], target)
        sys.exit(0)
    sys.exit(main(target))
