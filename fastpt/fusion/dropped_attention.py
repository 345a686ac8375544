"""Attention with dropout of its weights, in plain PyTorch on padded sequences: what the attention op does not do yet.

Key j of query t and head h is dropped by the hash of (seed, t H + h, j): no mask is stored, and backward draws it again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpt.ops._dropout import factors


class _Padded(NamedTuple):
    """Packed sequences as a batch: which token stands where, and which keys each query sees."""

    queries: Tensor  # int64 [N, Sq], any token where there is none
    keys: Tensor  # int64 [N, Sk]
    has_query: Tensor  # bool [N, Sq]
    seen: Tensor  # bool [N, 1, Sq, Sk]


def _padded(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window: int | None) -> _Padded:
    def indices(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        position = torch.arange(max(1, int(lengths.max())), device=cu_seqlens.device)
        there = position < lengths[:, None]
        return torch.where(there, starts[:, None] + position, 0), there, lengths

    queries, has_query, lengths_q = indices(cu_seqlens_q)
    keys, has_key, lengths_k = indices(cu_seqlens_k)
    at = torch.arange(queries.shape[1], device=queries.device) + (lengths_k - lengths_q)[:, None]  # the key it stands at
    distance = at[:, :, None] - torch.arange(keys.shape[1], device=keys.device)  # [N, Sq, Sk]
    seen = has_key[:, None, :] & has_query[:, :, None]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    return _Padded(queries, keys, has_query, seen[:, None])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, index: Tensor) -> Tensor:
    """[T, H, ...] -> [N, H, S, ...]."""
    return x[index].transpose(1, 2)


def _kept(q: Tensor, at: _Padded, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies the weights by, [N, H, Sq, Sk]."""
    tokens, heads = q.shape[:2]
    kept = factors(tokens * heads, at.keys.shape[1], dropout_p, seed, q.device).to(_wide(q).dtype)
    return _heads(kept.view(tokens, heads, -1), at.queries)


def _packed(x: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H, S, K] -> [T, H, K]."""
    return x.transpose(1, 2)[there].to(dtype)


def dropped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: tuple,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out [Tq, H, K] and lse [Tq, H], as the attention op gives them; options are (causal, window, softcap, scale)."""
    causal, window, _, scale = options
    at = _padded(cu_seqlens_q, cu_seqlens_k, causal, window)
    scores = _wide(_heads(q, at.queries) @ _heads(k, at.keys).mT) * scale
    lse = scores.masked_fill(~at.seen, float("-inf")).logsumexp(-1)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    weights = (scores - lse[..., None]).exp().masked_fill(~at.seen, 0) * _kept(q, at, dropout_p, seed)
    out = weights.to(q.dtype) @ _heads(v, at.keys)
    return _packed(out, at.has_query, q.dtype), lse.transpose(1, 2)[at.has_query]


def dropped_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: tuple,
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    causal, window, _, scale = options
    at = _padded(cu_seqlens_q, cu_seqlens_k, causal, window)
    query, key, value = _heads(q, at.queries), _heads(k, at.keys), _heads(v, at.keys)
    scores = _wide(query @ key.mT) * scale
    weights = (scores - _heads(lse, at.queries)[..., None]).exp().masked_fill(~at.seen, 0)
    kept = _kept(q, at, dropout_p, seed)
    dout = _heads(grad, at.queries).masked_fill(~at.has_query[:, None, :, None], 0)
    delta = (_wide(dout) * _wide(_heads(out, at.queries))).sum(-1, keepdim=True)
    dscores = (weights * (_wide(dout @ value.mT) * kept - delta) * scale).to(q.dtype)
    has_key = at.seen.new_ones(()).expand(at.keys.shape) & (
        torch.arange(at.keys.shape[1], device=q.device) < cu_seqlens_k.diff()[:, None]
    )
    return (
        _packed(dscores @ key, at.has_query, q.dtype),
        _packed(dscores.mT @ query, has_key, k.dtype),
        _packed((weights * kept).to(q.dtype).mT @ dout, has_key, v.dtype),
    )
