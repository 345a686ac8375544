"""adamw: one in-place AdamW step of many tensors in one pass; grad_norm: the norm that clipping needs, in another.

Arithmetic in csrc/common/adamw.h, csrc/common/stochastic_rounding.h and below.
"""

from __future__ import annotations

import math
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
    seed: int | None,
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
        if seed is not None and param.dtype == torch.bfloat16:
            master = round_stochastically(master, random_bits(master.shape, seed, int(step), i, device=param.device))
        param.copy_(master)


def _mix64(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2714064.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def random_bits(shape: Sequence[int], seed: int, step: int, tensor: int, *, device: torch.device | str) -> Tensor:
    """32 random bits, as int64, for each value of the tensor-th tensor in a step; a function of its arguments alone."""
    key = _mix64(_mix64(_mix64(seed % 2**64) ^ step) ^ tensor)
    key0, key1 = key % 2**32, key >> 32
    index = torch.arange(math.prod(shape), device=device)
    x = ((index % 2**32 ^ key0) + (index >> 32) * 0x9E3779B9) % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15 ^ key1) * 0x735A2D97 % 2**32
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    return (x ^ x >> 15).view(shape)


def round_stochastically(values: Tensor, random: Tensor) -> Tensor:
    """float32 values to one of their two bfloat16 neighbours, each with the probability of its nearness; inf and NaN stay."""
    bits = values.view(torch.int32) + (random % 2**16).to(torch.int32)
    return torch.where(values.isfinite(), (bits & -0x10000).view(torch.float32), values)


def grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The definition of grad_norm."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    if not grads:
        return torch.zeros((), dtype=wide)
    return torch.stack([g.double().square().sum().to(grads[0].device) for g in grads]).sum().sqrt().to(wide)


def _cost(params, grads, exp_avgs, exp_avg_sqs, steps, masters, *_) -> Cost:
    states = nbytes(*exp_avgs, *exp_avg_sqs, *masters)
    read = states + nbytes(*grads) + (0 if masters else nbytes(*params))
    return Cost(read, states + nbytes(*params), 15 * sum(p.numel() for p in params))


_step = register(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] masters, Tensor? grad_scale, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int? seed) -> ()",
    reference=reference,
    fake=lambda *_: None,
    cost=_cost,
    triton="fastpt.kernels.adamw:step",
)


def _fake_norm(grads):
    is_double = any(g.dtype == torch.float64 for g in grads)
    device = grads[0].device if grads else "cpu"
    return torch.empty((), dtype=torch.float64 if is_double else torch.float32, device=device)


_norm = register(
    "grad_norm(Tensor[] grads) -> Tensor",
    reference=grad_norm_reference,
    fake=_fake_norm,
    cost=lambda grads: Cost(nbytes(*grads), 4, 2 * sum(g.numel() for g in grads)),
    triton="fastpt.kernels.adamw:grad_norm",
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
    seed: int | None = None,
) -> None:
    """One step of torch.optim.AdamW on all the tensors, in place; each `steps[i]` is counted up first.

    `grad_scale` (clipping, unscaling) multiplies every gradient on the fly; `grads` are left as they were. With
    `masters` the float32 masters are updated and the parameters become their rounded copies. With a
    `seed` instead, bfloat16 parameters are rounded stochastically, so that small updates count on average: the random
    bits depend on the seed, steps[i], i and the place in the tensor, on nothing else.

    Shapes: equal-length lists, entry i of equal shape in all of them, steps float32 [], grad_scale float32 [].
    Numerics: params and grads float32 or bfloat16, states and masters float32; float32 inside, one rounding.
    Raises: RuntimeError when lists or shapes disagree, or when masters and a seed are given.
    Source: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101.
    """
    if masters and seed is not None:
        raise RuntimeError(f"adamw: masters and seed {seed} are given; a parameter with a master is its rounded copy")
    _step(
        params, grads, exp_avgs, exp_avg_sqs, steps, masters or [], grad_scale, lr, beta1, beta2, eps, weight_decay, seed
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # a raw op does not count versions, which autograd checks saved weights by
        torch.autograd.graph.increment_version(params)


@torch.no_grad()
def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all values of all the tensors, [] in float32 (float64 if any is), for clipping by adamw's grad_scale.

    Numerics: squares summed in float64 by the C++ kernel, in two scaled float32 sums by the Triton one; the order is fixed.
    """
    return _norm(grads)
