"""linear_cross_entropy at the head of SmolLM2-135M: frozen as under LoRA, trained, and with prompts that are not targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import linear_cross_entropy
from fastpt.ops._library import OPS


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As Hugging Face models compute their loss."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_chunked() -> dict[str, Callable]:
    """torch's own chunked loss, from 2.13 on."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        return {}
    return {"torch chunked": lambda h, w, y: F.linear_cross_entropy(h, w, y, ignore_index=-100, options=options())}


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width, classes = (8, 64, 128) if toy else (2048, 576, 49152)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    name, shape = str(dtype).removeprefix("torch."), f"{tokens}x{width}x{classes}"
    for what, ignored, is_trained in (("frozen", 0, False), ("frozen, half kept", 2, False), ("trained", 0, True)):
        weight = (torch.randn(classes, width, device=device, dtype=dtype) / width**0.5).requires_grad_(is_trained)
        targets = torch.randint(classes, (tokens,), device=device)
        if ignored:
            targets[::ignored] = -100
        kept = (targets != -100).nonzero().squeeze(1)

        def ours(h: Tensor, w: Tensor, y: Tensor, kept: Tensor = kept) -> Tensor:
            return linear_cross_entropy(h, w, y, kept=kept)

        peers = {"fastpt": ours, "eager": eager, **torch_chunked()}
        head = (targets, kept, -100, None, None, None, None, None, 1.0, 0.0, 0.0, True)
        wants = [True, is_trained, False, False, False]
        cost = OPS["linear_cross_entropy"].cost(hidden.detach(), weight.detach(), *head, wants)
        providers = {peer: forward_backward(f, hidden, weight, targets) for peer, f in peers.items()}
        yield Case("linear_cross_entropy", f"{shape} {what}", name, "forward+backward", providers, cost)
