r"""`divergence`: how far a student's next-token distribution Q is from a teacher's P, per token, in nats, from hidden states.

With z, u the logits of student and teacher over temperature, L the log of their sums of exponentials, q = exp(z - Lz),
p = exp(u - Lu):

    forward_kl        F = sum p (u - z) - Lu + Lz             dF/dz_j = q_j - p_j
    reverse_kl        R = sum q (z - u) - Lz + Lu             dR/dz_j = q_j (log q_j - log p_j - R)
    jsd               beta KL(P||M) + (1 - beta) KL(Q||M),    (1 - beta) q_j (log(q_j/m_j) - KL(Q||M))
                      M = beta P + (1 - beta) Q; beta = 0 is F, beta = 1 is R
    total_variation   sum |p - q| / 2                         q_j (sign(q_j - p_j) - sum q sign(q - p)) / 2
    topk_forward_kl   F over the teacher's k likeliest ids and, `tail`, all others as one
    topk_reverse_kl   R over the student's k likeliest ids and all others as one
    sampled_reverse_kl     (log q_a - log p_a) log q_a, the factor detached: a policy gradient; a are the tokens
    sampled_reverse_kl_k2  (log q_a - log p_a)^2 / 2

Sampled kinds have the expected gradient of R where the tokens are the student's own; docs/divergence.md has a table. `divergence`
is the definition, from logits. `linear_divergence` makes logits from hidden states in tiles over the vocabulary, twice ("jsd" and
"total_variation" three times): sums of exponentials and means forward, then again with the gradient backward. No tensor of tokens x vocabulary exists.

Sources: Agarwal et al. 2024, arXiv 2306.13649 (GKD, generalised JSD); Schulman 2020 (k1, k2, k3); Milakov and Gimelshein 2018
(online sums of exponentials); arXiv 2606.13657.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opdkernels.errors import UsageError
from opdkernels.ops.divergence import tiles
from opdkernels.ops.divergence.tiles import (
    AT_IDS,
    FLOOR,
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
    floored,
    over_mixture,
    wide_of,
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
DENSE = KINDS[:4]  # their gradients need every p; those of the others only p at a few ids
REFUSED = {
    "k1": "back-propagated directly it has no expected gradient at all",
    "k3": "back-propagated directly it has the gradient of the forward KL, not of the reverse",
}


@dataclass(frozen=True)
class Divergence:
    """Which divergence: `kind`, `beta` of "jsd", `k` and `tail` of the top-k kinds, and the temperature of both distributions.

    With k, `Scores` tells the mass on the teacher's k likeliest ids for any kind (the student's for "topk_reverse_kl").
    tail=False leaves "topk_forward_kl" without the bucket of all other ids: no divergence then, it may be negative. Losses are
    not multiplied by the square of the temperature.

    Raises UsageError for what does not exist or is ill-posed.
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
                f"jsd with beta {self.beta} is near 0, whatever the models: at 0 and 1 it is a KL, but not near them",
                stacklevel=3,
            )
        if self.k < 0 or (self.topk and self.k < 1):
            raise UsageError(f"k is {self.k}; {self.kind} takes {'1 or more' if self.topk else '0 or more'}")
        if self.kind == "topk_reverse_kl" and not self.tail:
            raise UsageError(
                "topk_reverse_kl without the tail falls as the student moves its mass elsewhere; pass tail=True"
            )
        check_temperature(self.temperature)

    @property
    def topk(self) -> bool:
        return self.kind.startswith("topk")

    @property
    def sampled(self) -> bool:
        return self.kind.startswith("sampled")

    @property
    def code(self) -> int:
        """What the kernels know of it."""
        if self.kind == "jsd" and self.beta in (0, 1):
            return FORWARD if self.beta == 0 else REVERSE
        return DENSE.index(self.kind) if self.kind in DENSE else AT_IDS


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature}; choose one above 0")


DEFAULT = Divergence()


