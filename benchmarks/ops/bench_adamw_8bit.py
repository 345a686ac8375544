"""adamw_8bit over all tensors of SmolLM2-135M beside the same step with float32 moments (torch's fused AdamW).

bitsandbytes is timed where it is installed: a step of its AdamW8bit on the same parameters and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.harness import Case
from benchmarks.ops.bench_adamw import MODEL, SETTINGS, _torch
from fastpt.ops import adamw_8bit
from fastpt.ops._library import OPS
from fastpt.ops.adamw_8bit import BLOCK


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    roundings = ["none"] if dtype == torch.float32 else ["masters", "stochastic"]
    shapes = [(7, 5), (300,)] if toy else MODEL
    for rounding in roundings:
        lists = _lists(shapes, device, dtype)
        masters = [p.float() for p in lists[0]] if rounding == "masters" else None
        seed = 0 if rounding == "stochastic" else None

        def step(lists=lists, masters=masters, seed=seed) -> None:
            adamw_8bit(*lists, masters=masters, seed=seed, **SETTINGS)

        wide = lists[0], lists[1], [], [], []
        providers = {"fastpt": step, "torch fused, float32 moments": _torch(wide, False, fused=True)}
        if find_spec("bitsandbytes"):
            providers["bitsandbytes"] = _bitsandbytes(lists)
        said = f"full: {len(shapes)} tensors, {sum(p.numel() for p in lists[0]) / 1e6:.1f}M"
        cost = OPS["adamw_8bit_step"].cost(*lists, masters or [])
        yield Case("adamw_8bit", said + f", {rounding}" * (rounding != "none"), name, "forward", providers, cost)


def _lists(shapes, device, dtype) -> tuple[list[Tensor], ...]:
    params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    codes = [[torch.zeros_like(p, dtype=torch.uint8) for p in params] for _ in range(2)]
    scales = [[torch.zeros(-(-p.numel() // BLOCK), device=device) for p in params] for _ in range(2)]
    return params, grads, *codes, *scales, [torch.zeros(()) for _ in params]


def _bitsandbytes(lists) -> Callable[[], None]:
    from bitsandbytes.optim import AdamW8bit

    targets = [torch.nn.Parameter(p.clone()) for p in lists[0]]
    optimizer = AdamW8bit(targets, lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"])
    for target, grad in zip(targets, lists[1], strict=True):
        target.grad = grad.to(target.dtype)
    return optimizer.step
