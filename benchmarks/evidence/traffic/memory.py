"""Bytes alive beyond what was there when the meter started, by storage."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class LiveMemory:
    def __init__(self) -> None:
        self.live = self.peak = 0
        self._is_new: dict[int, bool] = {}  # by storage: made while metered, or there before

    def note_input(self, tensor: Tensor) -> None:
        self._is_new.setdefault(tensor.untyped_storage()._cdata, False)

    def note_result(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._is_new:
            return
        size = storage.nbytes()
        self._is_new[storage._cdata] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._note_freed, storage._cdata, size)

    def _note_freed(self, key: int, size: int) -> None:
        if self._is_new.pop(key, False):
            self.live -= size

    def is_new(self, storage: torch.UntypedStorage) -> bool:
        return self._is_new.get(storage._cdata, False)