@dataclass(frozen=True)
class LMHead:
    """How logits come from hidden states: softcap(scale * (hidden @ weight.T + bias)), softcap(x) being c tanh(x / c).

    weight: [rows, width]; bias: [rows] or None; softcap: 0 for none; vocab: rows beyond it are padding and have no probability.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    vocab: int | None = None


class Scores(NamedTuple):
    """Of every valid token, in order, [N], fp32 (fp64 of fp64), in nats, detached."""

    loss: Tensor  # before weights
    forward_kl: Tensor
    reverse_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor  # 1 where both have the same most likely id
    student_logp: Tensor | None  # of the tokens, where given
    teacher_logp: Tensor | None
    student_mass: Tensor | None  # on the k ids, where k is given
    teacher_mass: Tensor | None


def divergence(
    student_logits: Tensor, teacher_logits: Tensor, spec: Divergence = DEFAULT, *, tokens: Tensor | None = None
) -> Tensor:
    """The definition, in plain PyTorch: [...], differentiable in the student's logits.

    student_logits, teacher_logits: [..., vocab], any floating dtype, computed in fp32 (fp64 where the student's are). tokens:
    int64 [...], for sampled kinds. A logit below -1e4, such as -inf, counts as -1e4. NaN spreads to its token.

    Raises ValueError where shapes differ or a sampled kind lacks tokens.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    >>> round(divergence(student, teacher, Divergence("total_variation")).item(), 6)
    0.25
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits are {list(student_logits.shape)} and {list(teacher_logits.shape)}; cut both to one vocabulary"
        )
    check_tokens(spec, tokens, student_logits.shape[:-1])
    wide = wide_of(student_logits)
    lq, lp = (
        torch.log_softmax(floored(x.to(wide) / spec.temperature), -1) for x in (student_logits, teacher_logits.detach())
    )
    if spec.code == AT_IDS:
        if spec.sampled and tokens is not None:
            ids = tokens.unsqueeze(-1)
        else:
            ids = (lq if spec.kind == "topk_reverse_kl" else lp).topk(min(spec.k, lq.shape[-1]), -1).indices
        rest = (
            [floored(x.scatter(-1, ids, 2 * FLOOR).logsumexp(-1)) for x in (lq, lp)] if spec.topk and spec.tail else []
        )
        return loss_at_ids(spec, lq.gather(-1, ids), lp.gather(-1, ids), *rest)
    q, p = lq.exp(), lp.exp()
    if spec.code == FORWARD:
        return (p * (lp - lq)).sum(-1)
    if spec.code == REVERSE:
        return (q * (lq - lp)).sum(-1)
    if spec.code == VARIATION:
        return (p - q).abs().sum(-1) / 2
    over_p, over_q = over_mixture(lp - lq, spec.beta)
    return (spec.beta * p * over_p + (1 - spec.beta) * q * over_q).sum(-1)


def loss_at_ids(spec: Divergence, lq: Tensor, lp: Tensor, *rest: Tensor) -> Tensor:
    """The kinds that see log-probabilities [..., k] at ids only, the tokens or the k argmax_ids, and, with a tail, the logs of what lies
    outside, the student's first [...]: a sum of its own, as 1 - mass is noise, without a gradient, where the mass is nearly 1."""
    if spec.sampled:
        ratio = (lq - lp).squeeze(-1)
        return ratio.detach() * lq.squeeze(-1) if spec.kind == "sampled_reverse_kl" else ratio**2 / 2
    if not spec.tail:
        return (lp.exp() * (lp - lq)).sum(-1)
    rest_q, rest_p = rest
    if spec.kind == "topk_forward_kl":
        return (lp.exp() * (lp - lq)).sum(-1) + rest_p.exp() * (rest_p - rest_q)
    return (lq.exp() * (lq - lp)).sum(-1) + rest_q.exp() * (rest_q - rest_p)


def check_tokens(spec: Divergence, tokens: Tensor | None, shape: Sequence[int]) -> None:
    if tokens is None and spec.sampled:
        raise ValueError(f"{spec.kind} needs the sampled tokens; pass tokens, int64 {list(shape)}")
    if tokens is not None and (tokens.shape != torch.Size(shape) or tokens.dtype != torch.int64):
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}; pass int64 {list(shape)}")


