"""FlashAttention 2, 3 and 4 behind the attention op's arguments, where they are installed; none is imported before it is asked
for. Their longest sequence is given as all tokens: the true one would have to be fetched from the GPU, and only sizes a grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops._attention_choice import TRITON


class Functions(NamedTuple):
    """Where a generation keeps its two functions, and what they must be able to take."""

    module: str
    forward: str
    backward: str
    takes: frozenset[str] = frozenset({"window_size_left", "window_size_right"})


FUNCTIONS = {
    "FlashAttention 4": Functions("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
    "FlashAttention 3": Functions("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    "FlashAttention 2": Functions(
        "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"
    ),
}


@cache
def missing() -> dict[str, str]:
    """Why kernels of the choice are not there, by name: not installed, broken, or of a version with other arguments."""
    reasons = {name: reason for name in FUNCTIONS if (reason := _why_missing(name)) is not None}
    return reasons if find_spec("triton") else {**reasons, TRITON: "not installed"}


def _why_missing(name: str) -> str | None:
    functions = FUNCTIONS[name]
    try:
        module = import_module(functions.module)
    except ModuleNotFoundError as error:
        return "not installed" if functions.module.startswith(error.name or "-") else f"cannot be imported: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"
    for function, takes in (
        (functions.forward, functions.takes),
        (functions.backward, functions.takes | {"deterministic"}),
    ):
        lacking = takes - _parameters(getattr(module, function, None))
        if lacking:
            return f"{function} of this version takes no {', '.join(sorted(lacking))}"
    return None


def _parameters(function: Callable | None) -> set[str]:
    if function is None:
        return set()
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)  # of a custom_op, what it wraps


def _calls(name: str) -> tuple[Callable, Callable]:
    functions = FUNCTIONS[name]
    module = import_module(functions.module)
    return getattr(module, functions.forward), getattr(module, functions.backward)


def _bounds(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> dict[str, Tensor | int]:
    if cu_seqlens_q is None:
        cu_seqlens_q, cu_seqlens_k = (
            torch.arange(0, len(x) + 1, max(len(x), 1), dtype=torch.int32, device=x.device) for x in (q, k)
        )
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    lengths = {"max_seqlen_q": len(q), "max_seqlen_k": len(k)}
    return {"cu_seqlens_q": cu_seqlens_q.int(), "cu_seqlens_k": cu_seqlens_k.int(), **lengths}


def _options(causal: bool, window: int | None, softcap: float | None, scale: float) -> dict[str, bool | int | float]:
    """Their window counts keys on either side without the query's own; -1 is none."""
    side = -1 if window is None else window - 1
    right = 0 if causal and window is not None else side
    options = {"window_size_left": side, "window_size_right": right, "softcap": softcap or 0.0}
    return {"softmax_scale": scale, "causal": causal, **options}


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *options
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, K] and lse [Tq, Hq] from the kernels of this name."""
    call, _ = _calls(name)
    extra = {"dropout_p": 0.0} if name == "FlashAttention 2" else {}
    if name == "FlashAttention 4":
        extra = {"return_lse": True}
    out, lse, *_ = call(q, k, v, **_bounds(q, k, cu_seqlens_q, cu_seqlens_k), **_options(*options), **extra)
    return out, lse.t().contiguous()


def backward(
    name: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *options,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, call = _calls(name)
    bounds, named = _bounds(q, k, cu_seqlens_q, cu_seqlens_k), {**_options(*options), "deterministic": True}
    lse = lse.t().contiguous()
    if name == "FlashAttention 4":
        return call(q, k, v, out, grad, lse, **bounds, **named)[:3]
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if name == "FlashAttention 3":
        named["is_causal"] = named.pop("causal")
        call(grad, q, k, v, out, lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True)), **bounds, **named)
    else:
        call(grad, q, k, v, out, lse, *gradients, **bounds, **named, dropout_p=0.0, alibi_slopes=None)
    return gradients
