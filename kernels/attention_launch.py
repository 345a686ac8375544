"""What attention's launchers share: checks by shape, options as kernel arguments, grids that no device value enters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import dropout
from .launch import Launch, choose

# Sizes that change from batch to batch: a kernel is not compiled anew for those that are 1 or multiples of 16.
VARYING = ["sequences", "tokens_q", "tokens_k", "window", "seed_low", "seed_high", "threshold"]
MAX_HEAD_SIZE = 256


class Problem(NamedTuple):
    """One call's sizes and options as all kernels take them."""

    arguments: tuple  # cu_seqlens, sequences, tokens, factors, window, seed
    constants: dict[str, bool | int]
    group: int  # query heads to a key head
    sequences: int


def problem_of(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
    window: int | None, softcap: float | None, scale: float, dropout_p: float, seed: int,
) -> Problem:  # fmt: skip
    """Check the call and put it in the kernels' terms; scores are in base 2 unless they are exact to float32."""
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    cu_q = q if cu_seqlens_q is None else cu_seqlens_q.contiguous()  # q: any pointer, it is not read
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    sequences = 1 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    base2 = q.dtype != torch.float32
    unit = math.log2(math.e) if base2 else 1.0
    into_cap, factor = (scale / softcap, softcap * unit) if softcap is not None else (1.0, scale * unit)
    group = q.shape[1] // max(k.shape[1], 1)
    *seeds, kept_scale = dropout.rule(dropout_p, seed)
    return Problem(
        (cu_q, cu_k, sequences, q.shape[0], k.shape[0], into_cap, factor, window or 0, *seeds, kept_scale),
        {
            "HEADS": q.shape[1], "GROUP": group, "DIM": q.shape[2], "PADDED": padded(q.shape[2]),
            "CAUSAL": causal, "WINDOW": window is not None, "SOFTCAP": softcap is not None, "DROPOUT": dropout_p > 0,
            "BASE2": base2, "PACKED": cu_seqlens_q is not None,
        },
        group,
        sequences,
    )  # fmt: skip


def padded(dim: int) -> int:
    """A tile's width for a head size: a power of two, deep enough for a tensor core's product."""
    return max(16, triton.next_power_of_2(dim))


def tiles(rows: int, tile_rows: int, problem: Problem) -> int:
    """How many tiles cover the rows of all sequences, wherever they are cut (attention_tiles.py: find_tile)."""
    if not problem.constants["PACKED"]:
        return triton.cdiv(rows, tile_rows)
    return rows // tile_rows + problem.sequences


def launch_of(kernel: str, q: Tensor, problem: Problem) -> Launch:
    """By the padded head size. Entries of their own: float32; window and softcap together at a head size of 128, whose masked
    loops want more registers; several query heads to a key head in forward."""
    size = padded(q.shape[2])
    if q.dtype == torch.float32:
        kernel += "_float32"
    elif size == 128 and problem.constants["WINDOW"] and problem.constants["SOFTCAP"]:
        kernel += "_window_softcap"
    elif problem.group > 1 and kernel == "attention_forward":
        kernel += "_grouped"
    return choose(kernel, size, q.device)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself unless its last dimension is strided, or the offsets within a tile would not fit 32 bits."""
    fits = 256 * x.stride(0) + x.shape[1] * x.stride(1) < 2**31
    return x if fits and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Raise where shapes tell that a kernel would read past an end; a look at cu_seqlens' values would wait for the GPU."""
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2] and q.dtype == k.dtype == v.dtype
    if not fits or q.shape[1] % max(k.shape[1], 1) != 0 or q.shape[2] > MAX_HEAD_SIZE:
        raise RuntimeError(
            f"attention: q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}; they must "
            f"be [Tq, Hq, K], [Tk, Hkv, K], [Tk, Hkv, K] of one dtype, Hq a multiple of Hkv, K at most {MAX_HEAD_SIZE}"
        )
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise RuntimeError("attention: cu_seqlens_k without cu_seqlens_q; give both, or only cu_seqlens_q")
        return
    sequences = len(cu_seqlens_q) - 1
    if sequences < min(len(q), 1):
        raise RuntimeError(f"attention: cu_seqlens_q is {list(cu_seqlens_q.shape)}, but q has {len(q)} tokens")
    if cu_seqlens_k is not None and len(cu_seqlens_k) - 1 != sequences:
        raise RuntimeError(
            f"attention: cu_seqlens_q has {sequences} sequences, cu_seqlens_k {len(cu_seqlens_k) - 1}; give one each"
        )
