"""attention on CUDA devices: the raw ops' implementation, which hands each call to the kernels that `choose` names."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastpt.ops import _flash_attention as flash
from fastpt.ops._attention_choice import REFERENCE, SDPA, TRITON, Call, Choice, choose


@cache
def serving(call: Call) -> Choice:
    """Who serves a call in this process."""
    return choose(call, flash.missing())


def call_of(
    device: torch.device, dtype: torch.dtype, head_size: int, window: object, softcap: object, dropout_p: float,
    sinks: object = None,
) -> Call:  # fmt: skip
    """What decides about a call on a device; the options' presence counts, not their values."""
    major, minor = torch.cuda.get_device_capability(device)
    options = window is not None, softcap is not None, dropout_p > 0, sinks is not None
    return Call(10 * major + minor, dtype, head_size, *options)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
    window: int | None, softcap: float | None, scale: float, dropout_p: float = 0.0, seed: int = 0,
    *, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale
    kernel = _kernel(q, window, softcap, dropout_p, sinks)
    if kernel == TRITON:
        from fastpt.kernels import attention

        return attention.forward(*arguments, dropout_p, seed, sinks=sinks)
    if kernel == SDPA:
        from fastpt.ops import _sdpa

        return _sdpa.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    if kernel == REFERENCE:
        from fastpt.ops.attention import reference

        return reference(*arguments, dropout_p, seed, sinks=sinks)
    return flash.forward(kernel, *arguments)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, window: int | None, softcap: float | None, scale: float,
    dropout_p: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Any kernel's will do for a call with sinks: all they change is in lse."""
    arguments = grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale
    kernel = _kernel(q, window, softcap, dropout_p)
    if kernel == TRITON:
        from fastpt.kernels import attention_backward

        return attention_backward.backward(*arguments, dropout_p, seed)
    if kernel == SDPA:
        from fastpt.ops import _sdpa

        return _sdpa.backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, scale)
    if kernel == REFERENCE:
        from fastpt.ops.attention import reference_backward

        return reference_backward(*arguments, dropout_p, seed)
    return flash.backward(kernel, *arguments)


def _kernel(q: Tensor, window: int | None, softcap: float | None, dropout_p: float, sinks: Tensor | None = None) -> str:
    """Triton's where there is no GPU: its interpreter, for the tests."""
    if not q.is_cuda or q.numel() == 0:
        return TRITON
    return serving(call_of(q.device, q.dtype, q.shape[2], window, softcap, dropout_p, sinks)).kernel
