"""cross_entropy over given logits: with autograd, and with the gradient written while they are read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import cross_entropy, cross_entropy_and_gradient
from fastpt.ops._library import OPS

# Every tile that holds a row, and rows that are read in tiles: Llama's old and new vocabularies among them.
PLAIN = (1024, 4096, 8192, 16384, 32000, 128256)
CAPPED = (256000,)
ONE_PROGRAM = {"sum_losses": "one program adds up a loss a row"}


def labels(rows: int, classes: int, ignored: int = 3) -> Tensor:
    """Every `ignored`-th row has no target."""
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    targets[1::ignored] = -100
    return targets


def reference(
    logits: Tensor, targets: Tensor, *, softcap=None, logit_scale=1.0, z_loss=0.0, class_weight=None, **options
) -> Tensor:
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    weight = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, targets, weight=weight, **options)
    extra = torch.where(targets == -100, 0, z_loss * z.logsumexp(1) ** 2)
    return loss + (extra if options.get("reduction") == "none" else extra.sum() / (targets != -100).sum())


def numbers(make: Make) -> Iterator[Inputs]:
    options = {"softcap": 5.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2, "reduction": "none"}
    none = {"reduction": "none"}
    yield Inputs("24x1000, all options", (make(24, 1000, grad=True, scale=3.0), labels(24, 1000)), options)
    yield Inputs("5x32785, in tiles", (make(5, 32785, grad=True, scale=3.0), labels(5, 32785)), none)
    yield Inputs("7x131", (make(7, 131, grad=True), labels(7, 131)), none)
    weighted = none | {"class_weight": torch.rand(300, generator=torch.Generator().manual_seed(0))}
    yield Inputs("16x300, class weights", (make(16, 300, grad=True), labels(16, 300)), weighted)
    yield Inputs("1x1", (make(1, 1, grad=True), labels(1, 1)))


def real(make: Make) -> Iterator[Inputs]:
    """The other tiles of row_losses: linear_cross_entropy."""
    for classes in (128256, 32000):
        yield Inputs(f"2048x{classes}", (make(2048, classes, grad=True), labels(2048, classes)))
    yield Inputs("2048x256000, softcap", (make(2048, 256000, grad=True), labels(2048, 256000)), {"softcap": 30.0})


def traffic(make: Make) -> Inputs:
    return Inputs("48x32000", (make(48, 32000, grad=True), labels(48, 32000, ignored=1000)))


def floor(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    """Logits once forward, their gradient once backward."""
    options = (targets, None, -100, None, 1.0, 0.0, 0.0, "mean")
    return OPS["cross_entropy"].cost(logits, *options).bytes, logits.numel() * logits.element_size()


def at_once(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(logits)
    return cross_entropy_and_gradient(logits, targets, scale, out=out), out


def reference_at_once(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(leaf.to(torch.promote_types(leaf.dtype, torch.float32)), targets)
    return loss.detach(), torch.autograd.grad(loss, leaf, scale.to(loss.dtype))[0]


def numbers_at_once(make: Make) -> Iterator[Inputs]:
    for rows, classes in ((24, 1000), (5, 32785)):
        yield Inputs(f"{rows}x{classes}", (make(rows, classes, scale=3.0), labels(rows, classes), torch.tensor(1.7)))


def real_at_once(make: Make) -> Iterator[Inputs]:
    for classes in (32000, 128256):
        yield Inputs(f"2048x{classes}", (make(2048, classes), labels(2048, classes), torch.tensor(1.0)))


def traffic_at_once(make: Make) -> Inputs:
    return Inputs("48x32000", (make(48, 32000), labels(48, 32000, ignored=1000), torch.tensor(1.0)))


def floor_at_once(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[int, int]:
    options = (targets, None, -100, None, 1.0, 0.0, 0.0, "mean")
    return OPS["cross_entropy_and_gradient"].cost(scale, logits, *options, logits).bytes, 0


def liger(logits: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "mean", None, False)[0]


CASES = [
    Case(
        op="cross_entropy",
        name="cross_entropy",
        function=cross_entropy,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(together=1.5, launches=(2, 1), new_saved_bytes=1024, not_streaming=ONE_PROGRAM),
        peers={"Liger": liger},
    ),
    Case(
        op="cross_entropy",
        name="cross_entropy, gradient at once",
        function=at_once,
        reference=reference_at_once,
        numbers=numbers_at_once,
        real=real_at_once,
        traffic=traffic_at_once,
        floor=floor_at_once,
        bars=Bars(forward=1.0, launches=(3, 0), new_saved_bytes=0, not_streaming=ONE_PROGRAM),
    ),
]
