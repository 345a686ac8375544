"""torch.mm and torch.addmm with `out_dtype` on CPU tensors, which torch has for CUDA alone: kernels run there call them."""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY: list[torch.library.Library] = []


def _mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.to(out_dtype) @ b.to(out_dtype)


def _addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha)


def install() -> None:
    """Once per process; where torch has them it is an error to take their place, and there is no need."""
    if _LIBRARY or torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "CPU"):
        return
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", _mm, "CPU")
    library.impl("addmm.dtype", _addmm, "CPU")
    library.impl("mm.dtype_out", lambda *args, out, **kwargs: out.copy_(_mm(*args, **kwargs)), "CPU")
    library.impl("addmm.dtype_out", lambda *args, out, **kwargs: out.copy_(_addmm(*args, **kwargs)), "CPU")
    _LIBRARY.append(library)
