"""rms_norm and add_rms_norm at the width of SmolLM2-135M, 4 x 512 tokens, weight frozen (LoRA) and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import add_rms_norm, rms_norm
from fastpt.ops._library import OPS, gradient_dtype
from fastpt.ops.rms_norm import reference

EPS = 1e-5


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width = (8, 64) if toy else (2048, 576)
    x, residual = (torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    weight = torch.ones(width, device=device, dtype=dtype)
    rstd = torch.empty(tokens, device=device)
    settings = (EPS, 0.0, True)
    norms: dict[str, Callable] = {
        "fastpt": lambda x, w: rms_norm(x, w, EPS),
        "eager": lambda x, w: reference(x, w, EPS),
        "F.rms_norm": lambda x, w: torch.nn.functional.rms_norm(x, (width,), w, EPS),
    }
    sums: dict[str, Callable] = {
        "fastpt": lambda x, r, w: add_rms_norm(x, r, w, EPS),
        "eager": lambda x, r, w: (reference(s := x + r, w, EPS), s),
        "F.rms_norm": lambda x, r, w: (torch.nn.functional.rms_norm(s := x + r, (width,), w, EPS), s),
    }
    for op, functions, inputs in (("rms_norm", norms, [x]), ("add_rms_norm", sums, [x, residual])):
        forward = OPS[op].cost(*inputs, weight, *settings)
        plain = [v.detach() for v in inputs]
        yield _case(op, "", x, "forward", {k: _call(f, *plain, weight) for k, f in functions.items()}, forward)
        for name, w in (("frozen", weight), ("trained", weight.clone().requires_grad_())):
            backward = OPS["rms_norm_backward"].cost(
                x, x if op == "add_rms_norm" else None, x, rstd, weight, 0.0, gradient_dtype(w)
            )
            both = {k: forward_backward(f, *inputs, w) for k, f in functions.items()}
            yield _case(op, f" {name}", x, "forward+backward", both, forward + backward)


def _call(function: Callable, *inputs: Tensor) -> Callable:
    return lambda: function(*inputs)


def _case(op, suffix, x, direction, providers, cost) -> Case:
    shape = "x".join(map(str, x.shape)) + suffix
    return Case(op, shape, str(x.dtype).removeprefix("torch."), direction, providers, cost)
