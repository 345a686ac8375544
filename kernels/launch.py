"""How a Triton kernel is launched: tile, warps and stages from a table by architecture and size, never by a search."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch_table import TABLE

# Without a GPU (the interpreter, compilation to a file) a launch is the one of this architecture with so many processors.
STAND_IN_ARCH = 90
STAND_IN_PROCESSORS = 8
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Launch:
    """One launch: `rows` x `columns` is the tile of the output, `depth` that of a product's or a loop's inner dimension."""

    rows: int = 1
    columns: int = 1
    depth: int = 1
    warps: int = 4
    stages: int = 1
    per_processor: int = 1  # programs of a persistent kernel for each streaming multiprocessor


def is_valid(launch: Launch, arch: int, *, shared_bytes: int = 0) -> bool:
    """Powers of two, warps within a block's limit, and the tiles that stages hold within the architecture's shared memory."""
    sizes = (launch.rows, launch.columns, launch.depth, launch.warps)
    return all(n > 0 and n & (n - 1) == 0 for n in sizes) and launch.warps <= 32 and shared_bytes <= SHARED_BYTES[arch]


def choose(kernel: str, size: int, device: torch.device) -> Launch:
    """The table's launch of a kernel for a size (what it measures is said where the kernel is) on a device."""
    return choose_for(kernel, size, arch_of(device))


def choose_for(kernel: str, size: int, arch: int) -> Launch:
    """The first entry whose limit is not below `size`, of the newest known architecture that is not newer than `arch`."""
    by_arch = TABLE[kernel]
    known = max((a for a in by_arch if a <= arch), default=min(by_arch))
    entries = by_arch[known]
    return Launch(**next((entry for limit, entry in entries if size <= limit), entries[-1][1]))


def arch_of(device: torch.device) -> int:
    """80 for sm_80 and so on; another 8.x, 9.x or 10.x counts as the table's nearest below."""
    if device.type != "cuda":
        return STAND_IN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return STAND_IN_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the tensor's device, whatever the current one is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_same_shape(op: str, **tensors: Tensor) -> None:
    """Raise unless all have the first one's shape and dtype: a kernel would read past the end."""
    first, *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first[1].shape or tensor.dtype != first[1].dtype:
            raise RuntimeError(
                f"{op}: {first[0]} is {list(first[1].shape)} {first[1].dtype}, {name} is {list(tensor.shape)} "
                f"{tensor.dtype}; they must be equal"
            )


def check_parameter(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    for name, parameter in parameters.items():
        if x.dim() == 0 or (parameter is not None and parameter.shape != x.shape[-1:]):
            found = "absent" if parameter is None else list(parameter.shape)
            raise RuntimeError(f"{op}: {name} is {found}, x is {list(x.shape)}; {name} must be [D] for x [..., D]")


def rows_of(x: Tensor) -> Tensor:
    """x [..., D] as rows whose values lie side by side: a view where strides allow it, as those of one projection's heads do."""
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def launch_elementwise(kernel, *tensors: Tensor, **constants) -> None:
    """Run a kernel over tensors of one shape, as many programs as the processors hold; those it writes are contiguous already."""
    n = tensors[0].numel()
    if n > 0:
        launch = choose(kernel.__name__, n, tensors[0].device)
        programs = min(-(-n // launch.columns), processors(tensors[0].device) * launch.per_processor)
        constants |= {"BLOCK": launch.columns, "STAGES": launch.stages, "num_warps": launch.warps}
        with on_device(tensors[0]):
            kernel[(programs,)](*(t.contiguous() for t in tensors), n, **constants)
