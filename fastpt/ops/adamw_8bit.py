"""adamw_8bit: adamw with moments of 8 bits in blocks of 256, in the format of bitsandbytes' optimizers.

Arithmetic in csrc/common/adamw.h, csrc/common/dynamic_map.h and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register
from fastpt.ops.adamw import reference as adamw_reference

BLOCK = 256


@cache
def dynamic_map(is_signed: bool) -> Tensor:
    """The 256 values of an 8-bit number, ascending: dynamic exponent and fraction of Dettmers et al. 2022, float32 [256].

    Seven decades below 1, of 1, 2, 4, ... 64 evenly spaced values each with either sign, or of 2, 4, ... 128 without;
    0 and 1. To the bit what bitsandbytes' create_dynamic_map gives.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, (1 if is_signed else 2) * 2**decade + 1, dtype=torch.float32)
        positive = 10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0
        values += [positive, -positive] if is_signed else [positive]
    return torch.cat(values).sort().values


@cache
def largest_of_index(is_signed: bool) -> Tensor:
    """The largest float32 whose nearest code is k or an earlier one, for k < 255; halfway it is the lower one."""
    code = dynamic_map(is_signed)
    low, high = code[:-1], code[1:]

    def is_higher(x: Tensor) -> Tensor:
        return high - x < x - low

    found, up = (low + high) / 2, torch.tensor(torch.inf)
    while (wrong := is_higher(found)).any():
        found = torch.where(wrong, torch.nextafter(found, -up), found)
    while not (right := is_higher(torch.nextafter(found, up))).all():
        found = torch.where(right, found, torch.nextafter(found, up))
    if not is_signed:
        found[0] = -1  # a second moment is not rounded to zero: the step divides by its root
    return found


def quantize(values: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes uint8, shaped as float32 `values`, and the largest magnitude of each block, float32 [blocks]."""
    blocks = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if len(blocks) else values.new_zeros(0)
    scaled = blocks * torch.where(absmax == 0, 0.0, 1 / absmax)[:, None]
    index = torch.searchsorted(largest_of_index(is_signed).to(values.device), scaled.contiguous())
    return index.to(torch.uint8).view(-1)[: values.numel()].view(values.shape), absmax


def dequantize(index: Tensor, absmax: Tensor, is_signed: bool) -> Tensor:
    """Codes times the scale of their block, float32."""
    scale = absmax.repeat_interleave(BLOCK)[: index.numel()].view(index.shape)
    return dynamic_map(is_signed).to(index.device)[index.long()] * scale


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxes: Sequence[Tensor],
    exp_avg_sq_absmaxes: Sequence[Tensor],
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
    """The definition: adamw's on the moments as they stand for, which are rounded again after it."""
    states = (exp_avgs, exp_avg_absmaxes, True), (exp_avg_sqs, exp_avg_sq_absmaxes, False)
    first, second = (
        [dequantize(q, a, is_signed) if q.dtype == torch.uint8 else q for q, a in zip(codes, absmaxes, strict=True)]
        for codes, absmaxes, is_signed in states
    )
    adamw_reference(params, grads, first, second, steps, masters, grad_scale, lr, beta1, beta2, eps, weight_decay, seed)
    for (codes, absmaxes, is_signed), values in zip(states, (first, second), strict=True):
        for code, absmax, value in zip(codes, absmaxes, values, strict=True):
            if code.dtype == torch.uint8:
                for old, new in zip((code, absmax), quantize(value, is_signed), strict=True):
                    old.copy_(new)


def _cost(params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters, *_) -> Cost:
    states = nbytes(*exp_avgs, *exp_avg_sqs, *exp_avg_absmaxes, *exp_avg_sq_absmaxes, *masters)
    read = states + nbytes(*grads) + (0 if masters else nbytes(*params))
    return Cost(read, states + nbytes(*params), 65 * sum(p.numel() for p in params))


_step = register(
    "adamw_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] exp_avg_absmaxes, Tensor(e!)[] exp_avg_sq_absmaxes, Tensor(f!)[] steps, Tensor(g!)[] masters, "
    "Tensor? grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int? seed) -> ()",
    reference=reference,
    fake=lambda *_: None,
    cost=_cost,
)


@torch.no_grad()
def adamw_8bit(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    exp_avg_absmaxes: Sequence[Tensor],
    exp_avg_sq_absmaxes: Sequence[Tensor],
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
    """adamw (see there) with moments of 8 bits each, in place.

    A moment is `dynamic_map[code] * absmax` of its block of 256. The step uses the new moments before they are rounded.
    A tensor whose exp_avg and exp_avg_sq are float32, with empty scales, keeps them so (a small one is not worth it).

    Shapes: equal-length lists; codes uint8 of the parameter's shape, absmaxes float32 [ceil(numel / 256)], steps float32 [].
    Numerics: float32 inside; a code is the nearest, halfway the lower; a second moment never rounds to zero.
    Raises: RuntimeError when lists or shapes disagree, or when masters and a seed are given.
    Source: Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
    """
    if masters and seed is not None:
        raise RuntimeError(
            f"adamw_8bit: masters and seed {seed} are given; a parameter with a master is its rounded copy"
        )
    _step(
        params, grads, exp_avgs, exp_avg_sqs, exp_avg_absmaxes, exp_avg_sq_absmaxes, steps, masters or [], grad_scale, lr,
        beta1, beta2, eps, weight_decay, seed,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # a raw op does not count versions, which autograd checks saved weights by
        torch.autograd.graph.increment_version(params)
