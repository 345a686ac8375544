"""layer_norm and add_layer_norm at the width of MiniLM-L6 and GPT-2, 4 x 512 tokens, parameters trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, forward_backward
from fastpt.ops import add_layer_norm, layer_norm
from fastpt.ops._library import OPS, Cost
from fastpt.ops.layer_norm import reference

EPS = 1e-5


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, widths = (8, [64]) if toy else (2048, [384, 768])
    for width in widths:
        x, residual, weight, bias = (
            torch.randn(shape, device=device, dtype=dtype).requires_grad_()
            for shape in ((tokens, width), (tokens, width), width, width)
        )
        numbers = torch.empty(tokens, device=device)
        norms: dict[str, Callable] = {
            "fastpt": lambda x, w, b: layer_norm(x, w, b, EPS),
            "eager": lambda x, w, b: reference(x, w, b, EPS),
        }
        forward = OPS["layer_norm"].cost(x, weight, bias, EPS)
        backward = OPS["layer_norm_backward"].cost(x, x, numbers, numbers, weight, weight.dtype, weight.dtype)
        yield from _pair("layer_norm", "", norms, (x, weight, bias), forward, backward)
        for name, p in (("", 0.0), (" dropout", 0.1)):
            sums: dict[str, Callable] = {
                "fastpt": lambda x, r, w, b, p=p: add_layer_norm(x, r, w, b, EPS, dropout_p=p, seed=1)[0],
                "eager": lambda x, r, w, b, p=p: reference((F.dropout(x, p) if p else x) + r, w, b, EPS),
            }
            forward = OPS["add_layer_norm"].cost(x, residual, weight, bias, EPS, p, 1)
            backward = OPS["add_layer_norm_backward"].cost(
                x, None, x, numbers, numbers, weight, dtype, p, 1, weight.dtype, weight.dtype
            )
            yield from _pair("add_layer_norm", name, sums, (x, residual, weight, bias), forward, backward)


def _pair(
    op: str, suffix: str, functions: dict[str, Callable], inputs: tuple[Tensor, ...], forward: Cost, backward: Cost
) -> Iterator[Case]:
    shape, dtype = "x".join(map(str, inputs[0].shape)) + suffix, str(inputs[0].dtype).removeprefix("torch.")
    plain = [v.detach() for v in inputs]
    one = {name: lambda f=f: f(*plain) for name, f in functions.items()}
    yield Case(op, shape, dtype, "forward", one, forward)
    both = {name: forward_backward(f, *inputs) for name, f in functions.items()}
    yield Case(op, shape, dtype, "forward+backward", both, forward + backward)
