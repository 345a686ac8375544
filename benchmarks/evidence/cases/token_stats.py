"""token_stats: log-probability, entropy and logsumexp of targets at a frozen head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from benchmarks.evidence.cases.cross_entropy import PLAIN
from benchmarks.evidence.cases.linear_cross_entropy import floor, flops, head, rows_for
from fastpt.ops import token_stats


def function(hidden: Tensor, weight: Tensor, targets: Tensor, **options) -> tuple[Tensor, ...]:
    return tuple(token_stats(hidden, weight, targets, **options))[:3]


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept=None, softcap=None) -> tuple[Tensor, ...]:
    z = F.linear(hidden, weight)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(1)
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return tuple(torch.where(targets != -100, x, 0) for x in (logprob, entropy, z.logsumexp(1)))


def numbers(make: Make) -> Iterator[Inputs]:
    args, kept = head(make, 37, 40, 1000)
    yield Inputs("37x40x1000, softcap", args, kept | {"softcap": 5.0})
    args, kept = head(make, 5, 24, 32785, ignored=100)
    yield Inputs("5x24x32785, in tiles", args, kept)


def real(make: Make) -> Iterator[Inputs]:
    for classes in reversed(PLAIN):
        args, kept = head(make, rows_for(classes), 16, classes)
        yield Inputs(f"{rows_for(classes)}x16x{classes}", args, kept)
    args, kept = head(make, rows_for(256000), 16, 256000)
    yield Inputs("512x16x256000, softcap", args, kept | {"softcap": 30.0})


def traffic(make: Make) -> Inputs:
    args, kept = head(make, 512, 512, 4096, trained=False, ignored=1000)
    return Inputs("512x512x4096", args, kept)


CASES = [
    Case(
        op="token_stats",
        name="token_stats, frozen head",
        function=function,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(together=12.0, launches=(10, 10), flops=3.0),
        flops=flops,
    )
]
