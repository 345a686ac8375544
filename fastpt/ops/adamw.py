"""adamw: one in-place AdamW step of many tensors in one pass; arithmetic in csrc/common/adamw.h and below."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The definition: torch.optim.AdamW's update in float32, rounded once where the parameter is stored."""
    for i, (param, m, v, step) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        grad = grads[i].to(m.dtype)
        if grad_scale is not None:
            grad = grad * grad_scale.to(m.dtype)
        step.add_(1)
        # In float64: 1 - beta2^t cancels, and at t = 1 float32 would keep 4 digits of it.
        correction1, correction2 = (1 - beta ** step.double() for beta in (beta1, beta2))
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (v.sqrt() / correction2.sqrt().to(v.dtype)).add_(eps)
        master = masters[i] if masters else param.to(m.dtype)
        master.sub_(lr * weight_decay * master + (lr / correction1).to(m.dtype) * m / denominator)
        param.copy_(master)


def _cost(params, grads, exp_avgs, exp_avg_sqs, steps, masters, *_) -> Cost:
    states = nbytes(*exp_avgs, *exp_avg_sqs, *masters)
    read = states + nbytes(*grads) + (0 if masters else nbytes(*params))
    return Cost(read, states + nbytes(*params), 15 * sum(p.numel() for p in params))


_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] masters, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
    reference=reference,
    fake=lambda *_: None,
    cost=_cost,
)


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
) -> None:
    """One step of torch.optim.AdamW on all the tensors, in place; each `steps[i]` is counted up first.

    `grad_scale` (clipping, unscaling) multiplies every gradient on the fly; `grads` are left as they were. With
    `masters` the float32 masters are updated and the parameters become their rounded copies.

    Shapes: equal-length lists, entry i of equal shape in all of them, steps float32 [], grad_scale float32 [].
    Numerics: params and grads float32 or bfloat16, states and masters float32; float32 inside, one rounding.
    Raises: RuntimeError when lists or shapes disagree.
    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    _step(params, grads, exp_avgs, exp_avg_sqs, steps, masters or [], grad_scale, lr, beta1, beta2, eps, weight_decay)
    if not torch.compiler.is_compiling():  # a raw op does not count versions, which autograd checks saved weights by
        torch.autograd.graph.increment_version(params)
