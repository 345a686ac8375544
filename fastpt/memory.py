"""How much memory this process uses and has used at most."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Resident set size now (0 where the system does not tell)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device) -> int:
    """Most memory used so far, or since forget_peak(): CUDA allocations on a GPU, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next((1024 * int(line.split()[1]) for line in status.open() if line.startswith("VmHWM:")), 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> bool:
    """Start anew what peak_bytes tells; false where the system keeps it for the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_memory() -> None:
    """Give what the allocators hold but nobody uses back to the system."""
    gc.collect()
    if (native := sys.modules.get("fastpt._C")) is not None:
        native.release_region()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the host had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def gib(count: int | float) -> str:
    """Bytes for people: 1.25 GiB, 37.2 MiB."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"
