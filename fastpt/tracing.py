"""Run code at real sizes without computing, and see what memory it would take: nothing is written, so it costs neither.

`NothingComputed` allocates results and never touches them; `LiveMemory` counts what is alive; `MemoryTrace` puts the two
together with the workspace that the ops declare.
"""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastpt.ops._library import OPS


class NothingComputed(TorchDispatchMode):
    """Floating results have the right shape and are never written; integers and views are what they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if _is_view(func) or not any(t.is_floating_point() for t in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
            return given[written[0]] if len(written) == 1 else tuple(given[name] for name in written)
        on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, {**kwargs}))
        if "device" in on_meta[1]:
            on_meta[1]["device"] = torch.device("meta")
        shapes = func(*on_meta[0], **on_meta[1])
        return tree_map_only(torch.Tensor, _allocated, shapes)


def _is_view(func) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or not returns


def _allocated(meta: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="cpu")


class LiveMemory:
    """Bytes alive beyond what was there when the meter started, by storage."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._is_new: dict[int, bool] = {}  # by storage: made while metered, or there before

    def note_input(self, tensor: Tensor) -> None:
        self._note(tensor.untyped_storage(), 0, False)

    def note_result(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if self._note(storage, size, True):
            self.live += size
            self.peak = max(self.peak, self.live)

    def _note(self, storage: torch.UntypedStorage, size: int, is_new: bool) -> bool:
        """Whether it was not known: the key of one that is gone may be that of another."""
        key = storage._cdata
        if key in self._is_new:
            return False
        self._is_new[key] = is_new
        weakref.finalize(storage, self._note_freed, key, size)
        return True

    def _note_freed(self, key: int, size: int) -> None:
        if self._is_new.pop(key, False):
            self.live -= size

    def is_new(self, storage: torch.UntypedStorage) -> bool:
        return self._is_new.get(storage._cdata, False)


class MemoryTrace(TorchDispatchMode):
    """The most memory that is in use at once in what runs under it (inside of NothingComputed), and where that is."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = LiveMemory()
        self.gradients = 0  # bytes of parameters' gradients alive: whoever runs the step counts them
        self.peak, self.steps = Peak(), 0
        self.largest: dict[str, int] = {}  # op -> the most workspace it took
        self.before: dict[str, int] = {}  # op -> bytes alive before its first call

    @property
    def live(self) -> int:
        return self.memory.live

    def new_step(self) -> None:
        """Forget the step before, not what is alive after it."""
        self.peak, self.gradients, self.before = Peak(), 0, {}
        self.steps += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and _is_called_by_autograd():
            func = torch.ops.aten.add_.Tensor  # where no mode is watching, autograd sums gradients in place
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.memory.note_input(leaf)
        op = OPS.get(func._opname) if func.namespace == "fastpt" else None
        if op is not None:
            self.before.setdefault(op.name, self.live)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.memory.note_result(leaf)
        workspace = 0 if op is None or op.workspace is None else op.workspace(*args, **kwargs)
        if op is not None:
            self.largest[op.name] = max(self.largest.get(op.name, 0), workspace)
        if self.live + workspace > self.peak.total:
            self.peak = Peak(self.live + workspace, self.gradients, workspace, func._opname)
        return result


def _is_called_by_autograd() -> bool:
    """Not by a function that it runs: nothing but torch's own wrappers lies between the mode and the engine."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("_fn", "inner") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


class Peak:
    """Bytes in use at the worst moment: all, those of gradients, the workspace of the op that ran."""

    def __init__(self, total: int = 0, gradients: int = 0, workspace: int = 0, op: str = "") -> None:
        self.total, self.gradients, self.workspace, self.op = total, gradients, workspace, op

    def __repr__(self) -> str:
        return f"Peak({self.total}, gradients={self.gradients}, workspace={self.workspace}, op={self.op!r})"
