"""lora_linear at the projections of SmolLM2-135M, rank 16, against PEFT's formula; bf16 x with adapters in both dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import lora_linear
from fastpt.ops._library import OPS
from fastpt.ops.lora_linear import _forward

SCALE = 2.0


def peft(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    low = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b) * SCALE
    return (F.linear(x, weight) + low).to(x.dtype)


def ours(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return lora_linear(x, weight, None, lora_a, lora_b, SCALE)


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    tokens, rank = (8, 4) if toy else (2048, 16)
    for width, out in ((64, 96),) if toy else ((576, 1536), (1536, 576), (576, 576)):
        x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(out, width, device=device, dtype=dtype) / width**0.5
        for adapter_dtype in dict.fromkeys((dtype, torch.float32)):
            options: dict = {"device": device, "dtype": adapter_dtype}
            lora_a = (torch.randn(rank, width, **options) / width**0.5).requires_grad_()
            lora_b = torch.randn(out, rank, **options).requires_grad_()
            yield _case(name, x, weight, lora_a, lora_b)


def _case(name: str, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Case:
    plain = [t.detach() for t in (x, weight, lora_a, lora_b)]
    y, xa = _forward(plain[0], plain[1], None, plain[2], plain[3], SCALE, 0.0, None)
    cost = OPS["lora_linear"].cost(plain[0], plain[1], None, plain[2], plain[3], SCALE, 0.0, None)
    cost += OPS["lora_linear_backward"].cost(y, *plain, xa, SCALE, 0.0, None, [True, False, False, True, True])
    peers: dict[str, Callable] = {"fastpt": ours, "peft": peft}
    providers = {peer: forward_backward(f, x, weight, lora_a, lora_b) for peer, f in peers.items()}
    adapters = str(lora_a.dtype).removeprefix("torch.")
    shape = f"{len(x)}x{x.shape[1]}x{len(weight)} rank {len(lora_a)}, {adapters} adapters"
    return Case("lora_linear", shape, name, "forward+backward", providers, cost)
