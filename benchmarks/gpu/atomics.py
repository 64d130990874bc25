"""Cycles that increments, additions and stores in shared memory take of a multiprocessor (atomics.cu).

An instruction of a warp takes a wavefront per word that it changes in the bank with the most of them. The kernels are
designed for increments of one or two cycles per wavefront: which of the two a GPU has, this measures first.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opdkernels.backends import gpu
from opdkernels.backends.cuda import launch
from opdkernels.backends.layout import WARP

BANKS = 32
THREADS = 768  # per block, as in `delta` of a bf16 pair
LAUNCHES = 3  # the last one is measured
VALUE = 3  # that is added or stored

# benchmarks/gpu/atomics.cu
SOURCE = Path(__file__).with_name("atomics.cu")
ADDRESSES, REPEATS, TABLE_WORDS = 16, 256, 8192

OWN_BANK, HISTOGRAM, ONE_WORD, ONE_BANK = "a bank per lane", "1,667 bins", "one bin per warp", "one bank"
INSTRUCTIONS = {"increment": "ATOMS.POPC.INC", "add": "ATOMS.ADD", "store": "STS"}


def patterns() -> dict[str, np.ndarray]:
    """The words that the threads of a block change, int64 [ADDRESSES, THREADS], by pattern."""
    rng, shape = np.random.default_rng(0), (ADDRESSES, THREADS)
    turn, thread = np.indices(shape)
    return {
        OWN_BANK: rng.integers(64, size=shape) * BANKS + thread % WARP,
        HISTOGRAM: rng.integers(1667, size=shape),
        ONE_WORD: turn * BANKS + thread // WARP,
        ONE_BANK: rng.integers(128, size=shape) * BANKS,
    }


def wavefronts(words: np.ndarray) -> float:
    """Wavefronts of an instruction of a warp: different words in the bank with the most of them, on average."""
    return float(np.mean([np.bincount(np.unique(lanes) % BANKS).max() for lanes in words.reshape(-1, WARP)]))


def predicted_cycles(instruction: str, pattern: str, words: np.ndarray) -> list[float] | None:
    """The least and the most cycles of an instruction of a warp; None if the model does not say."""
    if instruction == "add" and pattern == ONE_WORD:  # lanes with one address are known to be combined in increments
        return None
    count = wavefronts(words)
    return [count, count if instruction == "store" else 2 * count]


def expected_table(instruction: str, words: np.ndarray) -> np.ndarray:
    """The table of a block after the measurement."""
    hits = np.bincount(words.flatten(), minlength=TABLE_WORDS)
    if instruction == "store":
        return VALUE * (hits > 0)
    return hits * REPEATS * (VALUE if instruction == "add" else 1)


def cycles_of(kernels: Any, instruction: str, words: np.ndarray, device: torch.device) -> float:
    """Cycles of an instruction of a warp. Raises AssertionError if the tables are wrong."""
    blocks, shared_bytes = launch.device_limits(device)  # all of shared memory: one block per multiprocessor
    places = torch.from_numpy(words.astype(np.int32)).to(device)
    cycles = torch.zeros(blocks, dtype=torch.int64, device=device)
    tables = torch.zeros(blocks, TABLE_WORDS, dtype=torch.int32, device=device)
    arguments = [gpu.address(argument) for argument in (places, VALUE, cycles, tables)]
    for _ in range(LAUNCHES):
        kernels.launch(f"atomics_{instruction}", arguments, blocks, THREADS, shared_bytes, device)
    expected = torch.from_numpy(expected_table(instruction, words))
    assert bool((tables.cpu() == expected).all()), f"another table after {INSTRUCTIONS[instruction]}"
    return statistics.median(cycles.tolist()) / (THREADS // WARP * ADDRESSES * REPEATS)


def measure(kernels: Any, device: torch.device) -> list[dict[str, Any]]:
    """A row for each instruction and pattern of addresses."""
    return [
        {
            "instruction": INSTRUCTIONS[instruction],
            "pattern": pattern,
            "cycles": cycles_of(kernels, instruction, words, device),
            "wavefronts": wavefronts(words),
            "predicted_cycles": predicted_cycles(instruction, pattern, words),
        }
        for instruction in INSTRUCTIONS
        for pattern, words in patterns().items()
    ]
