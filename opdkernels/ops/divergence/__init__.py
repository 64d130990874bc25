r"""`divergence`: divergence of a student's next-token distribution Q from a teacher's P, per token, in nats, from
hidden states.

With z, u the logits of student and teacher over temperature, L the log of their sums of exponentials, q = exp(z - Lz),
p = exp(u - Lu):

    forward_kl        F = sum p (u - z) - Lu + Lz             dF/dz_j = q_j - p_j
    reverse_kl        R = sum q (z - u) - Lz + Lu             dR/dz_j = q_j (log q_j - log p_j - R)
    jsd               beta KL(P||M) + (1 - beta) KL(Q||M),    (1 - beta) q_j (log(q_j/m_j) - KL(Q||M))
                      M = beta P + (1 - beta) Q; beta = 0 is F, beta = 1 is R
    total_variation   sum |p - q| / 2                         q_j (sign(q_j - p_j) - sum q sign(q - p)) / 2
    topk_forward_kl   F over the teacher's k most likely ids and the tail: all other ids as one category
    topk_reverse_kl   R over the student's k most likely ids and the tail
    sampled_reverse_kl     (log q_a - log p_a) log q_a, the factor detached: a policy gradient; a are the tokens
    sampled_reverse_kl_k2  (log q_a - log p_a)^2 / 2

The sampled kinds have the expected gradient of R if the tokens are the student's own samples; docs/divergence.md has a
table. `divergence` is the definition, from logits. `linear_divergence` computes logits from hidden states in tiles over
the vocabulary, twice ("jsd" and "total_variation" three times): sums of exponentials and means in the forward pass,
then again with the gradient in the backward pass. No tensor of tokens x vocabulary exists.

Sources: Agarwal et al. 2024, arXiv 2306.13649 (GKD, generalised JSD); Schulman 2020 (k1, k2, k3); Milakov and
Gimelshein 2018 (online sums of exponentials); arXiv 2606.13657.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from opdkernels.errors import UsageError
from opdkernels.ops.divergence import tiles
from opdkernels.ops.divergence.logits import FLOOR, LogitParams
from opdkernels.ops.divergence.tiles import (
    AT_IDS,
    FORWARD,
    JSD,
    MEAN_FORWARD,
    MEAN_REVERSE,
    REVERSE,
    STUDENT_LOG,
    STUDENT_MEAN,
    TEACHER_LOG,
    TEACHER_MEAN,
    VARIATION,
    Side,
    compute_dtype,
    floored,
    over_mixture,
)

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "total_variation",
    "topk_forward_kl",
    "topk_reverse_kl",
    "sampled_reverse_kl",
    "sampled_reverse_kl_k2",
)
DENSE = KINDS[:4]  # their gradients need every p; those of the others need p at a few ids only
REFUSED = {
    "k1": "back-propagated directly, its expected gradient is 0",
    "k3": "back-propagated directly, it has the gradient of the forward KL, not of the reverse",
}


def validate_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature}; choose one above 0")


@dataclass(frozen=True)
class Divergence:
    """Which divergence to compute. Losses are not multiplied by the square of the temperature.

    Attributes:
        kind: One of `KINDS`.
        beta: Weight of the teacher in the mixture of "jsd", 0 to 1.
        k: Number of ids of the top-k kinds. For other kinds k > 0 adds to `Scores` the mass on the teacher's k most
            likely ids.
        tail: Whether all other ids form one category. tail=False is for "topk_forward_kl" only; the result is then not
            a divergence and may be negative.
        temperature: Temperature of both distributions.

    Raises:
        UsageError: The kind does not exist, or the choice is ill-posed.
    """

    kind: str = "reverse_kl"
    beta: float = 0.5
    k: int = 0
    tail: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, why in REFUSED.items():
            if self.kind.removeprefix("sampled_reverse_kl_") == name:
                raise UsageError(f"kind {self.kind} is refused: {why}; use sampled_reverse_kl or sampled_reverse_kl_k2")
        if self.kind not in KINDS:
            raise UsageError(f"kind is {self.kind}; choose one of {', '.join(KINDS)}")
        if not 0 <= self.beta <= 1:
            raise UsageError(f"beta is {self.beta}; choose from 0 (forward KL) to 1 (reverse KL)")
        if self.kind == "jsd" and (0 < self.beta < 0.05 or 0.95 < self.beta < 1):
            warnings.warn(
                f"jsd with beta {self.beta} is close to 0 for any two models: at 0 and 1 it is a KL, but not near them",
                stacklevel=3,
            )
        if self.k < 0 or (self.topk and self.k < 1):
            raise UsageError(f"k is {self.k}; {self.kind} takes {'1 or more' if self.topk else '0 or more'}")
        if self.kind == "topk_reverse_kl" and not self.tail:
            raise UsageError(
                "topk_reverse_kl without the tail decreases as the student moves mass out of the top k; pass tail=True"
            )
        validate_temperature(self.temperature)

    @property
    def topk(self) -> bool:
        """Whether it compares the k most likely ids."""
        return self.kind.startswith("topk")

    @property
    def sampled(self) -> bool:
        """Whether it needs sampled tokens."""
        return self.kind.startswith("sampled")

    @property
    def code(self) -> int:
        """The kernels' code: FORWARD, REVERSE, JSD, VARIATION or AT_IDS."""
        if self.kind == "jsd" and self.beta in (0, 1):
            return FORWARD if self.beta == 0 else REVERSE
        return DENSE.index(self.kind) if self.kind in DENSE else AT_IDS