class Linear(torch.autograd.Function):
    """Divergence of every token (of dense kinds), and of the student the log-probabilities at ids and the log of what lies outside the
    first `rest` of them; all have a gradient. With `rest`, that of log-probabilities at later ids is taken for none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden,
        weight,
        bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        ids,
        rest,
        vocab,
        numbers,
        kind,
        tops,
    ):
        student, teacher = side(hidden, weight, bias), side(teacher_hidden, teacher_weight, teacher_bias)
        moments, at, outside, argmax_ids = operator("divergence_scan", student)(
            student, teacher, ids, rest, vocab, numbers, tops
        )
        forward = moments[MEAN_FORWARD] - moments[TEACHER_LOG] + moments[STUDENT_LOG]
        reverse = moments[MEAN_REVERSE] - moments[STUDENT_LOG] + moments[TEACHER_LOG]
        if kind in (JSD, VARIATION):
            loss, center = operator("divergence_means", student)(student, teacher, moments, vocab, numbers, kind)
        else:
            loss = center = forward if kind == FORWARD else reverse
        lq, lp = (at[k] - moments[2 * k, :, None] - moments[2 * k + 1, :, None] for k in range(2))
        rest_q, rest_p = (
            floored(outside[k] - moments[2 * k] - moments[2 * k + 1]) if rest else moments.new_empty(0)
            for k in range(2)
        )
        ctx.save_for_backward(*student, *teacher, torch.cat([moments[:4], center[None]]), ids, rest_q)
        ctx.sizes, ctx.plan = (len(student), len(teacher)), (vocab, numbers, kind, rest)
        scores = torch.stack(
            [
                forward,
                reverse,
                moments[STUDENT_LOG] - moments[STUDENT_MEAN],
                moments[TEACHER_LOG] - moments[TEACHER_MEAN],
            ]
        )
        ctx.mark_non_differentiable(lp, rest_p, scores, argmax_ids)
        return loss.clone(), lq, lp, rest_q, rest_p, scores, argmax_ids

    @staticmethod
    def backward(ctx: Any, loss_grad, lq_grad, lp_grad, rest_grad, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "linear_divergence has no second derivative; drop create_graph=True, or use divergence, from logits"
            )
        *sides, scalars, ids, rest_q = ctx.saved_tensors
        vocab, numbers, kind, rest = ctx.plan
        student, teacher = sides[: ctx.sizes[0]], sides[ctx.sizes[0] :]
        if rest:
            ids, lq_grad = ids[:, :rest], lq_grad[:, :rest]
            rest_grad = rest_grad.masked_fill(rest_q <= FLOOR, 0)
            scalars = torch.cat([scalars, -(lq_grad.sum(1) + rest_grad)[None], rest_q[None], rest_grad[None]])
        else:
            scalars = torch.cat([scalars, (-lq_grad.sum(1) if kind == AT_IDS else loss_grad)[None]])
        wanted = [*ctx.needs_input_grad[:3]]
        if kind != AT_IDS:
            ids, lq_grad = ids[:, :0], lq_grad[:, :0]
        grads = operator("divergence_backward", student)(
            student, teacher, scalars, ids, lq_grad, vocab, numbers, kind, wanted
        )
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 9


def side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [hidden, weight] if bias is None else [hidden, weight, bias]


def operator(name: str, student: Sequence[Tensor]) -> Any:
    """Kernels are for fp32 and narrower; the reference serves fp64 on every device."""
    return getattr(tiles, name) if student[0].dtype == torch.float64 else getattr(torch.ops.opdkernels, name)


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
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    scores: bool = False,
) -> Tensor | tuple[Tensor, Scores]:
    """The divergence from hidden states, in memory that does not grow with the vocabulary; differentiable once, by the student.

    student_hidden, teacher_hidden: [..., width], each with the width of its head, bf16, fp16 or fp32 (fp64 is computed in fp64),
    any strides. tokens: int64 of the leading shape, for sampled kinds and `Scores`. valid: bool of the leading shape; other tokens
    are dropped before the product. weights: of the leading shape, multiplied into the loss, taken as constant. reduction: "mean",
    over valid tokens or by `normalizer` (their count over all micro-batches and ranks), "sum", or "none": the leading shape, fp32,
    0 where not valid. scores: also return `Scores`, from the same pass.

    Heads of unequal rows are cut to the smaller `vocab`, if one of them says it. Where nothing is valid the loss is 0 and gradients
    are zeros. A head that needs no gradient has none computed. NaN is not hidden: it spreads to the loss. A teacher's logit below
    -1e4 counts as -1e4, so that an id that only the student allows costs about 1e4 nats and not inf.

    Raises ValueError and TypeError for what does not fit, naming it.

    >>> head = LMHead(torch.eye(3))
    >>> round(linear_divergence(torch.zeros(2, 3), head, torch.eye(3)[:2], head).item(), 4)
    0.1195
    """
    shape = student_hidden.shape[:-1]
    vocab = common_vocabulary(student_head, teacher_head)
    check(student_hidden, student_head, teacher_hidden, teacher_head, valid, weights, reduction)
    check_tokens(spec, tokens, shape)

    def packed(tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, *tensor.shape[len(shape) :])
        return flat if valid is None else flat[valid.reshape(-1)]

    tokens, weights = (None if t is None else packed(t) for t in (tokens, weights))
    loss, found = of_tokens(
        packed(student_hidden), student_head, packed(teacher_hidden.detach()), teacher_head, vocab, spec, tokens, scores
    )
    weighted = loss if weights is None else loss * weights.detach()
    if reduction == "none":
        total = weighted.view(shape) if valid is None else weighted.new_zeros(shape).masked_scatter(valid, weighted)
    else:
        total = weighted.sum()
        if reduction == "mean" and len(loss):  # of nothing a normalizer may be 0 too
            total = total / (len(loss) if normalizer is None else normalizer)
    return (total, found) if found is not None else total


def linear_log_prob(hidden: Tensor, head: LMHead, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens from hidden states, in memory that does not grow with the vocabulary; differentiable once.

    hidden: [..., width], bf16, fp16, fp32 or fp64, any strides; tokens: int64 of the leading shape. Returns nats of the leading shape,
    fp32 (fp64 of fp64); NaN where a token is none of the vocabulary.

    Raises ValueError and TypeError for what does not fit, naming it, UsageError for a temperature that makes no sense.

    >>> round(linear_log_prob(torch.zeros(1, 3), LMHead(torch.eye(3)), torch.tensor([2])).item(), 4)
    -1.0986
    """
    shape, vocab = hidden.shape[:-1], common_vocabulary(head, head)
    nothing, rows = hidden.new_zeros(*shape, 1), hidden.new_zeros(vocab, 1)  # what stands where a teacher's would
    check(hidden, head, nothing, LMHead(rows), None, None, "none")
    check_tokens(DEFAULT, tokens, shape)
    check_temperature(temperature)
    numbers = [float(head.scale), float(head.softcap), 1.0, 0.0, temperature, 0.0]
    flat = hidden.reshape(-1, hidden.shape[-1])
    found = Linear.apply(
        flat,
        whole(head.weight),
        whole(head.bias),
        nothing.view(-1, 1),
        rows,
        None,
        tokens.reshape(-1, 1),
        0,
        vocab,
        numbers,
        AT_IDS,
        False,
    )
    return found[1].view(shape)


