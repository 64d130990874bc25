r"""`gram`: the Gram matrices of a pair of matrices, or of one matrix, from row blocks, in fp64.

For row blocks of W (base) and W' (trained), [rows, n]:

    W^T W,   W^T delta,   delta^T delta        summed over the rows

If n is the smaller side of a matrix, they determine every spectrum, projection and rotation of the pair: the
eigenvalues of W^T W are the squares of the singular values of W, and W'^T W' = W^T W + W^T delta + delta^T W + delta^T
delta. They add up over row blocks, so a matrix with any number of rows streams through bounded memory.

delta is W' - W in fp32 (fp64 where either matrix is fp64), or bf16(bf16(W') - bf16(W)) in the visible view, where W is
rounded to bf16 too. Sums are in fp64, where products of fp32 values are exact. W^T delta may be summed in fp32 over
`block` rows before fp64: twice as fast, and accurate enough where delta is small compared with W, to whose squares it
is added.

Source: Golub and Van Loan, Matrix Computations, 8.6 (normal equations and their condition); arXiv 2606.13657 (the
metrics).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.ops import register
from opdkernels.ops.arguments import validate_memory, validate_tensor
from opdkernels.ops.delta import DTYPES, base_and_delta
from opdkernels.ops.gram.layout import MAX_BLOCK, PART_BASE, PART_CROSS, PART_DELTA

SCHEMA = "gram_(Tensor base, Tensor trained, int parts, bool visible, int block, Tensor(a!) out) -> ()"
PARTS = ("base", "cross", "delta")  # W^T W, W^T delta, delta^T delta; bit i of the operator's `parts` asks for part i
PANEL = 224  # columns at a time; nothing below the diagonal panel of a symmetric matrix is computed


def fake(base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, out: torch.Tensor) -> None:
    torch._check(base.shape == trained.shape, lambda: f"shapes differ: {base.shape} and {trained.shape}")


def reference(
    base: torch.Tensor,  # [rows, n]
    trained: torch.Tensor,  # [rows, n]
    parts: int,
    visible: bool,
    block: int,
    out: torch.Tensor,  # fp64 [number of parts, n, n]
) -> None:
    """The definition, in plain PyTorch. Adds to `out`; of the symmetric matrices only to the upper triangle."""
    w, d = base_and_delta(base, trained, visible)
    matrices = iter(out)
    if parts & PART_BASE:
        add_upper(next(matrices), w.double())
    if parts & PART_CROSS:
        cross = next(matrices)
        for x, y in zip(w.split(block), d.split(block), strict=True) if block else [(w.double(), d.double())]:
            cross += x.T @ y
    if parts & PART_DELTA:
        add_upper(next(matrices), d.double())


def add_upper(matrix: torch.Tensor, x: torch.Tensor) -> None:
    """Add the upper triangle of x^T x, panel by panel."""
    for j in range(0, x.shape[1], PANEL):
        matrix[: j + PANEL, j : j + PANEL] += x[:, : j + PANEL].T @ x[:, j : j + PANEL]


def validate(
    base: torch.Tensor, trained: torch.Tensor, parts: int, visible: bool, block: int, out: torch.Tensor
) -> None:
    """Raise TypeError or ValueError where the arguments of the operator do not fit."""
    for name, tensor in (("base", base), ("trained", trained)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; gram takes bfloat16, float16, float32 and float64")
    if base.ndim != 2 or base.shape != trained.shape:
        raise ValueError(
            f"base and trained must be matrices of one shape, not {list(base.shape)} and {list(trained.shape)}"
        )
    if base.device != trained.device:
        raise ValueError(f"base is on {base.device}, trained on {trained.device}; move one of them")
    if not 0 < parts < 1 << len(PARTS):
        raise ValueError(f"parts must be a set of bits below {1 << len(PARTS)}, not {parts}")
    if not 0 <= block <= MAX_BLOCK:
        raise ValueError(f"block must be in 0 .. {MAX_BLOCK}, not {block}")
    if block and not visible and torch.float64 in (base.dtype, trained.dtype):
        raise ValueError("fp64 tensors are summed in fp64; pass block=0")
    validate_tensor("out", out, torch.float64, (parts.bit_count(), base.shape[1], base.shape[1]), base.device)
    validate_memory([out], [base, trained])


register("gram", SCHEMA, reference, fake, validate=validate)


def gram(
    base: torch.Tensor,
    trained: torch.Tensor | None = None,
    *,
    parts: Sequence[str] | None = None,
    visible: bool = False,
    block: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up the Gram matrices of row blocks of a pair, or of one matrix.

    Args:
        base: W [rows, n]: bf16, fp16, fp32 or fp64, any strides.
        trained: W' [rows, n], on the same device; the dtype may differ. None: the Gram matrix of `base` alone.
        parts: Names among "base" (W^T W), "cross" (W^T delta) and "delta" (delta^T delta), in this order. Default: all,
            or "base" without `trained`.
        visible: Whether W and delta are those of the visible view.
        block: Rows of W^T delta that are summed in fp32 before fp64, at most 256; 0: fp64 throughout, as fp64 inputs
            need.
        out: fp64 [len(parts), n, n], contiguous: a result to add to. Of the symmetric matrices only the upper triangle
            is read and written; `symmetric` completes them.

    Returns:
        fp64 [len(parts), n, n]. NaN and Inf of the inputs propagate.

    Raises:
        TypeError: Another dtype.
        ValueError: Shapes, devices, `parts`, `block` or `out` do not fit.

    Examples:
        >>> w = torch.tensor([[1.0, 2], [3, 4]])
        >>> symmetric(gram(w, w + torch.eye(2), parts=["delta"])).tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    names = list(parts) if parts is not None else list(PARTS if trained is not None else PARTS[:1])
    if not names or names != [part for part in PARTS if part in names] or (trained is None and names != ["base"]):
        raise ValueError(
            f"parts must be names among {', '.join(PARTS)}, in this order, and without trained only base; not {names}"
        )
    trained = base if trained is None else trained
    base, trained = (t.to_local().detach() if hasattr(t, "to_local") else t.detach() for t in (base, trained))
    if base.ndim != 2:
        raise ValueError(f"base and trained must be matrices of one shape, not {list(base.shape)}")
    if out is None:
        shape = (len(names), base.shape[1], base.shape[1])
        out = torch.zeros(shape, dtype=torch.float64, device=base.device)
    part_bits = sum(1 << PARTS.index(name) for name in names)
    torch.ops.opdkernels.gram_(base, trained, part_bits, visible, block, out)
    return out


def symmetric(grams: torch.Tensor, parts: Sequence[str] = PARTS) -> torch.Tensor:
    """Fill in the lower triangles of "base" and "delta" in the result of `gram`, in place; returns it."""
    for matrix, part in zip(grams, parts, strict=False):
        if part != "cross":
            upper = matrix.triu(1)
            matrix.triu_().add_(upper.T)
    return grams
