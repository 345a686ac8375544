"""linear_cross_entropy: a trained head and a frozen one, with rows that have no target."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from benchmarks.evidence.cases.cross_entropy import CAPPED, PLAIN, labels
from benchmarks.evidence.cases.cross_entropy import reference as of_logits
from fastpt.ops import linear_cross_entropy

SCALED = {"scale_in_place": "reads nothing but one number where the loss is not scaled"}


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept=None, bias=None, **options) -> Tensor:
    return of_logits(F.linear(hidden, weight, bias), targets, **options)


def head(make: Make, rows: int, width: int, classes: int, *, trained: bool = True, ignored: int = 3):
    """hidden, weight, targets, and by keyword the rows that have one, as a collator gives them."""
    targets = labels(rows, classes, ignored)
    weight = make(classes, width, grad=trained, scale=2 / width**0.5)
    kept = {"kept": (targets != -100).nonzero().squeeze(1)}
    return (make(rows, width, grad=True), weight, targets), kept


def numbers(make: Make) -> Iterator[Inputs]:
    options = {"softcap": 5.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}
    args, kept = head(make, 37, 40, 1000)
    yield Inputs("37x40x1000, all options", args, kept | options | {"bias": make(1000, grad=True)})
    args, kept = head(make, 5, 24, 32785, ignored=100)
    yield Inputs("5x24x32785, in tiles", args, kept)
    args, kept = head(make, 7, 33, 131)
    yield Inputs("7x33x131", args, kept)


def rows_for(classes: int) -> int:
    """Enough programs to fill a GPU; the products, which are computed, stay small."""
    return min(8192, (1 << 26) // classes)


def real(make: Make) -> Iterator[Inputs]:
    """Kernels see the classes alone: few rows and a narrow head keep the products small."""
    for classes in reversed(PLAIN):
        args, kept = head(make, rows_for(classes), 16, classes)
        yield Inputs(f"{rows_for(classes)}x16x{classes}", args, kept)
    for classes in reversed(CAPPED):
        args, kept = head(make, rows_for(classes), 16, classes)
        yield Inputs(f"{rows_for(classes)}x16x{classes}, softcap", args, kept | {"softcap": 30.0})


def real_frozen(make: Make) -> Iterator[Inputs]:
    args, kept = head(make, rows_for(128256), 16, 128256, trained=False)
    yield Inputs("512x16x128256", args, kept)


def traffic(make: Make) -> Inputs:
    args, kept = head(make, 512, 512, 4096, ignored=1000)
    return Inputs("512x512x4096", args, kept)


def traffic_half(make: Make) -> Inputs:
    args, kept = head(make, 512, 512, 4096, trained=False, ignored=2)
    return Inputs("512x512x4096, half without a target", args, kept)


def floor(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept: Tensor) -> tuple[int, int]:
    """As published for the peers: each input once forward, each gradient, in its input's dtype, once backward."""
    inputs = [x.numel() * x.element_size() for x in (hidden, weight)]
    return sum(inputs), sum(n for n, x in zip(inputs, (hidden, weight), strict=True) if x.requires_grad)


def flops(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept: Tensor) -> int:
    return 2 * len(targets) * weight.numel()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]


def case(name: str, real, traffic, bars: Bars) -> Case:
    return Case(
        op="linear_cross_entropy", name=name, function=linear_cross_entropy, reference=reference, numbers=numbers,
        real=real, traffic=traffic, floor=floor, bars=bars, flops=flops, peers={"Liger": liger},
    )  # fmt: skip


# A gradient rounded to bfloat16 errs 1.7e-3 by that alone; unrounded, the head's errs 1.1e-3.
CASES = [
    case(
        "linear_cross_entropy, trained head",
        real,
        traffic,
        Bars(together=9.0, launches=(10, 4), flops=3.0, gradient_error=2.7e-3, not_streaming=SCALED),
    ),
    case(
        "linear_cross_entropy, frozen head, half ignored",
        real_frozen,
        traffic_half,
        Bars(together=4.5, launches=(10, 2), flops=1.0, not_streaming=SCALED),
    ),
]
