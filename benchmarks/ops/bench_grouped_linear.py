"""grouped_linear as a mixture's experts use it: both layers of Qwen3-30B-A3B's experts at an eighth of its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import grouped_linear, swiglu
from fastpt.ops._library import OPS, Cost
from fastpt.ops.grouped_linear import Routing

SCALE, ACTIVE = 2.0, 4


def ours(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *adapters: Tensor) -> Tensor:
    routing = Routing(indices, len(gate_up))
    first, last = ((*adapters[:2], SCALE), (*adapters[2:], SCALE)) if adapters else ((), ())
    hidden = grouped_linear(routing.dispatch(x), routing.offsets, gate_up, *first)
    y = grouped_linear(swiglu(*hidden.chunk(2, -1)), routing.offsets, down, *last)
    return routing.combine(y, weights)


def added(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's way."""
    return torch.baddbmm(weight, b, a, alpha=SCALE)


def eager(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *adapters: Tensor) -> Tensor:
    """transformers' loop over the experts that are hit."""
    if adapters:
        gate_up, down = added(gate_up, *adapters[:2]), added(down, *adapters[2:])
    out = torch.zeros_like(x)
    for e in indices.unique().tolist():
        token, place = torch.where(indices == e)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[e]) * weights[token, place, None]
        out = out.index_add(0, token, y)
    return out


def grouped_mm(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *adapters: Tensor) -> Tensor:
    """transformers' default: torch's grouped product."""
    if adapters:
        gate_up, down = added(gate_up, *adapters[:2]), added(down, *adapters[2:])
    routing = Routing(indices, len(gate_up))
    rows, ends = x[routing.order // indices.shape[1]], routing.offsets[1:]
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * weights.flatten()[routing.order, None]
    return y[routing.places].sum(1)


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, experts, width, inner, rank = (16, 4, 32, 16, 4) if toy else (512, 16, 512, 192, 16)
    options: dict = {"device": device, "dtype": dtype}
    x = torch.randn(tokens, width, **options).requires_grad_()
    indices = torch.rand(tokens, experts, device=device).topk(min(ACTIVE, experts)).indices
    weights = torch.rand(indices.shape, **options).requires_grad_()
    stacks = [torch.randn(experts, 2 * inner, width, **options) / width**0.5]
    stacks.append(torch.randn(experts, width, inner, **options) / inner**0.5)
    adapters = [
        torch.randn(shape, **options).mul_(0.1).requires_grad_()
        for stack in stacks
        for shape in ((experts, rank, stack.shape[2]), (experts, stack.shape[1], rank))
    ]
    shape = f"{tokens}x{width}, {indices.shape[1]} of {experts} experts of {inner}"
    name = str(dtype).removeprefix("torch.")
    peers: dict[str, Callable] = {"fastpt": ours, "eager": eager, "grouped_mm": grouped_mm}
    for what, tensors in (
        (f"rank {rank}", [*stacks, *adapters]),
        ("trained", [stack.clone().requires_grad_() for stack in stacks]),
    ):
        timed = {peer: forward_backward(f, x, indices, weights, *tensors) for peer, f in peers.items()}
        yield Case("grouped_linear", f"{shape}, {what}", name, "forward+backward", timed, _cost(indices, *tensors))


def _cost(indices: Tensor, gate_up: Tensor, down: Tensor, *adapters: Tensor) -> Cost:
    """Of the four calls of the op."""
    rows, offsets, total = indices.numel(), indices.new_empty(len(gate_up) + 1, dtype=torch.int32), Cost(0, 0, 0)
    for weight, low in ((gate_up, adapters[:2]), (down, adapters[2:])):
        a, b = low or (None, None)
        x, y = (weight.new_empty(rows, size, device="meta") for size in (weight.shape[2], weight.shape[1]))
        xa = weight.new_empty(rows, 0 if a is None else a.shape[1])
        total += OPS["grouped_linear"].cost(x, offsets, weight, a, b, SCALE)
        wants = [True, a is None, a is not None, a is not None]
        total += OPS["grouped_linear_backward"].cost(y, x, offsets, weight, a, b, xa, SCALE, wants)
    return total
