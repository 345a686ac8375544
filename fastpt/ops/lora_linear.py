"""lora_linear: linear layers of one input, each with or without its low-rank term, as one op.

The low-rank term is written first and the base GEMM accumulates onto it: no extra pass over the output, and one rounding
at the base's magnitude instead of two. In backward dx sums over all layers of the input before it is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._dropout import factors
from fastpt.ops._library import Cost, autocast, gradient_dtype, nbytes, register
from fastpt.ops.dora_norm import dora_norm


def _low_dtype(x: Tensor, lora_a: Tensor | None) -> torch.dtype:
    """Of the low-rank hidden: the wider of x's and the adapter's."""
    return torch.promote_types(x.dtype, torch.float32 if lora_a is None else lora_a.dtype)


def _mask(x: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies x [T, D] by."""
    return factors(len(x), x.shape[1], dropout_p, seed, x.device).to(x.dtype)


def _dropped(x: Tensor, dropout_p: float, seeds: Sequence[int], i: int) -> Tensor:
    return x if dropout_p == 0 else x * _mask(x, dropout_p, seeds[i])


def reference(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds) -> tuple[list[Tensor], list[Tensor]]:
    """y_i [..., O_i] and the low-rank hidden xa_i [T, R_i], which backward needs (empty without an adapter)."""
    flat = x.reshape(-1, x.shape[-1])  # [T, D]
    ys, xas = [], []
    for i, (weight, bias, a, b) in enumerate(zip(weights, biases, lora_a, lora_b, strict=True)):
        low = _low_dtype(x, a)
        if a is None:
            xas.append(x.new_empty(len(flat), 0, dtype=low))
            y = flat @ weight.to(x.dtype).t()
        else:
            xa = _dropped(flat.to(low), dropout_p, seeds, i) @ a.to(low).t()
            xas.append(xa)
            y = (scales[i] * (xa @ b.to(low).t())).to(x.dtype).addmm_(flat, weight.to(x.dtype).t())
        ys.append((y if bias is None else y + bias.to(x.dtype)).view(*x.shape[:-1], len(weight)))
    return ys, xas


def reference_backward(
    grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32=True
):
    """dx, and per layer dweight, dbias, da and db, sums in float32; what is not wanted is empty.

    Unless in_float32 they are rounded once to their tensors' dtypes, all but dbias.
    """
    flat = x.reshape(-1, x.shape[-1])
    dx, *arrays = _gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32)
    dx_sum = torch.zeros_like(flat, dtype=torch.promote_types(x.dtype, torch.float32))
    for i, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        dweight, dbias, da, db = (array[i] for array in arrays)
        dy, dtype = grads[i].reshape(len(flat), len(weight)), dx_sum.dtype
        dx_sum += (dy @ weight.to(dy.dtype)).to(dtype) if wants_x else 0
        if wants[4 * i]:
            dweight.copy_(dy.t() @ flat)
        if wants[4 * i + 1]:
            dbias.copy_(dy.sum(0, dtype=dtype))
        if a is None:
            continue
        low = xas[i].dtype
        dxa = scales[i] * (dy.to(low) @ b.to(low))
        if wants_x:
            dx_low = dxa @ a.to(low)
            dx_sum += dx_low if dropout_p == 0 else dx_low * _mask(flat.to(low), dropout_p, seeds[i])
        if wants[4 * i + 2]:
            da.copy_(dxa.t() @ _dropped(flat.to(low), dropout_p, seeds, i))
        if wants[4 * i + 3]:
            db.copy_(scales[i] * (dy.to(low).t() @ xas[i]))
    return dx.copy_(dx_sum.view(x.shape)) if wants_x else dx, *arrays


