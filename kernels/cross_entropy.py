"""cross_entropy over given logits in Triton: the rows of head_rows.py, and one program that adds up their losses.

Definition: fastpt/ops/cross_entropy.py: reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head_rows import row_losses, row_losses_backward
from .launch import choose, on_device


@triton.jit
def sum_losses(
    losses_ptr, targets_ptr, class_weight_ptr, scale_ptr, loss_ptr, share_ptr, rows, classes, ignore_index,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """share = 1 / the sum of the rows' weights (1 unless MEAN) times `scale`; loss = share * the sum of losses."""
    sums = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if losses_ptr is not None:
            sums += tl.load(losses_ptr + at, mask=at < rows, other=0.0)
        if MEAN:
            y = tl.load(targets_ptr + at, mask=at < rows, other=ignore_index)
            if class_weight_ptr is None:
                weights += tl.where(y == ignore_index, 0.0, 1.0)
            else:
                is_class = (y != ignore_index) & (y >= 0) & (y < classes)
                weights += tl.load(class_weight_ptr + y, mask=is_class, other=0.0).to(tl.float32)
    share = 1.0
    if MEAN:
        total = tl.sum(weights, axis=0)
        share = tl.where(total > 0.0, 1.0 / total, 0.0)
    if losses_ptr is not None:
        tl.store(loss_ptr, tl.sum(sums, axis=0) * share)
    if share_ptr is not None:
        if scale_ptr is not None:
            share *= tl.load(scale_ptr)
        tl.store(share_ptr, share)


def forward(logits, targets, class_weight, ignore_index, softcap, logit_scale, label_smoothing, z_loss, reduction):
    logits, targets, class_weight = _readable(logits), targets.contiguous(), _contiguous(class_weight)
    losses, top, log_sum = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    loss, share = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    options = ignore_index, softcap, logit_scale, label_smoothing, z_loss
    with on_device(logits):
        _rows(logits, None, targets, class_weight, None, losses, top, log_sum, *options)
        if reduction == "none":
            return losses, top, log_sum, share.fill_(1.0)
        _sum(losses, targets, class_weight, None, loss, share, logits, ignore_index, reduction)
    return loss, top, log_sum, share


def forward_and_gradient(
    scale,
    logits,
    targets,
    class_weight,
    ignore_index,
    softcap,
    logit_scale,
    label_smoothing,
    z_loss,
    reduction,
    gradient,
):
    readable, targets, class_weight = _readable(logits), targets.contiguous(), _contiguous(class_weight)
    out = gradient if _is_readable(gradient) else torch.empty_like(readable)
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    loss, share = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    options = ignore_index, softcap, logit_scale, label_smoothing, z_loss
    factor = scale.to(torch.float32).contiguous()
    with on_device(logits):
        if reduction == "mean":
            _sum(None, targets, class_weight, factor, None, share, logits, ignore_index, reduction)
            factor = share
        _rows(readable, out, targets, class_weight, factor, losses, None, None, *options)
        if reduction != "none":
            _sum(losses, targets, class_weight, None, loss, None, logits, ignore_index, reduction)
    if out is not gradient:
        gradient.copy_(out)
    return losses if reduction == "none" else loss


def backward(
    grad, max_logit, log_sum, share, logits, targets, class_weight, ignore_index, softcap, logit_scale, label_smoothing,
    z_loss, reduction,
):  # fmt: skip
    logits, targets, class_weight = _readable(logits), targets.contiguous(), _contiguous(class_weight)
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows, classes = logits.shape
    if dlogits.numel() == 0:
        return dlogits
    launch = choose("row_losses_backward", classes, logits.device)
    is_smoothed = label_smoothing > 0
    mean_weight = class_weight.mean(dtype=torch.float32) if is_smoothed and class_weight is not None else None
    with on_device(logits):
        row_losses_backward[(rows,)](
            logits, dlogits, targets, class_weight, grad, share if reduction == "mean" else None, max_logit, log_sum,
            mean_weight, logits.stride(0), dlogits.stride(0), grad.stride(0) if grad.dim() else 0, classes, classes,
            ignore_index, logit_scale, softcap or 0.0, label_smoothing, z_loss,
            CAPPED=softcap is not None, SMOOTHED=is_smoothed,
            BLOCK=launch.columns, STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
    return dlogits


def _rows(
    logits: Tensor, dlogits: Tensor | None, targets: Tensor, class_weight: Tensor | None, factor: Tensor | None,
    losses: Tensor, top: Tensor | None, log_sum: Tensor | None, ignore_index: int, softcap: float | None,
    logit_scale: float, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    rows, classes = logits.shape
    if rows == 0:
        return
    takes_more = softcap is not None or class_weight is not None
    launch = choose("row_losses_capped" if takes_more else "row_losses", classes, logits.device)
    row_losses[(rows,)](
        logits, dlogits, targets, None, class_weight, factor, losses, top, log_sum,
        logits.stride(0), 0 if dlogits is None else dlogits.stride(0),
        factor.stride(0) if factor is not None and factor.dim() else 0, classes, classes, ignore_index,
        logit_scale, softcap or 0.0, label_smoothing, z_loss,
        CAPPED=softcap is not None, SMOOTHED=label_smoothing > 0, HELD=launch.columns >= classes,
        BLOCK=launch.columns, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip


def _sum(
    losses: Tensor | None, targets: Tensor, class_weight: Tensor | None, scale: Tensor | None, loss: Tensor | None,
    share: Tensor | None, logits: Tensor, ignore_index: int, reduction: str,
) -> None:  # fmt: skip
    launch = choose("sum_losses", len(targets), targets.device)
    sum_losses[(1,)](
        losses, targets, class_weight, scale, loss, share, len(targets), logits.shape[1], ignore_index,
        MEAN=reduction == "mean", BLOCK=launch.columns, num_warps=launch.warps,
    )  # fmt: skip


def _is_readable(x: Tensor) -> bool:
    return x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or len(x) < 2)


def _readable(x: Tensor) -> Tensor:
    """Rows may lie apart, or be one row expanded; columns must be neighbours."""
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