DEFAULT = Divergence()


@dataclass(frozen=True)
class LMHead:
    """Logits from hidden states: softcap(scale * (hidden @ weight.T + bias)), with softcap(x) = c tanh(x / c).

    Attributes:
        weight: [num_rows, hidden_size].
        bias: [num_rows] or None.
        scale: Factor of the logits.
        softcap: The constant c; 0 for none.
        vocab: Number of ids; rows from here on are padding and have no probability. None: all rows.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    vocab: int | None = None

    def logit_params(self, temperature: float) -> LogitParams:
        return LogitParams(float(self.scale), float(self.softcap), float(temperature))


class Scores(NamedTuple):
    """Statistics of every valid token, in order: [num_valid], fp32 (fp64 for fp64 inputs), in nats, detached."""

    loss: Tensor  # before weights
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor  # 1 if both have the same most likely id, else 0
    student_logp: Tensor | None  # log-probability of the token, if tokens are passed
    teacher_logp: Tensor | None
    student_mass: Tensor | None  # probability of the k ids, if k > 0
    teacher_mass: Tensor | None


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, spec: Divergence = DEFAULT, *, tokens: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch; differentiable in the student's logits.

    A logit below -1e4, such as -inf, counts as -1e4. NaN propagates to the result of its token only.

    Args:
        student_logits: [..., vocab_size], any floating dtype; computed in fp32 (fp64 for fp64).
        teacher_logits: [..., vocab_size], not differentiated.
        spec: Which divergence.
        tokens: int64 [...], the sampled tokens of the sampled kinds.

    Returns:
        Divergence of each token, [...], in nats, fp32 (fp64 for fp64).

    Raises:
        ValueError: Shapes differ, or a sampled kind has no tokens.

    Examples:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
        >>> round(divergence(student, teacher, Divergence("total_variation")).item(), 6)
        0.25
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits are {list(student_logits.shape)} and {list(teacher_logits.shape)}; cut both to one vocabulary"
        )
    validate_tokens(spec, tokens, student_logits.shape[:-1])
    dtype = compute_dtype(student_logits)
    lq, lp = (
        torch.log_softmax(floored(x.to(dtype) / spec.temperature), -1)
        for x in (student_logits, teacher_logits.detach())
    )
    if spec.code == AT_IDS:
        if spec.sampled and tokens is not None:
            ids = tokens.unsqueeze(-1)
        else:
            ids = (lq if spec.kind == "topk_reverse_kl" else lp).topk(min(spec.k, lq.shape[-1]), -1).indices
        tails: list[Tensor] = []
        if spec.topk and spec.tail:
            tails = [floored(x.scatter(-1, ids, 2 * FLOOR).logsumexp(-1)) for x in (lq, lp)]
        return loss_at_ids(spec, lq.gather(-1, ids), lp.gather(-1, ids), *tails)
    q, p = lq.exp(), lp.exp()
    if spec.code == FORWARD:
        return (p * (lp - lq)).sum(-1)
    if spec.code == REVERSE:
        return (q * (lq - lp)).sum(-1)
    if spec.code == VARIATION:
        return (p - q).abs().sum(-1) / 2
    over_p, over_q = over_mixture(lp - lq, spec.beta)
    return (spec.beta * p * over_p + (1 - spec.beta) * q * over_q).sum(-1)


def loss_at_ids(
    spec: Divergence, lq: Tensor, lp: Tensor, tail_q: Tensor | None = None, tail_p: Tensor | None = None
) -> Tensor:
    """The sampled and top-k kinds, which see log-probabilities at a few ids only.

    Args:
        spec: Which divergence.
        lq, lp: Log-probabilities of student and teacher at the tokens or the k ids, [..., num_ids].
        tail_q, tail_p: Logs of the mass of the tail [...], if spec.tail. They are computed as sums: 1 - mass is noise,
            without a gradient, where the mass is nearly 1.

    Returns:
        Divergence of each token, [...].
    """
    if spec.sampled:
        ratio = (lq - lp).squeeze(-1)
        return ratio.detach() * lq.squeeze(-1) if spec.kind == "sampled_reverse_kl" else ratio**2 / 2
    if not spec.tail:
        return (lp.exp() * (lp - lq)).sum(-1)
    assert tail_q is not None
    assert tail_p is not None
    if spec.kind == "topk_forward_kl":
        return (lp.exp() * (lp - lq)).sum(-1) + tail_p.exp() * (tail_p - tail_q)
    return (lq.exp() * (lq - lp)).sum(-1) + tail_q.exp() * (tail_q - tail_p)


class LinearDivergenceFunction(torch.autograd.Function):
    """Dense divergences, log-probabilities at ids, and log mass of the tail, from hidden states.

    Outputs: loss [N] (of the dense kinds), student and teacher log-probabilities at ids [N, num_ids], student and
    teacher log mass of the tail [N or 0], scores [4, N] (forward KL, reverse KL, entropies of student and teacher),
    most likely ids [2, N or 0]. Loss, and the student's log-probabilities and tail, have a gradient by the student's
    inputs. With a tail, only the first `tail_k` log-probabilities do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        ids: Tensor,
        tail_k: int,
        vocab: int,
        student_params: LogitParams,
        teacher_params: LogitParams,
        beta: float,
        kind: int,
        with_argmax: bool,
    ) -> tuple[Tensor, ...]:
        student, teacher = make_side(hidden, weight, bias), make_side(teacher_hidden, teacher_weight, teacher_bias)
        params = list(student_params), list(teacher_params)
        moments, logits_at_ids, tails, argmax_ids = operator("divergence_scan", student)(
            student, teacher, ids, tail_k, vocab, *params, with_argmax
        )
        forward = moments[MEAN_FORWARD] - moments[TEACHER_LOG] + moments[STUDENT_LOG]
        reverse = moments[MEAN_REVERSE] - moments[STUDENT_LOG] + moments[TEACHER_LOG]
        if kind in (JSD, VARIATION):
            loss, shift, center = operator("divergence_means", student)(
                student, teacher, moments, vocab, *params, beta, kind
            )
        else:
            loss = center = forward if kind == FORWARD else reverse
            shift = torch.zeros_like(center)
        lq, lp = (logits_at_ids[k] - moments[2 * k, :, None] - moments[2 * k + 1, :, None] for k in range(2))
        tail_q, tail_p = (
            floored(tails[k] - moments[2 * k] - moments[2 * k + 1]) if tail_k else moments.new_empty(0)
            for k in range(2)
        )
        ctx.save_for_backward(*student, *teacher, torch.cat([moments[:4], shift[None], center[None]]), ids, tail_q)
        ctx.num_student, ctx.num_teacher = len(student), len(teacher)
        ctx.vocab, ctx.params, ctx.beta, ctx.kind, ctx.tail_k = vocab, params, beta, kind, tail_k
        scores = torch.stack(
            [
                forward,
                reverse,
                moments[STUDENT_LOG] - moments[STUDENT_MEAN],
                moments[TEACHER_LOG] - moments[TEACHER_MEAN],
            ]
        )
        ctx.mark_non_differentiable(lp, tail_p, scores, argmax_ids)
        return loss.clone(), lq, lp, tail_q, tail_p, scores, argmax_ids

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, lq_grad: Tensor, lp_grad: Tensor, tail_grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_divergence has no second derivative; drop create_graph=True, or use divergence, from logits"
            )
        *sides, scalars, ids, tail_q = ctx.saved_tensors
        student, teacher = sides[: ctx.num_student], sides[ctx.num_student :]
        if ctx.tail_k:
            ids, lq_grad = ids[:, : ctx.tail_k], lq_grad[:, : ctx.tail_k]
            tail_grad = tail_grad.masked_fill(tail_q <= FLOOR, 0)
            scalars = torch.cat([scalars, -(lq_grad.sum(1) + tail_grad)[None], tail_q[None], tail_grad[None]])
        else:
            factor = -lq_grad.sum(1) if ctx.kind == AT_IDS else loss_grad
            scalars = torch.cat([scalars, factor[None]])
        needs_grad = [*ctx.needs_input_grad[:3]]
        if ctx.kind != AT_IDS:
            ids, lq_grad = ids[:, :0], lq_grad[:, :0]
        grads = operator("divergence_backward", student)(
            student, teacher, scalars, ids, lq_grad, ctx.vocab, *ctx.params, ctx.beta, ctx.kind, needs_grad
        )
        return *(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)), *[None] * 11


