"""embedding's backward: rare and frequent ids, padding; Llama-3.1-8B's vocabulary. Forward is torch's own gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops._library import OPS
from fastpt.ops.embedding import reference_backward


def random_ids(count: int, rows: int) -> Tensor:
    """Some ids are frequent, as in language."""
    return (torch.rand(count, generator=torch.Generator().manual_seed(2)) ** 3 * rows).long()


def numbers(make: Make) -> Iterator[Inputs]:
    yield Inputs("3x47 ids of 29, 129 wide", (make(3, 47, 129), random_ids(141, 29).view(3, 47), 29, -1))
    frequent = torch.cat((torch.full((300,), 4), random_ids(20, 9)))
    yield Inputs("a frequent id, padding, one gradient for all", (make(1, 40).expand(320, 40), frequent, 9, 2))
    yield Inputs("one id", (make(1, 1), torch.tensor([0]), 1, -1))


def real(make: Make) -> Iterator[Inputs]:
    yield Inputs("8192 ids of 128256, 4096 wide", (make(8192, 4096), random_ids(8192, 128256), 128256, -1))


def traffic(make: Make) -> Inputs:
    """Into float32, as fastpt's trainer takes it."""
    args = make(256, 128), random_ids(256, 2048), 2048, -1
    return Inputs("256 ids of 2048, 128 wide", args, {"dtype": torch.float32})


def backward(
    function: Callable, grad: Tensor, ids: Tensor, rows: int, padding_idx: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    return function(grad, ids, rows, padding_idx, dtype or grad.dtype)


def floor(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, *, dtype: torch.dtype) -> tuple[int, int]:
    """Of a dense gradient every row is written, zero or not: more than the op's cost, which counts the rows in use."""
    cost = OPS["embedding_backward"].cost(grad, ids, rows, padding_idx, dtype)
    return cost.bytes_read + dtype.itemsize * rows * grad.shape[-1], 0


CASES = [
    Case(
        op="embedding",
        name="embedding backward",
        function=lambda *args, **dtype: backward(OPS["embedding_backward"].overload, *args, **dtype),
        reference=lambda *args, **dtype: backward(reference_backward, *args, **dtype),
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(
            forward=1.2,  # rows in use are written twice: zero, then the sum
            not_streaming={
                "embedding_backward": "every thread of a row reads its token's index; gradients go by 16 bytes",
                "embedding_join": "only what a frequent id left in more than one piece",
            },
        ),
    )
]
