"""lora_linear: q, k and v, a gated MLP, odd groups with dropout; float32 adapters too. Base weights are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import Layer, linear_group, lora_swiglu
from fastpt.ops._dropout import factors
from fastpt.ops._library import OPS, nbytes

SCALE, DROPOUT, SEEDS = 2.0, 0.25, (5, 7 << 40, 9)
LARGE_DOTS = ("lora_output", "lora_input_grad", "lora_swiglu")
SMALL_DOTS = ("lora_hidden", "lora_hidden_grad", "lora_a_grad")
NOT_STREAMING = {"lora_sum": "partial sums, a few per cent of the bytes of the kernel before it and still in L2"}


def layers(tensors: Sequence[Tensor]) -> list[Layer]:
    """From weight, lora_a, lora_b of each."""
    return [Layer(weight, None, a, b, SCALE) for weight, a, b in zip(*(tensors[i::3] for i in range(3)), strict=True)]


def group(x: Tensor, *tensors: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    return linear_group(x, layers(tensors), dropout_p=dropout_p, seeds=SEEDS[: len(tensors) // 3])


def mlp(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up, down = layers(tensors)
    return linear_group(lora_swiglu(x, gate, up), [down])[0]


def peft_layer(x: Tensor, layer: Layer, dropout_p: float = 0.0, seed: int = 0) -> Tensor:
    """PEFT's formula, the mask of dropout from the seed."""
    low = x.to(layer.lora_a.dtype)  # type: ignore[union-attr]
    if dropout_p > 0:
        low = low * factors(len(x), x.shape[1], dropout_p, seed, x.device).to(low.dtype)
    return (F.linear(x, layer.weight) + SCALE * F.linear(F.linear(low, layer.lora_a), layer.lora_b)).to(x.dtype)


