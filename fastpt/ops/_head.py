"""The head in plain PyTorch, a chunk of rows at a time: hidden rows -> logits -> gradients, never all logits at once.

linear_cross_entropy and token_stats define themselves on it; csrc/cpu/linear_cross_entropy.cpp does the same in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes

CHUNK_BYTES = 64 << 20  # logits held at a time; a constant, so that results never depend on free memory
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? kept, int ignore_index, Tensor? bias, Tensor? low_hidden, "
    "Tensor? low_weight, Tensor? class_weight, float? softcap, float logit_scale"
)


def kept_rows(targets: Tensor, kept: Tensor | None, ignore_index: int) -> Tensor:
    """Indices of the rows that have a target; computing them costs a host sync on a GPU, so batches bring them."""
    return (targets != ignore_index).nonzero().squeeze(1) if kept is None else kept


@dataclass
class Head:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias + low_hidden @ low_weight.T)).

    Numerics: logits and gradient sums in float32 (float64 for float64 inputs).
    """

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    low_hidden: Tensor | None  # [T, R], the scaled hidden @ lora_a.T
    low_weight: Tensor | None  # [V, R], lora_b; given with low_hidden
    softcap: float | None
    logit_scale: float

    def __post_init__(self):
        self.wide = torch.promote_types(self.hidden.dtype, torch.float32)
        if not self.hidden.is_cuda:  # CPU GEMMs round their output to the dtype of their inputs
            self.weight = self.weight.to(self.wide)

    def chunks(self, kept: Tensor) -> Iterator[Tensor]:
        rows = max(1, CHUNK_BYTES // (self.wide.itemsize * self.weight.shape[0]))
        return iter(kept.split(rows)) if len(kept) else iter(())

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b with float32 result; on CUDA from 16-bit factors."""
        if a.is_cuda and b.dtype.itemsize == 2:
            return torch.mm(a.to(b.dtype), b, out_dtype=self.wide)
        return a.to(self.wide) @ b.to(self.wide)

    def weight_grad(self, dz: Tensor, hidden: Tensor) -> Tensor:
        """What a chunk adds to the weight's gradient, in float32."""
        return self.matmul(dz.t(), hidden)

    def logits(self, rows: Tensor) -> Tensor:
        z = self.matmul(self.hidden[rows], self.weight.t())  # [n, V]
        if self.low_hidden is not None and self.low_weight is not None:
            z += self.matmul(self.low_hidden[rows], self.low_weight.t())
        if self.bias is not None:
            z += self.bias
        if self.logit_scale != 1:
            z *= self.logit_scale
        return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def zero_grads(self, wants: Sequence[bool]) -> list[Tensor]:
        """Accumulators for (hidden, weight, bias, low_hidden, low_weight); empty where not wanted."""
        inputs = [self.hidden, self.weight, self.bias, self.low_hidden, self.low_weight]
        return empty_grads(inputs, wants, torch.zeros)

    def add_grads(self, grads: list[Tensor], wants: Sequence[bool], rows: Tensor, z: Tensor, dz: Tensor) -> None:
        """Add what the gradient dz [n, V] of this chunk's logits z means for each wanted input; overwrites dz."""
        if self.softcap is not None:
            dz *= 1 - (z / self.softcap) ** 2
        if self.logit_scale != 1:
            dz *= self.logit_scale
        if wants[0]:
            grads[0][rows] = self.matmul(dz, self.weight).to(grads[0].dtype)
        if wants[1]:
            grads[1] += self.weight_grad(dz, self.hidden[rows])
        if wants[2]:
            grads[2] += dz.sum(0)
        if self.low_hidden is None or self.low_weight is None:
            return
        if wants[3]:
            grads[3][rows] = self.matmul(dz, self.low_weight).to(grads[3].dtype)
        if wants[4]:
            grads[4] += self.matmul(dz.t(), self.low_hidden[rows])


def empty_grads(inputs: Sequence[Any], wants: Sequence[bool], make=torch.empty) -> list[Tensor]:
    """Gradients shaped like the inputs: row gradients in their dtype, weight gradients in float32 (autograd rounds them once)."""
    device, grads = inputs[0].device, []
    for i, (x, wanted) in enumerate(zip(inputs, wants, strict=True)):
        if x is None or not wanted:
            grads.append(torch.empty(0, device=device))
        else:
            dtype = x.dtype if i in (0, 3) else torch.promote_types(x.dtype, torch.float32)
            grads.append(make(x.shape, dtype=dtype, device=device))
    return grads


def cost(hidden, weight, kept, bias, low_hidden, low_weight, gemms: int, grads: Sequence[Tensor]) -> Cost:
    """`gemms` products over the kept rows with the whole head; inputs and gradients moved once."""
    rows = len(hidden) if kept is None else len(kept)
    inner = hidden.shape[1] + (0 if low_hidden is None else low_hidden.shape[1])
    reads = rows * hidden.shape[1] * hidden.element_size() + nbytes(weight, bias, low_hidden, low_weight)
    return Cost(reads, nbytes(*grads), 2 * gemms * rows * inner * weight.shape[0])


def check_head(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, lora: tuple[Tensor | None, Tensor | None]):
    """Shapes and dtypes that every head must have, named with their values."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise RuntimeError(
            f"{name}: hidden is {tuple(hidden.shape)} {hidden.dtype}, weight is {tuple(weight.shape)} {weight.dtype}; "
            "they must be [T, D] and [V, D] of one dtype"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise RuntimeError(
            f"{name}: targets is {tuple(targets.shape)} {targets.dtype}; it must be [{len(hidden)}] of torch.int64"
        )
    if (lora[0] is None) != (lora[1] is None):
        raise RuntimeError(f"{name}: one of lora_a and lora_b is missing; give both or none")


def low_rank_hidden(hidden: Tensor, lora_a: Tensor | None, lora_scale: float) -> Tensor | None:
    """scale * hidden @ lora_a.T [T, R]: small, so autograd of plain PyTorch takes care of lora_a."""
    return None if lora_a is None else (hidden.to(lora_a.dtype) @ lora_a.t()) * lora_scale
