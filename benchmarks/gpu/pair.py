"""A pair of the shapes of Llama-3.1-8B in bf16, analysed from host memory as `analyze --device cuda` analyses files.

Tensors are generated on the device, one at a time, so nothing is copied to the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.gpu.checks import Inconclusive
from opdkernels.backends import devices
from opdkernels.benchmark.workloads import UPDATE
from opdkernels.checkpoint import streaming
from opdkernels.ops.delta import Tally, delta
from opdkernels.ops.delta.many import SparseTally

LIMIT_S = 90.0
SPARE_BYTES = 4 << 30  # of host memory, for the process and its pinned buffers


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Llama model; the default is Llama-3.1-8B."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14_336
    key_value: int = 1024
    vocabulary: int = 128_256

    def of_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, intermediate = self.hidden, self.intermediate
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for i in range(self.layers):
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("self_attn.q_proj", (hidden, hidden)),
                ("self_attn.k_proj", (self.key_value, hidden)),
                ("self_attn.v_proj", (self.key_value, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("post_attention_layernorm", (hidden,)),
                ("mlp.gate_proj", (intermediate, hidden)),
                ("mlp.up_proj", (intermediate, hidden)),
                ("mlp.down_proj", (hidden, intermediate)),
            ):
                yield f"model.layers.{i}.{name}.weight", shape
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)


LLAMA_8B, SMALL = Shapes(), Shapes(2, 64, 160, 32, 300)


def available_host_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group (Linux)."""
    meminfo = Path("/proc/meminfo").read_text().split()
    free = 1024 * int(meminfo[meminfo.index("MemAvailable:") + 1])
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return free


@dataclass(frozen=True)
class HostPair:
    """Both sides of every tensor in host memory, bf16 [numel], and how many coordinates differ."""

    sides: list[tuple[torch.Tensor, torch.Tensor]]
    num_changed: list[int]

    def matches(self) -> list[tuple[int, Any]]:
        """What `streaming` needs to know of the tensors."""
        info = SimpleNamespace(dtype="bf16")
        return [
            (i, SimpleNamespace(index=i, numel=base.numel(), base=info, trained=info))
            for i, (base, _) in enumerate(self.sides)
        ]

    def read(self, match: Any, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        base, trained = self.sides[match.index]
        return base[begin:end], trained[begin:end]


def check_time(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise Inconclusive(f"{what} took more than {LIMIT_S:.0f} s")


def generate(shapes: Shapes, device: torch.device, deadline: float) -> HostPair:
    """Generates the tensors on the device and copies them to the host."""
    generator = torch.Generator(device).manual_seed(0)
    sides, num_changed = [], []
    for _, shape in shapes.of_tensors():
        check_time(deadline, "generating the pair")
        numel = torch.Size(shape).numel()
        base = (0.02 * torch.randn(numel, generator=generator, device=device)).bfloat16()
        trained = (base.float() + UPDATE * torch.randn(numel, generator=generator, device=device)).bfloat16()
        sides.append((base.cpu(), trained.cpu()))
        num_changed.append(int((base.view(torch.int16) != trained.view(torch.int16)).sum()))
    return HostPair(sides, num_changed)


def tallies_of(pair: HostPair, device: torch.device, deadline: float) -> list[SparseTally]:
    """A tally of each tensor, slice by slice through pinned buffers."""
    tally, tallies = Tally.empty(), []
    slices = streaming.stream_slices(pair, pair.matches(), streaming.MAX_SLICE_BYTES, device)  # type: ignore[arg-type]
    for slice_, ready in slices:
        check_time(deadline, "analysing the pair")
        delta(*ready(), out=tally)
        if slice_.end == slice_.match.numel:
            tallies.append(SparseTally.of(tally))
            tally.reset()
    return tallies


def measure(device: torch.device, shapes: Shapes = LLAMA_8B) -> list[dict[str, Any]]:
    """The row of the pair. Raises AssertionError if a tensor has another number of changed coordinates."""
    coordinates = sum(torch.Size(shape).numel() for _, shape in shapes.of_tensors())
    nbytes = 2 * torch.bfloat16.itemsize * coordinates
    free, needed = available_host_bytes(), nbytes + SPARE_BYTES * (shapes == LLAMA_8B)
    if free < needed:
        raise Inconclusive(f"{free / 1e9:.0f} GB of {needed / 1e9:.0f} GB of host memory are available")
    deadline = time.monotonic() + LIMIT_S
    devices.empty_cache(device)
    start = time.perf_counter()
    pair = generate(shapes, device, deadline)
    generated = time.perf_counter()
    tallies = tallies_of(pair, device, deadline)
    analyzed = time.perf_counter()
    for (name, _), tally, changed in zip(shapes.of_tensors(), tallies, pair.num_changed, strict=True):
        assert tally.numel - tally.bit_equal == changed, f"another number of changed coordinates of {name}"
    return [
        {
            "pair": "Llama-3.1-8B shapes" if shapes == LLAMA_8B else "small shapes",
            "tensors": len(tallies),
            "coordinates": coordinates,
            "changed": sum(pair.num_changed) / coordinates,
            "generate_s": generated - start,
            "analyze_s": analyzed - generated,
            "bytes_per_s": nbytes / (analyzed - generated),
        }
    ]
