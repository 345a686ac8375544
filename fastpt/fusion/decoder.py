"""A decoder block as one autograd.Function: (norm, qkv, rope), attention, (output, add + norm, gated MLP).

Forward saves what `Saved` lists and nothing else: no GEMM is run twice, and whatever a pass over rows gives back (norms,
activation x gate) is computed again in backward. The residual's gradient rides through the norms' backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpt.fusion.layout import Layout
from fastpt.fusion.pieces import (
    Activation,
    Attention,
    Heads,
    Linears,
    Norm,
    gate_and_up,
    keep,
    kept,
    product_dtype,
    raw,
)  # fmt: skip
from fastpt.fusion.tree import tree_flatten, tree_unflatten

# The last piece, whose inner width is the largest, goes by so many tokens: what it needs for a moment does not grow with
# the length of a row, and its blocks of memory are of one size and get used again.
ROWS = 2048


class QKV(NamedTuple):
    """What the first piece needs: one packed projection or three, and the norms of the heads where there are any."""

    norm: Norm
    projections: Linears
    q_norm: Norm | None
    k_norm: Norm | None


class OutputMLP(NamedTuple):
    """What the last piece needs; the two `after` norms are Gemma's."""

    output: Linears
    norm: Norm
    gate_up: Linears
    activation: Activation
    down: Linears
    after_attention: Norm | None
    after_mlp: Norm | None


class Call(NamedTuple):
    """What one call of a block is about, besides its tensors."""

    layout: Layout
    scale: float | None
    softcap: float | None
    heads: int
    kv_heads: int
    head_dim: int
    cache: Any = None
    layer_idx: int = 0
    recomputes: bool = False

    @property
    def attention(self) -> Attention:
        return Attention(self.layout, self.head_dim**-0.5 if self.scale is None else self.scale, self.softcap)


class Block(NamedTuple):
    """Everything one call needs besides the hidden states."""

    qkv: QKV
    mlp: OutputMLP
    cos: Tensor  # [1 or B, S, R]
    sin: Tensor
    call: Call


class Saved(NamedTuple):
    """What backward needs. T tokens; D model, I inner width, R rank or rotated dims."""

    x: Tensor  # [T, D]
    rstd: Tensor  # [T]
    qkv_low: list[Tensor]  # [T, R] each: low-rank hiddens
    heads: tuple[Tensor, ...]  # q, k before their norms and 1 / rms of each, where heads are normed
    attention: Heads  # q and k rotated
    cos: Tensor  # [T, R]
    sin: Tensor
    mlp: list[SavedMLP]  # one for every ROWS tokens


class SavedMLP(NamedTuple):
    """What backward needs of the last piece, for some of the tokens."""

    output_low: list[Tensor]
    output: tuple[Tensor, ...]  # the projection and its 1 / rms, where a norm follows
    s: Tensor  # [T, D], the residual stream after attention
    s_rstd: Tensor
    gate_up: list[Tensor]  # [T, I] twice, or [T, 2 I]
    gate_up_low: list[Tensor]
    down_low: list[Tensor]
    down: tuple[Tensor, ...]  # as output


def decoder_block(hidden: Tensor, block: Block, *, recomputes: bool = False) -> Tensor:
    """hidden [B, S, D] through the three pieces; `recomputes`: only hidden is saved, the rest is formed again in backward."""
    shape = hidden.shape
    cos, sin = (table.expand(*shape[:2], -1).reshape(-1, table.shape[-1]) for table in (block.cos, block.sin))
    leaves, spec = tree_flatten((block.qkv, block.mlp))
    call = block.call._replace(recomputes=recomputes)
    return _DecoderBlock.apply(hidden.reshape(-1, shape[-1]), cos, sin, call, spec, *leaves).view(shape)


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, call, spec, *leaves):
        out, saved = _forward(x, cos, sin, call, *tree_unflatten(leaves, spec))
        keep(ctx, (x, cos, sin) if call.recomputes else saved, leaves, spec)
        ctx.call, ctx.products = call._replace(cache=None), product_dtype(x.dtype, x.device)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved, (qkv, mlp), wants = kept(ctx)
        if ctx.call.recomputes:
            x, cos, sin = saved
            with torch.autocast(grad.device.type, ctx.products, enabled=ctx.products != x.dtype):
                saved = _forward(x, cos, sin, ctx.call, qkv, mlp, wants_out=False)[1]
        wants_x, wants_mlp = ctx.needs_input_grad[0], wants[1] if len(saved.mlp) == 1 else _widened(wants[1])
        attended = ctx.call.attention.again(saved.attention, len(grad)).flatten(1)
        rows = zip(grad.split(ROWS), attended.split(ROWS), saved.mlp, strict=True)
        dattended, dx, dmlp = _joined([output_norm_mlp_backward(*some, mlp, wants_mlp) for some in rows])
        dq, dk, dv = ctx.call.attention.backward(dattended.unflatten(1, (-1, ctx.call.head_dim)), saved.attention)
        dx, dqkv = norm_qkv_rope_backward(dq, dk, dv, dx.to(saved.x.dtype), qkv, saved, wants[0])
        return dx if wants_x else None, None, None, None, None, *tree_flatten((dqkv, dmlp))[0]


