"""layer_norm and add_layer_norm with dropout: absent and frozen parameters, autocast's two dtypes; BERT's and GPT-2's widths."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import add_layer_norm, layer_norm
from fastpt.ops._library import OPS
from fastpt.ops.layer_norm import reference, reference_sum

EPS = 1e-5
DROPOUT = {"dropout_p": 0.1, "seed": 2**61 + 12345}
TOO_SMALL = {
    "column_sums": "adds one row of each program: 4 % of the bytes at most",
}


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, dropout_p=0.0, seed=0
) -> tuple[Tensor, Tensor]:
    summed = reference_sum(x, residual, dropout_p, seed)
    return reference(summed, weight, bias, eps), summed


def parameters(make: Make, d: int, grad: bool = True) -> tuple[Tensor, Tensor]:
    return make(d, grad=grad), make(d, grad=grad)


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("9x129", (make(9, 129, grad=True), *parameters(make, 129), EPS))
    yield Inputs("20x2100", (make(20, 2100, grad=True), *parameters(make, 2100), EPS))
    yield Inputs("5x40, no parameters", (make(5, 40, grad=True), None, None, EPS))
    yield Inputs("2x5000, bias alone trained", (make(2, 5000, grad=True), make(5000), make(5000, grad=True), EPS))


def add_numbers(make: Make) -> Iterator[Inputs]:
    for name, options in (("", {}), (", dropout", DROPOUT)):
        streams = (make(9, 129, grad=True), make(9, 129, grad=True))
        yield Inputs(f"9x129{name}", (*streams, *parameters(make, 129), EPS), options)
        streams = (make(20, 2100, grad=True), make(20, 2100, grad=True))
        yield Inputs(f"20x2100, frozen{name}", (*streams, *parameters(make, 2100, grad=False), EPS), options)


def real(make: Make) -> Iterator[Inputs]:
    for rows, d in ((16384, 768), (8192, 4096), (4096, 8192), (2048, 16384)):
        yield Inputs(f"{rows}x{d}", (make(rows, d, grad=True), *parameters(make, d), EPS))


def add_real(make: Make) -> Iterator[Inputs]:
    for rows, d in ((16384, 768), (8192, 4096)):
        streams = (make(rows, d, grad=True), make(rows, d, grad=True))
        yield Inputs(f"{rows}x{d}, dropout", (*streams, *parameters(make, d), EPS), DROPOUT)
    for dtype in (None, torch.float32):
        streams = (make(2048, 16384, grad=True), make(2048, 16384, dtype=dtype, grad=True))
        yield Inputs(f"2048x16384, residual {dtype or 'alike'}", (*streams, *parameters(make, 16384), EPS))
    streams = (make(16384, 768, grad=True), make(16384, 768, dtype=torch.float32, grad=True))
    yield Inputs("16384x768 beside float32", (*streams, *parameters(make, 768), EPS), DROPOUT)


def traffic(make: Make) -> Inputs:
    return Inputs("1024x2048", (make(1024, 2048, grad=True), *parameters(make, 2048), EPS))


def add_traffic(make: Make) -> Inputs:
    streams = (make(1024, 2048, grad=True), make(1024, 2048, grad=True))
    return Inputs("1024x2048", (*streams, *parameters(make, 2048), EPS), DROPOUT)


def floor(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[int, int]:
    number = x.new_empty(x.shape[:-1], dtype=torch.float32)
    backward = OPS["layer_norm_backward"].cost(x, x, number, number, weight, weight.dtype, bias.dtype)
    return OPS["layer_norm"].cost(x, weight, bias, eps).bytes, backward.bytes


def add_floor(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout_p=0.0, seed=0):
    number, rest = x.new_empty(x.shape[:-1], dtype=torch.float32), (dropout_p, seed)
    backward = OPS["add_layer_norm_backward"].cost(
        residual, residual, residual, number, number, weight, x.dtype, *rest, weight.dtype, bias.dtype
    )
    return OPS["add_layer_norm"].cost(x, residual, weight, bias, eps, *rest).bytes, backward.bytes


def liger(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)


BARS = Bars(forward=1.05, backward=1.05, launches=(1, 2), not_streaming=TOO_SMALL)
CASES = [
    Case(
        op="layer_norm",
        name="layer_norm",
        function=layer_norm,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=BARS,
        peers={"Liger": liger},
    ),
    Case(
        op="layer_norm",
        name="add_layer_norm",
        function=add_layer_norm,
        reference=add_reference,
        numbers=add_numbers,
        real=add_real,
        traffic=add_traffic,
        floor=add_floor,
        bars=BARS,
    ),
]
