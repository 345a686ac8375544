"""An encoder block as one autograd.Function: (qkv), attention, (output, dropout + add + norm), (MLP, dropout + add + norm).

Forward saves what `Saved` lists and nothing else: no GEMM is run twice; norms and GELU are computed again in backward, and
dropout's masks come from their seeds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.fusion.layout import Layout
from fastpt.fusion.pieces import APPROXIMATIONS, Attention, Heads, Linears, keep, kept, product_dtype, raw
from fastpt.fusion.tree import tree_flatten, tree_unflatten


class LayerNorm(NamedTuple):
    """A layer norm over dropout(x) + residual."""

    weight: Tensor | None  # [D]
    bias: Tensor | None
    eps: float
    dropout_p: float = 0.0
    seed: int = 0

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """norm(s) and, for backward, s = dropout(x) + residual, its means and 1 / standard deviations."""
        return raw.add_layer_norm(x, residual, self.weight, self.bias, self.eps, self.dropout_p, self.seed)

    def again(self, s: Tensor) -> Tensor:
        """norm(s), from what was saved."""
        return raw.layer_norm(s, self.weight, self.bias, self.eps)[0]

    def backward(
        self, grad: Tensor, s: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype, wants: LayerNorm
    ) -> tuple[Tensor, Tensor, LayerNorm]:
        """The gradients of x (in its dtype) and of the residual, and the norm's own."""
        dx, ds, dweight, dbias = raw.add_layer_norm_backward(
            grad, None, s, mean, rstd, self.weight, dtype, self.dropout_p, self.seed,
            wants.weight, wants.bias,
        )  # fmt: skip
        found = LayerNorm(dweight if wants.weight else None, dbias if wants.bias else None, None, None, None)  # type: ignore
        has_dx = self.dropout_p > 0 or dtype != ds.dtype
        return dx if has_dx else ds, ds, found


class EncoderBlock(NamedTuple):
    """The weights of a post-norm encoder block; the bias of `up` is added by the activation's kernel."""

    qkv: Linears
    output: Linears
    norm: LayerNorm
    up: Linears
    up_bias: Tensor | None
    activation: str
    down: Linears
    mlp_norm: LayerNorm


class EncoderCall(NamedTuple):
    """What one call is about, besides its tensors."""

    layout: Layout
    scale: float
    head_dim: int
    dropout_p: float = 0.0  # of the attention weights
    seed: int = 0

    @property
    def attention(self) -> Attention:
        return Attention(self.layout, self.scale, None, self.dropout_p, self.seed)


class Saved(NamedTuple):
    """What backward needs. T tokens; D model, I inner width, R rank."""

    x: Tensor  # [T, D]
    qkv_low: list[Tensor]  # [T, R] each: low-rank hiddens
    attention: Heads
    output_low: list[Tensor]
    norm: tuple[Tensor, ...]  # sum [T, D], mean and 1 / standard deviation [T]
    up: Tensor  # [T, I], before bias and activation
    up_low: list[Tensor]
    down_low: list[Tensor]
    mlp_norm: tuple[Tensor, ...]


def encoder_block(hidden: Tensor, block: EncoderBlock, call: EncoderCall) -> Tensor:
    """hidden [B, S, D] through the block."""
    leaves, spec = tree_flatten(block)
    return _EncoderBlock.apply(hidden.reshape(-1, hidden.shape[-1]), call, spec, *leaves).view(hidden.shape)


class _EncoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, call, spec, *leaves):
        w: EncoderBlock = tree_unflatten(leaves, spec)
        products = product_dtype(x.dtype, x.device)
        (q, k, v), qkv_low = w.qkv.forward(x.to(products))
        q, k, v = (part.unflatten(-1, (-1, call.head_dim)) for part in (q, k, v))
        attended, heads = call.attention.forward(q, k, v)
        (y,), output_low = w.output.forward(attended.flatten(1))
        y, *norm = w.norm.forward(y, x)
        (up,), up_low = w.up.forward(y.to(products))
        (out,), down_low = w.down.forward(raw.bias_gelu(up, w.up_bias, APPROXIMATIONS[w.activation]))
        out, *mlp_norm = w.mlp_norm.forward(out, y)
        saved = Saved(x, qkv_low, heads, output_low, tuple(norm), up, up_low, down_low, tuple(mlp_norm))
        keep(ctx, saved, leaves, spec)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved, w, wants = kept(ctx)
        wants_x = ctx.needs_input_grad[0]
        dx, found = _backward(grad, w, saved, wants, ctx.call, wants_x)
        return dx if wants_x else None, None, None, *tree_flatten(found)[0]


def _backward(
    grad: Tensor, w: EncoderBlock, saved: Saved, wants: EncoderBlock, call: EncoderCall, wants_x: bool
) -> tuple[Tensor, EncoderBlock]:
    products, form = saved.attention.q.dtype, APPROXIMATIONS[w.activation]
    dout, dy, mlp_norm = w.mlp_norm.backward(grad.to(saved.x.dtype), *saved.mlp_norm, products, wants.mlp_norm)  # type: ignore
    dinner, down = w.down.backward([dout], raw.bias_gelu(saved.up, w.up_bias, form), saved.down_low, wants.down)
    dup, dup_bias = raw.bias_gelu_backward(dinner, saved.up, w.up_bias, form, wants.up_bias)
    y = w.norm.again(saved.norm[0]).to(products)
    dy_mlp, up = w.up.backward([dup], y, saved.up_low, wants.up)
    dout, dx, norm = w.norm.backward(dy.add_(dy_mlp), *saved.norm, products, wants.norm)  # type: ignore
    attended = call.attention.again(saved.attention, len(grad)).flatten(1)
    dattended, output = w.output.backward([dout], attended, saved.output_low, wants.output)
    grads = call.attention.backward(dattended.unflatten(1, (-1, call.head_dim)), saved.attention)
    dx_heads, qkv = w.qkv.backward(
        [g.flatten(1) for g in grads], saved.x.to(products), saved.qkv_low, wants.qkv, wants_x
    )
    found = EncoderBlock(qkv, output, norm, up, dup_bias if wants.up_bias else None, None, down, mlp_norm)  # type: ignore
    return dx.add_(dx_heads) if wants_x else dx, found
