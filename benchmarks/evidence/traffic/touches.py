"""Which bytes of which tensor a kernel's loads and stores touch, and which of them two programs of a launch fight over.

The interpreter runs programs one after the other, so a race never shows in its results. Here each element remembers the last
program that read it and the last that wrote it, which finds, within one launch:
  ww  an element stored by two programs,
  rw  an element loaded after another program stored it,
  wr  an element stored after another program loaded it (of several readers only the last is remembered).
"""

from __future__ import annotations

import bisect
import collections

import numpy as np
from torch import Tensor

NOBODY = -1


class Storage:
    """One storage that a launch was given, with who touched which of its elements last."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.stop = start, start + size
        self.names: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self._grain = 0  # bytes of one entry of the maps: the smallest element size seen
        self._reader = self._writer = np.empty(0, np.int64)

    @property
    def name(self) -> str:
        return "+".join(sorted(set(self.names)))

    def account(self, kind: str, at: np.ndarray, item: int, program: int, first_program: int) -> None:
        """Count one load, store or atomic of addresses that all lie inside."""
        self.counts[kind] += at.size * item
        self._use_grain(item)
        entries = self._entries(at, item)
        reader, writer = self._reader[entries], self._writer[entries]
        others_wrote = np.count_nonzero((writer >= first_program) & (writer != program))
        if kind == "load":
            self.counts["rw"] += others_wrote
            self._reader[entries] = program
            return
        if kind == "store":
            self.counts["ww"] += others_wrote
            self.counts["wr"] += np.count_nonzero((reader >= first_program) & (reader != program))
        self._writer[entries] = program

    def close(self, first_program: int) -> None:
        """At the end of a launch: bytes touched at all, then forget."""
        for name, last in (("loaded once", self._reader), ("stored once", self._writer)):
            self.counts[name] += int(np.count_nonzero(last >= first_program)) * self._grain
        self.counts = collections.Counter({name: int(count) for name, count in self.counts.items() if count})
        self._reader = self._writer = np.empty(0, np.int64)

    def _use_grain(self, item: int) -> None:
        if self._grain == 0:
            self._grain = item
            entries = -(-(self.stop - self.start) // item)
            self._reader, self._writer = (np.full(entries, NOBODY, np.int64) for _ in range(2))
        elif item % self._grain:
            grain = int(np.gcd(item, self._grain))
            self._reader, self._writer = (
                np.repeat(last, self._grain // grain) for last in (self._reader, self._writer)
            )  # fmt: skip
            self._grain = grain

    def _entries(self, at: np.ndarray, item: int) -> np.ndarray | slice:
        """The maps' entries under the addresses; a slice where they are one dense ascending run (no two lanes the same)."""
        per_item, first = item // self._grain, int(at[0])
        if int(at[-1]) - first == (at.size - 1) * item and bool(np.all(np.diff(at.view(np.int64)) == item)):
            start = (first - self.start) // self._grain
            return slice(start, start + at.size * per_item)
        entries = ((np.unique(at) - np.uint64(self.start)) // np.uint64(self._grain)).astype(np.int64)
        return entries if per_item == 1 else (entries[:, None] + np.arange(per_item)).reshape(-1)


def storages_of(tensors: list[tuple[str, Tensor]]) -> list[Storage]:
    """The storages behind a launch's arguments in order of address, each once."""
    found: dict[int, Storage] = {}
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0:
            found.setdefault(storage.data_ptr(), Storage(storage.data_ptr(), storage.nbytes())).names.append(name)
    return [found[start] for start in sorted(found)]


def touch(
    storages: list[Storage], kind: str, pointers: np.ndarray, mask: np.ndarray | None, item: int,
    program: int, first_program: int,
) -> int:  # fmt: skip
    """Account the active lanes of one access; returns how many of them lie outside every storage."""
    at = _active(pointers, mask)
    if at.size == 0:
        return 0
    starts = [storage.start for storage in storages]
    low, high = int(at.min()), int(at.max())
    whose = bisect.bisect_right(starts, low) - 1
    if whose >= 0 and high + item <= storages[whose].stop:  # nearly always one storage
        storages[whose].account(kind, at, item, program, first_program)
        return 0
    outside = 0
    lanes = np.searchsorted(np.asarray(starts, np.uint64), at, side="right").astype(np.int64) - 1
    for whose in np.unique(lanes):
        part = at[lanes == whose]
        inside = part[part + np.uint64(item) <= np.uint64(storages[whose].stop)] if whose >= 0 else part[:0]
        outside += part.size - inside.size
        if inside.size:
            storages[whose].account(kind, inside, item, program, first_program)
    return outside


def _active(pointers: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is not None:
        mask = np.asarray(mask).astype(bool)
        if not mask.all():
            pointers = np.broadcast_to(pointers, mask.shape)[mask]
    return pointers.reshape(-1)
