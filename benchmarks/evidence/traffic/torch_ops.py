"""Bytes, launches, FLOPs and host syncs of the plain torch ops that run between the kernels."""

from __future__ import annotations

import collections
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MOVES_NOTHING = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "detach", "alias",
    "lift_fresh", "set_", "resize_",
}  # fmt: skip
WAITS_FOR_THE_GPU = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "item"}
DOES_NOT_READ_SELF = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}
ADDS_A_PRODUCT = {"addmm_", "addmm", "baddbmm", "baddbmm_", "addmv", "addmv_", "addbmm", "addbmm_"}
GATHERS = {"index", "gather", "embedding", "index_select"}


class TorchOps(TorchDispatchMode):
    """Counts for a Meter, and tells its memory what comes and goes."""

    def __init__(self, meter: Any) -> None:
        super().__init__()
        self.meter = meter
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.meter.is_inside_kernel:
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self.meter.memory.note_input(tensor)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        for tensor in outputs:
            self.meter.memory.note_result(tensor)
        self._count(func, args, kwargs, inputs, outputs, result)
        return result

    def _count(self, func, args, kwargs, inputs, outputs, result) -> None:
        name = func._schema.name.split("::")[-1]
        self.counts["syncs"] += name in WAITS_FOR_THE_GPU
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in storages]
        is_view = not func._schema.is_mutable and outputs and not fresh
        if name in MOVES_NOTHING or is_view or name == "_local_scalar_dense":
            return
        read, written = _read_and_written(func, name, args, kwargs)
        if not func._schema.is_mutable:
            written += sum(map(dense_bytes, fresh))
        if name in GATHERS:  # only the rows that are taken
            read = written + sum(map(dense_bytes, inputs[1:]))
        elif name == "nll_loss_forward":
            read = dense_bytes(inputs[1]) + inputs[1].numel() * inputs[0].element_size()
        elif name == "nll_loss_backward":
            read = sum(dense_bytes(tensor) for tensor in inputs if tensor is not inputs[1])
        self.counts["read"] += read
        self.counts["written"] += written
        self.counts["launches"] += 1
        self.counts["flops"] += _flops(func, name, args, kwargs, result)


def dense_bytes(tensor: Tensor) -> int:
    """What one pass over a tensor touches: a broadcast dimension counts once."""
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _read_and_written(func, name: str, args, kwargs) -> tuple[int, int]:
    """Bytes of the arguments that are read (each once) and of those that are written in place."""
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    reads: dict[int, Tensor] = {}
    written = 0
    for argument in func._schema.arguments:
        tensors = _tensors(given.get(argument.name))
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += sum(map(dense_bytes, tensors))
            if argument.kwarg_only or argument.name.startswith("out") or name in DOES_NOT_READ_SELF:
                continue
        if name in ADDS_A_PRODUCT and argument.name == "self" and kwargs.get("beta", 1) == 0:
            continue
        reads.update((id(tensor), tensor) for tensor in tensors)
    return sum(map(dense_bytes, reads.values())), written


def _flops(func, name: str, args, kwargs, result) -> int:
    if name == "addmm_":
        return 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    args = [value for value in args if not isinstance(value, torch.dtype)]  # the out_dtype of mm and addmm
    return formula(
        *args, **{k: v for k, v in kwargs.items() if k not in ("beta", "alpha", "out_dtype")}, out_val=result
    )
