"""The functions that CUDA kernels have once for GPUs and once in plain C (packed.cu): both equal NumPy.

Fibers run the plain C; only on a GPU can the other instructions be compared.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.layout import WARP

SOURCE = Path(__file__).with_name("packed.cu")
NUM_WORDS, THREADS = 1 << 17, 256
HALVES = (0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFFFF)  # every two of them in a word


def make_words() -> np.ndarray:
    """Random words and all pairs of special halves, uint32 [3, NUM_WORDS]."""
    rng = np.random.default_rng(0)
    words = rng.integers(1 << 32, size=(3, NUM_WORDS), dtype=np.uint64).astype(np.uint32)
    special = np.array([low | high << 16 for low, high in itertools.product(HALVES, HALVES)], np.uint32)
    words[:, : NUM_WORDS // 2] = rng.choice(special, (3, NUM_WORDS // 2))
    return words


def expected_results(words: np.ndarray) -> dict[str, np.ndarray]:
    """What each function gives, uint32 [NUM_WORDS], in the order of packed.cu."""
    x, y, z = words
    i = np.arange(x.size)
    distance = 1 << (i // WARP % 5)
    below = np.where(i % WARP >= distance, x[i - distance], 0).astype(np.uint32)
    halves_x, halves_y, halves_z = (word.view(np.uint16).reshape(-1, 2) for word in (x, y, z))
    signed, factors = halves_x.view(np.int16).astype(np.int64), y.view(np.int8).reshape(-1, 4)
    dots = (signed * factors[:, :2]).sum(1) + (z.view(np.int32) >> 8)
    joined = {
        "sign_masks": np.where(halves_x & 0x8000, 0xFFFF, 0),
        "max_of_sums": np.maximum(halves_x + halves_y, halves_z),
        "nonzero_halves": halves_x != 0,
        "lower_halves": np.stack([halves_x[:, 0], halves_y[:, 0]], 1),
        "upper_halves": np.stack([halves_x[:, 1], halves_y[:, 1]], 1),
    }
    results = {name: halves.astype(np.uint16).view(np.uint32).reshape(-1) for name, halves in joined.items()}
    results["add_lane_below"] = x + below
    results["dot_halves"] = dots.astype(np.int32).view(np.uint32)
    results["clamp_to"] = np.clip(x.view(np.int32), 0, (y >> 1).view(np.int32)).view(np.uint32)
    order = ("add_lane_below", "sign_masks", "max_of_sums", "nonzero_halves", "dot_halves", "clamp_to")
    return {name: results[name] for name in (*order, "lower_halves", "upper_halves")}


def check(kernels: Any, device: torch.device) -> None:
    """Raises AssertionError where a function on a device gives another result."""
    words = make_words()
    expected = expected_results(words)
    inputs = torch.from_numpy(words.view(np.int32)).to(device)
    results = torch.zeros(len(expected), NUM_WORDS, dtype=torch.int32, device=device)
    arguments = [gpu.address(argument) for argument in (inputs, results, NUM_WORDS)]
    kernels.launch("packed_functions", arguments, NUM_WORDS // THREADS, THREADS, 0, device)
    for (name, right), row in zip(expected.items(), results.cpu().numpy().view(np.uint32), strict=True):
        wrong = np.flatnonzero(row != right)
        assert not wrong.size, f"{name} of {[hex(word) for word in words[:, wrong[0]]]} is {row[wrong[0]]:#x}"
