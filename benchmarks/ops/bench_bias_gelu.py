"""bias_gelu, exact and tanh, at the MLP width of MiniLM-L6 and BERT-base's, 4 x 512 tokens, bias trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import bias_gelu
from fastpt.ops._library import OPS
from fastpt.ops.bias_gelu import reference


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, widths = (8, [64]) if toy else (2048, [1536, 3072])
    for width in widths:
        x, bias = (torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in ((tokens, width), width))
        plain = x.detach(), bias.detach()
        for form in ("none", "tanh"):
            forward = OPS["bias_gelu"].cost(x, bias, form)
            backward = OPS["bias_gelu_backward"].cost(x, x, bias, form, bias.dtype)
            shape, name = f"{tokens}x{width} {form}", str(dtype).removeprefix("torch.")
            functions = {
                "fastpt": lambda x, b, form=form: bias_gelu(x, b, approximate=form),
                "eager": lambda x, b, form=form: reference(x, b, form),
            }
            one = {n: lambda f=f, plain=plain: f(*plain) for n, f in functions.items()}
            yield Case("bias_gelu", shape, name, "forward", one, forward)
            both = {n: forward_backward(f, x, bias) for n, f in functions.items()}
            yield Case("bias_gelu", shape, name, "forward+backward", both, forward + backward)
