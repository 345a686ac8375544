"""The projections of SmolLM2-135M, rank 16, against PEFT's formula and, without adapters, F.linear; both adapter dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import Layer, linear_group
from fastpt.ops._library import OPS
from fastpt.ops.lora_linear import forward

SCALE = 2.0
GROUPS = {"qkv": (576, (576, 192, 192)), "gate and up": (576, (1536, 1536)), "down": (1536, (576,))}


def peft(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    ys = []
    for weight, lora_a, lora_b in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True):
        low = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * SCALE
        ys.append((F.linear(x, weight) + low).to(x.dtype))
    return tuple(ys)


def ours(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    layers = [Layer(tensors[i], None, *tensors[i + 1 : i + 3], SCALE) for i in range(0, len(tensors), 3)]
    return linear_group(x, layers)


def plain(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def ours_plain(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return linear_group(x, [Layer(weight) for weight in weights])


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    tokens, rank = (8, 4) if toy else (2048, 16)
    for group, (width, outs) in {"toy": (64, (96, 32))}.items() if toy else GROUPS.items():
        x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
        weights = [torch.randn(out, width, device=device, dtype=dtype) / width**0.5 for out in outs]
        shape = f"{group} {tokens}x{width}x{'+'.join(map(str, outs))}"
        trained = [weight.clone().requires_grad_() for weight in weights]
        yield _case(f"{shape}, weights trained", name, {"fastpt": ours_plain, "F.linear": plain}, x, trained, 1)
        for adapter_dtype in dict.fromkeys((dtype, torch.float32)):
            options: dict = {"device": device, "dtype": adapter_dtype}
            tensors = []
            for weight in weights:
                lora_a = (torch.randn(rank, width, **options) / width**0.5).requires_grad_()
                tensors += [weight, lora_a, torch.randn(len(weight), rank, **options).requires_grad_()]
            adapters = str(adapter_dtype).removeprefix("torch.")
            peers = {"fastpt": ours, "peft": peft}
            yield _case(f"{shape}, rank {rank}, {adapters} adapters", name, peers, x, tensors, 3)


def _case(shape: str, name: str, peers: dict[str, Callable], x: Tensor, tensors: list[Tensor], step: int) -> Case:
    held = [t.detach() for t in tensors]
    weights, none = held[::step], [None] * (len(held) // step)
    adapters = (held[1::3], held[2::3]) if step == 3 else (none, none)
    rest: tuple = ([SCALE] * len(weights), 0.0, [])
    ys, xas = forward(x.detach(), weights, none, *adapters, *rest)
    cost = OPS["lora_linear"].cost(x.detach(), weights, none, *adapters, *rest)
    wants = [step == 1, False, step == 3, step == 3] * len(weights)
    cost += OPS["lora_linear_backward"].cost(ys, x.detach(), weights, *adapters, xas, *rest, True, wants)
    providers = {peer: forward_backward(f, x, *tensors) for peer, f in peers.items()}
    return Case("lora_linear", shape, name, "forward+backward", providers, cost)