def peft_group(x: Tensor, *tensors: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    return tuple(peft_layer(x, layer, dropout_p, seed) for layer, seed in zip(layers(tensors), SEEDS, strict=False))


def peft_mlp(x: Tensor, *tensors: Tensor) -> Tensor:
    gate, up, down = layers(tensors)
    return peft_layer(F.silu(peft_layer(x, gate)) * peft_layer(x, up), down)


def inputs(
    make: Make, name: str, tokens: int, widths: Sequence[tuple[int, int, int]], adapters=None, dtype=None, **options
) -> Inputs:
    """Of layers of (in, out, rank); the weights are frozen. `dtype` is that of x and the weights, by default the tested one."""
    tensors = [make(tokens, widths[0][0], grad=True, dtype=dtype)]
    for width, out, rank in widths:
        tensors.append(make(out, width, scale=width**-0.5, dtype=dtype))
        tensors.append(make(rank, width, scale=width**-0.5, grad=True, dtype=adapters))
        tensors.append(make(out, rank, grad=True, dtype=adapters))
    slow = "float32 activations are there to compare with, and every product is three of tf32" if dtype else ""
    return Inputs(name, tuple(tensors), options, not_streaming=slow)


def numbers_group(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "37x48, outputs 40, 24 and 17, ranks 16, 3 and 1", 37, [(48, 40, 16), (48, 24, 3), (48, 17, 1)])
    yield inputs(make, "37x48, dropout", 37, [(48, 40, 16), (48, 24, 3)], dropout_p=DROPOUT)
    yield inputs(make, "130x33, rank 65", 130, [(33, 70, 65)])
    yield inputs(
        make, "37x48, float32 adapters, dropout", 37, [(48, 40, 8), (48, 24, 16)], torch.float32, dropout_p=DROPOUT
    )


def real_group(make: Make) -> Iterator[Inputs]:
    qkv = [(4096, 4096, 16), (4096, 1024, 16), (4096, 1024, 16)]
    yield inputs(make, "q, k, v of Llama-3.1-8B, 4096 tokens", 4096, qkv)
    yield inputs(make, "the same, float32 adapters, dropout", 4096, qkv, torch.float32, dropout_p=DROPOUT)
    yield inputs(make, "rank 64, float32 adapters", 4096, [(4096, 4096, 64)], torch.float32)
    yield inputs(make, "all in float32, dropout", 4096, qkv, torch.float32, torch.float32, dropout_p=DROPOUT)


def traffic_group(make: Make) -> Inputs:
    return inputs(make, "512x1024 to 1024, 256 and 256, rank 16", 512, [(1024, out, 16) for out in (1024, 256, 256)])


def floor_group(x: Tensor, *tensors: Tensor, dropout_p: float = 0.0) -> tuple[int, int]:
    weights, lora_a, lora_b = (tensors[i::3] for i in range(3))
    scales, none = [SCALE] * len(weights), [None] * len(weights)
    ys = [x.new_empty(len(x), len(weight), device="meta") for weight in weights]
    xas = [a.new_empty(len(x), len(a), device="meta") for a in lora_a]
    options = scales, dropout_p, SEEDS[: len(weights)]
    wants = [False, False, True, True] * len(weights)
    return (
        OPS["lora_linear"].cost(x, weights, none, lora_a, lora_b, *options).bytes,
        OPS["lora_linear_backward"].cost(ys, x, weights, lora_a, lora_b, xas, *options, True, wants).bytes,
    )


def widths_of_mlp(width: int, inner: int) -> list[tuple[int, int, int]]:
    return [(width, inner, 16), (width, inner, 16), (inner, width, 16)]


def numbers_mlp(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "37x48 to 70", 37, widths_of_mlp(48, 70))
    yield inputs(make, "37x33 to 65, float32 adapters", 37, widths_of_mlp(33, 65), torch.float32)


def real_mlp(make: Make) -> Iterator[Inputs]:
    yield inputs(make, "the MLP of Llama-3.1-8B, 4096 tokens", 4096, widths_of_mlp(4096, 14336))
    yield inputs(make, "the same, float32 adapters", 4096, widths_of_mlp(4096, 14336), torch.float32)
    yield inputs(make, "all in float32", 4096, widths_of_mlp(4096, 14336), torch.float32, torch.float32)


def traffic_mlp(make: Make) -> Inputs:
    return inputs(make, "512x1024 to 2816, rank 16", 512, widths_of_mlp(1024, 2816))


def floor_mlp(x: Tensor, *tensors: Tensor) -> tuple[int, int]:
    """As for the peers' figures: gate and up are outputs that backward needs, h is neither."""
    weights, adapters = tensors[::3], [t for i, t in enumerate(tensors) if i % 3]
    inner = 2 * len(x) * len(weights[0]) * x.element_size()  # gate and up
    forward = 2 * nbytes(x) + nbytes(*tensors) + inner
    hiddens = sum(len(x) * len(a) * a.element_size() for a in tensors[1::3])
    return forward, 3 * nbytes(x) + nbytes(*tensors) + inner + hiddens + sum(4 * t.numel() for t in adapters)


def case(
    name: str, function: Callable, reference: Callable, parts: tuple, bars: tuple, launches: tuple[int, int]
) -> Case:
    numbers, real, traffic, floor = parts
    return Case(
        op="lora_linear",
        name=name,
        function=function,
        reference=reference,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(
            forward=bars[0],
            backward=bars[1],
            launches=launches,
            tensor_cores=LARGE_DOTS,
            gemms=LARGE_DOTS,  # the peers call torch's GEMMs for these
            small_dots=SMALL_DOTS,
            not_streaming=NOT_STREAMING,
        ),
    )


CASES = [
    case("lora qkv", group, peft_group, (numbers_group, real_group, traffic_group, floor_group), (1.6, 2.6), (4, 9)),
    case("lora mlp", mlp, peft_mlp, (numbers_mlp, real_mlp, traffic_mlp, floor_mlp), (1.5, 2.5), (6, 12)),
]
