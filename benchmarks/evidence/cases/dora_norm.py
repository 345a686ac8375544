"""dora_norm: odd shapes, a rank above a tile's; Llama-3.1-8B's projections with adapters in bfloat16 and float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import dora_norm
from fastpt.ops._library import OPS
from fastpt.ops.dora_norm import reference

SCALE = 1.75


def tensors(make: Make, out: int, width: int, rank: int, dtype: torch.dtype | None = None) -> tuple:
    return make(out, width), make(rank, width, dtype=dtype, scale=rank**-0.5), make(out, rank, dtype=dtype), SCALE


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("130x300, rank 16", tensors(make, 130, 300, 16))
    yield Inputs("130x300, rank 16 in float32", tensors(make, 130, 300, 16, torch.float32))
    yield Inputs("33x700, rank 80", tensors(make, 33, 700, 80))
    yield Inputs("3x5, rank 2", tensors(make, 3, 5, 2))


def real(make: Make) -> Iterator[Inputs]:
    for out, width in ((4096, 4096), (14336, 4096), (1024, 4096)):
        for dtype in (None, torch.float32):
            yield Inputs(f"{out}x{width}, rank 16, adapters {dtype or 'alike'}", tensors(make, out, width, 16, dtype))
    yield Inputs("4096x4096, rank 32, adapters torch.float32", tensors(make, 4096, 4096, 32, torch.float32))
    yield Inputs("4096x4096, rank 128, adapters alike", tensors(make, 4096, 4096, 128))


def traffic(make: Make) -> Inputs:
    return Inputs("1024x4096, rank 16", tensors(make, 1024, 4096, 16))


def floor(*args: Tensor) -> tuple[int, int]:
    return OPS["dora_norm"].cost(*args).bytes, 0


CASES = [
    Case(
        op="dora_norm",
        name="dora_norm",
        function=dora_norm,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(
            forward=1.05,
            launches=(2, 0),
            small_dots=("dora_norm",),
            not_streaming={"dora_norm_join": "adds one number of each row and chunk of columns: 1 % of the bytes"},
        ),
    )
]
