"""linear_divergence of SmolLM2-135M's head against a teacher of twice its width; eager holds both logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness import Case, forward_backward
from fastpt.ops import TeacherHead, linear_divergence
from fastpt.ops._library import OPS


def eager(hidden, weight, teacher, kept):
    log_s = (hidden @ weight.t())[kept].float().log_softmax(-1)
    log_t = (teacher.hidden @ teacher.weight.t())[kept].float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True)


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    tokens, width, vocab = (8, 16, 40) if toy else (1024, 576, 49152)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, device=device, dtype=dtype) / width**0.5
    teacher = TeacherHead(
        torch.randn(tokens, 2 * width, device=device, dtype=dtype),
        torch.randn(vocab, 2 * width, device=device, dtype=dtype) / width**0.5,
    )
    kept = torch.arange(tokens, device=device)
    functions = {"fastpt": linear_divergence, "eager": eager}
    calls = {
        name: forward_backward(partial(function, weight=weight, teacher=teacher, kept=kept), hidden)
        for name, function in functions.items()
    }
    wants = [True, False, False, False, False]
    cost = OPS["linear_divergence"].cost(
        hidden, weight, None, None, None, None, 1.0, *teacher[:2], None, None, 1.0, kept, None, 0.0, 1.0, wants
    )
    yield Case("linear_divergence", f"{tokens}x{width}x{vocab}", str(dtype).removeprefix("torch."), "both", calls, cost)
