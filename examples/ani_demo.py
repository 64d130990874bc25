"""Analyse a real pair in one minute: ANI-1x and ANI-1ccx, the same networks before and after transfer learning.

Downloads torchani 1.2 (MIT) from the package index, converts its parameter files to two safetensors checkpoints,
analyses the pair and prints the path of the report.

    python examples/ani_demo.py demo
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

PIP_DOWNLOAD = ("-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d")
PACKAGE = "torchani==1.2"
MEMBERS, ELEMENTS, LAYERS = 8, "HCNO", 4


def download(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheels = sorted(folder.glob("torchani-1.2-*.whl"))
    if not wheels:
        command = [sys.executable, *PIP_DOWNLOAD, str(folder), PACKAGE]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{PACKAGE} could not be downloaded from the package index; connect and run the demo again")
        wheels = sorted(folder.glob("torchani-1.2-*.whl"))
    return wheels[0]


def parameters(wheel: zipfile.ZipFile, model: str) -> dict[str, torch.Tensor]:
    """The parameters of a model, fp32: biases [out], weights [out, in]."""
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
    base, trained, out = (str(folder / name) for name in ("ani-1x", "ani-1ccx", "out"))
    command = ["-m", "opdkernels", "analyze", base, trained, "-o", out, "--overwrite"]
    print("$ python", *command, flush=True)
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status == 0:
        print(f"report: {folder / 'out' / 'report.html'}")
    sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