def _forward(
    x: Tensor, cos: Tensor, sin: Tensor, call: Call, qkv: QKV, mlp: OutputMLP, *, wants_out: bool = True
) -> tuple[Tensor, Saved]:
    """The block's output (empty when not wanted: a product less) and what to save."""
    q, k, v, rstd, low, unnormed = norm_qkv_rope(x, cos, sin, qkv, call)
    if call.cache is not None:  # a prefill: the layout says that these are all the keys there are
        shape = (call.layout.batch, call.layout.length)
        call.cache.update(*(t.unflatten(0, shape).transpose(1, 2) for t in (k, v)), call.layer_idx)
    attended, heads = call.attention.forward(q, k, v)
    rows = zip(attended.flatten(1).split(ROWS), x.split(ROWS), strict=True)
    outs, third = zip(*(output_norm_mlp(some, residual, mlp, wants_out) for some, residual in rows), strict=True)
    return outs[0] if len(outs) == 1 else torch.cat(outs), Saved(x, rstd, low, unnormed, heads, cos, sin, list(third))


def norm_qkv_rope(
    x: Tensor, cos: Tensor, sin: Tensor, w: QKV, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], tuple[Tensor, ...]]:
    """x [T, D], cos and sin [T, R] -> q [T, H, K], k and v [T, Hkv, K]; 1 / rms, low-rank hiddens and heads before norms."""
    y, rstd = w.norm.forward(x)
    projected, low = w.projections.forward(y.to(product_dtype(x.dtype, x.device)))
    if len(projected) == 1:
        sizes = [n * call.head_dim for n in (call.heads, call.kv_heads, call.kv_heads)]
        *projected, v = projected[0].split(sizes, dim=-1)
        projected.append(v.contiguous())  # not the whole of it is to be kept
    q, k, v = (part.unflatten(-1, (-1, call.head_dim)) for part in projected)
    heads: tuple[Tensor, ...] = ()
    if w.q_norm is not None and w.k_norm is not None:
        (q_normed, q_rstd), (k_normed, k_rstd) = w.q_norm.forward(q), w.k_norm.forward(k)
        heads, q, k = (q, k, q_rstd, k_rstd), q_normed, k_normed
    q, k = raw.rope(q, k, cos, sin, None, False, False)
    return q, k, v, rstd, low, heads


def norm_qkv_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor, w: QKV, saved: Saved, wants: QKV
) -> tuple[Tensor, QKV]:
    """The block's gradient of x, given what the residual brings (dx), and those of the weights."""
    dq, dk = raw.rope(dq, dk, saved.cos, saved.sin, None, False, True)
    q_norm = k_norm = None
    if w.q_norm is not None and w.k_norm is not None:
        q, k, q_rstd, k_rstd = saved.heads
        dq, q_norm = w.q_norm.backward(dq, q, q_rstd, wants.q_norm)  # type: ignore[arg-type]
        dk, k_norm = w.k_norm.backward(dk, k, k_rstd, wants.k_norm)  # type: ignore[arg-type]
    grads = [dq.flatten(1), dk.flatten(1), dv.flatten(1)]
    if len(w.projections.layers) == 1:
        grads = [torch.cat(grads, dim=-1)]
    y, _ = w.norm.forward(saved.x)
    dy, projections = w.projections.backward(grads, y.to(dq.dtype), saved.qkv_low, wants.projections)
    dx, norm = w.norm.backward(dy, saved.x, saved.rstd, wants.norm, dx)
    return dx, QKV(norm, projections, q_norm, k_norm)


