"""nf4_quantize and nf4_dequantize: weights in 4-bit numbers, bit for bit as bitsandbytes stores them.

Arithmetic in csrc/common/nf4.h and below. NF4's 16 numbers are quantiles of the normal distribution; every 64 values share
an absolute maximum, and of those (nested) every 256 share one too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from fastpt.ops._library import Cost, nbytes, register
from fastpt.ops.adamw_8bit import dynamic_map

BLOCK = 64
SCALE_BLOCK = 256
STEPS = 65535  # bitsandbytes' CPU kernel cuts [-1, 1] into so many steps before it looks a scale up


def _code() -> Tensor:
    """NF4's numbers, sorted: 8 quantiles below zero, zero, 7 above, scaled to [-1, 1]; float32 [16].

    Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E; the outermost probability is the mean of
    1 - 1/32 and 1 - 1/30.
    """
    outermost, normal = 0.9677083, NormalDist()

    def quantiles(n: int) -> list[float]:
        return [normal.inv_cdf(p) for p in torch.linspace(outermost, 0.5, n + 1, dtype=torch.float32)[:-1].tolist()]

    values = torch.tensor([*(-q for q in quantiles(7)), 0.0, *quantiles(8)], dtype=torch.float32)
    return values.sort().values / values.max()


CODE, SCALE_MAP = _code(), dynamic_map(is_signed=True)


def reference(weight: Tensor, scales_map: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, absmax, nested): codes in pairs, the first in the upper half of its byte; without a map `nested` is empty."""
    values = weight.reshape(-1).float()
    whole = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK)
    rest = values[whole.numel() :]
    absmax = whole.abs().amax(1)
    scaled = (whole * (1 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)
    if len(rest):
        last = rest.abs().max().clamp(min=1e-38)
        absmax, scaled = torch.cat([absmax, last[None]]), torch.cat([scaled, rest / last])
    if len(scaled) % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    numbers = CODE.to(weight.device)
    codes = torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)
    packed = codes[::2] << 4 | codes[1::2]
    if scales_map is None:
        return packed, absmax, absmax.new_empty(0)
    return packed, *_nest(absmax, scales_map)


def _nest(absmax: Tensor, scales_map: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as codes of a map, and the map, their offset and the absolute maxima in one tensor."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    centred = absmax - offset
    blocks = torch.cat([centred, centred.new_zeros(-len(centred) % SCALE_BLOCK)]).view(-1, SCALE_BLOCK)
    maxima = blocks.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(1)
    scaled = (blocks * (1 / maxima)[:, None]).clamp(-1, 1)
    steps = ((scaled + 1) * 0.5 * STEPS + 0.5).nan_to_num(nan=0.0).floor() * (2 / STEPS) - 1
    right = torch.bucketize(steps, scales_map).clamp(1, len(scales_map) - 1)
    nearest = torch.where(scales_map[right] - steps < steps - scales_map[right - 1], right, right - 1)
    codes = torch.where(maxima[:, None] > 0, nearest, 0).to(torch.uint8).reshape(-1)[: len(absmax)]
    return codes, torch.cat([scales_map, offset[None], maxima])


def scales_reference(absmax: Tensor, nested: Tensor | None) -> Tensor:
    """The scales in float32, of nested ones too."""
    if nested is None:
        return absmax
    maxima = nested[SCALE_BLOCK + 1 :].repeat_interleave(SCALE_BLOCK)[: len(absmax)]
    return nested[absmax.int()] * maxima + nested[SCALE_BLOCK]


def dequantize_reference(
    packed: Tensor, absmax: Tensor, nested: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The values in float32, rounded once to dtype."""
    n = math.prod(shape)
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[:n]
    scales = scales_reference(absmax.reshape(-1), nested).repeat_interleave(BLOCK)[:n]
    return (CODE.to(packed.device)[codes.int()] * scales).to(dtype).view(*shape)


def _sizes(values: int) -> tuple[int, int, int]:
    """Lengths of packed, absmax and nested."""
    blocks = -(-values // BLOCK)
    return -(-values // 2), blocks, SCALE_BLOCK + 1 + -(-blocks // SCALE_BLOCK)


def _fake(weight, scales_map):
    bytes_, blocks, size = _sizes(weight.numel())
    kept = torch.float32 if scales_map is None else torch.uint8
    nested = weight.new_empty(0 if scales_map is None else size, dtype=torch.float32)
    return weight.new_empty(bytes_, dtype=torch.uint8), weight.new_empty(blocks, dtype=kept), nested


def _cost(weight, scales_map):
    return Cost(nbytes(weight, scales_map), nbytes(*_fake(weight, scales_map)), 17 * weight.numel())


def _cost_dequantize(packed, absmax, nested, shape, dtype):
    values = math.prod(shape)
    return Cost(nbytes(packed, absmax, nested), values * dtype.itemsize, values)


quantize = register(
    "nf4_quantize(Tensor weight, Tensor? scales_map) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
)
dequantize = register(
    "nf4_dequantize(Tensor packed, Tensor absmax, Tensor? nested, int[] shape, ScalarType dtype) -> Tensor",
    reference=dequantize_reference,
    fake=lambda packed, absmax, nested, shape, dtype: packed.new_empty(shape, dtype=dtype),
    cost=_cost_dequantize,
)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A frozen weight in NF4."""

    packed: Tensor  # uint8, ceil(N / 2) of any shape
    absmax: Tensor  # [N / 64] float32, or uint8 codes where nested
    nested: Tensor | None  # float32: the map of those codes [256], their offset, and a maximum for every 256 of them
    shape: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return nbytes(self.packed, self.absmax, self.nested)

    @property
    def rows(self) -> Tensor:
        """packed as uint8 [O, D / 2].

        Raises: RuntimeError where a row is no whole number of bytes.
        """
        if len(self.shape) != 2 or self.shape[1] % 2:
            raise RuntimeError(
                f"nf4: rows of a weight {tuple(self.shape)} are no whole bytes; it must be [O, D], D even"
            )
        return self.packed.view(self.shape[0], self.shape[1] // 2)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in dtype, in float32 before it is rounded."""
        return dequantize(self.packed, self.absmax, self.nested, self.shape, dtype)


@torch.no_grad()
def nf4_quantize(weight: Tensor, *, nested: bool = True) -> NF4Weight:
    """The nearest NF4 weight, with float32 scales or (nested) 8-bit ones: 4.5 or 4.127 bits a value.

    Shapes: any, in float32, bfloat16 or float16.
    Numerics: bit for bit bitsandbytes' CPU backend. A block that holds NaN or infinity is NaN; where scales are nested
    so is the whole weight, since they share an offset.
    Source: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
    """
    packed, absmax, kept = quantize(weight, SCALE_MAP.to(weight.device) if nested else None)
    return NF4Weight(packed, absmax, kept if nested else None, tuple(weight.shape))


@torch.no_grad()
def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight in float32, bfloat16 or float16, each value rounded once.

    Source: as nf4_quantize.
    """
    return weight.dequantize(dtype)
