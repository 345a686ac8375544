"""bias_gelu, exact and tanh: absent and frozen bias, odd sizes; the MLP of BERT-base."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import bias_gelu
from fastpt.ops._library import OPS
from fastpt.ops.bias_gelu import reference

FORMS = ("none", "tanh")


def numbers(make: Make) -> Iterator[Inputs]:
    for form in FORMS:
        options = {"approximate": form}
        yield Inputs(f"37x1300, {form}", (make(37, 1300, grad=True, scale=3.0), make(1300, grad=True)), options)
        yield Inputs(f"9x129, frozen bias, {form}", (make(9, 129, grad=True), make(129)), options)
        yield Inputs(f"3x5x40, no bias, {form}", (make(3, 5, 40, grad=True), None), options)


def real(make: Make) -> Iterator[Inputs]:
    for form in FORMS:
        yield Inputs(
            f"16384x3072, {form}", (make(16384, 3072, grad=True), make(3072, grad=True)), {"approximate": form}
        )


def traffic(make: Make) -> Inputs:
    return Inputs("1024x3072", (make(1024, 3072, grad=True), make(3072, grad=True)))


def floor(x: Tensor, bias: Tensor, *, approximate: str = "none") -> tuple[int, int]:
    backward = OPS["bias_gelu_backward"].cost(x, x, bias, approximate, bias.dtype)
    return OPS["bias_gelu"].cost(x, bias, approximate).bytes, backward.bytes


CASES = [
    Case(
        op="bias_gelu",
        name="bias_gelu",
        function=bias_gelu,
        reference=lambda x, bias, *, approximate="none": reference(x, bias, approximate),
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(
            forward=1.05,
            backward=1.03,
            launches=(1, 2),
            new_saved_bytes=0,
            not_streaming={"column_sums": "adds one row of each program: 1 % of the bytes"},
        ),
    )
]
