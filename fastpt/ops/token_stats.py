"""token_stats: log-probability, entropy and logsumexp of given targets, without holding the logits of all rows.

The backward recomputes each chunk of logits; every preference, RL and distillation loss is plain torch on these vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._head import SCHEMA, Head, check_head, cost, empty_grads, kept_rows, low_rank_hidden
from fastpt.ops._library import autocast, register


class TokenStats(NamedTuple):
    """Per-token statistics, float32 [T]; rows without a target hold 0 (False)."""

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    is_top1: Tensor


def row_statistics(z: Tensor, y: Tensor, class_weight: Tensor | None) -> tuple[Tensor, ...]:
    """logprob, entropy, max, log of the sum of e^(z - max), (class-weighted) mean and is_top1 of logits z [n, V], targets y.

    log p is z - max - log_sum: against a rounded logsumexp every p of the row would share its rounding.
    """
    target = z.gather(1, y[:, None]).squeeze(1)
    max_logit = z.amax(1)
    log_sum = (z - max_logit[:, None]).exp_().sum(1).log_()
    entropy = torch.special.entr((z - max_logit[:, None]).sub_(log_sum[:, None]).exp_()).sum(1)
    mean_logit = z.mean(1) if class_weight is None else (z @ class_weight.to(z.dtype)) / z.shape[1]
    return target - max_logit - log_sum, entropy, max_logit, log_sum, mean_logit, target >= max_logit


def reference(
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale
):
    """The definition: vectors [T] as in row_statistics, 0 in rows without a target; the mean is for label smoothing."""
    head = Head(hidden, weight, bias, low_hidden, low_weight, softcap, logit_scale)
    vectors = [torch.zeros_like(vector) for vector in _fake(hidden)]
    for rows in head.chunks(kept_rows(targets, kept, ignore_index)):
        for vector, values in zip(vectors, row_statistics(head.logits(rows), targets[rows], class_weight), strict=True):
            vector[rows] = values
    return tuple(vectors)


def reference_backward(
    dlogprob, dentropy, dlogsumexp, dmean_logit, entropy, max_logit, log_sum,
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale, wants,
):  # fmt: skip
    head = Head(hidden, weight, bias, low_hidden, low_weight, softcap, logit_scale)
    grads = head.zero_grads(wants)
    # d(logprob) = 1[v = y] - p, d(lse) = p, d(entropy) = -p (log p + entropy).
    of_p = dlogsumexp - dlogprob - dentropy * entropy
    for rows in head.chunks(kept_rows(targets, kept, ignore_index)):
        z = head.logits(rows)
        log_p = z - max_logit[rows, None] - log_sum[rows, None]
        dz = log_p.exp() * (of_p[rows, None] - dentropy[rows, None] * log_p.clamp_(min=-104))  # e^-104 is 0 in float32
        spread = dmean_logit[rows, None] / z.shape[1]
        dz += spread if class_weight is None else spread * class_weight
        dz.scatter_add_(1, targets[rows, None], dlogprob[rows, None])
        head.add_grads(grads, wants, rows, z, dz)
    return tuple(grads)


def _fake(hidden, *_):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    vectors = [hidden.new_empty(len(hidden), dtype=wide) for _ in range(5)]
    return (*vectors, hidden.new_empty(len(hidden), dtype=torch.bool))


def _fake_backward(
    dlogprob, dentropy, dlogsumexp, dmean_logit, entropy, max_logit, log_sum,
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale, wants,
):  # fmt: skip
    return tuple(empty_grads([hidden, weight, bias, low_hidden, low_weight], wants))


def _cost(hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, *_):
    return cost(hidden, weight, kept, bias, low_hidden, low_weight, 1, _fake(hidden))


def _cost_backward(*args):
    hidden, weight, _, kept, _, bias, low_hidden, low_weight = args[7:15]
    gemms = 1 + args[-1][0] + args[-1][1]
    return cost(hidden, weight, kept, bias, low_hidden, low_weight, gemms, _fake_backward(*args))


_forward = register(
    f"token_stats({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
    triton="fastpt.kernels.token_stats:forward",
    workspace=_workspace.token_stats,
)
_backward = register(
    "token_stats_backward(Tensor dlogprob, Tensor dentropy, Tensor dlogsumexp, Tensor dmean_logit, Tensor entropy, "
    f"Tensor max_logit, Tensor log_sum, {SCHEMA}, bool[5] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    triton="fastpt.kernels.token_stats:backward",
    workspace=_workspace.token_stats_backward,
)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, low_hidden, low_weight, targets, kept, class_weight, ignore_index, softcap, logit_scale
    ):  # fmt: skip
        logprob, entropy, max_logit, log_sum, mean_logit, is_top1 = _forward(
            hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale
        )  # fmt: skip
        ctx.save_for_backward(
            hidden, weight, bias, low_hidden, low_weight, targets, kept, class_weight, entropy, max_logit, log_sum
        )
        ctx.scalars = ignore_index, softcap, logit_scale
        ctx.mark_non_differentiable(is_top1)
        return logprob, entropy, max_logit + log_sum, mean_logit, is_top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogprob, dentropy, dlogsumexp, dmean_logit, _):
        hidden, weight, bias, low_hidden, low_weight, targets, kept, class_weight, *stats = ctx.saved_tensors
        ignore_index, softcap, logit_scale = ctx.scalars
        wants = list(ctx.needs_input_grad[:5])
        grads = _backward(
            dlogprob, dentropy, dlogsumexp, dmean_logit, *stats, hidden, weight, targets, kept,
            ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale, wants,
        )  # fmt: skip
        return (*(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), *[None] * 6)


def all_stats(
    hidden, weight, targets, *, bias, kept, ignore_index, class_weight, softcap, logit_scale, lora_a, lora_b, lora_scale
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_stats with the mean logit, which label smoothing needs, before is_top1."""
    return _TokenStats.apply(
        hidden, weight, bias, low_rank_hidden(hidden, lora_a, lora_scale), lora_b,
        targets, kept, class_weight, ignore_index, softcap, logit_scale,
    )  # fmt: skip


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> TokenStats:
    """Log-probability, entropy and logsumexp of the targets under softmax(hidden @ weight.T), and whether they are top.

    Shapes: hidden [T, D], weight [V, D], targets int64 [T], bias [V], lora_a [R, D], lora_b [V, R] -> four of [T].
    `kept` int64 [N] are the rows whose target is not `ignore_index`; without it they are found here (a sync on a GPU).
    Numerics: float32; logits = softcap * tanh(logit_scale * (...) / softcap); a target that ties with the best is top.
    All but is_top1 are differentiable, once, in hidden, weight, bias, lora_a and lora_b.
    Raises: RuntimeError when shapes or dtypes do not fit.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head("token_stats", hidden, weight, targets, (lora_a, lora_b))
    logprob, entropy, logsumexp, _, is_top1 = all_stats(
        hidden, weight, targets, bias=bias, kept=kept, ignore_index=ignore_index, class_weight=None, softcap=softcap,
        logit_scale=logit_scale, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale,
    )  # fmt: skip
    return TokenStats(logprob, entropy, logsumexp, is_top1)