def make_side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """[hidden, weight] or [hidden, weight, bias], as operators take them."""
    return [hidden, weight] if bias is None else [hidden, weight, bias]


def operator(name: str, side: Side) -> Any:
    """An operator; for fp64 the reference on every device, as kernels are for fp32 and narrower."""
    return getattr(tiles, name) if side[0].dtype == torch.float64 else getattr(torch.ops.opdkernels, name)


def linear_divergence(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    spec: Divergence = DEFAULT,
    *,
    tokens: Tensor | None = None,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    normalizer: float | Tensor | None = None,
    scores: bool = False,
) -> Tensor | tuple[Tensor, Scores]:
    """Divergence from hidden states, in memory that does not grow with the vocabulary; differentiable once, by the
    student.

    Heads with different numbers of rows are cut to the smaller `vocab`, if one of them sets it. If no token is valid,
    the loss is 0 and gradients are zeros. Gradients are computed only for tensors that require them. NaN propagates to
    the loss. A teacher's logit below -1e4 counts as -1e4, so that an id that only the student allows costs about 1e4
    nats instead of inf.

    Args:
        student_hidden: [..., student_hidden_size], bf16, fp16 or fp32 (fp64 is computed in fp64), any strides.
        student_head: The student's LM head.
        teacher_hidden: [..., teacher_hidden_size], not differentiated.
        teacher_head: The teacher's LM head, not differentiated.
        spec: Which divergence.
        tokens: int64 [...], for sampled kinds and the log-probabilities in `Scores`.
        valid: bool [...]; tokens where it is False are dropped before the matrix product.
        weights: [...], constants that multiply the loss of each token.
        reduction: "mean" over valid tokens or by `normalizer`, "sum", or "none".
        normalizer: Divisor of "mean" instead of the number of valid tokens, such as their number over all micro-batches
            and ranks.
        scores: Whether to also return `Scores`, from the same pass.

    Returns:
        The loss in nats, fp32 (fp64 for fp64): a scalar, or for "none" [...] with 0 where not valid. With `scores`, a
        pair of the loss and `Scores`.

    Raises:
        ValueError: Shapes, devices or vocabularies do not match; UsageError, a ValueError, for an unknown reduction.
        TypeError: A dtype is not supported.

    Examples:
        >>> head = LMHead(torch.eye(3))
        >>> round(linear_divergence(torch.zeros(2, 3), head, torch.eye(3)[:2], head).item(), 4)
        0.1195
    """
    shape = student_hidden.shape[:-1]
    vocab = common_vocab(student_head, teacher_head)
    validate_inputs(student_hidden, student_head, teacher_hidden, teacher_head, valid, weights, reduction)
    validate_tokens(spec, tokens, shape)

    def select_valid(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, *tensor.shape[len(shape) :])
        return flat if valid is None else flat[valid.reshape(-1)]

    tokens, weights = (None if t is None else select_valid(t) for t in (tokens, weights))
    loss, token_scores = token_losses(
        select_valid(student_hidden),
        student_head,
        select_valid(teacher_hidden.detach()),
        teacher_head,
        vocab=vocab,
        spec=spec,
        tokens=tokens,
        scores=scores,
    )
    weighted = loss if weights is None else loss * weights.detach()
    if reduction == "none":
        total = weighted.view(shape) if valid is None else weighted.new_zeros(shape).masked_scatter(valid, weighted)
    else:
        total = weighted.sum()
        if reduction == "mean" and len(loss):  # without tokens the normalizer may be 0
            total = total / (len(loss) if normalizer is None else normalizer)
    return (total, token_scores) if token_scores is not None else total


