"""lora_linear: a linear layer plus its low-rank term, in GEMMs alone.

The low-rank term is written first and the base GEMM accumulates onto it: no extra pass over the output, and one rounding
at the base's magnitude instead of two. Row blocks keep float32 adapters exact without a float32 copy of x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpt.ops._library import Cost, autocast, nbytes, register

BLOCK_ROWS = 1024  # rows cast (and dropped out) at a time: fixed, so that backward draws the mask that forward drew


def _blocks(x: Tensor, dtype: torch.dtype, dropout_p: float, seed: int | None) -> Iterator[tuple]:
    """(rows, x[rows] dropped out in `dtype`, factor of its gradient or None), rows in order; x [T, D]."""
    if dropout_p == 0 and x.dtype == dtype:
        yield slice(0, len(x)), x, None
        return
    generator = torch.Generator(x.device).manual_seed(seed) if dropout_p > 0 else None
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = x[rows].to(dtype)
        if dropout_p == 0:
            yield rows, block, None
        else:
            factor = torch.empty_like(block).bernoulli_(1 - dropout_p, generator=generator)
            factor /= max(1 - dropout_p, torch.finfo(dtype).tiny)
            yield rows, block * factor, factor


def reference(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed) -> tuple[Tensor, Tensor]:
    """y [..., O] and the low-rank hidden xa [T, R], which backward needs."""
    flat = x.reshape(-1, x.shape[-1])  # [T, D]
    low = torch.promote_types(x.dtype, lora_a.dtype)
    a, b = lora_a.to(low), lora_b.to(low)
    xa = flat.new_empty(len(flat), len(a), dtype=low)
    y = flat.new_empty(len(flat), len(weight))
    offset = flat.new_zeros((), dtype=low) if bias is None else bias.to(low)
    for rows, block, _ in _blocks(flat, low, dropout_p, seed):
        xa[rows] = block @ a.t()
        y[rows] = torch.addmm(offset, xa[rows], b.t(), beta=0 if bias is None else 1, alpha=scale)
    y.addmm_(flat, weight.t())
    return y.view(*x.shape[:-1], len(weight)), xa


def reference_backward(grad, x, weight, lora_a, lora_b, xa, scale, dropout_p, seed, wants) -> tuple[Tensor, ...]:
    """Gradients of (x, weight, bias, lora_a, lora_b); grad @ lora_b is formed once for both lora_a and x."""
    flat, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    a, b = lora_a.to(xa.dtype), lora_b.to(xa.dtype)
    dx, dweight, dbias, da, db = _grads(x, weight, lora_a, lora_b, wants)
    dx2 = dx.view(flat.shape) if wants[0] else dx
    for array in (da, db):
        array.zero_()
    zero = xa.new_zeros(())
    if wants[0] or wants[3] or wants[4]:
        for rows, block, factor in _blocks(flat, xa.dtype, dropout_p, seed):
            dy_block = dy[rows].to(xa.dtype)
            dxa = torch.addmm(zero, dy_block, b, beta=0, alpha=scale)  # [n, R], one rounding
            if wants[4]:
                db += torch.addmm(zero, dy_block.t(), xa[rows], beta=0, alpha=scale)
            if wants[3]:
                da += dxa.t() @ block
            if wants[0]:
                dx2[rows] = dxa @ a if factor is None else (dxa @ a) * factor
    if wants[0]:
        dx2.addmm_(dy, weight)
    if wants[1]:
        dweight = dy.t() @ flat
    if wants[2]:
        dbias = dy.sum(0)
    return dx, dweight, dbias, da, db


def _grads(x, weight, lora_a, lora_b, wants) -> tuple[Tensor, ...]:
    """Where the gradients go, empty when not wanted; those of the adapters in float32, autograd rounds them once."""
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    shapes = x.shape, weight.shape, weight.shape[:1], lora_a.shape, lora_b.shape
    dtypes = x.dtype, x.dtype, x.dtype, wide, wide
    return tuple(
        x.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, wants, strict=True)
    )


def _fake(x, weight, bias, lora_a, *_):
    low = torch.promote_types(x.dtype, lora_a.dtype)
    tokens = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(tokens, len(lora_a), dtype=low)


def _fake_backward(grad, x, weight, lora_a, lora_b, xa, scale, dropout_p, seed, wants):
    return _grads(x, weight, lora_a, lora_b, wants)


def _cost(x, weight, bias, lora_a, lora_b, *_):
    tokens = x.numel() // x.shape[-1]
    parameters = weight.numel() + lora_a.numel() + lora_b.numel()
    read = nbytes(x, weight, bias, lora_a, lora_b)
    return Cost(read, nbytes(*_fake(x, weight, bias, lora_a)), 2 * tokens * parameters)


def _cost_backward(grad, x, weight, lora_a, lora_b, xa, scale, dropout_p, seed, wants):
    tokens = len(xa)
    base, a, b = weight.numel(), lora_a.numel(), lora_b.numel()
    flops = 2 * tokens * ((wants[0] + wants[1]) * base + (wants[0] + wants[3]) * a + b + wants[4] * b)
    return Cost(nbytes(grad, x, weight, lora_a, lora_b, xa), nbytes(*_grads(x, weight, lora_a, lora_b, wants)), flops)


_forward = register(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, float dropout_p, "
    "int? seed) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
)
_backward = register(
    "lora_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor xa, float scale, "
    "float dropout_p, int? seed, bool[5] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cost=_cost_backward,
)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
        y, xa = _forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa)
        ctx.scalars = scale, dropout_p, seed
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wants = list(ctx.needs_input_grad[:5])
        grads = _backward(grad, *ctx.saved_tensors, *ctx.scalars, wants)
        return (*(g if wanted else None for g, wanted in zip(grads, wants, strict=True)), None, None, None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + scale * dropout(x) @ lora_a.T @ lora_b.T, or DoRA when `magnitude` is given.

    Shapes: x [..., D], weight [O, D], bias and magnitude [O], lora_a [R, D], lora_b [O, R] -> [..., O], x's dtype.
    DoRA: magnitude / |weight + scale * lora_b @ lora_a| (the norm a constant in backward, as in PEFT) times the result
    without bias. Dropout touches the input of the low-rank term only; its mask is drawn from `seed` (by default one from torch's
    generator) and drawn again in backward, never stored.
    Numerics: adapters of a wider dtype than x are used unrounded, in row blocks; their gradients are sums in float32.
    Raises: RuntimeError when shapes or dtypes do not fit.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, lora_a, lora_b, dropout_p)
    if dropout_p > 0 and seed is None:
        seed = int(torch.randint(2**62, ()))
    if magnitude is None:
        return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    # DoRA is LoRA with the rows of weight and lora_b scaled; autograd carries the gradient on to the magnitude.
    ratio = (magnitude / _row_norms(weight, lora_a, lora_b, scale))[:, None]
    weight, lora_b = (ratio * weight).to(x.dtype), (ratio * lora_b).to(lora_b.dtype)
    return _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)


@torch.no_grad()
def _row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """|weight + scale * lora_b @ lora_a| of each row [O]."""
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return torch.addmm(weight.to(wide), lora_b.to(wide), lora_a.to(wide), alpha=scale).norm(dim=1)


def _check(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, dropout_p: float) -> None:
    fits = weight.shape[1:] == x.shape[-1:] == lora_a.shape[1:] and lora_b.shape == (len(weight), len(lora_a))
    if not fits or x.dtype != weight.dtype or lora_a.dtype != lora_b.dtype:
        shapes = ", ".join(
            f"{name} {tuple(t.shape)} {t.dtype}"
            for name, t in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b))
        )
        raise RuntimeError(
            f"lora_linear: got {shapes}; they must be [..., D], [O, D], [R, D] and [O, R], with x and weight of one "
            "dtype and lora_a and lora_b of one dtype"
        )
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"lora_linear: dropout_p is {dropout_p}; it must lie between 0 and 1")
