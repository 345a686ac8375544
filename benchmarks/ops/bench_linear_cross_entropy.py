"""linear_cross_entropy at the head of SmolLM2-135M: frozen as under LoRA, trained, and with prompts that are not targets.

A trained head's gradient comes in the dtype that each provider makes it in: fastpt's is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

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


def trl_fused() -> dict[str, Callable]:
    """The log-probabilities that TRL's fused head gives its trainers, where TRL (1.16 or newer) is installed."""
    if find_spec("trl") is None or find_spec("trl.kernels") is None:
        return {}
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CLASSES

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        kept = y != -100
        h, y = (h[kept], y[kept]) if h.is_cuda else (h, y.clamp(min=0))  # as add_fused_lm_head does
        logprobs = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, CLASSES, None, 1.0, ("log_probs",))[0]
        return -(logprobs if h.is_cuda else logprobs.masked_fill(~kept, 0)).sum() / kept.sum()

    return {"TRL fused head": loss}


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

        peers = {"fastpt": ours, "eager": eager, **torch_chunked(), **trl_fused()}
        head = (targets, kept, -100, None, None, None, None, None, 1.0, 0.0, 0.0, True)
        wants = [True, is_trained, False, False, False]
        cost = OPS["linear_cross_entropy"].cost(hidden.detach(), weight.detach(), *head, wants)
        wide = weight.detach().requires_grad_(is_trained)
        wide.grad_dtype = torch.float32  # takes the gradient as it is made
        providers = {
            peer: forward_backward(f, hidden, wide if peer == "fastpt" else weight, targets)
            for peer, f in peers.items()
        }
        yield Case("linear_cross_entropy", f"{shape} {what}", name, "forward+backward", providers, cost)
