"""What on-policy distillation changes in a model, offline, in about two minutes on two cores.

First the weights of a real run: layer 5 of a 0.5B model before and after two seeds of on-policy distillation
(examples/opd_sample), with the verdict of `analyze` and what both seeds share. Then a small run from start to end: a
student of 0.4 M parameters that adds two-digit numbers badly learns from a teacher of 3.2 M that adds them well, both
of which ship with the package; the coordinates that changed most are trained alone, and for comparison as many random
and as many magnitude-matched ones. This small task changes nearly all weights; the real run does not.

    python examples/demo.py demo
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

SAMPLE = Path(__file__).parent / "opd_sample"
BASE, SEED_0, SEED_1 = (str(SAMPLE / f"{name}.safetensors") for name in ("base", "seed0", "seed1"))
COMMANDS = {
    "sample": ("What a real run changed", ["analyze", BASE, SEED_1]),
    "overlap": ("What two seeds of it share", ["overlap", BASE, SEED_0, SEED_1]),
    "masks": (
        "A small run: distil, take the coordinates that changed most, train only these",
        ["experiment", "masks", "--density", "0.2", "--arms", "changed,random,magnitude-matched", "--max-steps", "60"],
    ),
}


def main(folder: str) -> int:
    start = time.perf_counter()
    for name, (title, command) in COMMANDS.items():
        arguments = [*command, "-o", f"{folder}/{name}", "--overwrite"]
        print(f"\n{title}\n$ opdkernels {' '.join(arguments)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "opdkernels", *arguments], check=False).returncode
        if status:
            return status
    print(f"\n{time.perf_counter() - start:.0f} s; reports:")
    for name, (title, _) in COMMANDS.items():
        print(f"  {folder}/{name}/report.html  {title}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
