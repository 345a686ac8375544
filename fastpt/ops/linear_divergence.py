"""linear_divergence: how far a student's next-token distributions are from a teacher's, from the hidden states and heads of both.

Neither's logits are ever held: a chunk of rows is formed, compared and turned into gradients before the next one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops._head import Head, check_head, cost, empty_grads, low_rank_hidden
from fastpt.ops._library import autocast, register

PARTS = 2  # of a chunk of logits: the student's, the teacher's and what stands between them are held at once


class TeacherHead(NamedTuple):
    """What makes a teacher's logits: hidden [T, E], weight [V, E], bias [V] | None, softcap and scale of the logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class NarrowHead(Head):
    """A head whose products take and round to the dtype of its weights on the CPU, as a model's own do: several times faster."""

    def __post_init__(self):
        self.wide = torch.promote_types(self.hidden.dtype, torch.float32)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        adds_up = len(a) == len(self.weight)  # a weight's gradient, a part of it from each chunk
        return super().matmul(a, b) if a.is_cuda or adds_up else (a.to(b.dtype) @ b).to(self.wide)


def row_divergence(z: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(divergence [n], its gradient by z [n, V]) of logits z and the teacher's, both divided by the temperature; overwrites both.

    beta 0: KL(teacher || student); 1: KL(student || teacher); between: beta KL(teacher || m) + (1 - beta) KL(student || m) with
    the mixture m = beta teacher + (1 - beta) student (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, eq. 1).
    """
    log_s, log_t = z.log_softmax(-1), teacher.log_softmax(-1)
    s = torch.exp(log_s, out=z)
    if beta == 0:
        t = torch.exp(log_t, out=teacher)
        return log_t.sub_(log_s).mul_(t).sum(-1, dtype=torch.float64), s.sub_(t)
    if beta == 1:
        ratio, share, from_teacher = log_s.sub_(log_t), 1.0, z.new_zeros(len(z))
    else:
        t = torch.exp(log_t, out=teacher)
        log_m = torch.lerp(s, t, beta)
        log_m = log_m.clamp_(min=torch.finfo(z.dtype).tiny).log_()
        from_teacher = beta * log_t.sub_(log_m).mul_(t).sum(-1, dtype=torch.float64)
        ratio, share = log_s.sub_(log_m), 1 - beta
    from_student = (s * ratio).sum(-1, dtype=torch.float64)
    return from_teacher + share * from_student, s.mul_(ratio.sub_(from_student[:, None].to(s.dtype))).mul_(share)


def reference(
    hidden, weight, bias, low_hidden, low_weight, softcap, logit_scale, teacher_hidden, teacher_weight, teacher_bias,
    teacher_softcap, teacher_scale, kept, row_weight, beta, temperature, wants,
):  # fmt: skip
    """The definition: the sum over kept rows and its gradients by (hidden, weight, bias, low_hidden, low_weight)."""
    student = NarrowHead(hidden, weight, bias, low_hidden, low_weight, softcap, logit_scale)
    teacher = NarrowHead(teacher_hidden, teacher_weight, teacher_bias, None, None, teacher_softcap, teacher_scale)
    grads = student.zero_grads(wants)
    total = hidden.new_zeros((), dtype=torch.float64)
    start = 0
    for chunk in student.chunks(kept):
        for rows in chunk.split(-(-len(chunk) // PARTS)):
            z, theirs = student.logits(rows), teacher.logits(rows)
            scaled = z.div_(temperature) if softcap is None else z / temperature  # a cap's gradient needs the logits
            found, dz = row_divergence(scaled, theirs.div_(temperature), beta)
            if row_weight is not None:
                weights = row_weight[start : start + len(rows)].to(found.dtype)
                found, dz = found * weights, dz.mul_(weights[:, None].to(dz.dtype))
            start += len(rows)
            total += found.sum(dtype=total.dtype)
            if any(wants):
                student.add_grads(grads, wants, rows, z, dz.div_(temperature))
    return (total.to(student.wide), *grads)


def _fake(hidden, weight, bias, low_hidden, low_weight, *rest):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.new_empty((), dtype=wide), *empty_grads([hidden, weight, bias, low_hidden, low_weight], rest[-1]))


def _cost(hidden, weight, bias, low_hidden, low_weight, *rest):
    grads = _fake(hidden, weight, bias, low_hidden, low_weight, *rest)
    teacher_hidden, teacher_weight, kept, wants = rest[2], rest[3], rest[7], rest[-1]
    own = cost(hidden, weight, kept, bias, low_hidden, low_weight, 1 + wants[0] + wants[1], grads)
    return own + cost(teacher_hidden, teacher_weight, kept, rest[4], None, None, 1, [])


_forward = register(
    "linear_divergence(Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_hidden, Tensor? low_weight, float? softcap, "
    "float logit_scale, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, float? teacher_softcap, "
    "float teacher_scale, Tensor kept, Tensor? row_weight, float beta, float temperature, bool[5] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low_hidden, low_weight, wants, *options):
        total, *grads = _forward(hidden, weight, bias, low_hidden, low_weight, *options, wants)
        ctx.wants = wants
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads = [grad * x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)]
        return (*grads, *[None] * (len(ctx.needs_input_grad) - 5))


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead,
    kept: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    row_weight: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """The sum over rows of the divergence of softmax(student logits / temperature) from the teacher's (`row_divergence`).

    Shapes: hidden [T, D], weight [V, D], bias [V], lora_a [R, D], lora_b [V, R], kept int64 [N] rows, row_weight float32 [N]
    -> []. The teacher gets no gradient; logits are as in `linear_cross_entropy`.
    Numerics: divergence and sums in float32, of logits in the dtype of the weights on the CPU, in float32 on a GPU.
    Differentiable once.
    Raises: RuntimeError when shapes or dtypes do not fit, or beta is not in [0, 1].
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head("linear_divergence", hidden, weight, kept.new_zeros(len(hidden)), (lora_a, lora_b))
    if len(teacher.weight) != len(weight) or len(teacher.hidden) != len(hidden) or not 0 <= beta <= 1:
        raise RuntimeError(
            f"linear_divergence: student hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, teacher hidden "
            f"{tuple(teacher.hidden.shape)} and weight {tuple(teacher.weight.shape)}, beta {beta}; both need as many rows and as "
            "large a vocabulary, and beta lies in [0, 1]"
        )
    inputs = hidden, weight, bias, low_rank_hidden(hidden, lora_a, lora_scale), lora_b
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    teacher_parts = teacher.hidden.detach(), teacher.weight.detach(), teacher.bias, teacher.softcap, teacher.logit_scale
    options = softcap, logit_scale, *teacher_parts, kept, row_weight, beta, temperature
    return _LinearDivergence.apply(*inputs, wants, *options)
