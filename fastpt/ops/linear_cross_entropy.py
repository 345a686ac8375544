"""linear_cross_entropy: hidden states and head weight to loss, never holding the logits, rows without a target skipped.

mean and sum make their gradients in the forward while a chunk of logits is at hand, so a frozen head costs two GEMMs and
the backward only scales; "none" recomputes (token_stats).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._head import SCHEMA, Head, check_head, cost, empty_grads, kept_rows, low_rank_hidden
from fastpt.ops._library import Cost, autocast, nbytes, register
from fastpt.ops.token_stats import all_stats, row_statistics


def reference(
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale,
    label_smoothing, z_loss, is_mean, wants,
):  # fmt: skip
    """The definition: the loss and its gradients by (hidden, weight, bias, low_hidden, low_weight)."""
    head = Head(hidden, weight, bias, low_hidden, low_weight, softcap, logit_scale)
    kept = kept_rows(targets, kept, ignore_index)
    grads = head.zero_grads(wants)
    loss = hidden.new_zeros((), dtype=torch.float64)
    if class_weight is None:
        column_weight, row_weight = hidden.new_ones((), dtype=head.wide), hidden.new_ones(len(kept), dtype=head.wide)
    else:
        column_weight = class_weight.to(head.wide)
        row_weight = column_weight[targets[kept]]
    total = row_weight.sum()
    share = torch.where(total > 0, 1 / total, 0) if is_mean else torch.ones_like(total)
    smoothing = label_smoothing / weight.shape[0]  # what each class gets
    start = 0
    for rows in head.chunks(kept):
        z, y = head.logits(rows), targets[rows]
        w = row_weight[start : start + len(rows)]
        start += len(rows)
        logprob, _, max_logit, log_sum, mean_logit, _ = row_statistics(z, y, class_weight)
        lse = max_logit + log_sum
        loss += share * ((label_smoothing - 1) * w * logprob + z_loss * lse**2).sum(dtype=loss.dtype)
        if label_smoothing > 0:  # only then, for a mean with -inf in it
            loss += share * label_smoothing * (column_weight.mean() * lse - mean_logit).sum(dtype=loss.dtype)
        if any(wants):
            of_p = (1 - label_smoothing) * w + label_smoothing * column_weight.mean() + 2 * z_loss * lse
            dz = (
                (z - max_logit[:, None])
                .sub_(log_sum[:, None])
                .exp_()
                .mul_(of_p[:, None])
                .sub_(smoothing * column_weight)
            )
            dz.scatter_add_(1, y[:, None], (label_smoothing - 1) * w[:, None])
            head.add_grads(grads, wants, rows, z, dz.mul_(share))
    return (loss.to(head.wide), *grads)


def _fake(hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, *rest):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.new_empty((), dtype=wide), *empty_grads([hidden, weight, bias, low_hidden, low_weight], rest[-1]))


def _cost(hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, *rest):
    grads = _fake(hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, *rest)
    return cost(hidden, weight, kept, bias, low_hidden, low_weight, 1 + rest[-1][0] + rest[-1][1], grads)


def _scale_reference(gradient: Tensor, factor: Tensor) -> None:
    if factor.device.type != "cpu" or factor != 1:  # elsewhere the value would cost a sync
        gradient.mul_(factor)


_forward = register(
    f"linear_cross_entropy({SCHEMA}, float label_smoothing, float z_loss, bool is_mean, bool[5] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
    triton="fastpt.kernels.linear_cross_entropy:forward",
    workspace=_workspace.linear_cross_entropy,
)
_scale = register(  # in place, as a trained head's gradient is as large as the head; a factor of 1 costs a GPU nothing
    "linear_cross_entropy_scale(Tensor(a!) gradient, Tensor factor) -> ()",
    reference=_scale_reference,
    fake=lambda gradient, factor: None,
    cost=lambda gradient, factor: Cost(nbytes(gradient, factor), nbytes(gradient), gradient.numel()),
    triton="fastpt.kernels.linear_cross_entropy:scale",
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, low_hidden, low_weight, wants, targets, kept, ignore_index, *options):
        loss, *grads = _forward(
            hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, *options, wants
        )
        ctx.wants = wants
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = [x if wanted else None for x, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)]
        return (*_scaled(saved, grad), *[None] * (len(ctx.needs_input_grad) - 5))


def _scaled(grads: list[Tensor | None], scale: Tensor) -> list[Tensor | None]:
    """scale * grads: in place when this is the graph's last backward, as a trained head's gradient is as large as the head."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if x is None else scale * x for x in grads]
    for x in grads:
        if x is not None:
            _scale(x, scale)
    return grads


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
) -> Tensor:
    """Cross-entropy of hidden @ weight.T against targets, as F.cross_entropy, without the logits.

    Shapes: hidden [T, D], weight [V, D], targets int64 [T], bias and class_weight [V], lora_a [R, D], lora_b [V, R]
    -> [] or, for reduction="none", [T] (0 where the target is `ignore_index`).
    `kept` int64 [N] are the rows whose target is not `ignore_index`; without it they are found here (a sync on a GPU).
    Logits are softcap * tanh(logit_scale * (hidden @ weight.T + bias + lora_scale * hidden @ lora_a.T @ lora_b.T) /
    softcap); z_loss * logsumexp² is added per row. The mean is over kept rows, or over their class weights; none: 0.
    Numerics: float32 sums, also for the loss; on a GPU logits are stored in the dtype of hidden. Differentiable once.
    Raises: RuntimeError when shapes, dtypes or the reduction do not fit.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head("linear_cross_entropy", hidden, weight, targets, (lora_a, lora_b))
    if reduction not in ("mean", "sum", "none"):
        raise RuntimeError(f'linear_cross_entropy: reduction is {reduction!r}; it must be "mean", "sum" or "none"')
    if reduction == "none":
        logprob, _, lse, mean_logit, _ = all_stats(
            hidden, weight, targets, bias=bias, kept=kept, ignore_index=ignore_index, class_weight=class_weight,
            softcap=softcap, logit_scale=logit_scale, lora_a=lora_a, lora_b=lora_b, lora_scale=lora_scale,
        )  # fmt: skip
        row_weight = 1.0 if class_weight is None else class_weight[targets.clamp(min=0)]
        loss = (label_smoothing - 1) * row_weight * logprob + z_loss * lse**2
        if label_smoothing > 0:
            mean_weight = 1.0 if class_weight is None else class_weight.mean()
            loss = loss + label_smoothing * (mean_weight * lse - mean_logit)
        return loss
    inputs = hidden, weight, bias, low_rank_hidden(hidden, lora_a, lora_scale), lora_b
    wants = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    options = class_weight, softcap, logit_scale, label_smoothing, z_loss, reduction == "mean"
    return _LinearCrossEntropy.apply(*inputs, wants, targets, kept, ignore_index, *options)
