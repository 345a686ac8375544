"""linear_divergence: what stands between both heads' products, which are torch's; forward KL, reverse KL and a mixture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops._library import OPS
from fastpt.ops.linear_divergence import rows_reference

VOCABULARIES = (32000, 151936)


def in_place_of(z: Tensor, teacher: Tensor, row_weight: Tensor | None, *, beta: float, temperature: float = 1.0):
    """The op with a gradient of its own; linear_divergence gives it z's place."""
    gradient = torch.empty_like(z)
    return OPS["divergence_rows"].overload(z, teacher, row_weight, beta, temperature, gradient), gradient


def reference(z: Tensor, teacher: Tensor, row_weight: Tensor | None, *, beta: float, temperature: float = 1.0):
    gradient = torch.empty_like(z)
    return rows_reference(z, teacher, row_weight, beta, temperature, gradient), gradient


def numbers(make: Make) -> Iterator[Inputs]:
    weights = torch.rand(7, generator=torch.Generator().manual_seed(0))
    for beta in (0.0, 0.3, 1.0):
        options = {"beta": beta, "temperature": 2.0}
        yield Inputs(f"7x8209 beta {beta}", (make(7, 8209, scale=3.0), make(7, 8209, scale=3.0), weights), options)
        yield Inputs(f"9x131, beta {beta}", (make(9, 131), make(9, 131), None), options)
    yield Inputs("1x1", (make(1, 1), make(1, 1), None), {"beta": 0.5})


def real(make: Make) -> Iterator[Inputs]:
    for beta in (0.5, 0.0, 1.0):
        for classes in VOCABULARIES:
            yield Inputs(f"256x{classes}, beta {beta}", (make(256, classes), make(256, classes), None), {"beta": beta})


def traffic(make: Make) -> Inputs:
    return Inputs("48x32000", (make(48, 32000), make(48, 32000), None), {"beta": 0.0})


def floor(z: Tensor, teacher: Tensor, row_weight: Tensor | None, *, beta: float) -> tuple[int, int]:
    return OPS["divergence_rows"].cost(z, teacher, row_weight, beta, 1.0, z).bytes, 0


CASES = [
    Case(
        op="linear_divergence",
        name="divergence_rows",
        function=in_place_of,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(forward=1.67, launches=(1, 0), new_saved_bytes=0),
    )
]
