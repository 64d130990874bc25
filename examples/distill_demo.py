"""The whole story in small, offline, in some two minutes on two cores: a student of 0.4 M parameters that adds two-digit numbers
badly and a teacher of 3.2 M that adds them well, both shipped with the package.

On-policy distillation in bf16; the coordinates that it changed most; the same training on these alone, on as many random ones, and
on random ones of the same |W|; the analysis of what changed, beside what rounding alone would show; one page.

    python examples/distill_demo.py demo
"""

from __future__ import annotations

import subprocess
import sys
import time

COMMAND = [
    "experiment",
    "masks",
    "--density",
    "0.2",
    "--arms",
    "changed,random,magnitude-matched",
    "--max-steps",
    "60",
    "--overwrite",
]


def main(folder: str) -> int:
    began = time.perf_counter()
    print("$ opdkernels", *(f'"{part}"' if " " in part else part for part in COMMAND), "-o", folder, flush=True)
    status = subprocess.run([sys.executable, "-m", "opdkernels", *COMMAND, "-o", folder], check=False).returncode
    if status == 0:
        print(
            f"{time.perf_counter() - began:.0f} s; the page is {folder}/report.html, the analysis of what changed {folder}/analysis/report.html"
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
