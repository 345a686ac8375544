"""Sums as the hardware adds: in a tree, every addition rounded to the block's dtype.

Stock, the interpreter hands a sum to NumPy, which adds float32 one after the other along all axes but the last: its error
grows with the number of terms, a tree's with the logarithm of it.
"""

from __future__ import annotations

import numpy as np
from triton.runtime import interpreter

Reduce = interpreter.ReduceOps


def in_a_tree(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The sum along an axis, halves added to halves as lanes of a warp are; its length is a power of two, as a block's."""
    values = values.reshape(-1) if axis is None else np.moveaxis(values, axis, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        while (half := len(values) // 2) > 0:
            values = values[:half] + values[half:]
    return values[0]


def install() -> None:
    """After bf16.py, whose blocks are patterns: they come back here widened."""
    before = Reduce.sum

    def in_a_tree_where_it_rounds(self, block):
        values = block.handle.data
        if not np.issubdtype(values.dtype, np.floating):
            return before(self, block)
        total = in_a_tree(values, self.axis)
        if self.keep_dims:
            total = total.reshape([1] * values.ndim) if self.axis is None else np.expand_dims(total, self.axis)
        return self.to_tensor(total, block.dtype)

    Reduce.sum = in_a_tree_where_it_rounds
