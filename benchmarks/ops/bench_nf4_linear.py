"""The projections of SmolLM2-135M on NF4 bases, rank 16, against bitsandbytes under PEFT's formula and the bfloat16 base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness import Case, forward_backward
from benchmarks.ops.bench_lora_linear import GROUPS, SCALE
from fastpt.ops import Layer, linear_group, nf4_linear, nf4_quantize
from fastpt.ops._library import OPS
from fastpt.ops.nf4_linear import forward, operands


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    tokens, rank = (8, 4) if toy else (2048, 16)
    for group, (width, outs) in {"toy": (64, (96, 32))}.items() if toy else GROUPS.items():
        x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
        whole = [torch.randn(out, width, device=device, dtype=dtype) / width**0.5 for out in outs]
        weights = [nf4_quantize(weight) for weight in whole]
        shapes = [shape for out in outs for shape in ((rank, width), (out, rank))]
        adapters = [(torch.randn(shape, device=device) / width**0.5).requires_grad_() for shape in shapes]
        providers = {"fastpt": _ours(nf4_linear, weights)}
        if find_spec("bitsandbytes") is not None:
            providers["bitsandbytes + peft"] = _theirs(whole)
        providers["fastpt, base not quantised"] = _ours(linear_group, whole)
        runs = {peer: forward_backward(function, x, *adapters) for peer, function in providers.items()}
        shape = f"{group} {tokens}x{width}x{'+'.join(map(str, outs))}, rank {rank}"
        yield Case("nf4_linear", shape, name, "forward+backward", runs, _cost(x, weights, adapters))


def _ours(op: Callable, weights: list) -> Callable:
    def run(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        return op(x, [Layer(w, None, *adapters[2 * i : 2 * i + 2], SCALE) for i, w in enumerate(weights)])

    return run


def _theirs(weights: list[Tensor]) -> Callable:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    packed = [quantize_4bit(weight, quant_type="nf4", compress_statistics=True) for weight in weights]

    def run(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        ys = []
        for (weight, state), a, b in zip(packed, adapters[::2], adapters[1::2], strict=True):
            low = linear(linear(x.to(a.dtype), a), b) * SCALE
            ys.append((matmul_4bit(x, weight, state) + low).to(x.dtype))
        return tuple(ys)

    return run


def _cost(x: Tensor, weights: list, adapters: list[Tensor]):
    held, none = x.detach(), [None] * len(weights)
    stored = tuple(zip(*(operands(weight) for weight in weights), strict=True))
    low = [t.detach() for t in adapters[::2]], [t.detach() for t in adapters[1::2]]
    rest: tuple = ([SCALE] * len(weights), 0.0, [])
    ys, xas = forward(held, *stored, none, *low, *rest)
    cost = OPS["nf4_linear"].cost(held, *stored, none, *low, *rest)
    wants = [False, False, True, True] * len(weights)
    return cost + OPS["nf4_linear_backward"].cost(ys, held, *stored, *low, xas, *rest, True, wants)
