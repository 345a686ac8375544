"""layer_norm and add_layer_norm in Triton; the kernels are norm_rows.py's, which RMSNorm shares."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import check_parameter
from .norm_rows import launch_backward, launch_forward


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_parameter("layer_norm", x, weight=weight, bias=bias)
    y, _, mean, rstd = launch_forward(x, None, weight, bias, eps, has_mean=True)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, dweight, dbias = launch_backward(
        grad, None, x, mean, rstd, weight, weight_dtype=weight_dtype, bias_dtype=bias_dtype
    )
    return dx, dweight, dbias


def add_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.shape != residual.shape:
        raise RuntimeError(
            f"add_layer_norm: x is {list(x.shape)}, residual is {list(residual.shape)}; they must be equal"
        )
    check_parameter("add_layer_norm", x, weight=weight, bias=bias)
    return launch_forward(x, residual, weight, bias, eps, has_mean=True, dropout_p=dropout_p, seed=seed)


def add_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    dropout_p: float,
    seed: int,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ds, dx, dweight, dbias = launch_backward(
        grad, grad_sum, summed, mean, rstd, weight, weight_dtype=weight_dtype, bias_dtype=bias_dtype,
        branch_dtype=dtype, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return dx, ds, dweight, dbias
