"""Count what a callable moves, without a GPU: Triton kernels in the interpreter, torch ops by a dispatch mode.

    with Meter() as meter:
        y = function(x, w)
    meter.traffic().moved / nbytes(x, w, y)

TRITON_INTERPRET=1 must be set before triton is imported. "Moved" is without any cache: every active lane of every load and
store, an atomic twice (a read and a write), and what torch ops between the kernels read and write, of which a GEMM counts
each operand once. A kernel named to the meter as a GEMM is counted like torch's; `moved_by_tile` is without that. The truth
on a GPU lies between this and `moved_once`, where every launch reads and writes each byte of a tensor once at most.
"""

from __future__ import annotations

import collections
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.evidence import interpreter
from benchmarks.evidence.traffic import hooks
from benchmarks.evidence.traffic.torch_ops import TorchOps
from benchmarks.evidence.traffic.touches import Storage, storages_of, touch
from fastpt.tracing import LiveMemory


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Traffic:
    """Counts of one metered stretch; bytes unless the name says otherwise."""

    triton_launches: int
    torch_launches: int
    host_syncs: int
    loaded: int
    stored: int
    atomic: int
    torch_read: int
    torch_written: int
    moved_once: int
    read_by_tiles: int  # by the tiles of a GEMM beyond each operand once; in `loaded`, not in `moved`
    dot_flops: int
    torch_flops: int
    peak_extra: int
    saved: int
    saved_new: int
    hazards: dict[str, int] = field(default_factory=dict)  # elements, by kind: see touches.py
    kernels: dict[str, int] = field(default_factory=dict)  # launches by name

    @property
    def launches(self) -> int:
        return self.triton_launches + self.torch_launches

    @property
    def moved_by_tile(self) -> int:
        return self.loaded + self.stored + 2 * self.atomic + self.torch_read + self.torch_written

    @property
    def moved(self) -> int:
        return self.moved_by_tile - self.read_by_tiles

    @property
    def flops(self) -> int:
        return self.dot_flops + self.torch_flops


class Meter:
    """A context that counts. One at a time; kernels with lanes outside their tensors raise IndexError before the access.

    `gemms` are names of kernels that multiply two large matrices by tiles.
    """

    def __init__(self, gemms: Collection[str] = ()) -> None:
        self.gemms = gemms
        self.counts: collections.Counter[str] = collections.Counter()
        self.by_tensor: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.kernels: collections.Counter[str] = collections.Counter()
        self.memory = LiveMemory()
        self.torch_ops = TorchOps(self)
        self.is_inside_kernel = False
        self._storages: list[Storage] = []
        self._kernel = ""
        self._program = self._first_program = 0
        self._saved: dict[int, tuple[int, bool]] = {}

    def __enter__(self) -> Meter:
        interpreter.install()
        hooks.install()
        assert hooks.active() is None, "one meter at a time"
        hooks.activate(self)
        self.torch_ops.__enter__()
        self._saved_hooks = torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda kept: kept)
        self._saved_hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._saved_hooks.__exit__(*error)
        self.torch_ops.__exit__(*error)
        hooks.activate(None)

    def _note_saved(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._saved[storage._cdata] = storage.nbytes(), self.memory.is_new(storage)
        # A result saved as it is would keep its own graph alive.
        return tensor.detach() if tensor.requires_grad and not tensor.is_leaf else tensor

    # What hooks.py reports of the interpreter.

    def begin_launch(self, kernel: str, tensors: list[tuple[str, Tensor]]) -> None:
        self.kernels[kernel] += 1
        self._kernel, self._storages = kernel, storages_of(tensors)
        self._first_program = self._program + 1

    def begin_program(self) -> None:
        self._program += 1

    def touch(self, kind: str, pointers, mask, item_bytes: int) -> None:
        outside = touch(self._storages, kind, pointers, mask, item_bytes, self._program, self._first_program)
        if outside:
            program = self._program - self._first_program
            raise IndexError(
                f"{outside} lanes of a {kind} in {self._kernel}, program {program}, are outside every tensor"
            )

    def end_launch(self) -> None:
        for storage in self._storages:
            storage.close(self._first_program)
            self.by_tensor[storage.name].update(storage.counts)
            self.counts.update(storage.counts)
            if self._kernel in self.gemms:
                self.counts["read by tiles"] += storage.counts["load"] - storage.counts["loaded once"]
        self._storages = []

    def saved_beyond(self, outputs: list[Tensor]) -> int:
        """Bytes made here and kept for backward that are no output's own."""
        theirs = {output.untyped_storage()._cdata for output in outputs}
        return sum(size for key, (size, is_new) in self._saved.items() if is_new and key not in theirs)

    def traffic(self) -> Traffic:
        counts, ops = self.counts, self.torch_ops.counts
        return Traffic(
            triton_launches=self.kernels.total(),
            torch_launches=ops["launches"],
            host_syncs=ops["syncs"],
            loaded=counts["load"],
            stored=counts["store"],
            atomic=counts["atomic"],
            torch_read=ops["read"],
            torch_written=ops["written"],
            moved_once=counts["loaded once"] + counts["stored once"] + ops["read"] + ops["written"],
            read_by_tiles=counts["read by tiles"],
            dot_flops=counts["flops"],
            torch_flops=ops["flops"],
            peak_extra=self.memory.peak,
            saved=sum(size for size, _ in self._saved.values()),
            saved_new=sum(size for size, is_new in self._saved.values() if is_new),
            hazards={kind: counts[kind] for kind in ("ww", "rw", "wr") if counts[kind]},
            kernels=dict(self.kernels),
        )
