"""What becomes of the tensors that a block saves for backward: kept, computed again, or moved off the device until then.

A policy sits on the layers of one model, at the place that transformers has for checkpointing, and what it does lives in the
graph of one call: no globals, so two models, or two graphs of one, do not know of each other. Offloaded tensors of a GPU go to
pinned memory on a stream of their own, those of the CPU to a file that has no name. The copies are the copy engine's or the
kernel's work either way, so plain torch streams do here what C++ would.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpt.errors import TrainingError

Policy = Literal["keep", "recompute", "offload"]
SMALLEST = 1 << 16  # bytes: what is smaller stays where it is


def set_policy(model: nn.Module, policy: Policy, *, offload: Offload | None = None) -> int:
    """Set what every block of a model does with its activations in training; returns how many blocks there are.

    `offload`: where they go (default: pinned memory of a GPU's tensors, a file in the system's folder for temporary ones).
    """
    if policy != "offload":
        offload = None
    elif offload is None:
        offload = Offload()
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing") and _is_layer(module)]
    for layer in layers:
        layer.gradient_checkpointing = policy != "keep"  # type: ignore[assignment]
        layer._gradient_checkpointing_func = recomputed if offload is None else _Offloaded(offload, layer)  # type: ignore
    return len(layers)


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def recomputed(function: Callable, *args: Any) -> Any:
    """function(*args), saving its arguments alone; a fused block does that itself and leaves out its last product."""
    block = getattr(function, "recomputed", None)
    return checkpoint(function, *args, use_reentrant=False) if block is None else block(*args)


class _Offloaded:
    """What a layer calls its forward through."""

    def __init__(self, offload: Offload, layer: nn.Module):
        self.offload, self.layer = offload, weakref.ref(layer)

    def __call__(self, function: Callable, *args: Any) -> Any:
        layer = self.layer()
        own = [] if layer is None else [*layer.parameters(), *layer.buffers()]
        with self.offload.saving(_tensors_of((own, getattr(function, "args", ()), getattr(function, "keywords", {})))):
            return function(*args)

    def __deepcopy__(self, memo: dict) -> _Offloaded:
        copy = memo.get(id(self.layer()), self.layer())
        return _Offloaded(self.offload, copy)


def _tensors_of(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors_of(child)


class Offload:
    """Where offloaded tensors are until backward; one for a model, so that buffers and file are used again."""

    def __init__(self, directory: str | Path | None = None):
        self.directory = directory
        self._disk: Disk | None = None
        self._pinned: dict[torch.device, Pinned] = {}

    def saving(self, shared: Iterable[Tensor]) -> Any:
        """A context in which what autograd saves is moved away, but not `shared`: weights, and tables of all layers."""
        stay = {t.untyped_storage().data_ptr() for t in shared}
        groups: dict[torch.device, Any] = {}

        def pack(tensor: Tensor) -> Any:
            is_small = tensor.numel() * tensor.element_size() < SMALLEST
            if is_small or tensor.untyped_storage().data_ptr() in stay or tensor.device.type not in ("cpu", "cuda"):
                return tensor
            if tensor.device not in groups:
                groups[tensor.device] = self._store(tensor.device).group()
            return groups[tensor.device].put(tensor)

        return torch.autograd.graph.saved_tensors_hooks(
            pack, lambda held: held if isinstance(held, Tensor) else held.get()
        )

    def _store(self, device: torch.device) -> Any:
        if device.type == "cuda":
            if device not in self._pinned:
                self._pinned[device] = Pinned(device)
            return self._pinned[device]
        if self._disk is None:
            self._disk = Disk(self.directory)
        return self._disk


class Disk:
    """An unnamed file: written as tensors come, mapped into memory when they are asked for."""

    def __init__(self, directory: str | Path | None = None):
        self.place = str(directory or tempfile.gettempdir())
        os.makedirs(self.place, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=self.place, prefix="fastpt-offload-")  # noqa: SIM115  lives as long as this
        self.free: defaultdict[int, list[int]] = defaultdict(list)  # bytes -> places in the file
        self.end = 0

    def group(self) -> Disk:
        return self

    def put(self, tensor: Tensor) -> OnDisk:
        region = Region(self, -(-tensor.numel() * tensor.element_size() // mmap.ALLOCATIONGRANULARITY))
        data = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self.file.fileno(), data[written:], region.offset + written)
        except OSError as error:
            raise TrainingError(
                f"offload: {self.place} took {written} of {len(data)} bytes ({error.strerror}); make room there, or set "
                'activations="recompute"'
            ) from error
        return OnDisk(region, tensor.shape, tensor.dtype)


class Region:
    """A stretch of the file, given back when nobody needs it any more."""

    def __init__(self, disk: Disk, pages: int):
        self.disk, self.bytes = disk, pages * mmap.ALLOCATIONGRANULARITY
        free = disk.free[self.bytes]
        self.offset = free.pop() if free else disk.end
        disk.end = max(disk.end, self.offset + self.bytes)

    def __del__(self) -> None:
        self.disk.free[self.bytes].append(self.offset)


class _Mapping(mmap.mmap):
    """Keeps its region as long as a tensor lies on it."""

    region: Region


class OnDisk:
    def __init__(self, region: Region, shape: torch.Size, dtype: torch.dtype):
        self.region, self.shape, self.dtype = region, shape, dtype

    def get(self) -> Tensor:
        region = self.region
        length = self.shape.numel() * self.dtype.itemsize
        mapping = _Mapping(region.disk.file.fileno(), length, access=mmap.ACCESS_COPY, offset=region.offset)
        mapping.region = region
        return torch.from_numpy(np.frombuffer(mapping, np.uint8)).view(self.dtype).view(self.shape)


class Pinned:
    """Pinned buffers and a stream of one GPU: copies out run beside forward, copies back one block ahead of backward."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.free: defaultdict[tuple, list[Tensor]] = defaultdict(list)
        self.latest: Any = lambda: None  # weak reference to the group of the block before
        self.leaving: list[torch.cuda.Event] = []  # of the last two blocks

    def group(self) -> PinnedGroup:
        """What one block saves. It starts when the copies of the block before the last are done: two blocks are under way."""
        if len(self.leaving) == 2:
            torch.cuda.current_stream(self.device).wait_event(self.leaving.pop(0))
        made = PinnedGroup(self, self.latest())
        self.latest = weakref.ref(made)
        return made


