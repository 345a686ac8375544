"""geglu, exact and tanh: odd and strided sizes; the MLP of Gemma-2-2B; the shape of swiglu's figures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import geglu
from fastpt.ops._library import OPS
from fastpt.ops.geglu import reference

FORMS = ("tanh", "none")


def numbers(make: Make) -> Iterator[Inputs]:
    for form in FORMS:
        options = {"approximate": form}
        yield Inputs(f"3x5x129, {form}", (make(3, 5, 129, grad=True), make(3, 5, 129, grad=True)), options)
        packed = make(37, 2 * 129)
        halves = tuple(half.requires_grad_() for half in packed.chunk(2, -1))
        yield Inputs(f"37x129, halves of one tensor, {form}", halves, options)
        large = make(4, 2048, grad=True, scale=10.0), make(4, 2048, grad=True)
        yield Inputs(f"4x2048, large values, {form}", large, options)


def real(make: Make) -> Iterator[Inputs]:
    for form in FORMS:
        yield Inputs(
            f"4096x9216, {form}", (make(4096, 9216, grad=True), make(4096, 9216, grad=True)), {"approximate": form}
        )


def traffic(make: Make) -> Inputs:
    return Inputs("128x2816", (make(128, 2816, grad=True), make(128, 2816, grad=True)))


def floor(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> tuple[int, int]:
    forward, backward = (
        OPS["geglu"].cost(gate, up, approximate),
        OPS["geglu_backward"].cost(gate, gate, up, approximate),
    )
    return forward.bytes, backward.bytes


def liger(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, up)


CASES = [
    Case(
        op="geglu",
        name="geglu",
        function=geglu,
        reference=lambda gate, up, *, approximate="tanh": reference(gate, up, approximate),
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(forward=1.0, backward=1.0, launches=(1, 1), new_saved_bytes=0),
        peers={"Liger": liger},
    )
]
