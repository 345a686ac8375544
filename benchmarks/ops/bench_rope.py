"""rope at the heads of SmolLM2-135M (9 query, 3 key, 64 wide), 4 x 512 tokens, tables as Hugging Face makes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import rope
from fastpt.ops._library import OPS
from fastpt.ops.rope import reference


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, query_heads, key_heads, width = (8, 3, 1, 16) if toy else (2048, 9, 3, 64)
    q, k = (
        torch.randn(tokens, heads, width, device=device, dtype=dtype).requires_grad_()
        for heads in (query_heads, key_heads)
    )
    cos, sin = (torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(2))
    plain = q.detach(), k.detach()
    for interleaved in (False, True):
        cost = OPS["rope"].cost(q, k, cos, sin, None)
        shape = f"{tokens}x({query_heads}+{key_heads})x{width}" + (" interleaved" if interleaved else "")
        name = str(dtype).removeprefix("torch.")
        functions = {
            "fastpt": lambda q, k, i=interleaved: rope(q, k, cos, sin, interleaved=i),
            "eager": lambda q, k, i=interleaved: reference(q, k, cos, sin, interleaved=i),
        }
        yield Case("rope", shape, name, "forward", {n: lambda f=f: f(*plain) for n, f in functions.items()}, cost)
        both = {n: forward_backward(f, q, k) for n, f in functions.items()}
        yield Case("rope", shape, name, "forward+backward", both, cost + cost)
