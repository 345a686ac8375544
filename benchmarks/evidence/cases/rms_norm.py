"""rms_norm and add_rms_norm: Llama's and Gemma's rounding; heads to 405B's width; the shape of the peers' figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import add_rms_norm, rms_norm
from fastpt.ops._library import OPS, gradient_dtype
from fastpt.ops.rms_norm import reference

EPS = 1e-6
GEMMA = {"offset": 1.0, "casts_first": False}
TOO_SMALL = {"column_sums": "adds one row of each program: 2 % of the bytes at most"}


def add_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **family) -> tuple[Tensor, Tensor]:
    return reference(x + residual, weight, eps, **family), x + residual


def inputs(name: str, streams: int, x: Callable[[], Tensor], weight: Tensor, **family) -> Inputs:
    return Inputs(name, (*(x() for _ in range(streams)), weight, EPS), family)


def numbers(streams: int) -> Callable[[Make], Iterator[Inputs]]:
    def build(make: Make) -> Iterator[Inputs]:
        yield inputs("9x129", streams, lambda: make(9, 129, grad=True), make(129, grad=True))
        yield inputs("9x129, Gemma", streams, lambda: make(9, 129, grad=True), make(129, grad=True), **GEMMA)
        yield inputs("20x2100, frozen", streams, lambda: make(20, 2100, grad=True), make(2100))
        yield inputs("700x64", streams, lambda: make(700, 64, grad=True), make(64, grad=True))
        yield inputs("3x5x8 of 24", streams, lambda: make(3, 5, 24)[..., 8:16].requires_grad_(), make(8, grad=True))
        yield inputs("2x9000", streams, lambda: make(2, 9000, grad=True), make(9000, grad=True))

    return build


def real(streams: int) -> Callable[[Make], Iterator[Inputs]]:
    def build(make: Make) -> Iterator[Inputs]:
        for rows, d in ((8192, 4096), (262144, 128), (4096, 8192), (2048, 16384)):
            yield inputs(f"{rows}x{d}", streams, lambda n=rows, d=d: make(n, d, grad=True), make(d, grad=True))
        yield inputs("8192x4096, frozen", streams, lambda: make(8192, 4096, grad=True), make(4096))
        yield inputs(
            "2048x16384 float32, forward only",
            streams,
            lambda: make(2048, 16384, dtype=torch.float32),
            make(16384, dtype=torch.float32),
        )

    return build


def traffic(streams: int) -> Callable[[Make], Inputs]:
    return lambda make: inputs("1024x2048", streams, lambda: make(1024, 2048, grad=True), make(2048, grad=True))


def floor(x: Tensor, weight: Tensor, eps: float, **_) -> tuple[int, int]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    backward = OPS["rms_norm_backward"].cost(x, None, x, rstd, weight, 0.0, gradient_dtype(weight))
    return OPS["rms_norm"].cost(x, weight, eps, 0.0, True).bytes, backward.bytes


def add_floor(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **_) -> tuple[int, int]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    backward = OPS["rms_norm_backward"].cost(x, x, x, rstd, weight, 0.0, gradient_dtype(weight))
    return OPS["add_rms_norm"].cost(x, residual, weight, eps, 0.0, True).bytes, backward.bytes


def liger(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps)


def add_liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)


BARS = Bars(
    forward=1.05,
    backward=1.03,
    launches=(1, 2),
    in_flight_kib={"norm_backward": 64},
    not_streaming=TOO_SMALL,
)
CASES = [
    Case(
        op="rms_norm",
        name="rms_norm",
        function=rms_norm,
        reference=reference,
        numbers=numbers(1),
        real=real(1),
        traffic=traffic(1),
        floor=floor,
        bars=BARS,
        peers={"Liger": liger},
    ),
    Case(
        op="rms_norm",
        name="add_rms_norm",
        function=add_rms_norm,
        reference=add_reference,
        numbers=numbers(2),
        real=real(2),
        traffic=traffic(2),
        floor=add_floor,
        bars=BARS,
        peers={"Liger": add_liger},
    ),
]
