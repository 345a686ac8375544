"""token_stats at the frozen head of SmolLM2-135M: log-probabilities and entropies of the targets, and their gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import token_stats
from fastpt.ops._library import OPS
from fastpt.ops.token_stats import _forward


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    stats = token_stats(hidden, weight, targets, kept=kept)
    return stats.logprob, stats.entropy


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.linear(hidden, weight).float().log_softmax(1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width, classes = (8, 64, 128) if toy else (2048, 576, 49152)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, width, device=device, dtype=dtype) / width**0.5
    targets, kept = torch.randint(classes, (tokens,), device=device), torch.arange(tokens, device=device)
    name, shape = str(dtype).removeprefix("torch."), f"{tokens}x{width}x{classes}"
    plain = hidden.detach(), weight, targets, kept
    head = (*plain, -100, None, None, None, None, None, 1.0)
    vectors = _forward(*head)
    forward = OPS["token_stats"].cost(*head)
    backward = OPS["token_stats_backward"].cost(
        *vectors[:5], vectors[0], vectors[1], *head, [True, False, False, False, False]
    )
    only_forward = {"fastpt": lambda: _forward(*head), "eager": lambda: eager(*plain)}
    yield Case("token_stats", shape, name, "forward", only_forward, forward)
    both = {
        peer: forward_backward(f, hidden, weight, targets, kept) for peer, f in (("fastpt", ours), ("eager", eager))
    }
    yield Case("token_stats", shape, name, "forward+backward", both, forward + backward)
