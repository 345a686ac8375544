"""grouped_linear: the linear layers of a mixture's experts, each over its own tokens, with or without LoRA (a grouped GEMM).

Tokens come sorted by expert; `offsets` says on the device where each expert's begin, so no count reaches the host. The
low-rank term never becomes a weight: PEFT's E [O, D] sums of W and B A are the cost of the usual way.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastpt.ops._library import Cost, autocast, gradient_dtype, nbytes, register


def _groups(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Expert, begin and end of those that have tokens."""
    ends = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(ends)) if a < b]


def reference(x, offsets, weight, lora_a, lora_b, scale) -> tuple[Tensor, Tensor]:
    """y [T, O] and the low-rank hidden xa [T, R], which backward needs (empty without adapters); no expert's rows are 0."""
    y, xa = _fake(x, offsets, weight, lora_a, lora_b, scale)
    last = 0
    for e, begin, end in _groups(offsets):
        rows, last = slice(begin, end), end
        if lora_a is None:
            torch.mm(x[rows], weight[e].t(), out=y[rows])
        else:
            torch.mm(x[rows], lora_a[e].t(), out=xa[rows])
            torch.mm(xa[rows], lora_b[e].t(), out=y[rows]).mul_(scale).addmm_(x[rows], weight[e].t())
    y[last:] = 0
    xa[last:] = 0
    return y, xa


def reference_backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32=True):
    """dx, and dweight, da, db in float32 or, rounded once, in x's dtype.

    What `wants` does not name is empty, that of an expert without tokens zero.
    """
    dx, dweight, da, db = found = _fake_backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32)
    groups, last, wide = _groups(offsets), 0, torch.promote_types(x.dtype, torch.float32)
    for e in set(range(len(weight))) - {e for e, *_ in groups}:
        for gradient in (gradient for gradient in found[1:] if gradient.numel() > 0):
            gradient[e] = 0
    for e, begin, end in groups:
        rows, last = slice(begin, end), end
        dy = grad[rows]
        dxa = dy.new_empty(len(dy), 0) if lora_b is None else dy @ lora_b[e]
        if wants[0]:
            torch.mm(dy, weight[e], out=dx[rows])
            if lora_a is not None:
                dx[rows].addmm_(dxa, lora_a[e], alpha=scale)
        if wants[1]:
            dweight[e] = dy.t() @ x[rows]
        if wants[2]:
            da[e] = scale * (dxa.t() @ x[rows]).to(wide)
        if wants[3]:
            db[e] = scale * (dy.t() @ xa[rows]).to(wide)
    dx[last:] = 0
    return found


def _fake(x, offsets, weight, lora_a, lora_b, scale):
    _check(x, offsets, weight, lora_a, lora_b)
    return x.new_empty(len(x), weight.shape[1]), x.new_empty(len(x), 0 if lora_a is None else lora_a.shape[1])


def _fake_backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32=True):
    wide = torch.promote_types(x.dtype, torch.float32) if in_float32 else x.dtype

    def new(wanted: bool, like: Tensor | None, dtype: torch.dtype) -> Tensor:
        return x.new_empty(like.shape if wanted and like is not None else (0,), dtype=dtype)

    return new(wants[0], x, x.dtype), *(
        new(wanted, like, wide) for wanted, like in zip(wants[1:], (weight, lora_a, lora_b), strict=True)
    )


def _check(x, offsets, weight, lora_a, lora_b) -> None:
    low = [] if lora_a is None or lora_b is None else [lora_a, lora_b]
    shapes = [list(t.shape) for t in (x, offsets, weight, *low)]
    is_right = x.dim() == 2 and weight.dim() == 3 and x.shape[1] == weight.shape[2]
    is_right &= offsets.dtype == torch.int32 and list(offsets.shape) == [len(weight) + 1]
    is_right &= (lora_a is None) == (lora_b is None) and all(t.dtype == x.dtype for t in (weight, *low))
    if is_right and low:
        experts, out, width = weight.shape
        is_right = lora_a.dim() == 3 and lora_a.shape[::2] == (experts, width)
        is_right = is_right and lora_b.shape == (experts, out, lora_a.shape[1])
    if not is_right:
        raise RuntimeError(
            f"grouped_linear: x, offsets, weight, lora_a, lora_b are {shapes}, offsets {offsets.dtype}; they must be [T, D], "
            "[E + 1] int32, [E, O, D], [E, R, D], [E, O, R] (the last two or neither) of one dtype"
        )


def _cost(x, offsets, weight, lora_a, lora_b, scale):
    per_expert = sum(t[0].numel() for t in (weight, lora_a, lora_b) if t is not None)
    return Cost(
        nbytes(x, offsets, weight, lora_a, lora_b),
        nbytes(*_fake(x, offsets, weight, lora_a, lora_b, scale)),
        2 * len(x) * per_expert,
    )


