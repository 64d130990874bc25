"""Sparse patches: the coordinates that training changed, as one file; docs/patch.md describes the format.

>>> import tempfile, torch, opdkernels
>>> from safetensors.torch import save_file
>>> folder = tempfile.mkdtemp()
>>> save_file({"w": torch.zeros(1000)}, f"{folder}/base.safetensors")
>>> save_file({"w": torch.arange(1000.0) // 999}, f"{folder}/trained.safetensors")
>>> opdkernels.patch.create(f"{folder}/base.safetensors", f"{folder}/trained.safetensors", f"{folder}/p")["changed"]
1
>>> opdkernels.patch.apply(f"{folder}/base.safetensors", f"{folder}/p", f"{folder}/again")["files"]
['trained.safetensors']
"""

from opdkernels.patch.apply import apply, apply_to
from opdkernels.patch.create import create
from opdkernels.patch.graft import graft
from opdkernels.patch.manifest import format_applied, format_text, info

__all__ = ["apply", "apply_to", "create", "format_applied", "format_text", "graft", "info"]
