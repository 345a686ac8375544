"""What fused blocks are made of: norms and groups of linear layers, each with its backward, on the raw ops.

A piece is a NamedTuple of tensors and options, read from the modules on every call. Its gradient is a piece of the same
form, so a whole block can be flattened into the arguments of one autograd.Function and its gradients flattened alike. So is
`wants`, which holds the dtype that a tensor's gradient is to be stored in, or None where none is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpt.fusion.layout import Layout
from fastpt.fusion.tree import tree_flatten, tree_unflatten
from fastpt.ops import Layer, NF4Weight
from fastpt.ops._library import gradient_dtype
from fastpt.ops.nf4_linear import operands

raw = torch.ops.fastpt


class Norm(NamedTuple):
    """An RMS norm with its family's rounding."""

    weight: Tensor  # [D]
    eps: float
    offset: float
    casts_first: bool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x) in x's dtype, and 1 / rms(x) for backward."""
        return raw.rms_norm(x, self.weight, self.eps, self.offset, self.casts_first)

    def add_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(norm(s), s, 1 / rms(s)) of s = x + residual, in the wider of their dtypes."""
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return raw.add_rms_norm(x.to(dtype), residual.to(dtype), self.weight, self.eps, self.offset, self.casts_first)

    def backward(
        self, dy: Tensor, x: Tensor, rstd: Tensor, wants: Norm, grad_sum: Tensor | None = None
    ) -> tuple[Tensor, Norm]:
        """dx (plus grad_sum, another gradient of x) and the norm's own gradient."""
        dx, dweight = raw.rms_norm_backward(dy.to(x.dtype), grad_sum, x, rstd, self.weight, self.offset, wants.weight)
        return dx, Norm(dweight if wants.weight else None, None, None, None)  # type: ignore[arg-type]


class Linears(NamedTuple):
    """Linear layers of one input, with or without adapters."""

    layers: tuple[Layer, ...]
    dropout_p: float = 0.0
    seeds: tuple[int, ...] = ()

    @property
    def has_nf4(self) -> bool:
        """Whether a weight is 4-bit."""
        return any(isinstance(layer.weight, NF4Weight) for layer in self.layers)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs, and the low-rank hiddens that backward needs."""
        weights, *others = zip(*self.layers, strict=True)
        rest = *others, self.dropout_p, self.seeds
        if self.has_nf4:
            return raw.nf4_linear(x, *_operands(weights), *rest)
        return raw.lora_linear(x, weights, *rest)

    def gated_forward(self, x: Tensor, activation: Activation) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The activation of gate and up, these (in one tensor where one layer makes both), and the low-rank hiddens."""
        # A GPU forms it as the products are stored, but for 4-bit weights.
        if activation.name == "silu" and len(self.layers) == 2 and not self.has_nf4:
            return raw.lora_swiglu(x, *zip(*self.layers, strict=True), self.dropout_p, self.seeds)
        outputs, low = self.forward(x)
        return activation.forward(*gate_and_up(outputs)), outputs, low

    def low(self, x: Tensor) -> list[Tensor]:
        """The low-rank hiddens alone."""
        none = x.new_empty(0, x.shape[-1])
        without = [layer._replace(weight=none, bias=None) for layer in self.layers]
        layers = [one if one.lora_b is None else one._replace(lora_b=one.lora_b[:0]) for one in without]
        return Linears(tuple(layers), self.dropout_p, self.seeds).forward(x)[1]

    def backward(
        self, grads: Sequence[Tensor], x: Tensor, low: Sequence[Tensor], wants: Linears, wants_x: bool = True
    ) -> tuple[Tensor, Linears]:
        """dx (empty when not wanted) and the layers' gradients."""
        weights, _, lora_a, lora_b, scales = zip(*self.layers, strict=True)
        dtypes = [dtype for layer in wants.layers for dtype in layer[:4]]
        tensors = [tensor for layer in self.layers for tensor in layer[:4]]
        flags = [bool(dtype) for dtype in dtypes]
        in_float32 = any(dtype and dtype != tensor.dtype for dtype, tensor in zip(dtypes, tensors, strict=True))  # type: ignore
        rest = lora_a, lora_b, low, scales, self.dropout_p, self.seeds, wants_x, flags, in_float32
        if self.has_nf4:
            dx, *found = raw.nf4_linear_backward(grads, x, *_operands(weights), *rest)
        else:
            dx, *found = raw.lora_linear_backward(grads, x, weights, *rest)
        layers = tuple(
            Layer(*(found[kind][i] if flags[4 * i + kind] else None for kind in range(4)), None)  # type: ignore
            for i in range(len(self.layers))
        )
        return dx, Linears(layers, None, (None,) * len(self.seeds))  # type: ignore[arg-type]


def _operands(weights: Sequence[Any]) -> tuple[tuple, ...]:
    """Weights and the scales of 4-bit ones, as nf4_linear takes them."""
    return tuple(zip(*map(operands, weights), strict=True))