def _gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32) -> tuple[Any, ...]:
    """Where the gradients go: dx, then lists of dweight, dbias, da, db; empty when not wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def arrays(kind: int, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        found = []
        for i, tensor in enumerate(tensors):
            shape = (0,) if tensor is None or not wants[4 * i + kind] else tensor.shape[: 1 if kind == 1 else 2]
            is_wide = in_float32 or kind == 1 or tensor is None
            found.append(x.new_empty(shape, dtype=wide if is_wide else tensor.dtype))  # type: ignore[union-attr]
        return found

    dx = x.new_empty(x.shape if wants_x else (0,))
    return dx, *(arrays(kind, tensors) for kind, tensors in enumerate((weights, weights, lora_a, lora_b)))


def _fake(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds):
    tokens = x.numel() // max(1, x.shape[-1])
    ys = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    return ys, [x.new_empty(tokens, 0 if a is None else len(a), dtype=_low_dtype(x, a)) for a in lora_a]


def _fake_backward(grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32=True):
    return _gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32)


def reference_swiglu(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds):
    """h = silu(gate) * up of two layers, gate and up, and the low-rank hiddens; backward is that of the parts."""
    ys, xas = forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)
    return torch.ops.fastpt.swiglu(*ys), ys, xas


def _fake_swiglu(x, weights, *rest):
    ys, xas = _fake(x, weights, *rest)
    return torch.empty_like(ys[0]), ys, xas


def _cost_swiglu(x, weights, *rest):
    found = _cost(x, weights, *rest)
    tokens = x.numel() // max(1, x.shape[-1])
    return found + Cost(0, tokens * len(weights[0]) * x.element_size(), 0)


def _cost(x, weights, biases, lora_a, lora_b, *_):
    tokens = x.numel() // max(1, x.shape[-1])
    parameters = sum(t.numel() for t in (*weights, *lora_a, *lora_b) if t is not None)
    ys, xas = _fake(x, weights, biases, lora_a, lora_b, (), 0.0, ())
    return Cost(nbytes(x, *weights, *biases, *lora_a, *lora_b), nbytes(*ys, *xas), 2 * tokens * parameters)


def _cost_backward(grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32=True):
    tokens, products = x.numel() // max(1, x.shape[-1]), 0
    for i, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        _, _, wants_a, wants_b = wants[4 * i : 4 * i + 4]
        products += (wants_x + wants[4 * i]) * weight.numel()
        if a is not None:
            products += (wants_x + wants_a) * a.numel() + ((wants_x or wants_a) + wants_b) * b.numel()
    dx, *arrays = _gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32)
    written = nbytes(dx, *(t for array in arrays for t in array))
    return Cost(nbytes(*grads, x, *weights, *lora_a, *lora_b, *xas), written, 2 * tokens * products)


forward = register(
    "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, Tensor?[] lora_b, float[] scales, "
    "float dropout_p, int[] seeds) -> (Tensor[], Tensor[])",
    reference=reference,
    fake=_fake,
    cost=_cost,
    triton="fastpt.kernels.lora_linear:forward",
    workspace=_workspace.lora_linear,
)
backward = register(
    "lora_linear_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor?[] lora_a, Tensor?[] lora_b, Tensor[] xas, "
    "float[] scales, float dropout_p, int[] seeds, bool wants_x, bool[] wants, bool in_float32=True) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
    reference=reference_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    triton="fastpt.kernels.lora_linear:backward",
    workspace=_workspace.lora_linear_backward,
)


forward_swiglu = register(
    "lora_swiglu(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, Tensor?[] lora_b, float[] scales, "
    "float dropout_p, int[] seeds) -> (Tensor, Tensor[], Tensor[])",
    reference=reference_swiglu,
    fake=_fake_swiglu,
    cost=_cost_swiglu,
    triton="fastpt.kernels.lora_linear:swiglu_forward",
    workspace=_workspace.lora_swiglu,
)


class Layer(NamedTuple):
    """One linear layer: y = x weightᵀ + bias + scale · dropout(x) lora_aᵀ lora_bᵀ."""

    weight: Tensor  # [O, D]
    bias: Tensor | None = None  # [O]
    lora_a: Tensor | None = None  # [R, D]
    lora_b: Tensor | None = None  # [O, R]
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.lora_a, self.lora_b


def takes_float32(tensors: Sequence[Tensor | None]) -> bool:
    """Whether one of them takes its gradient wider than it is itself."""
    return any(t is not None and gradient_dtype(t) not in (None, t.dtype) for t in tensors)


def layer_gradients(grads: tuple, wants: Sequence[bool]) -> list[Tensor | None]:
    """The raw backward's lists in the order of the layers' tensors, None where not wanted."""
    lists = grads[1:]
    return [lists[i % 4][i // 4] if wanted else None for i, wanted in enumerate(wants)]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scales, dropout_p, seeds, *tensors):
        weights, biases, lora_a, lora_b = (tensors[i::4] for i in range(4))
        ys, xas = forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)
        ctx.save_for_backward(x, *weights, *lora_a, *lora_b, *xas)
        ctx.scalars, ctx.in_float32 = (scales, dropout_p, seeds), takes_float32(tensors)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        n = len(saved) // 4
        weights, lora_a, lora_b, xas = (saved[i * n : (i + 1) * n] for i in range(4))
        wants_x, wants = ctx.needs_input_grad[0], list(ctx.needs_input_grad[4:])
        found = backward(grads, x, weights, lora_a, lora_b, xas, *ctx.scalars, wants_x, wants, ctx.in_float32)
        return found[0] if wants_x else None, None, None, None, *layer_gradients(found, wants)


class _LoraSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scales, dropout_p, seeds, *tensors):
        weights, biases, lora_a, lora_b = (tensors[i::4] for i in range(4))
        h, ys, xas = forward_swiglu(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)
        ctx.save_for_backward(x, *weights, *lora_a, *lora_b, *xas, *ys)
        ctx.scalars, ctx.in_float32 = (scales, dropout_p, seeds), takes_float32(tensors)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *saved = ctx.saved_tensors
        weights, lora_a, lora_b, xas, ys = (saved[i : i + 2] for i in range(0, 10, 2))
        wants_x, wants = ctx.needs_input_grad[0], list(ctx.needs_input_grad[4:])
        grads = torch.ops.fastpt.swiglu_backward(grad, *ys)
        found = backward(grads, x, weights, lora_a, lora_b, xas, *ctx.scalars, wants_x, wants, ctx.in_float32)
        return found[0] if wants_x else None, None, None, None, *layer_gradients(found, wants)


def lora_swiglu(
    x: Tensor, gate: Layer, up: Layer, *, dropout_p: float = 0.0, seeds: Sequence[int] | None = None
) -> Tensor:
    """swiglu of two layers of one input; gate and up are saved, the activation is formed as they are.

    Shapes, dropout, numerics and errors as in linear_group; the activation is that of gate and up as rounded to x's dtype.
    """
    (x,) = autocast(x)
    for layer in (gate, up):
        _check(x, layer, dropout_p)
    seeds = new_seeds(dropout_p, 2) if seeds is None else list(seeds)
    return _LoraSwiglu.apply(x, [gate.scale, up.scale], dropout_p, seeds, *gate.tensors, *up.tensors)


def new_seeds(dropout_p: float, n: int) -> list[int]:
    """Seeds of n dropout masks from torch's generator; none without dropout."""
    return torch.randint(2**62, (n,)).tolist() if dropout_p > 0 else []


