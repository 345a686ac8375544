"""nf4 of projections of SmolLM2-135M and of an 8B model, nested scales, against bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.harness import Case
from fastpt.ops import NF4Weight, nf4_dequantize, nf4_quantize
from fastpt.ops._library import OPS
from fastpt.ops.nf4 import SCALE_MAP

SHAPES = [(1536, 576), (4096, 4096)]


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for shape in [(32, 64)] if toy else SHAPES:
        weight = torch.randn(shape, device=device, dtype=dtype) / shape[1] ** 0.5
        packed = nf4_quantize(weight)
        stored = packed.packed, packed.absmax, packed.nested
        size = "x".join(map(str, shape))
        cost = OPS["nf4_quantize"].cost(weight, SCALE_MAP)
        yield Case("nf4", f"quantise {size}", name, "forward", _quantizers(weight), cost)
        cost = OPS["nf4_dequantize"].cost(*stored, shape, dtype)
        yield Case("nf4", f"dequantise {size}", name, "forward", _dequantizers(weight, packed), cost)


def _quantizers(weight: Tensor) -> dict[str, Callable]:
    providers: dict[str, Callable] = {"fastpt": lambda: nf4_quantize(weight).packed}
    if find_spec("bitsandbytes") is not None:
        from bitsandbytes.functional import quantize_4bit

        options = {"quant_type": "nf4", "compress_statistics": True}
        providers["bitsandbytes"] = lambda: quantize_4bit(weight, **options)[0]
    return providers


def _dequantizers(weight: Tensor, packed: NF4Weight) -> dict[str, Callable]:
    providers: dict[str, Callable] = {"fastpt": lambda: nf4_dequantize(packed, weight.dtype)}
    if find_spec("bitsandbytes") is not None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        theirs = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        providers["bitsandbytes"] = lambda: dequantize_4bit(*theirs)
    return providers