class Activation(NamedTuple):
    """A gated activation: one of ACTIVATIONS."""

    name: str

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.name == "silu":
            return raw.swiglu(gate, up)
        return raw.geglu(gate, up, APPROXIMATIONS[self.name])

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "silu":
            return raw.swiglu_backward(grad, gate, up)
        return raw.geglu_backward(grad, gate, up, APPROXIMATIONS[self.name])


def gate_and_up(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    return gate, up


class Heads(NamedTuple):
    """What attention saves: of a padded batch only the N real tokens; keys that sequences share are there once."""

    q: Tensor  # [N, H, K]
    k: Tensor  # [N, Hkv, K]
    v: Tensor
    out: Tensor  # [N, H, K]
    lse: Tensor  # [N, H]


class Attention(NamedTuple):
    """Attention over the flattened tokens of a layout."""

    layout: Layout
    scale: float
    softcap: float | None = None
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def _options(self) -> tuple:
        """The tail of the ops' arguments."""
        options = self.layout.causal, self.layout.window, self.softcap, self.scale
        return options if self.dropout_p == 0 else (*options, self.dropout_p, self.seed)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Heads]:
        """[T, H, K], zero at queries left out, and what to save."""
        queries, keys, cu_seqlens_q, cu_seqlens_k = self.layout.spans
        tokens = q.shape[0]
        seen = [t if keys is None else t.index_select(0, keys) for t in (k, v)]
        q = q if queries is None else q.index_select(0, queries)
        op = raw.attention_dropout if self.dropout_p > 0 else raw.attention
        out, lse = op(q, *seen, cu_seqlens_q, cu_seqlens_k, *self._options)
        k, v = seen if self.layout.keys is None else (k, v)
        return scattered(out, queries, tokens), Heads(q, k, v, out, lse)

    def again(self, saved: Heads, tokens: int) -> Tensor:
        """What forward gave, from what was saved."""
        return scattered(saved.out, self.layout.spans.queries, tokens)

    def backward(self, grad: Tensor, saved: Heads) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, cu_seqlens_q, cu_seqlens_k = self.layout.spans
        tokens = grad.shape[0]
        grad = grad if queries is None else grad.index_select(0, queries)
        if (shared := self.layout.keys) is not None:
            saved = saved._replace(k=saved.k.index_select(0, shared), v=saved.v.index_select(0, shared))
        op = raw.attention_dropout_backward if self.dropout_p > 0 else raw.attention_backward
        dq, dk, dv = op(grad, *saved, cu_seqlens_q, cu_seqlens_k, *self._options)
        if shared is not None:
            return dq, summed(dk, shared, tokens), summed(dv, shared, tokens)
        return scattered(dq, queries, tokens), scattered(dk, keys, tokens), scattered(dv, keys, tokens)


def scattered(x: Tensor, index: Tensor | None, tokens: int) -> Tensor:
    """Rows of x at `index` of so many tokens, the others zero."""
    return x if index is None else x.new_zeros(tokens, *x.shape[1:]).index_copy_(0, index, x)


def summed(x: Tensor, index: Tensor, tokens: int) -> Tensor:
    """The same where rows share an index: their sum in float32, in one order and without atomics, rounded once."""
    return raw.embedding_backward(x.flatten(1), index, tokens, -1, x.dtype).view(tokens, *x.shape[1:])


APPROXIMATIONS = {"gelu_tanh": "tanh", "gelu": "none"}


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of matrix products on activations of `dtype`: autocast's where it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def keep(ctx: Any, saved: Any, weights: Sequence[Any], spec: Any) -> None:
    """Save for backward a tree of tensors and the leaves of a block's pieces, of which only tensors go through autograd."""
    tensors, ctx.saved_spec = tree_flatten(saved)
    ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in weights]
    ctx.others = [leaf for leaf in weights if not isinstance(leaf, Tensor)]
    ctx.spec, ctx.count = spec, len(tensors)
    ctx.dtypes = [gradient_dtype(leaf) if isinstance(leaf, Tensor) else None for leaf in weights]
    ctx.save_for_backward(*tensors, *(leaf for leaf in weights if isinstance(leaf, Tensor)))


def kept(ctx: Any) -> tuple[Any, Any, Any]:
    """The saved tree, the block's pieces and what they want; the pieces' leaves are the last inputs of the Function."""
    tensors = ctx.saved_tensors  # once: checkpointing unpacks each time
    weights, others = iter(tensors[ctx.count :]), iter(ctx.others)
    pieces = tree_unflatten([next(weights if is_one else others) for is_one in ctx.is_tensor], ctx.spec)
    needed = ctx.needs_input_grad[-len(ctx.dtypes) :]
    wants = [dtype if is_needed else None for dtype, is_needed in zip(ctx.dtypes, needed, strict=True)]
    return tree_unflatten(list(tensors[: ctx.count]), ctx.saved_spec), pieces, tree_unflatten(wants, ctx.spec)
