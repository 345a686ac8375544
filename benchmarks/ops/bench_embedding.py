"""embedding of SmolLM2-135M trained: 4 x 512 tokens, a fresh gradient each call, as after zero_grad(set_to_none=True).

"then read" also has the gradient's norm taken, which reads the whole of it, as clipping and the optimizer do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case
from fastpt.ops import embedding, grad_norm
from fastpt.ops._library import OPS


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, rows, width = (8, 100, 64) if toy else (2048, 49152, 576)
    weight = torch.randn(rows, width, device=device, dtype=dtype)
    weight.requires_grad_().grad_dtype = torch.float32
    ids = (torch.rand(tokens, device=device) ** 4 * rows).long()  # crowded at the low end, as the ids of language are
    grad = torch.randn(tokens, width, device=device, dtype=dtype)
    cost = OPS["embedding"].cost(ids, weight) + OPS["embedding_backward"].cost(grad, ids, rows, -1, dtype)
    for is_read in (False, True):
        providers = {
            "fastpt": _step(embedding, weight, ids, grad, is_read),
            "F.embedding": _step(F.embedding, weight, ids, grad, is_read),
        }
        shape = f"{tokens} of {rows}x{width}" + (", then read" if is_read else "")
        yield Case("embedding", shape, str(dtype).removeprefix("torch."), "forward+backward", providers, cost)


def _step(function: Callable, weight: Tensor, ids: Tensor, grad: Tensor, is_read: bool) -> Callable[[], Tensor]:
    def step() -> Tensor:
        (dweight,) = torch.autograd.grad(function(ids, weight), weight, grad)
        return grad_norm([dweight]) if is_read else dweight

    return step
