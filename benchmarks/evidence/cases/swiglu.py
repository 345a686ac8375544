"""swiglu: odd and strided sizes; the MLP of Llama-3.1-8B; the shape of the peers' figures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import swiglu
from fastpt.ops._library import OPS
from fastpt.ops.swiglu import reference


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("3x5x129", (make(3, 5, 129, grad=True), make(3, 5, 129, grad=True)))
    packed = make(37, 2 * 129)
    yield Inputs("37x129, halves of one tensor", tuple(half.requires_grad_() for half in packed.chunk(2, -1)))
    yield Inputs("1x1", (make(1, 1, grad=True), make(1, 1, grad=True)))
    yield Inputs("4x2048, large values", (make(4, 2048, grad=True, scale=30.0), make(4, 2048, grad=True)))


def real(make: Make) -> Iterator[Inputs]:
    yield Inputs("4096x14336", (make(4096, 14336, grad=True), make(4096, 14336, grad=True)))


def traffic(make: Make) -> Inputs:
    return Inputs("128x2816", (make(128, 2816, grad=True), make(128, 2816, grad=True)))


def floor(gate: Tensor, up: Tensor) -> tuple[int, int]:
    return OPS["swiglu"].cost(gate, up).bytes, OPS["swiglu_backward"].cost(gate, gate, up).bytes


def liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


CASES = [
    Case(
        op="swiglu",
        name="swiglu",
        function=swiglu,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(forward=1.0, backward=1.0, launches=(1, 1), new_saved_bytes=0),
        peers={"Liger": liger},
    )
]
