"""adamw over all tensors of SmolLM2-135M (full fine-tuning) and over rank-16 adapters of its 30 layers (LoRA).

Gradients are float32, as fastpt and mixed-precision training have them; "clipped" includes the norm of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case
from fastpt.ops import adamw, grad_norm
from fastpt.ops._library import OPS

SETTINGS = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)]
MODEL = [(49152, 576), *30 * LAYER, (576,)]
ADAPTERS = [shape for o, d in LAYER[:7] for shape in ((16, d), (o, 16))]
CLIP_NORM = 1.0


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    roundings = ["none"] if dtype == torch.float32 else ["masters", "stochastic"]
    works = {"full": [(7, 5), (3,)]} if toy else {"full": MODEL, "LoRA": 30 * ADAPTERS}
    for work, shapes in works.items():
        for rounding in roundings:
            for is_clipped in (False, True):
                lists = _lists(shapes, device, dtype)
                masters = [p.float() for p in lists[0]] if rounding == "masters" else None
                providers = {"fastpt": _ours(lists, masters, 0 if rounding == "stochastic" else None, is_clipped)}
                providers["torch fused"] = _torch(lists, is_clipped, fused=True)
                if not is_clipped:
                    providers["torch foreach"] = _torch(lists, is_clipped, foreach=True)
                said = [f"{work}: {len(shapes)} tensors", f"{sum(p.numel() for p in lists[0]) / 1e6:.1f}M"]
                said += [rounding] * (rounding != "none") + ["clipped"] * is_clipped
                cost = OPS["adamw_step"].cost(*lists, masters or [])
                if is_clipped:
                    cost = cost + OPS["grad_norm"].cost(lists[1])
                yield Case("adamw", ", ".join(said), name, "forward", providers, cost)


def _lists(shapes, device, dtype) -> tuple[list[Tensor], ...]:
    params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(3)]
    for grad in states[0]:
        grad.normal_()
    return params, *states, [torch.zeros((), device=device) for _ in params]


def _ours(lists, masters, seed, is_clipped: bool) -> Callable[[], None]:
    def step() -> None:
        scale = (CLIP_NORM / grad_norm(lists[1])).clamp(max=1.0) if is_clipped else None
        adamw(*lists, masters=masters, seed=seed, grad_scale=scale, **SETTINGS)

    return step


def _torch(lists, is_clipped: bool, **implementation) -> Callable[[], None]:
    """torch.optim.AdamW on float32 weights, copied to bfloat16 parameters: it has neither masters nor stochastic rounding."""
    targets = [p.float().clone() for p in lists[0]]
    optimizer = torch.optim.AdamW(targets, lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"], **implementation)
    params = [p.clone() for p in lists[0]] if lists[0][0].dtype != torch.float32 else []
    for target, grad in zip(targets, lists[1], strict=True):
        target.grad = grad.clone()  # clipping changes it

    def step() -> None:
        if is_clipped:
            torch.nn.utils.clip_grad_norm_(targets, CLIP_NORM)
        optimizer.step()
        if params:
            torch._foreach_copy_(params, targets)

    return step
