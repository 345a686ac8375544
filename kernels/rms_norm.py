"""rms_norm and add_rms_norm in Triton; the kernels are norm_rows.py's, which LayerNorm shares."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import check_parameter, check_same_shape
from .norm_rows import launch_backward, launch_forward


def forward(x: Tensor, weight: Tensor, eps: float, offset: float, casts_first: bool) -> tuple[Tensor, Tensor]:
    check_parameter("rms_norm", x, weight=weight)
    y, _, _, rstd = launch_forward(
        x, None, weight, None, eps, has_mean=False, offset=offset, casts_first=casts_first
    )  # fmt: skip
    return y, rstd


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casts_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_shape("add_rms_norm", x=x, residual=residual)
    check_parameter("add_rms_norm", x, weight=weight)
    y, summed, _, rstd = launch_forward(
        x, residual, weight, None, eps, has_mean=False, offset=offset, casts_first=casts_first
    )
    return y, summed, rstd


def backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
    weight_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    dx, _, dweight, _ = launch_backward(
        grad, grad_sum, x, None, rstd, weight, weight_dtype=weight_dtype, bias_dtype=None, offset=offset
    )
    return dx, dweight
