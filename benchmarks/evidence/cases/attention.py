"""attention: masks, packs, groups, dropout; Llama's and Gemma's head sizes; the shape of the peers' figures, MHA and GQA 4:1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import attention
from fastpt.ops._library import OPS
from fastpt.ops.attention import _kept, _pairs, _sequences, _visible


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options) -> Tensor:
    return attention(q, k, v, sinks=sinks, **options)


KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def definition(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, dropout_p: float = 0.0, seed: int = 0, **options
) -> Tensor:
    """transformers' eager attention, one sequence at a time: products in q's dtype, softmax in float32."""
    cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale = _tail(q, **options)
    parts = []
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        query = q[rows].transpose(0, 1)
        key, value = (x[keys].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        scores = query @ key.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_visible(q[rows], k[keys], causal, window), float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, len(q[rows]), 1)], -1)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        weights = weights[..., : len(key[0])]
        if dropout_p > 0:
            weights = weights * _kept(q, k, rows, weights, dropout_p, seed).flatten(0, 1)
        parts.append((weights @ value).transpose(0, 1))
    return torch.cat(parts)


def _tail(q, *, cu_seqlens_q=None, cu_seqlens_k=None, causal=True, window=None, softcap=None, scale=None) -> tuple:
    """The raw op's arguments after k and v."""
    return cu_seqlens_q, cu_seqlens_k, causal, window, softcap, q.shape[2] ** -0.5 if scale is None else scale


def _inputs(
    make: Make, name: str, tokens: int, heads: int, heads_k: int, dim: int, dtype: torch.dtype | None = None, **options
) -> Inputs:
    q = make(tokens, heads, dim, grad=True, dtype=dtype)
    k, v = (make(tokens, heads_k, dim, grad=True, dtype=dtype) for _ in range(2))
    return Inputs(f"{tokens}x{heads}:{heads_k}x{dim}{name}", (q, k, v), options)


def _with_sinks(make: Make, inputs: Inputs) -> Inputs:
    sinks = make(inputs.args[0].shape[1], grad=True, dtype=torch.float32)
    return Inputs(f"{inputs.name}, sinks", (*inputs.args, sinks), inputs.kwargs)


