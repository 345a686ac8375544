"""layer_norm at the width of MiniLM-L6 and GPT-2, 4 x 512 tokens, parameters trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import layer_norm
from fastpt.ops._library import OPS
from fastpt.ops.layer_norm import reference

EPS = 1e-5


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, widths = (8, [64]) if toy else (2048, [384, 768])
    for width in widths:
        x, weight, bias = (
            torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in ((tokens, width), width, width)
        )
        numbers = torch.empty(tokens, device=device)
        forward = OPS["layer_norm"].cost(x, weight, bias, EPS)
        backward = OPS["layer_norm_backward"].cost(x, x, numbers, numbers, weight, True, True)
        plain = [v.detach() for v in (x, weight, bias)]
        shape, name = f"{tokens}x{width}", str(dtype).removeprefix("torch.")
        one = {
            "fastpt": lambda plain=plain: layer_norm(*plain, EPS),
            "eager": lambda plain=plain: reference(*plain, EPS),
        }
        yield Case("layer_norm", shape, name, "forward", one, forward)
        both = {
            "fastpt": forward_backward(lambda *i: layer_norm(*i, EPS), x, weight, bias),
            "eager": forward_backward(lambda *i: reference(*i, EPS), x, weight, bias),
        }
        yield Case("layer_norm", shape, name, "forward+backward", both, forward + backward)
