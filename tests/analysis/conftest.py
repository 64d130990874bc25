"""Small checkpoints on disk, shaped like a language model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in (
            ("input_layernorm.weight", (32,)),
            ("self_attn.q_proj.weight", (32, 32)),
            ("self_attn.q_proj.bias", (32,)),
            ("self_attn.o_proj.weight", (32, 32)),
            ("mlp.gate_proj.weight", (96, 32)),
            ("mlp.down_proj.weight", (32, 96)),
        )
    },
    "lm_head.weight": (64, 32),
}


def weights(dtype=torch.bfloat16, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (0.03 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


def trained(source: dict[str, torch.Tensor], size=3e-5, seed=1) -> dict[str, torch.Tensor]:
    """A dense update of the given size, stored in the source's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (w.float() + size * torch.randn(w.shape, generator=generator)).to(w.dtype) for n, w in source.items()}


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> str:
    """A checkpoint in one file; tensors may share memory."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def pair(tmp_path):
    source = weights()
    return save(tmp_path / "source", source), save(tmp_path / "trained", trained(source))