def _cost_backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32=True):
    products = (wants[0] + wants[1]) * weight[0].numel()
    if lora_a is not None:
        products += (wants[0] + wants[2]) * lora_a[0].numel()
        products += ((wants[0] or wants[2]) + wants[3]) * lora_b[0].numel()
    written = _fake_backward(grad, x, offsets, weight, lora_a, lora_b, xa, scale, wants, in_float32)
    read = [grad, offsets]
    read += [weight] if wants[0] else []
    read += [x] if wants[1] or wants[2] else []
    read += [] if lora_a is None else [lora_a, lora_b, xa]
    return Cost(nbytes(*read), nbytes(*written), 2 * len(x) * products)


forward = register(
    "grouped_linear(Tensor x, Tensor offsets, Tensor weight, Tensor? lora_a, Tensor? lora_b, float scale) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
    triton="fastpt.kernels.grouped_linear:forward",
)
backward = register(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor offsets, Tensor weight, Tensor? lora_a, Tensor? lora_b, "
    "Tensor xa, float scale, bool[] wants, bool in_float32=True) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cost=_cost_backward,
    triton="fastpt.kernels.grouped_linear:backward",
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, weight, lora_a, lora_b, scale):
        low_a, low_b = (t if t is None else t.to(x.dtype) for t in (lora_a, lora_b))
        y, xa = forward(x, offsets, weight, low_a, low_b, scale)
        ctx.save_for_backward(x, offsets, weight, low_a, low_b, xa)
        ctx.scale = scale
        ctx.in_float32 = any(gradient_dtype(t) not in (None, x.dtype) for t in (weight, lora_a, lora_b))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        wants = [needs[0], *needs[2:5]]
        dx, *rest = backward(grad, *ctx.saved_tensors, ctx.scale, wants, ctx.in_float32)
        dweight, da, db = (g if wanted else None for g, wanted in zip(rest, wants[1:], strict=True))
        return dx if wants[0] else None, None, dweight, da, db, None


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y_t = W_e x_t + scale B_e A_e x_t for the tokens t from offsets[e] to offsets[e + 1].

    Shapes: x [T, D], offsets [E + 1] int32 from 0 and ascending, weight [E, O, D], lora_a [E, R, D], lora_b [E, O, R]
    -> [T, O] in x's dtype. Rows from offsets[E] on are zero. Weights and adapters may be views of any strides.
    Numerics: float32 accumulation; adapters are rounded to x's dtype, as PEFT does for expert parameters; their gradients
    and the weight's are sums in float32, rounded once where all of them take x's dtype. Deterministic, no host sync on a GPU.
    Raises: RuntimeError when shapes or dtypes do not fit.
    """
    x, weight = autocast(x, weight)  # type: ignore[assignment]
    return _GroupedLinear.apply(x, offsets, weight, lora_a, lora_b, float(scale))


class _Dispatch(torch.autograd.Function):
    """Rows of x by expert; backward sums the k rows of a token in their order, where an index's would use atomics."""

    @staticmethod
    def forward(ctx, x, order, places):
        ctx.save_for_backward(places)
        return x[order // places.shape[1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return grad[places].sum(1), None, None


class _Combine(torch.autograd.Function):
    """out_t = sum over j of weights[t, j] y[places[t, j]], added up in float32."""

    @staticmethod
    def forward(ctx, y, weights, order, places):
        ctx.save_for_backward(y, weights, order, places)
        wide = torch.promote_types(y.dtype, torch.float32)
        out = y.new_zeros(len(weights), y.shape[1], dtype=wide)
        for j in range(weights.shape[1]):
            out += weights[:, j, None].to(wide) * y[places[:, j]]
        return out.to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, weights, order, places = ctx.saved_tensors
        dy = dweights = None
        if ctx.needs_input_grad[0]:
            dy = grad[order // places.shape[1]] * weights.flatten()[order, None].to(grad.dtype)
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(y.dtype, torch.float32)
            columns = [(grad.to(wide) * y[places[:, j]]).sum(1) for j in range(weights.shape[1])]
            dweights = torch.stack(columns, 1).to(weights.dtype)
        return dy, dweights, None, None


class Routing:
    """Which expert serves which token, sorted: what grouped_linear needs, without a host sync."""

    def __init__(self, experts: Tensor, count: int):
        """`experts` [T, k] are indices; those from `count` on are nobody's."""
        sorted_experts, self.order = torch.sort(experts.flatten(), stable=True)
        bounds = torch.arange(count + 1, device=experts.device, dtype=sorted_experts.dtype)
        self.expert_of_row = sorted_experts.clamp(max=count - 1)
        self.offsets = torch.searchsorted(sorted_experts, bounds, out_int32=True)
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        self.places = places.view(experts.shape)  # of token t's j-th expert among the rows

    def dispatch(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T k, D], sorted by expert."""
        return _Dispatch.apply(x, self.order, self.places)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """y [T k, D] sorted by expert, weights [T, k] -> [T, D]; each token's sum in one order, so deterministic."""
        return _Combine.apply(y, weights, self.order, self.places)