def of_tokens(hidden, student_head, teacher, teacher_head, vocab, spec, tokens, scores) -> tuple[Tensor, Scores | None]:
    """Loss of every token, and its scores."""
    weight, bias = whole(student_head.weight), whole(student_head.bias)
    with torch.no_grad():
        teacher_weight, teacher_bias = whole(teacher_head.weight), whole(teacher_head.bias)
    numbers = [
        float(x)
        for x in (
            student_head.scale,
            student_head.softcap,
            teacher_head.scale,
            teacher_head.softcap,
            spec.temperature,
            spec.beta,
        )
    ]
    ids = hidden.new_empty((len(hidden), 0), dtype=torch.int64) if tokens is None else tokens[:, None]
    k = min(spec.k, vocab) if spec.topk or scores else 0
    if k:
        of_student = spec.kind == "topk_reverse_kl"
        one = side(hidden, weight, bias) if of_student else side(teacher, teacher_weight, teacher_bias)
        with torch.no_grad():
            argmax_ids = operator("divergence_top", one)(
                one, vocab, k, numbers if of_student else [*numbers[2:4], *numbers[2:]]
            )
        ids = torch.cat([argmax_ids, ids], 1)
    arguments = hidden, weight, bias, teacher, teacher_weight, teacher_bias, ids
    loss, lq, lp, rest_q, rest_p, figures, argmax_ids = Linear.apply(
        *arguments, k if spec.topk and spec.tail else 0, vocab, numbers, spec.code, scores
    )
    if spec.code == AT_IDS:
        mine = slice(k, None) if spec.sampled else slice(k)
        loss = loss_at_ids(spec, lq[:, mine], lp[:, mine], rest_q, rest_p)
    if not scores:
        return loss, None
    at = (lq.detach(), lp)
    forward, reverse, student_entropy, teacher_entropy = figures
    student_logp, teacher_logp = (None if tokens is None else x[:, -1] for x in at)
    student_mass, teacher_mass = (x[:, :k].exp().sum(1) if k else None for x in at)
    top1_agreement = (argmax_ids[0] == argmax_ids[1]).to(lp.dtype)
    return loss, Scores(
        loss.detach(),
        forward,
        reverse,
        student_entropy,
        teacher_entropy,
        top1_agreement,
        student_logp,
        teacher_logp,
        student_mass,
        teacher_mass,
    )


def whole(tensor: Any) -> Any:
    """All of a sharded head."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def common_vocabulary(student: LMHead, teacher: LMHead) -> int:
    for name, head in (("student", student), ("teacher", teacher)):
        if head.vocab is not None and not 1 <= head.vocab <= len(head.weight):
            raise ValueError(
                f"vocab of {name}_head is {head.vocab}; it must lie in 1 .. {len(head.weight)}, the rows of its weight"
            )
    sizes = [len(head.weight) if head.vocab is None else head.vocab for head in (student, teacher)]
    if sizes[0] != sizes[1] and student.vocab is None and teacher.vocab is None:
        raise ValueError(
            f"the student's head has {sizes[0]} rows, the teacher's {sizes[1]}; set LMHead.vocab if they share the first {min(sizes)} ids"
        )
    return min(sizes)


def check(student_hidden, student_head, teacher_hidden, teacher_head, valid, weights, reduction) -> None:
    shape = student_hidden.shape[:-1]
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim < 1 or head.weight.ndim != 2 or hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{name}_hidden is {list(hidden.shape)}, the weight of its head {list(head.weight.shape)}; their last sizes must be equal"
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
            f"student_hidden has leading shape {list(shape)}, teacher_hidden {list(teacher_hidden.shape[:-1])}; score the same tokens"
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
        raise ValueError(f"reduction is {reduction}; choose mean, sum or none")
