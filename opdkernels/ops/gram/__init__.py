r"""`gram`: the Gram matrices of a pair, or of one matrix, from row blocks, in fp64.

For row blocks of W (source) and W' (trained), [rows, n]:

    W^T W,   W^T delta,   delta^T delta        summed over the rows

With n the smaller side of a matrix they hold every spectrum, projection and rotation of the pair: the eigenvalues of
W^T W are the squares of the singular values of W, and W'^T W' = W^T W + W^T delta + delta^T W + delta^T delta. They add
up over row blocks, so a matrix of any length streams through in bounded memory.

delta is W' - W in fp32 (fp64 where either side is fp64), or bf16(bf16(W') - bf16(W)) in the visible view, where W is
rounded to bf16 too. Sums are in fp64, where products of fp32 values are exact. W^T delta may be summed in fp32 over
`block` rows and only then in fp64: twice as fast, and enough where delta is small beside W, to whose squares it is added.

Source: Golub and Van Loan, Matrix Computations, 8.6 (normal equations and their condition); arXiv 2606.13657 (the figures).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opdkernels.ops import register
from opdkernels.ops.delta import DTYPES

SCHEMA = "gram_(Tensor source, Tensor trained, int parts, bool visible, int block, Tensor(a!) into) -> ()"
PARTS = ("source", "cross", "change")  # W^T W, W^T delta, delta^T delta; `parts` holds a bit for each
MAX_BLOCK = 256
PANEL = 224  # columns at a time: what is below the diagonal of a symmetric matrix is never computed


def fake(source, trained, parts, visible, block, into) -> None:
    torch._check(source.shape == trained.shape, lambda: f"shapes differ: {source.shape} and {trained.shape}")


def change(source: torch.Tensor, trained: torch.Tensor, visible: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """W and delta of one view, in fp32, or fp64 where a side is (never in the visible view)."""
    if visible:
        w = source.bfloat16().float()
        return w, (trained.bfloat16().float() - w).bfloat16().float()
    wide = torch.float64 if torch.float64 in (source.dtype, trained.dtype) else torch.float32
    w = source.to(wide)
    return w, trained.to(wide) - w


def reference(source, trained, parts, visible, block, into) -> None:
    """The definition, in plain PyTorch. Adds to `into`, fp64 [parts, n, n], of the symmetric ones the upper triangles."""
    w, d = change(source, trained, visible)
    matrices = iter(into)
    if parts & 1:
        upper(next(matrices), w.double())
    if parts & 2:
        cross = next(matrices)
        for x, y in zip(w.split(block), d.split(block), strict=True) if block else [(w.double(), d.double())]:
            cross += x.T @ y
    if parts & 4:
        upper(next(matrices), d.double())


def upper(into: torch.Tensor, x: torch.Tensor) -> None:
    """Adds the upper triangle of x^T x, panel by panel."""
    for j in range(0, x.shape[1], PANEL):
        into[: j + PANEL, j : j + PANEL] += x[:, : j + PANEL].T @ x[:, j : j + PANEL]


register("gram", SCHEMA, reference, fake)


def gram(
    source: torch.Tensor,
    trained: torch.Tensor | None = None,
    *,
    of: Sequence[str] | None = None,
    visible: bool = False,
    block: int = 0,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp64 [of, n, n]: W^T W ("source"), W^T delta ("cross") and delta^T delta ("change") of row blocks, in this order.

    source, trained: [rows, n], bf16, fp16, fp32 or fp64, any strides. of: which of them; by default all, or "source" of a
    matrix without `trained`. visible: the visible view. block: rows of W^T delta summed in fp32 before fp64, 0 for fp64
    throughout, at most 256; an fp64 input allows 0 only. into: a result to go on with, added to; only its upper triangles
    are read and written, except that of W^T delta, which is whole. `symmetric` completes it.

    Raises TypeError for other dtypes, ValueError for shapes, devices, parts or a block that do not fit. NaN and Inf spread.

    >>> w = torch.tensor([[1.0, 2], [3, 4]])
    >>> symmetric(gram(w, w + torch.eye(2), of=["change"])).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    of = list(of) if of is not None else list(PARTS if trained is not None else PARTS[:1])
    if not of or of != [part for part in PARTS if part in of] or (trained is None and of != ["source"]):
        raise ValueError(
            f"of must name parts among {', '.join(PARTS)}, in this order, and without trained only source; not {of}"
        )
    trained = source if trained is None else trained
    source, trained = (t.to_local().detach() if hasattr(t, "to_local") else t.detach() for t in (source, trained))
    for side, tensor in (("source", source), ("trained", trained)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{side} is {tensor.dtype}; gram takes bfloat16, float16, float32 and float64")
    if source.ndim != 2 or source.shape != trained.shape:
        raise ValueError(
            f"source and trained must be matrices of one shape, not {list(source.shape)} and {list(trained.shape)}"
        )
    if source.device != trained.device:
        raise ValueError(f"source is on {source.device}, trained on {trained.device}; move one of them")
    if not 0 <= block <= MAX_BLOCK:
        raise ValueError(f"block must lie in 0 .. {MAX_BLOCK}, not {block}")
    if block and not visible and torch.float64 in (source.dtype, trained.dtype):
        raise ValueError("fp64 tensors are summed in fp64; pass block=0")
    shape = (len(of), source.shape[1], source.shape[1])
    if into is None:
        into = torch.zeros(shape, dtype=torch.float64, device=source.device)
    elif into.shape != shape or into.dtype != torch.float64 or not into.is_contiguous() or into.device != source.device:
        raise ValueError(f"into must be a contiguous float64 tensor {list(shape)} on {source.device}")
    torch.ops.opdkernels.gram_(source, trained, sum(1 << PARTS.index(part) for part in of), visible, block, into)
    return into


def symmetric(grams: torch.Tensor, of: Sequence[str] = PARTS) -> torch.Tensor:
    """The result of `gram` with the lower triangles of "source" and "change" filled in, in place."""
    for matrix, part in zip(grams, of, strict=False):
        if part != "cross":
            upper = matrix.triu(1)
            matrix.triu_().add_(upper.T)
    return grams
