"""embedding's backward: rare and frequent ids, padding; Llama-3.1-8B's vocabulary. Forward is torch's own gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import embedding
from fastpt.ops._library import OPS


def reference(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return torch.nn.functional.embedding(ids, weight, padding_idx=padding_idx)


def random_ids(count: int, rows: int) -> Tensor:
    """Some ids are frequent, as in language."""
    return (torch.rand(count, generator=torch.Generator().manual_seed(2)) ** 3 * rows).long()


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("3x47 ids of 29, 129 wide", (random_ids(141, 29).view(3, 47), make(29, 129, grad=True)))
    frequent = torch.cat((torch.full((300,), 4), random_ids(20, 9)))
    yield Inputs("a frequent id, padding", (frequent, make(9, 40, grad=True)), {"padding_idx": 2})
    yield Inputs("one id", (torch.tensor([0]), make(1, 1, grad=True)))


def real(make: Make) -> Iterator[Inputs]:
    yield Inputs("8192 ids of 128256, 4096 wide", (random_ids(8192, 128256), make(128256, 4096, grad=True)))


def traffic(make: Make) -> Inputs:
    return Inputs("256 ids of 64, 512 wide", (random_ids(256, 64), make(64, 512, grad=True)))


def floor(ids: Tensor, weight: Tensor) -> tuple[int, int]:
    """Backward: the ids and their gradients, and every row of a dense gradient, zero or not."""
    forward = OPS["embedding"].cost(ids, weight).bytes
    read = ids.numel() * (ids.element_size() + weight.shape[1] * weight.element_size())
    return forward, read + weight.numel() * (4 + weight.element_size())


CASES = [
    Case(
        op="embedding",
        name="embedding",
        function=embedding,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(),
    )
]