def linear_log_prob(hidden: Tensor, head: LMHead, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens from hidden states, in memory that does not grow with the vocabulary; differentiable
    once.

    Args:
        hidden: [..., hidden_size], bf16, fp16, fp32 or fp64, any strides.
        head: The LM head.
        tokens: int64 [...].
        temperature: Temperature of the distribution.

    Returns:
        [...], in nats, fp32 (fp64 for fp64); NaN if a token is outside the vocabulary.

    Raises:
        ValueError: Shapes or devices do not match; UsageError, a ValueError, for a temperature that is not positive.
        TypeError: A dtype is not supported.

    Examples:
        >>> round(linear_log_prob(torch.zeros(1, 3), LMHead(torch.eye(3)), torch.tensor([2])).item(), 4)
        -1.0986
    """
    shape, vocab = hidden.shape[:-1], common_vocab(head, head)
    no_teacher, no_head = hidden.new_zeros(*shape, 1), LMHead(hidden.new_zeros(vocab, 1))
    validate_inputs(hidden, head, no_teacher, no_head, None, None, "none")
    validate_tokens(DEFAULT, tokens, shape)
    validate_temperature(temperature)
    outputs = LinearDivergenceFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        unsharded(head.weight),
        unsharded(head.bias),
        no_teacher.view(-1, 1),
        no_head.weight,
        None,
        tokens.reshape(-1, 1),
        0,  # tail_k
        vocab,
        head.logit_params(temperature),
        LogitParams(temperature=float(temperature)),
        0.0,  # beta
        AT_IDS,
        False,  # with_argmax
    )
    return outputs[1].view(shape)


def token_losses(
    hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    *,
    vocab: int,
    spec: Divergence,
    tokens: Tensor | None,
    scores: bool,
) -> tuple[Tensor, Scores | None]:
    """Loss [N] of tokens with hidden states [N, hidden_size], and their `Scores` if wanted."""
    weight, bias = unsharded(student_head.weight), unsharded(student_head.bias)
    with torch.no_grad():
        teacher_weight, teacher_bias = unsharded(teacher_head.weight), unsharded(teacher_head.bias)
    params = student_head.logit_params(spec.temperature), teacher_head.logit_params(spec.temperature)
    ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64) if tokens is None else tokens[:, None]
    k = min(spec.k, vocab) if spec.topk or scores else 0
    if k:
        by_student = spec.kind == "topk_reverse_kl"
        if by_student:
            side = make_side(hidden, weight, bias)
        else:
            side = make_side(teacher_hidden, teacher_weight, teacher_bias)
        with torch.no_grad():
            top_ids = operator("divergence_top", side)(side, vocab, k, list(params[0 if by_student else 1]))
        ids = torch.cat([top_ids, ids], 1)
    loss, lq, lp, tail_q, tail_p, token_scores, argmax_ids = LinearDivergenceFunction.apply(
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        ids,
        k if spec.topk and spec.tail else 0,  # tail_k
        vocab,
        *params,
        float(spec.beta),
        spec.code,
        scores,  # with_argmax
    )
    if spec.code == AT_IDS:
        columns = slice(k, None) if spec.sampled else slice(k)
        loss = loss_at_ids(spec, lq[:, columns], lp[:, columns], tail_q, tail_p)
    if not scores:
        return loss, None
    log_probs = (lq.detach(), lp)
    forward, reverse, student_entropy, teacher_entropy = token_scores
    student_logp, teacher_logp = (None if tokens is None else x[:, -1] for x in log_probs)
    student_mass, teacher_mass = (x[:, :k].exp().sum(1) if k else None for x in log_probs)
    return loss, Scores(
        loss=loss.detach(),
        forward_kl=forward,
        reverse_kl=reverse,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        top1_agreement=(argmax_ids[0] == argmax_ids[1]).to(lp.dtype),
        student_logp=student_logp,
        teacher_logp=teacher_logp,
        student_mass=student_mass,
        teacher_mass=teacher_mass,
    )


def unsharded(tensor: Any) -> Any:
    """All of a DTensor; any other value as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def common_vocab(student: LMHead, teacher: LMHead) -> int:
    """Number of ids of both heads. Raises ValueError if they differ and neither sets `vocab`."""
    for name, head in (("student", student), ("teacher", teacher)):
        if head.vocab is not None and not 1 <= head.vocab <= len(head.weight):
            raise ValueError(
                f"vocab of {name}_head is {head.vocab}; it must be in 1 .. {len(head.weight)}, the rows of its weight"
            )
    sizes = [len(head.weight) if head.vocab is None else head.vocab for head in (student, teacher)]
    if sizes[0] != sizes[1] and student.vocab is None and teacher.vocab is None:
        raise ValueError(
            f"the student's head has {sizes[0]} rows, the teacher's {sizes[1]}; "
            f"set LMHead.vocab if they share the first {min(sizes)} ids"
        )
    return min(sizes)


def validate_tokens(spec: Divergence, tokens: Tensor | None, shape: Sequence[int]) -> None:
    if tokens is None and spec.sampled:
        raise ValueError(f"{spec.kind} needs the sampled tokens; pass tokens, int64 {list(shape)}")
    if tokens is not None and (tokens.shape != torch.Size(shape) or tokens.dtype != torch.int64):
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}; pass int64 {list(shape)}")


