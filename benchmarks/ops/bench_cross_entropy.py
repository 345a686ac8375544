"""cross_entropy over logits that are there: with autograd, and with the gradient written while they are read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import cross_entropy, cross_entropy_and_gradient
from fastpt.ops._library import OPS
from fastpt.ops.cross_entropy import _forward


def eager(logits: Tensor, targets: Tensor) -> Tensor:
    """As Hugging Face models compute their loss."""
    return F.cross_entropy(logits.float(), targets)


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for tokens, classes in ((8, 128),) if toy else ((2048, 32000), (1024, 128256)):
        logits = torch.randn(tokens, classes, device=device, dtype=dtype)
        targets = torch.randint(classes, (tokens,), device=device)
        out, one = torch.empty_like(logits), torch.ones((), device=device)
        options = (targets, None, -100, None, 1.0, 0.0, 0.0, "mean")
        loss, *saved = _forward(logits, *options)
        forward = OPS["cross_entropy"].cost(logits, *options)
        backward = OPS["cross_entropy_backward"].cost(loss, *saved, logits, *options)
        both = {
            peer: forward_backward(f, logits.clone().requires_grad_(), targets)
            for peer, f in (("fastpt", cross_entropy), ("eager", eager))
        }

        def at_once(x: Tensor = logits, y: Tensor = targets, one: Tensor = one, out: Tensor = out) -> Tensor:
            return cross_entropy_and_gradient(x, y, one, out=out)

        providers = {"fastpt": both["fastpt"], "fastpt, gradient at once": at_once, "eager": both["eager"]}
        yield Case("cross_entropy", f"{tokens}x{classes}", name, "forward+backward", providers, forward + backward)
