"""Writes the checkpoints of the benchmarks: Qwen2.5-0.5B shapes, a source and two runs trained from it.

About 79 % of their coordinates are bit-identical. The data are synthetic: weights are a scale mixture with row and
column scales, updates are dense, heavy-tailed and small (200 steps of 1e-6), stored in bf16.

    python benchmarks/data.py bench-data          # about 3 GB: source/, run_a/, run_b/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY, KV = 896, 24, 4864, 151936, 128
SHARD_BYTES = 500_000_000


def shapes(layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocabulary, HIDDEN)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (HIDDEN,)
        for name, shape in (("q", (HIDDEN, HIDDEN)), ("k", (KV, HIDDEN)), ("v", (KV, HIDDEN)), ("o", (HIDDEN, HIDDEN))):
            yield at + f"self_attn.{name}_proj.weight", shape
            if name != "o":
                yield at + f"self_attn.{name}_proj.bias", shape[:1]
        yield at + "post_attention_layernorm.weight", (HIDDEN,)
        yield at + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield at + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield at + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)


def weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
    rows = torch.exp(0.3 * torch.randn(shape[0], 1, generator=generator))
    columns = torch.exp(0.3 * torch.randn(1, shape[1], generator=generator))
    return (torch.randn(shape, generator=generator).mul_(0.018).mul_(rows).mul_(columns)).bfloat16()


def updated(source: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    size = torch.empty(source.shape).log_normal_(0, 0.9, generator=generator)
    update = torch.randn(source.shape, generator=generator).mul_(size).mul_(1.3e-5).clamp_(-2e-4, 2e-4)
    return (source.float() + update).bfloat16()


def write(folder: Path, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> None:
    """Writes source, run_a and run_b as sharded safetensors, unless they are complete."""
    if (folder / "done.json").exists():
        return
    torch.manual_seed(0)
    generators = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(("source", "run_a", "run_b"))}
    shards: dict[str, list[dict[str, torch.Tensor]]] = {name: [{}] for name in generators}
    size = 0
    for name, shape in shapes(layers, vocabulary):
        source = weight(shape, generators["source"])
        tensors = {"source": source, **{run: updated(source, generators[run]) for run in ("run_a", "run_b")}}
        if size and size + source.nbytes > SHARD_BYTES:
            size = 0
            for parts in shards.values():
                parts.append({})
        size += source.nbytes
        for run, tensor in tensors.items():
            shards[run][-1][name] = tensor
    for run, parts in shards.items():
        (folder / run).mkdir(parents=True, exist_ok=True)
        index = {"metadata": {}, "weight_map": {}}
        for i, part in enumerate(parts, 1):
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
            save_file(part, folder / run / file, metadata={"format": "pt"})
            index["weight_map"].update(dict.fromkeys(part, file))
        (folder / run / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / run / "config.json").write_text(json.dumps({"model_type": "qwen2", "tie_word_embeddings": True}))
    (folder / "done.json").write_text("{}")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "bench-data"))