def validate_inputs(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    valid: Tensor | None,
    weights: Tensor | None,
    reduction: str,
) -> None:
    """Raises ValueError or TypeError for arguments of `linear_divergence` that do not fit together."""
    shape = student_hidden.shape[:-1]
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim < 1 or head.weight.ndim != 2 or hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{name}_hidden is {list(hidden.shape)}, the weight of its head {list(head.weight.shape)}; "
                "their last sizes must be equal"
            )
        if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
            raise ValueError(
                f"the bias of {name}_head is {list(head.bias.shape)}; it must be {list(head.weight.shape[:1])}"
            )
        if not hidden.is_floating_point() or not head.weight.is_floating_point():
            raise TypeError(
                f"{name}_hidden is {hidden.dtype}, the weight of its head {head.weight.dtype}; both must be floating"
            )
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"student_hidden has leading shape {list(shape)}, teacher_hidden {list(teacher_hidden.shape[:-1])}; "
            "score the same tokens"
        )
    for name, tensor in (("valid", valid), ("weights", weights)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(shape)}")
    tensors = {
        "student_head": student_head.weight,
        "teacher_hidden": teacher_hidden,
        "teacher_head": teacher_head.weight,
        "valid": valid,
        "weights": weights,
    }
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != student_hidden.device:
            raise ValueError(
                f"student_hidden is on {student_hidden.device}, {name} on {tensor.device}; move one of them"
            )
    if valid is not None and valid.dtype != torch.bool:
        raise TypeError(f"valid is {valid.dtype}; pass bool")
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction is {reduction}; choose mean, sum or none")
