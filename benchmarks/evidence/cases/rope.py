"""rope: odd sizes, layouts and options; Llama-3.1-8B, SmolLM2 and Cohere's pairs; the shape of the peers' figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import rope
from fastpt.ops._library import OPS
from fastpt.ops.rope import reference


def packed(make: Make, T: int, Hq: int, Hkv: int, K: int) -> tuple[Tensor, Tensor]:
    """q and k as views of one projection of q, k and v."""
    qkv = make(T, Hq + 2 * Hkv, K)
    return qkv[:, :Hq].requires_grad_(), qkv[:, Hq : Hq + Hkv].requires_grad_()


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("7x5+2x34, views of qkv", (*packed(make, 7, 5, 2, 34), make(9, 34), make(9, 34)))
    positions = torch.tensor([8, 0, 3, 3, 1])
    yield Inputs(
        "5x4+1x80, 32 rotated, interleaved, positions", (*packed(make, 5, 4, 1, 80), make(9, 32), make(9, 32)),
        {"position_ids": positions, "interleaved": True},
    )  # fmt: skip
    by_head = [make(H, 6, 64).transpose(0, 1).requires_grad_() for H in (9, 3)]
    tables = [make(6, 64, dtype=torch.float32) for _ in range(2)]
    yield Inputs("6x9+3x64, attention layout, float32 tables", (*by_head, *tables))
    yield Inputs("1x1+1x2", (*packed(make, 1, 1, 1, 2), make(1, 2), make(1, 2)))
    by_column = [make(16, H, 5).permute(2, 1, 0).requires_grad_() for H in (3, 2)]
    yield Inputs("5x3+2x16, strided columns", (*by_column, make(5, 6), make(5, 6)))


def real(make: Make) -> Iterator[Inputs]:
    yield Inputs("16384x32+8x128", (*packed(make, 16384, 32, 8, 128), make(16384, 128), make(16384, 128)))
    positions = torch.arange(16384)
    tables = [make(2048, 64, dtype=torch.float32) for _ in range(2)]
    yield Inputs("16384x9+3x64, positions", (*packed(make, 16384, 9, 3, 64), *tables), {"position_ids": positions})
    tables = [make(16384, 128, dtype=torch.float32) for _ in range(2)]
    yield Inputs("16384x32+8x128, interleaved", (*packed(make, 16384, 32, 8, 128), *tables), {"interleaved": True})
    yield Inputs("16384x32+32x80, 32 rotated", (*packed(make, 16384, 32, 32, 80), make(16384, 32), make(16384, 32)))


def traffic(make: Make) -> Inputs:
    angles = make(256, 64, dtype=torch.float32)
    tables = [make(256, 128).copy_(torch.cat((half, half), -1)) for half in (angles.cos(), angles.sin())]
    return Inputs("256x8+2x128", (make(256, 8, 128, grad=True), make(256, 2, 128, grad=True), *tables))


def traffic_of_views(make: Make) -> Inputs:
    q, k = (t.detach().requires_grad_() for t in packed(make, 256, 8, 2, 128))
    positions = torch.arange(256).flip(0)
    return Inputs("256x8+2x128, positions", (q, k, make(256, 128), make(256, 128)), {"position_ids": positions})


def floor(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **settings) -> tuple[int, int]:
    least = OPS["rope"].cost(q, k, cos, sin, settings.get("position_ids")).bytes
    return least, least


def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    by_head = (t.transpose(0, 1)[None] for t in (q, k))
    return tuple(t[0].transpose(0, 1) for t in LigerRopeFunction.apply(*by_head, cos[None], sin[None]))


ROPE = Case(
    op="rope",
    name="rope",
    function=rope,
    reference=reference,
    numbers=numbers,
    real=real,
    traffic=traffic,
    floor=floor,
    bars=Bars(forward=1.02, backward=1.02, launches=(1, 1), new_saved_bytes=0),
    peers={"Liger": liger},
)
CASES = [ROPE, replace(ROPE, name="rope of views", traffic=traffic_of_views, peers={})]
