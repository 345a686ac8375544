"""The places where triton's interpreter launches, starts a program, touches memory and multiplies, reported to the meter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Grid = interpreter.GridExecutor
_meter: Any = None
_installed: set[str] = set()


def active() -> Any:
    return _meter


def activate(meter: Any) -> None:
    global _meter
    _meter = meter


def install() -> None:
    """Once per process, after the interpreter's own fixes: these wrap what they find."""
    if _installed:
        return
    _installed.add("installed")
    _hook_launches()
    _hook_memory()
    _hook_dots()


def _hook_launches() -> None:
    launch, init, set_index = Grid.__call__, Grid._init_args_hst, Builder.set_grid_idx

    def launch_reported(self, *args, **kwargs):
        if _meter is None:
            return launch(self, *args, **kwargs)
        _meter.is_inside_kernel = True  # the interpreter's own torch ops are not the program's
        try:
            return launch(self, *args, **kwargs)
        finally:
            _meter.is_inside_kernel = False
            _meter.end_launch()

    def init_reported(self, args_dev, kwargs):
        positional, named = init(self, args_dev, kwargs)
        if _meter is not None:
            arguments = [*zip(self.arg_names, positional, strict=False), *named.items()]
            tensors = [found for name, value in arguments for found in _tensors(name, value)]
            tensors += [("addressed", tensor) for value in args_dev for tensor in getattr(value, "points_to", ())]
            _meter.begin_launch(self.fn.__name__, tensors)
        return positional, named

    def set_index_reported(self, x, y, z):
        if _meter is not None:
            _meter.begin_program()
        return set_index(self, x, y, z)

    Grid.__call__, Grid._init_args_hst, Builder.set_grid_idx = launch_reported, init_reported, set_index_reported


def _tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, (tuple, list)):
        return [found for i, item in enumerate(value) for found in _tensors(f"{name}.{i}", item)]
    if isinstance(value, interpreter.TensorDescriptor) or (hasattr(value, "data_ptr") and hasattr(value, "base")):
        return _tensors(name, value.base)
    return []


def _item_bytes(pointers) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _data(mask) -> np.ndarray | None:
    return None if mask is None else mask.data


def _hook_memory() -> None:
    """Plain, descriptor and atomic accesses all pass through these four."""
    load, store = Builder.create_masked_load, Builder.create_masked_store
    add, swap = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def load_reported(self, pointers, mask, *rest, **kwargs):
        if _meter is not None:
            _meter.touch("load", pointers.data, _data(mask), _item_bytes(pointers))
        return load(self, pointers, mask, *rest, **kwargs)

    def store_reported(self, pointers, value, mask, *rest, **kwargs):
        if _meter is not None:
            _meter.touch("store", pointers.data, _data(mask), _item_bytes(pointers))
        return store(self, pointers, value, mask, *rest, **kwargs)

    def add_reported(self, op, pointers, value, mask, *rest, **kwargs):
        if _meter is not None:
            _meter.touch("atomic", pointers.data, _data(mask), _item_bytes(pointers))
        return add(self, op, pointers, value, mask, *rest, **kwargs)

    def swap_reported(self, pointers, *rest, **kwargs):
        if _meter is not None:
            _meter.touch("atomic", pointers.data, None, _item_bytes(pointers))
        return swap(self, pointers, *rest, **kwargs)

    Builder.create_masked_load, Builder.create_masked_store = load_reported, store_reported
    Builder.create_atomic_rmw, Builder.create_atomic_cas = add_reported, swap_reported


def _hook_dots() -> None:
    dot = Builder.create_dot

    def dot_reported(self, a, b, accumulator, *rest, **kwargs):
        if _meter is not None:
            _meter.counts["flops"] += 2 * accumulator.data.size * a.data.shape[-1]
        return dot(self, a, b, accumulator, *rest, **kwargs)

    Builder.create_dot = dot_reported
