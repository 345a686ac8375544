"""One place that talks to torch.library: schema, reference, fake, cost and device kernels of every op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

LIBRARY = torch.library.Library("fastpt", "DEF")


def _load_native() -> str | None:
    """Import fastpt._C, which registers the C++ CPU kernels; return why not, or None when they are in place."""
    if find_spec("fastpt._C") is None:  # absent is fine, broken is an error
        return "fastpt._C was not built (no C++ compiler at install time?): pip install --no-build-isolation -e ."
    import fastpt._C as native

    built, running = native.build_info()["torch"], ".".join(torch.__version__.split(".")[:2])
    if built != running:
        raise ImportError(
            f"fastpt._C was built for torch {built}, this is torch {torch.__version__}: "
            "reinstall fastpt (pip install --no-build-isolation --force-reinstall --no-deps fastpt)"
        )
    return None


@dataclass(frozen=True)
class Cost:
    """What one call of an op must move and compute at least.

    Units: bytes_read and bytes_written count each input and output once (no cache); flops counts a multiply-add as 2.
    """

    bytes_read: int
    bytes_written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written, self.flops + other.flops
        )


@dataclass(frozen=True)
class Op:
    """One registered op: how `fastpt doctor`, the benchmarks and the tests find it."""

    name: str
    overload: Callable[..., Any]
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    triton: Callable[..., Any] | None
    triton_launcher: str | None  # "module:function"
    workspace: Callable[..., int] | None


OPS: dict[str, Op] = {}
SERVED_BY_TRITON: set[str] = set()  # on CUDA


def register(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    cost: Callable[..., Cost],
    triton: str | None = None,
    workspace: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define `fastpt::<name>` from its schema and return the overload to call.

    `reference` serves every device that has no kernel of its own. A C++ kernel claims the CPU or CUDA by
    TORCH_LIBRARY_IMPL(fastpt, CPU, m). `triton` is "module:function", imported on its first call with CUDA tensors; where
    CUDA C++ was built and has the op, it serves it instead.
    `fake`, `cost` and `workspace` take the op's arguments; `fake` returns empty outputs, `cost` a `Cost`, `workspace` the
    bytes that the C++ kernel needs for a moment beyond inputs and outputs (None: next to nothing).
    """
    name = LIBRARY.define(schema).split("::")[-1]
    LIBRARY.impl(name, _past_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpt::{name}", fake, lib=LIBRARY)
    kernel = None if triton is None else _past_autocast(_by_dtype(triton, reference))
    if kernel is not None and not _has_kernel(name, "CUDA"):
        LIBRARY.impl(name, kernel, "CUDA")
        SERVED_BY_TRITON.add(name)
    overload = getattr(torch.ops.fastpt, name).default
    OPS[name] = Op(name, overload, reference, cost, kernel, triton, workspace)
    return overload


def _past_autocast(function: Callable) -> Callable:
    """Autocast stays on inside a kernel written in Python and would change the dtypes that it chose."""

    def call(*args, **kwargs):
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return call


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast hands them to a GEMM: in its dtype where it is on, else as they are."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def gradient_dtype(parameter: torch.Tensor | None) -> torch.dtype | None:
    """The dtype to store a parameter's gradient in, so that autograd has nothing to cast; None where it wants none.

    To be asked in forward: checkpointing's backward sees copies, which do not know the parameter's grad_dtype.
    """
    if parameter is None or not parameter.requires_grad:
        return None
    if torch.compiler.is_compiling():  # cannot read a grad_dtype; the cast is part of its graph
        return torch.promote_types(parameter.dtype, torch.float32)
    if not parameter.is_leaf:
        return parameter.dtype
    return parameter.grad_dtype or torch.promote_types(parameter.dtype, torch.float32)


def _by_dtype(triton: str, reference: Callable) -> Callable:
    """The Triton kernel, but for float64 the reference."""
    kernel = _imported_on_first_call(triton)

    def call(*args, **kwargs):
        return (reference if _has_double(args) else kernel)(*args, **kwargs)

    return call


def _has_double(args: Any) -> bool:
    """On every call of a GPU op: no pytree here."""
    if isinstance(args, torch.Tensor):
        return args.dtype == torch.float64
    return isinstance(args, (tuple, list)) and any(_has_double(arg) for arg in args)


def _imported_on_first_call(target: str) -> Callable:
    module, function = target.split(":")
    return lambda *args, **kwargs: getattr(import_module(module), function)(*args, **kwargs)


def serving_kernel(name: str, device_type: str) -> str:
    """What serves `fastpt::<name>` on a device type: "C++", "Triton" or "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or not _has_kernel(name, key):
        return "reference"
    return "Triton" if key == "CUDA" and name in SERVED_BY_TRITON else "C++"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpt::{name}", key)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


MISSING_NATIVE = _load_native()
