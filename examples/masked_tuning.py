"""Three runs of SmolLM2-135M side by side, bf16 weights, 50 steps at a rate of 1e-6: AdamW on fp32 masters of everything;
MaskedAdamW on the coordinates that the first run changed visibly, gradients gathered; and AdamW rounding each step to bf16.

Prints losses, what changed visibly and the peak of memory of each, and writes masked_tuning.json. Each run is a process of its own.
Some ten minutes on two cores.

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
from opdkernels.optim import MaskedAdamW, compact_gradients

STEPS, RATE, CLIP = 50, 1e-6, 1.0
RUNS = ("full", "masked", "nearest")


class PeakMemory(threading.Thread):
    """The most anonymous memory of this process since it was started, looked at every 5 ms (Linux)."""

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


class FullMasters:
    """AdamW on an fp32 copy of every weight, as mixed-precision trainers keep it."""

    def __init__(self, model: torch.nn.Module):
        self.used = list(model.parameters())
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in self.used]
        self.optimizer = torch.optim.AdamW(self.masters, lr=RATE, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for master, used in zip(self.masters, self.used, strict=True):
            master.grad, used.grad = used.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for master, used in zip(self.masters, self.used, strict=True):
            used.copy_(master.bfloat16())


class Masked:
    """MaskedAdamW, its gradients gathered as backward goes."""

    def __init__(self, model: torch.nn.Module, masks, precision: str):
        self.optimizer = MaskedAdamW(
            model.named_parameters(), masks=masks, lr=RATE, weight_decay=0.0, precision=precision
        )
        compact_gradients(model, self.optimizer)

    def step(self) -> None:
        self.optimizer.clip_grad_norm_(CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def tune(run: str, folder: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = load(weights(folder / "download"))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    if run == "full":
        stepper: FullMasters | Masked = FullMasters(model)
    elif run == "masked":
        full = torch.load(folder / "full.pt")
        stepper = Masked(model, from_bools({name: full[name] != p for name, p in base.items()}), "exact")
    else:
        stepper = Masked(
            model, {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}, "nearest"
        )
    peak, generator, losses, seconds = PeakMemory(), random.Random(0), [], []
    for _ in range(STEPS):
        ids, labels = batch(tokenizer, generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        began = time.perf_counter()
        stepper.step()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    after = {name: p.detach() for name, p in model.named_parameters()}
    moved, count = (
        sum(f(name) for name in base) for f in (lambda n: int((after[n] != base[n]).sum()), lambda n: base[n].numel())
    )
    outside = None
    if run == "full":
        torch.save(after, folder / "full.pt")
    elif run == "masked":
        outside = sum(int(((after[n] != base[n]) & (full[n] == base[n])).sum()) for n in base)
    found = {
        "losses": losses,
        "changed": moved / count,
        "peak_bytes": peak.bytes,
        "step_s": sorted(seconds)[STEPS // 2],
        "outside": outside,
    }
    (folder / f"{run}.json").write_text(json.dumps(found))


def main(folder: Path) -> int:
    for run in RUNS:
        print(f"{run}: {STEPS} steps", flush=True)
        if subprocess.run([sys.executable, __file__, str(folder), run], check=False).returncode:
            return 1
    found = {run: json.loads((folder / f"{run}.json").read_text()) for run in RUNS}

    def mean(values):
        return sum(values) / len(values)

    print(f"{'':10}{'loss, first 10':>16}{'last 10':>10}{'changed':>10}{'peak':>10}{'clip and step':>16}")
    for run, one in found.items():
        print(
            f"{run:10}{mean(one['losses'][:10]):16.3f}{mean(one['losses'][-10:]):10.3f}{100 * one['changed']:9.2f}%{one['peak_bytes'] / 1e9:8.2f}GB"
            f"{1000 * one['step_s']:13.0f} ms"
        )
    print(f"coordinates that moved outside the mask: {found['masked']['outside']}")
    Path("masked_tuning.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    if len(sys.argv) > 2:
        tune(sys.argv[2], target)
        sys.exit(0)
    sys.exit(main(target))
