"""linear_cross_entropy in Triton and cuBLAS: head.py's chunks of logits, each read by one kernel that leaves its gradient
in their place. Definition: fastpt/ops/linear_cross_entropy.py: reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Chunk, Head
from .head_rows import row_losses
from .launch import choose, on_device


@triton.jit
def scale_in_place(x_ptr, scale_ptr, n, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:  # a loss that is not scaled, the usual one, moves nothing
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, x * scale, mask=at < n)


def forward(
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale,
    label_smoothing, z_loss, is_mean, wants,
):  # fmt: skip
    head = Head(
        hidden,
        weight,
        targets,
        kept,
        ignore_index,
        bias,
        low_hidden,
        low_weight,
        hidden.dtype,
        [bool(w) for w in wants],
    )
    losses = hidden.new_empty(head.rows, dtype=torch.float32)
    class_weight = None if class_weight is None else class_weight.contiguous()
    options = logit_scale, softcap, label_smoothing, z_loss
    # The mean's factor goes into the GEMMs, so that gradients of logits do not underflow in float16.
    share = 1.0 if not is_mean or class_weight is not None or head.rows == 0 else 1 / head.rows
    with on_device(hidden):
        for chunk in head.chunks():
            _write_losses(head, chunk, class_weight, losses[chunk.rows], ignore_index, *options)
            if any(head.wants):
                head.add_grads(chunk, share)
        loss = losses.sum(dtype=torch.float64) * share
        if is_mean and class_weight is not None:
            y = head.targets if head.kept is None else head.targets[head.kept]
            total = class_weight[y].sum(dtype=torch.float32)
            share = torch.where(total > 0, 1 / total, 0.0)
            loss = loss * share
            for grad in head.grads:
                grad.mul_(share)
    return loss.float(), *head.grads


def _write_losses(
    head: Head, chunk: Chunk, class_weight: Tensor | None, losses: Tensor, ignore_index: int, logit_scale: float,
    softcap: float | None, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    takes_more = softcap is not None or class_weight is not None
    launch = choose("row_losses_capped" if takes_more else "row_losses", head.bound, losses.device)
    targets = head.targets[chunk.rows] if chunk.places is None else head.targets
    row_losses[(len(losses),)](
        chunk.logits, chunk.dlogits if any(head.wants) else None, targets, chunk.places, class_weight, None, losses,
        None, None, chunk.logits.stride(0), chunk.dlogits.stride(0), 0, head.bound, head.classes, ignore_index,
        logit_scale, softcap or 0.0, label_smoothing, z_loss,
        CAPPED=softcap is not None, SMOOTHED=label_smoothing > 0, HELD=launch.columns >= head.bound,
        BLOCK=launch.columns, STAGES=launch.stages, num_warps=launch.warps,
    )  # fmt: skip


def scale(gradient: Tensor, factor: Tensor) -> None:
    n = gradient.numel()
    launch = choose("scale_in_place", n, gradient.device)
    if n > 0:
        with on_device(gradient):
            scale_in_place[(triton.cdiv(n, launch.columns),)](
                gradient, factor, n, BLOCK=launch.columns, num_warps=launch.warps
            )
