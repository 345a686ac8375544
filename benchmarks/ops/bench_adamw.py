"""adamw over a model's list of tensors: 4 layers of SmolLM2-135M (full) and 30 layers of rank-16 adapters (LoRA)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case
from fastpt.ops import adamw
from fastpt.ops._library import OPS

SETTINGS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
ADAPTERS = [shape for o, d in LAYER[:7] for shape in ((16, d), (o, 16))]


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    works = {"full": [(7, 5), (3,)]} if toy else {"full": 4 * LAYER, "LoRA": 30 * ADAPTERS}
    for work, shapes in works.items():
        lists = _lists(shapes, device, dtype)
        masters = [p.float() for p in lists[0]] if dtype == torch.bfloat16 else None
        providers = {"fastpt": lambda lists=lists, m=masters: adamw(*lists, masters=m, **SETTINGS)}
        providers["torch fused"] = _torch(lists, masters, fused=True)
        providers["torch foreach"] = _torch(lists, masters, foreach=True)
        values = sum(p.numel() for p in lists[0])
        shape = f"{work}: {len(shapes)} tensors, {values / 1e6:.1f}M" + (" + masters" if masters else "")
        cost = OPS["adamw_step"].cost(*lists, masters or [])
        yield Case("adamw", shape, name, "forward", providers, cost)


def _lists(shapes, device, dtype) -> tuple[list[Tensor], ...]:
    params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    grads = [torch.randn_like(p) for p in params]
    states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    return params, grads, *states, [torch.zeros((), device=device) for _ in params]


def _torch(lists, masters, **implementation):
    """torch.optim.AdamW on the same work: with masters it needs the gradients cast up and the result cast down."""
    targets = [p.clone() for p in masters or lists[0]]
    optimizer = torch.optim.AdamW(targets, lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"], **implementation)
    params = [p.clone() for p in lists[0]]

    def step() -> None:
        for target, grad in zip(targets, lists[1], strict=True):
            target.grad = grad.to(target.dtype)
        optimizer.step()
        if masters:
            torch._foreach_copy_(params, targets)

    return step