def output_norm_mlp(
    attended: Tensor, residual: Tensor, w: OutputMLP, wants_out: bool = True
) -> tuple[Tensor, SavedMLP]:
    """attended [T, H * K], residual [T, D] -> the block's output [T, D] (or none), and what to save."""
    (y,), output_low = w.output.forward(attended)
    y, output = _normed(y, w.after_attention)
    normed, s, s_rstd = w.norm.add_forward(y, residual)
    inner, gate_up, gate_up_low = w.gate_up.gated_forward(normed.to(attended.dtype), w.activation)
    if not wants_out and w.after_mlp is None:
        return s[:0], SavedMLP(output_low, output, s, s_rstd, gate_up, gate_up_low, w.down.low(inner), ())
    (y,), down_low = w.down.forward(inner)
    y, down = _normed(y, w.after_mlp)
    return s + y, SavedMLP(output_low, output, s, s_rstd, gate_up, gate_up_low, down_low, down)


def output_norm_mlp_backward(
    grad: Tensor, attended: Tensor, saved: SavedMLP, w: OutputMLP, wants: OutputMLP
) -> tuple[Tensor, Tensor, OutputMLP]:
    """Gradients of attended [T, H * K] and of the residual [T, D], and those of the weights."""
    dtype = attended.dtype
    dy, after_mlp = _normed_backward(grad.to(dtype), w.after_mlp, saved.down, wants.after_mlp)
    gate, up = gate_and_up(saved.gate_up)
    dinner, down = w.down.backward([dy], w.activation.forward(gate, up), saved.down_low, wants.down)
    grads: tuple[Tensor, ...] = w.activation.backward(dinner, gate, up)
    if len(w.gate_up.layers) == 1:
        grads = (torch.cat(grads, dim=-1),)
    normed, _ = w.norm.forward(saved.s)
    dnormed, gate_up = w.gate_up.backward(grads, normed.to(dtype), saved.gate_up_low, wants.gate_up)
    ds, norm = w.norm.backward(dnormed, saved.s, saved.s_rstd, wants.norm, grad.to(saved.s.dtype))
    dy, after_attention = _normed_backward(ds.to(dtype), w.after_attention, saved.output, wants.after_attention)
    dattended, output = w.output.backward([dy], attended, saved.output_low, wants.output)
    found = OutputMLP(output, norm, gate_up, Activation(None), down, after_attention, after_mlp)  # type: ignore
    return dattended, ds, found


def _widened(wants: OutputMLP) -> OutputMLP:
    """What is added up over parts of the rows is float32 until the last."""
    dtypes, spec = tree_flatten(wants)
    return tree_unflatten([d and torch.promote_types(d, torch.float32) for d in dtypes], spec)


def _joined(parts: list[tuple[Tensor, Tensor, OutputMLP]]) -> tuple[Tensor, Tensor, OutputMLP]:
    """The gradients of all rows: those of activations one after another, those of weights added up."""
    if len(parts) == 1:
        return parts[0]
    dattended, ds, found = zip(*parts, strict=True)
    added = [
        None if grads[0] is None else sum(grads) for grads in zip(*(tree_flatten(one)[0] for one in found), strict=True)
    ]
    return torch.cat(dattended), torch.cat(ds), tree_unflatten(added, tree_flatten(found[0])[1])


def _normed(y: Tensor, norm: Norm | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y through a norm that a family may have, and what to save for it."""
    if norm is None:
        return y, ()
    normed, rstd = norm.forward(y)
    return normed, (y, rstd)


def _normed_backward(
    grad: Tensor, norm: Norm | None, saved: tuple[Tensor, ...], wants: Norm | None
) -> tuple[Tensor, Norm | None]:
    if norm is None:
        return grad, None
    y, rstd = saved
    return norm.backward(grad, y, rstd, wants)  # type: ignore[arg-type]