def _pack(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def numbers(make: Make) -> Iterator[Inputs]:
    pack = {"cu_seqlens_q": _pack(150, 1, 0, 64, 17)}
    yield _inputs(make, ", packed", 232, 6, 2, 64, **pack)
    yield _inputs(make, ", packed, window 7, softcap 2", 232, 4, 4, 32, **pack, window=7, softcap=2.0)
    yield _inputs(make, ", bidirectional, window 33", 232, 2, 2, 40, **pack, causal=False, window=33)
    yield _inputs(make, ", dropout", 129, 3, 1, 80, dropout_p=0.2, seed=2**61 + 77)
    yield _inputs(make, "", 33, 2, 1, 5)
    projected = make(70, 8, 64)
    pieces = tuple(piece.requires_grad_() for piece in projected.split((4, 2, 2), dim=1))
    yield Inputs("70x4:2x64, pieces of one projection", pieces)


def grouped_numbers(make: Make) -> Iterator[Inputs]:
    yield _inputs(make, ", packed", 96, 8, 2, 64, cu_seqlens_q=_pack(40, 56))
    yield _with_sinks(
        make, _inputs(make, ", packed, window 7", 150, 6, 2, 40, cu_seqlens_q=_pack(130, 0, 20), window=7)
    )


def real(make: Make) -> Iterator[Inputs]:
    yield _inputs(make, "", 4096, 32, 32, 128)
    yield _inputs(make, "", 4096, 16, 16, 64)


def grouped_real(make: Make) -> Iterator[Inputs]:
    yield _inputs(make, ", packed", 4096, 32, 8, 128, cu_seqlens_q=_pack(2048, 2048))  # Llama-3.1-8B
    yield _inputs(make, ", packed", 4096, 9, 3, 64, cu_seqlens_q=_pack(2048, 2048))  # SmolLM2-135M
    yield _with_sinks(make, _inputs(make, ", window 128", 4096, 64, 8, 64, window=128))  # GPT-OSS-20B
    yield _with_sinks(make, _inputs(make, "", 4096, 32, 8, 128))
    pack = {"cu_seqlens_q": _pack(2048, 2048)}
    yield _inputs(
        make, ", packed, window 1024, softcap 50", 4096, 32, 16, 128, **pack, window=1024, softcap=50.0
    )  # 27B


def wide_numbers(make: Make) -> Iterator[Inputs]:
    yield _inputs(make, ", packed", 90, 2, 1, 256, cu_seqlens_q=_pack(50, 40))
    yield _inputs(make, ", window 20, softcap 2", 70, 2, 2, 160, window=20, softcap=2.0)


def wide_real(make: Make) -> Iterator[Inputs]:
    yield _inputs(make, "", 4096, 8, 8, 256)
    yield _inputs(make, ", window 1024, softcap 50", 4096, 8, 4, 256, window=1024, softcap=50.0)  # Gemma 2
    yield _with_sinks(make, _inputs(make, "", 4096, 8, 4, 256))


def exact_real(make: Make) -> Iterator[Inputs]:
    for dim in (64, 128, 256):
        yield _inputs(make, ", float32", 4096, 8, 4, dim, torch.float32)
        yield _inputs(make, ", float32, window, softcap", 4096, 8, 4, dim, torch.float32, window=1024, softcap=50.0)


def traffic(make: Make) -> Inputs:
    return _inputs(make, "", 512, 4, 4, 64)


def wide_traffic(make: Make) -> Inputs:
    return _inputs(make, "", 512, 2, 2, 256)


def grouped_traffic(make: Make) -> Inputs:
    return _inputs(make, "", 512, 4, 1, 64)


def floor(q: Tensor, k: Tensor, v: Tensor, *_, **options) -> tuple[int, int]:
    tail, lse = _tail(q, **options), q.new_empty(q.shape[:2], dtype=torch.float32)
    return OPS["attention"].cost(q, k, v, *tail).bytes, OPS["attention_backward"].cost(q, q, k, v, q, lse, *tail).bytes


def product(q: Tensor, k: Tensor, v: Tensor, *_, **options) -> int:
    """FLOPs of one of attention's products over the pairs that see each other."""
    cu_seqlens_q, cu_seqlens_k, causal, window, *_ = _tail(q, **options)
    return 2 * q.shape[2] * _pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)


def _case(
    name: str, numbers, real, traffic, forward: float | None, backward: float | None, new_saved_bytes: int, **bars
) -> Case:
    return Case(
        op="attention",
        name=name,
        function=attend,
        reference=definition,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        flops=product,
        bars=Bars(
            forward=forward,
            backward=backward,
            launches=(1, 2),
            flops=11.3,  # 2 + 7 products (attention_backward.py says why 7), and a quarter more for tiles on the diagonal
            new_saved_bytes=new_saved_bytes,  # lse
            **bars,
        ),
    )


CASES = [
    _case("attention", numbers, real, traffic, 1.8, 2.6, 512 * 4 * 4, tensor_cores=KERNELS),
    _case(
        "attention, 4 query heads to a key head", grouped_numbers, grouped_real, grouped_traffic, 2.0, 3.0, 512 * 4 * 4,
        tensor_cores=KERNELS,
    ),
    _case(
        "attention, head size 256", wide_numbers, wide_real, wide_traffic, None, None, 512 * 2 * 4,
        tensor_cores=KERNELS[:2],
        # dK and dV of 64 keys by 256 take half of sm_90's registers: every tile that HGMMA could take spills.
        small_dots=KERNELS[2:],
    ),
    _case(
        "attention in float32", wide_numbers, exact_real, wide_traffic, None, None, 512 * 2 * 4,
        not_streaming=dict.fromkeys(KERNELS, "bound by float32 multiply-adds: no tensor core is exact to float32"),
    ),
]  # fmt: skip
