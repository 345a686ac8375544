"""linear_divergence: how far a student's next-token distributions are from a teacher's, from the hidden states and heads of both.

Neither's logits are ever held: a chunk of rows is formed, compared and turned into gradients before the next one. The products
are the linear ops' and torch's; what stands between them, `divergence_rows`, reads both logits and leaves the gradient in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops import _head
from fastpt.ops._head import Head, check_head, cost, empty_grads, low_rank_hidden
from fastpt.ops._library import Cost, autocast, nbytes, register

HELD = 2  # logits of a row at once: the student's and the teacher's


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

        is_product = self.bias is None and self.low_hidden is None and self.softcap is None and self.logit_scale == 1
        self.is_narrow = is_product and not self.hidden.is_cuda

    def chunks(self, kept: Tensor) -> Iterator[Tensor]:
        """As many rows as are held at once, of both heads' logits."""
        size = self.weight.dtype.itemsize if self.is_narrow else self.wide.itemsize
        rows = max(1, _head.CHUNK_BYTES // (HELD * size * len(self.weight)))
        return iter(kept.split(rows)) if len(kept) else iter(())

    def logits(self, rows: Tensor) -> Tensor:
        if not self.is_narrow:
            return super().logits(rows)
        return self.hidden[rows].to(self.weight.dtype) @ self.weight.t()  # rounded already: no need to widen it

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return super().matmul(a, b) if a.is_cuda else (a.to(b.dtype) @ b).to(self.wide)

    def weight_grad(self, dz: Tensor, hidden: Tensor) -> Tensor:
        if dz.is_cuda:
            return super().weight_grad(dz, hidden)
        hidden, none, wants = hidden.to(self.weight.dtype), [None], [True, False, False, False]
        return torch.ops.fastpt.lora_linear_backward(
            [dz.to(hidden.dtype)],
            hidden,
            [self.weight],
            none,
            none,
            [hidden.new_empty(0)],
            [1.0],
            0.0,
            [],
            False,
            wants,
            True,
        )[1][0]


def rows_reference(
    z: Tensor, teacher: Tensor, row_weight: Tensor | None, beta: float, temperature: float, gradient: Tensor
) -> Tensor:
    """The divergence of each row of logits z [n, V] from the teacher's, times its weight; its gradient by z goes to `gradient`.

    That may be z itself. Both are divided by the temperature first. beta 0: KL(teacher || student); 1: KL(student || teacher);
    between: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture m = beta teacher + (1 - beta) student
    (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, eq. 1).
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    log_s, log_t = ((x.to(wide) / temperature).log_softmax(-1) for x in (z, teacher))
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        found, dz = ((log_t - log_s) * t).sum(-1, dtype=torch.float64), s - t
    else:
        log_m = log_t if beta == 1 else torch.lerp(s, t, beta).clamp_(min=torch.finfo(wide).tiny).log_()
        share, ratio = 1.0 if beta == 1 else 1 - beta, log_s - log_m
        from_student = (s * ratio).sum(-1, dtype=torch.float64)
        found = beta * ((log_t - log_m) * t).sum(-1, dtype=torch.float64) + share * from_student
        dz = share * s * (ratio - from_student[:, None].to(wide))
    weight = 1.0 if row_weight is None else row_weight[:, None].to(wide)
    gradient.copy_(dz * weight / temperature)
    return (found if row_weight is None else found * row_weight).to(wide)


_rows = register(
    "divergence_rows(Tensor z, Tensor teacher, Tensor? row_weight, float beta, float temperature, Tensor(a!) gradient) -> Tensor",
    reference=rows_reference,
    fake=lambda z, *_: z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32)),
    cost=lambda z, teacher, row_weight, *_: Cost(
        nbytes(z, teacher, row_weight), nbytes(z) + 4 * len(z), 12 * z.numel()
    ),
    triton="fastpt.kernels.divergence_rows:divergence_rows",
)


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
    for rows in student.chunks(kept):
        z, theirs = student.logits(rows), teacher.logits(rows)
        dz = z if softcap is None else z.clone()  # a cap's gradient needs the logits
        weights = None if row_weight is None else row_weight[start : start + len(rows)]
        total += _rows(dz, theirs, weights, beta, temperature, dz).sum(dtype=total.dtype)
        start += len(rows)
        if any(wants):
            student.add_grads(grads, wants, rows, z, dz)
        del z, dz, theirs  # before the next ones are made
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
    """The sum over rows of the divergence of softmax(student logits / temperature) from the teacher's (`rows_reference`).

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
