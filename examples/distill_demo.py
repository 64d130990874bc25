"""On-policy distillation and masked training on a small example, offline, in about two minutes on two cores.

A student of 0.4 M parameters that adds two-digit numbers badly learns from a teacher of 3.2 M that adds them well; both
ship with the package. The demo distils in bf16, takes the coordinates that changed most, trains only these, as many
random ones, and as many magnitude-matched ones, and writes one page with the scores and the analysis of the update.

    python examples/distill_demo.py demo
"""

from __future__ import annotations

import subprocess
import sys
import time

COMMAND = [
    *("experiment", "masks", "--density", "0.2", "--arms", "changed,random,magnitude-matched"),
    *("--max-steps", "60", "--overwrite"),
]


def main(folder: str) -> int:
    start = time.perf_counter()
    print("$ opdkernels", *COMMAND, "-o", folder, flush=True)
    status = subprocess.run([sys.executable, "-m", "opdkernels", *COMMAND, "-o", folder], check=False).returncode
    if status == 0:
        print(f"{time.perf_counter() - start:.0f} s")
        print(f"report: {folder}/report.html")
        print(f"analysis of the update: {folder}/analysis/report.html")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
