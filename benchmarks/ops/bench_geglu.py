"""geglu, exact and tanh, at an MLP width of 1536, 4 x 512 tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import geglu
from fastpt.ops._library import OPS
from fastpt.ops.geglu import reference


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width = (8, 64) if toy else (2048, 1536)
    gate, up = (torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    plain = gate.detach(), up.detach()
    for form in ("tanh", "none"):
        forward, backward = OPS["geglu"].cost(gate, up, form), OPS["geglu_backward"].cost(gate, gate, up, form)
        shape, name = f"{tokens}x{width} {form}", str(dtype).removeprefix("torch.")
        functions = {
            "fastpt": lambda g, u, form=form: geglu(g, u, approximate=form),
            "eager": lambda g, u, form=form: reference(g, u, form),
        }
        yield Case("geglu", shape, name, "forward", {n: lambda f=f: f(*plain) for n, f in functions.items()}, forward)
        both = {n: forward_backward(f, gate, up) for n, f in functions.items()}
        yield Case("geglu", shape, name, "forward+backward", both, forward + backward)
