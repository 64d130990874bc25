"""What test_sharded.py starts under torchrun: runs of distillation, one after the other in the same processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from opdkernels.distillation.loop import train
from opdkernels.distillation.options import options_from


def main(jobs: str) -> None:
    """`jobs`: file with a list of (options, output directory)."""
    for values, output_dir in json.loads(Path(jobs).read_text()):
        train(options_from(None, values), output_dir)


if __name__ == "__main__":
    main(sys.argv[1])