class PinnedGroup:
    def __init__(self, store: Pinned, before: PinnedGroup | None):
        self.store, self.held = store, []  # type: Pinned, list[weakref.ref[OnHost]]
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.left = torch.cuda.Event()
        store.leaving.append(self.left)

    def put(self, tensor: Tensor) -> OnHost:
        store, key = self.store, (tensor.shape, tensor.dtype)
        free = store.free[key]
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        store.stream.wait_stream(torch.cuda.current_stream(store.device))
        with torch.cuda.stream(store.stream):
            buffer.copy_(tensor.detach(), non_blocking=True)
            self.left.record(store.stream)
        tensor.record_stream(store.stream)
        held = OnHost(self, buffer)
        self.held.append(weakref.ref(held))
        return held

    def fetch(self) -> None:
        """Start the copies back of all that is not there yet."""
        for one in filter(None, (reference() for reference in self.held)):
            one.start()


class OnHost:
    def __init__(self, group: PinnedGroup, buffer: Tensor):
        self.group, self.buffer, self.arriving = group, buffer, None  # type: PinnedGroup, Tensor, Any

    def start(self) -> None:
        if self.arriving is None:
            store = self.group.store
            with torch.cuda.stream(store.stream):  # behind the copy out: one stream keeps the order
                tensor = self.buffer.to(store.device, non_blocking=True)
                self.arriving = tensor, store.stream.record_event()

    def get(self) -> Tensor:
        self.group.fetch()
        (tensor, event), self.arriving = self.arriving, None
        if (before := self.group.before()) is not None:
            before.fetch()
        current = torch.cuda.current_stream(self.group.store.device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor

    def __del__(self) -> None:
        # A later copy into the buffer is on the same stream, so it comes after any copy out of it.
        self.group.store.free[self.buffer.shape, self.buffer.dtype].append(self.buffer)
