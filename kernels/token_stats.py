"""token_stats in Triton and cuBLAS: head.py's chunks of logits, in float32, each read by one kernel in either direction.

Definition: fastpt/ops/token_stats.py: reference, reference_backward.
"""

from __future__ import annotations

import torch

from .head import Head
from .head_rows import row_statistics, row_statistics_backward
from .launch import choose, on_device

NONE_WANTED = [False] * 5


def forward(
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale
):
    head = Head(hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, torch.float32, NONE_WANTED)
    make = torch.empty if head.kept is None else torch.zeros  # rows without a target hold 0
    dtypes = [torch.float32] * 5 + [torch.bool]
    vectors = [make(len(hidden), dtype=dtype, device=hidden.device) for dtype in dtypes]
    class_weight = None if class_weight is None else class_weight.contiguous()
    launch = choose("row_statistics", head.bound, hidden.device)
    with on_device(hidden):
        for chunk in head.chunks():
            at = slice(None) if chunk.places is not None else chunk.rows
            row_statistics[(len(chunk.logits),)](
                chunk.logits, head.targets[at], chunk.places, class_weight, *(v[at] for v in vectors),
                chunk.logits.stride(0), head.bound, head.classes, logit_scale, softcap or 0.0,
                CAPPED=softcap is not None, HELD=launch.columns >= head.bound,
                BLOCK=launch.columns, STAGES=launch.stages, num_warps=launch.warps,
            )  # fmt: skip
    return tuple(vectors)


def backward(
    dlogprob, dentropy, dlogsumexp, dmean_logit, entropy, max_logit, log_sum,
    hidden, weight, targets, kept, ignore_index, bias, low_hidden, low_weight, class_weight, softcap, logit_scale, wants,
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
        torch.float32,
        [bool(w) for w in wants],
    )
    vectors = [v.contiguous() for v in (dlogprob, dentropy, dlogsumexp, dmean_logit, entropy, max_logit, log_sum)]
    class_weight = None if class_weight is None else class_weight.contiguous()
    launch = choose("row_statistics_backward", head.bound, hidden.device)
    with on_device(hidden):
        for chunk in head.chunks() if any(head.wants) else ():
            at = slice(None) if chunk.places is not None else chunk.rows
            row_statistics_backward[(len(chunk.logits),)](
                chunk.logits, chunk.dlogits, head.targets[at], chunk.places, class_weight, *(v[at] for v in vectors),
                chunk.logits.stride(0), chunk.dlogits.stride(0), head.bound, head.classes, logit_scale, softcap or 0.0,
                CAPPED=softcap is not None, BLOCK=launch.columns, STAGES=launch.stages, num_warps=launch.warps,
            )  # fmt: skip
            head.add_grads(chunk)
    return tuple(head.grads)
