"""A real pair, small enough for a minute: ANI-1x and ANI-1ccx, the same networks before and after transfer learning.

Takes the package torchani 1.2 (MIT) from the package index, turns its parameter files into two safetensors folders,
analyses the pair and prints where the report lies.

    python examples/ani_demo.py demo
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PACKAGE = "torchani==1.2"
MEMBERS, ELEMENTS, LAYERS = 8, "HCNO", 4


def download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob("torchani-1.2-*.whl"))
    if not found:
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
                f"the demo takes {PACKAGE} from the package index, which cannot be reached; connect, and run it again"
            )
        found = sorted(folder.glob("torchani-1.2-*.whl"))
    return found[0]


def parameters(wheel: zipfile.ZipFile, model: str) -> dict[str, torch.Tensor]:
    """Raw little-endian fp32: biases (out), weights (out, in)."""
    tensors = {}
    for member in range(MEMBERS):
        for element in ELEMENTS:
            for layer in range(1, LAYERS + 1):
                stem = f"torchani/resources/{model}_8x/train{member}/networks/ANN-{element}.nnf-l{layer}"
                bias, weight = (
                    torch.frombuffer(bytearray(wheel.read(stem + end)), dtype=torch.float32)
                    for end in (".bparam", ".wparam")
                )
                name = f"members.{member}.{element}.layers.{layer}"
                tensors[name + ".weight"] = weight.reshape(len(bias), -1)
                tensors[name + ".bias"] = bias
    return tensors


def write(wheel: zipfile.ZipFile, model: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(parameters(wheel, model), folder / "model.safetensors")


def main(folder: Path) -> None:
    with zipfile.ZipFile(download(folder / "download")) as wheel:
        for model in ("ani-1x", "ani-1ccx"):
            write(wheel, model, folder / model)
    command = [
        "-m",
        "opdkernels",
        "analyze",
        str(folder / "ani-1x"),
        str(folder / "ani-1ccx"),
        "-o",
        str(folder / "out"),
        "--overwrite",
    ]
    print("$ python", *command, flush=True)
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status == 0:
        print(f"report: {folder / 'out' / 'report.html'}")
    sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
