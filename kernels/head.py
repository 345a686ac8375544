"""The head on a GPU, a chunk of rows at a time: cuBLAS writes logits, one kernel of head_rows.py reads them, cuBLAS makes
gradients of what it wrote. Shared by linear_cross_entropy.py and token_stats.py; definition: fastpt/ops/_head.py.

A chunk is as large as a fixed number of bytes allows, thousands of rows: every chunk reads the head's weight up to three
times and adds to its gradient, so that many small chunks would move more bytes for the weight than for the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30  # logits and their gradients held at a time: 4096 rows of 128k classes in 16 bits
LEAST_ROWS = 2048
ROW_MULTIPLE = 128  # a tile of a GEMM
WIDTH_MULTIPLE = 16  # rows of logits start and end on it, so that kernels read 16 bytes at a time


def kept_rows(targets: Tensor, kept: Tensor | None, ignore_index: int) -> Tensor | None:
    """Rows that have a target, None where all have; a batch that brings them saves the sync."""
    kept = (targets != ignore_index).nonzero().squeeze(1) if kept is None else kept
    return None if len(kept) == len(targets) else kept.contiguous()


def rows_of_chunks(rows: int, row_bytes: int) -> list[int]:
    """Chunks of equal length within CHUNK_BYTES, never below LEAST_ROWS."""
    most = max(LEAST_ROWS, CHUNK_BYTES // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)
    chunks = -(-rows // most)
    length = 0 if chunks == 0 else -(-rows // (chunks * ROW_MULTIPLE)) * ROW_MULTIPLE
    return [min(length, rows - start) for start in range(0, rows, length or 1)]


def multiply(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False, alpha: float = 1.0) -> None:
    """out = alpha * a @ b, or that is added; summed in float32, rounded once to the dtype of `out`."""
    wider = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, beta=int(adds), alpha=alpha, out=out, **wider)


def in_parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` that add up to x, to 16 bits where x is float32 and they have 8."""
    high = x.to(dtype)
    return [high] if x.dtype == dtype else [high, (x - high).to(dtype)]


