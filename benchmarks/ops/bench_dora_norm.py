"""dora_norm at SmolLM2-135M's and Llama-3.2-1B's projections, rank 16 in float32; eager forms the merged weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Case
from fastpt.ops import dora_norm
from fastpt.ops._library import OPS
from fastpt.ops.dora_norm import reference

RANK, SCALE = 16, 2.0


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    for out, width in [(8, 16)] if toy else [(576, 576), (1536, 576), (2048, 2048), (8192, 2048)]:
        weight = torch.randn(out, width, device=device, dtype=dtype)
        a, b = torch.randn(RANK, width, device=device) / 4, torch.randn(out, RANK, device=device)
        functions = {"fastpt": dora_norm, "eager": reference}
        calls = {name: lambda f=f, w=weight, a=a, b=b: f(w, a, b, SCALE) for name, f in functions.items()}
        cost = OPS["dora_norm"].cost(weight, a, b, SCALE)
        yield Case("dora_norm", f"{out}x{width}", str(dtype).removeprefix("torch."), "forward", calls, cost)
