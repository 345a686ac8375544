"""The Triton interpreter with the numbers and the strictness of the compiler, and fastpt's ops served by it on CPU tensors.

TRITON_INTERPRET=1 must be set before triton is imported: `@triton.jit` reads it. What triton 3.9's interpreter does
otherwise is said in the module that sets it right.
"""

from __future__ import annotations

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.evidence.interpreter import products
from fastpt.ops._library import OPS

_installed: set[str] = set()


def install() -> None:
    """Make the interpreter compute and refuse what the compiler does, before a kernel first runs."""
    from benchmarks.evidence.interpreter import bf16, builtins, strict, sums

    if not _installed:  # once: the meter wraps what it finds in place
        _installed.update(part.__name__ for part in (builtins, bf16, sums, strict))
        for part in (builtins, bf16, sums, strict):
            part.install()
    builtins.install_libdevice()  # each time: a module imported since then may hold the stubs


class TritonServes(TorchDispatchMode):
    """Within it the Triton kernels of fastpt's ops serve CPU tensors; ops without one stay as they are.

    Interpreted where TRITON_INTERPRET=1, else whatever stands in for the driver decides (evidence/compiled.py).
    """

    def __init__(self) -> None:
        super().__init__()
        products.install()
        if triton.knobs.runtime.interpret:
            install()
        self.served: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = OPS.get(func.name().removeprefix("fastpt::").split(".")[0]) if func.namespace == "fastpt" else None
        if op is None or op.triton is None or not _are_plain(args, kwargs):
            return func(*args, **kwargs)
        self.served.add(op.name)
        return op.triton(*args, **kwargs)


def _are_plain(*arguments) -> bool:
    """Fake and functional tensors hold no numbers."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
