"""swiglu at the MLP width of SmolLM2-135M, 4 x 512 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import swiglu
from fastpt.ops._library import OPS
from fastpt.ops.swiglu import _forward, reference


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width = (8, 64) if toy else (2048, 1536)
    gate, up = (torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    shape = f"{tokens}x{width}"
    forward, backward = OPS["swiglu"].cost(gate, up), OPS["swiglu_backward"].cost(gate, gate, up)
    name = str(dtype).removeprefix("torch.")
    plain = gate.detach(), up.detach()
    yield Case(
        "swiglu",
        shape,
        name,
        "forward",
        {"fastpt": lambda: _forward(*plain), "eager": lambda: reference(*plain)},
        forward,
    )
    both = {"fastpt": forward_backward(swiglu, gate, up), "eager": forward_backward(reference, gate, up)}
    yield Case("swiglu", shape, name, "forward+backward", both, forward + backward)
