"""What the model of a GPU predicts of an NVIDIA H200, to be compared with what is measured.

A kernel takes the longest of: its bytes at the rate of a copy; its instructions, four per cycle of a multiprocessor at
79 %; and its wavefronts of shared memory, one per cycle, increments one or two cycles (benchmarks/gpu/atomics.py). At
1.98 GHz and 132 multiprocessors, a cycle per 32 coordinates is 0.032 ms of 2^28 coordinates.
"""

from __future__ import annotations

COORDINATES = 1 << 28
GPU = "H200"
TOLERANCE = 0.25  # a larger miss is looked into before the next change
CUDA, TRITON = ("CUDA library", "NVRTC"), ("Triton",)

# Milliseconds, the least and the most. "As measured": of kernels that have not changed since.
EXPECTED_MS: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {
    # 18 instructions and 4 bytes per coordinate; 4.6 wavefronts of increments and 2.6 of loads and stores.
    ("delta of a bf16 pair", CUDA): (0.26, 0.38),
    ("delta against three tables", CUDA): (0.26, 0.38),
    # A changed coordinate has 38 instructions and 10 wavefronts of increments more.
    ("delta of a bf16 pair, 25 % changed", CUDA): (0.27, 0.47),
    ("delta of a bf16 pair, 99 % changed", CUDA): (0.52, 0.96),
    # 450 to 500 instructions.
    ("delta of an fp32 pair", CUDA): (5.6, 6.3),
    # 17.9 instructions and 6 bytes per coordinate, 23 instructions per changed one.
    ("overlap of two bf16 runs", CUDA): (0.38, 0.45),
    # 9 instructions, 3.4 wavefronts of increments.
    ("quantile of bf16 and a mask", CUDA): (0.17, 0.25),
    # Two passes: both at the rate of a copy, or 60 instructions in the second one.
    ("quantile of fp32 and a mask", CUDA): (0.53, 0.9),
    # As measured, 1.06, less twelve operations of torch of 12 us each.
    ("gather of a bf16 pair", CUDA): (0.9, 0.9),
    # As measured, 0.70 the kernel that restores, and three launches.
    ("scatter of a bf16 pair", CUDA): (0.75, 0.75),
    # As measured; warps wait for memory, which the model does not predict.
    ("AdamW step of bf16, exact, 20 % active", CUDA): (1.33, 1.33),
    ("AdamW step of fp32, 20 % active", CUDA): (1.35, 1.35),
    # Products 0.37 as measured, packing and launches; no additions of temporary matrices any more.
    ("gram of a bf16 pair", TRITON): (0.42, 0.42),
    # 254, 150 and 112 instructions; one coordinate in seven, and every changed one, is an increment in the L2 cache.
    ("delta of a bf16 pair", TRITON): (2.5, 3.5),
    ("overlap of two bf16 runs", TRITON): (1.6, 2.0),
    ("quantile of bf16 and a mask", TRITON): (1.2, 2.0),
    # As measured: products and passes over logits.
    ("reverse KL and its gradients", TRITON): (19.6, 19.6),
    ("JSD and its gradients", TRITON): (28.2, 28.2),
}


def expected_s(workload: str, implementation: str, gpu: str, n: int) -> list[float] | None:
    """The least and the most seconds that are predicted; None without a prediction for this GPU and size."""
    if GPU not in gpu or n != COORDINATES:
        return None
    for (name, implementations), bounds in EXPECTED_MS.items():
        if name == workload and implementation in implementations:
            return [ms / 1000 for ms in bounds]
    return None


def is_missed(measured: float, expected: list[float]) -> bool:
    """Whether a measurement is more than TOLERANCE outside the predicted range."""
    low, high = expected
    return not low * (1 - TOLERANCE) <= measured <= high * (1 + TOLERANCE)