def multiply_exactly(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """out = a @ b.T of few columns: as one product of the parts of both in `dtype`, but for the parts that are least."""
    pairs = [(x, y) for i, x in enumerate(in_parts(a, dtype)) for j, y in enumerate(in_parts(b, dtype)) if i + j < 2]
    left, right = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    multiply(left, right.t(), out)


@dataclass
class Chunk:
    """Some rows of one batch: hidden [n, D], logits and dlogits [n, V] (rows padded), their places in the batch."""

    rows: slice  # of the kept rows
    places: Tensor | None  # [n] in the batch; None: the same as `rows`
    hidden: Tensor
    low_hidden: Tensor | None
    logits: Tensor
    dlogits: Tensor

    def part_of(self, x: Tensor) -> Tensor:
        """The chunk's rows of x [T, ...]."""
        return x[self.rows] if self.places is None else x.index_select(0, self.places)


class Head:
    """The inputs of a head op with the buffers of its chunks; wanted gradients are added up in `grads`.

    Numerics: logits in `logits_dtype`, what is computed from them in float32, gradients of logits rounded once to the
    dtype of `hidden`, products of them summed in float32.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor | None, ignore_index: int, bias: Tensor | None,
        low_hidden: Tensor | None, low_weight: Tensor | None, logits_dtype: torch.dtype, wants: Sequence[bool],
    ):  # fmt: skip
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
            raise RuntimeError(
                f"hidden is {list(hidden.shape)} {hidden.dtype}, weight is {list(weight.shape)} {weight.dtype}; "
                "they must be [T, D] and [V, D] of one dtype"
            )
        self.hidden, self.weight, self.bias = hidden.contiguous(), weight.contiguous(), bias
        self.low_hidden, self.low_weight = low_hidden, low_weight
        self.targets = targets.contiguous()
        self.kept = kept_rows(targets, kept, ignore_index)
        self.classes = weight.shape[0]
        self.bound = -(-self.classes // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.logits_dtype = logits_dtype
        self.wants = wants
        self.grads = self._no_grads([hidden, weight, bias, low_hidden, low_weight])
        self.is_first = True

    @property
    def rows(self) -> int:
        return len(self.hidden) if self.kept is None else len(self.kept)

    def _no_grads(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Rows that are not kept have no gradient; sums start as zeros only where no chunk will write them."""
        grads = []
        for i, (x, wanted) in enumerate(zip(inputs, self.wants, strict=True)):
            is_row = i in (0, 3)
            if x is None or not wanted:
                grads.append(self.hidden.new_empty(0, dtype=torch.float32))
                continue
            is_written = self.rows > 0 and (self.kept is None or not is_row)
            dtype = x.dtype if is_row else torch.float32
            grads.append((torch.empty if is_written else torch.zeros)(x.shape, dtype=dtype, device=x.device))
        return grads

    def chunks(self) -> Iterator[Chunk]:
        """Chunks whose logits are computed; one buffer for all of them, and a second where gradients have another dtype."""
        same = self.logits_dtype == self.hidden.dtype
        forms_gradients = any(self.wants)
        row_bytes = self.logits_dtype.itemsize + (0 if same or not forms_gradients else self.hidden.dtype.itemsize)
        lengths = rows_of_chunks(self.rows, self.bound * row_bytes)
        shape = (max(lengths, default=0), self.bound)
        logits = self.hidden.new_empty(shape, dtype=self.logits_dtype)
        dlogits = logits if same or not forms_gradients else self.hidden.new_empty(shape)
        start = 0
        for n in lengths:
            rows = slice(start, start + n)
            chunk = Chunk(
                rows, None if self.kept is None else self.kept[rows], self.hidden, self.low_hidden,
                logits[:n, : self.classes], dlogits[:n, : self.classes],
            )  # fmt: skip
            chunk.hidden = chunk.part_of(self.hidden)
            if self.low_hidden is not None:
                chunk.low_hidden = chunk.part_of(self.low_hidden)
            self._write_logits(chunk)
            yield chunk
            start += n

    def _write_logits(self, chunk: Chunk) -> None:
        """hidden @ weight.T, added onto the low-rank product and the bias, which round once together."""
        low, adds = chunk.low_hidden, True
        if low is not None and self.low_weight is not None:
            left, right = low, self.low_weight
            if self.bias is not None:
                left = torch.cat([low, low.new_ones(len(low), 1)], 1)
                right = torch.cat([right, self.bias[:, None].to(right.dtype)], 1)
            multiply_exactly(left, right, self.hidden.dtype, chunk.logits)
        elif self.bias is not None:
            chunk.logits.copy_(self.bias)
        else:
            adds = False
        multiply(chunk.hidden, self.weight.t(), chunk.logits, adds=adds)

    def add_grads(self, chunk: Chunk, alpha: float = 1.0) -> None:
        """Add what alpha times chunk.dlogits means for each wanted gradient."""
        dz, adds = chunk.dlogits, not self.is_first
        self.is_first = False
        if self.wants[0]:
            self._write_rows(self.grads[0], chunk, [self.weight], alpha)
        if self.wants[1]:
            multiply(dz.t(), chunk.hidden, self.grads[1], adds=adds, alpha=alpha)
        if self.wants[2]:
            of_bias = dz.sum(0, dtype=torch.float32)
            self.grads[2] = self.grads[2].add_(of_bias, alpha=alpha) if adds else of_bias.mul_(alpha)
        if chunk.low_hidden is None or self.low_weight is None:
            return
        if self.wants[3]:
            self._write_rows(self.grads[3], chunk, in_parts(self.low_weight, dz.dtype), alpha)
        if self.wants[4]:
            for i, part in enumerate(in_parts(chunk.low_hidden, dz.dtype)):
                multiply(dz.t(), part, self.grads[4], adds=adds or i > 0, alpha=alpha)

    def _write_rows(self, grad: Tensor, chunk: Chunk, factors: list[Tensor], alpha: float) -> None:
        """grad[chunk] = alpha * dlogits @ factors' sum."""
        out = grad[chunk.rows] if chunk.places is None else grad.new_empty((len(chunk.logits), grad.shape[1]))
        for i, factor in enumerate(factors):
            multiply(chunk.dlogits, factor, out, adds=i > 0, alpha=alpha)
        if chunk.places is not None:
            grad.index_copy_(0, chunk.places, out)