def linear_group(
    x: Tensor, layers: Sequence[Layer], *, dropout_p: float = 0.0, seeds: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """The layers of one input in one call: what they share (packing x, its gradient) is done once.

    Shapes: x [..., D], weight [O, D], bias [O], lora_a [R, D], lora_b [O, R] of each layer -> [..., O] each, x's dtype.
    Dropout touches the input of the low-rank terms only; each layer's mask is drawn from its seed (by default one from torch's
    generator) and drawn again in backward, never stored.
    Numerics: float32 weights beside bfloat16 activations enter rounded, float32 adapters unrounded; the gradients of weights,
    biases and adapters are sums in float32, rounded once where a parameter takes less.
    Raises: RuntimeError when shapes or dtypes do not fit.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    (x,) = autocast(x)
    for layer in layers:
        _check(x, layer, dropout_p)
    seeds = new_seeds(dropout_p, len(layers)) if seeds is None else list(seeds)
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return _LoraLinear.apply(x, [layer.scale for layer in layers], dropout_p, seeds, *tensors)


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

    Shapes, numerics and errors as in linear_group; magnitude [O].
    DoRA: magnitude / |weight + scale * lora_b @ lora_a| (the norm a constant in backward, as in PEFT) times the result
    without bias.
    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Liu et al. 2024, https://arxiv.org/abs/2402.09353.
    """
    (x,) = autocast(x)
    layer = Layer(weight, bias, lora_a, lora_b, scale)
    _check(x, layer, dropout_p)
    if magnitude is not None:
        layer = with_magnitude(layer, magnitude, x.dtype)
    return linear_group(x, [layer], dropout_p=dropout_p, seeds=None if seed is None else [seed])[0]


def with_magnitude(layer: Layer, magnitude: Tensor, dtype: torch.dtype) -> Layer:
    """A DoRA layer as LoRA with the rows of weight and lora_b scaled; autograd carries the gradient on to the magnitude."""
    weight, lora_b = layer.weight, layer.lora_b
    ratio = (magnitude / dora_norm(weight.to(dtype), layer.lora_a, lora_b, layer.scale))[:, None]  # type: ignore[arg-type]
    return layer._replace(weight=(ratio * weight.to(dtype)).to(dtype), lora_b=(ratio * lora_b).to(lora_b.dtype))  # type: ignore


def _check(x: Tensor, layer: Layer, dropout_p: float) -> None:
    weight, _, lora_a, lora_b, _ = layer
    has_adapter = lora_a is not None and lora_b is not None
    fits = weight.dim() == 2 and weight.shape[1:] == x.shape[-1:] and (lora_a is None) == (lora_b is None)
    if has_adapter:
        fits &= lora_a.shape[1:] == x.shape[-1:] and lora_b.shape == (len(weight), len(lora_a))  # type: ignore
        fits &= lora_a.dtype == lora_b.dtype  # type: ignore[union-attr]
    if not fits or weight.dtype not in (x.dtype, torch.float32):
        shapes = ", ".join(
            f"{name} {None if t is None else (*t.shape, t.dtype)}"
            for name, t in (("x", x), ("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b))
        )
        raise RuntimeError(
            f"lora_linear: got {shapes}; they must be [..., D], [O, D], [R, D] and [O, R], with a weight of x's dtype or "
            "float32, and lora_a and lora_b of one dtype"
        )
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"lora_linear: dropout_p is {dropout_p}; it must lie between 0 and 1")
