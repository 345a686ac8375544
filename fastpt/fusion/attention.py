"""The name "fastpt" in transformers' attention table: any model's heads through the attention op, padding left out.

What the op does not do (KV cache, dense masks, dropout, position bias, weights asked for) takes transformers' own
path for that call, with the same mask made dense.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import output_capturing

from fastpt.errors import ModelError
from fastpt.fusion.layout import KEYS, Layout, attention_mask
from fastpt.ops import attention, embedding

NAME = "fastpt"
SINKS = "s_aux"  # by this keyword models pass them
BIAS = "position_bias"  # and by this one what T5 adds to the scores

# What models pass through **kwargs that says nothing about which token sees which; anything else set sends the call
# to transformers' own path.
HARMLESS = {
    *("position_ids", "use_cache", "cache_position", "past_key_values", "encoder_hidden_states", "token_type_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window", "is_causal", "layer_idx"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
    *("num_items_in_batch", "shift_labels", "seq_idx", KEYS),
}

_recorded: ContextVar[list[dict[str, Any]] | None] = ContextVar("recorded attention calls", default=None)


@contextmanager
def recording() -> Iterator[list[dict[str, Any]]]:
    """Collect what each attention module passes here: how its scale and softcap are found out without guessing names."""
    calls: list[dict[str, Any]] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float | None, softcap: float | None,
    sinks: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention over the flattened tokens of a layout; padded queries get 0 where their row is causal.

    Shapes: q [T, Hq, K], k, v [Tk, Hkv, K] with T = B * S, and Tk the same or the layout's sources -> [T, Hq, K].
    """
    queries, keys, cu_seqlens_q, cu_seqlens_k = layout.spans
    tokens = q.shape[0]
    if keys is not None:  # whose gradient is a sum in one order, where a token comes several times
        k, v = (embedding(keys, t.flatten(1)).view(-1, *t.shape[1:]) for t in (k, v))
    if queries is not None:
        q = q.index_select(0, queries)
    out = attention(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        causal=layout.causal, window=layout.window, softcap=softcap, scale=scale, sinks=sinks,
        dropout_p=dropout_p,
    )  # fmt: skip
    return out if queries is None else out.new_zeros(tokens, *out.shape[1:]).index_copy(0, queries, out)


def biased(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Tensor, *, scale: float | None, dropout_p: float
) -> Tensor:
    """The same with a bias [1, H, longest, longest] by the places of query and key in their document, for packed tokens.

    The op takes none, so documents become padded rows for scaled_dot_product_attention alone.
    """
    assert layout.cu_seqlens is not None
    rows, places, are_real = zip(
        *(_rows_of(starts, x.shape[0], most) for starts, x, most in zip(layout.cu_seqlens, (q, k), bias.shape[-2:], strict=True)),
        strict=True,
    )  # fmt: skip
    queries, keys, values = (
        embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:]).transpose(1, 2)
        for index, x in ((rows[0], q), (rows[1], k), (rows[1], v))
    )
    seen = are_real[1][:, None, None, :]  # [N, 1, 1, longest]
    if layout.causal:
        seen = seen & torch.ones(bias.shape[-2:], dtype=torch.bool, device=q.device).tril()
    # The lowest number, not -inf: padded queries may see nothing, and a softmax over that is no number.
    mask = torch.where(seen, bias.to(q.dtype), torch.finfo(q.dtype).min)
    out = F.scaled_dot_product_attention(queries, keys, values, mask, dropout_p, scale=scale)
    return embedding(places[0], out.transpose(1, 2).flatten(0, 1).flatten(1)).view(q.shape)


def _rows_of(cu_seqlens: Tensor, tokens: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of packed documents as rows of `most`: the token at each place [N, most], each token's place [T], which are real."""
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    place = torch.arange(most, device=cu_seqlens.device)
    token = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.bucketize(token, cu_seqlens, right=True) - 1
    is_real = place < lengths
    index = (starts + place).masked_fill(~is_real, 0)
    return index.long(), document * most + token - cu_seqlens[document], is_real


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, Hq, S, K]
    key: Tensor,  # [B, Hkv, S, K]
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # [B, S, Hq, K]
    """The entry of transformers' attention table."""
    extra = {name: value for name, value in kwargs.items() if value is not None and name not in HARMLESS}
    if (calls := _recorded.get()) is not None:
        calls.append({"scaling": scaling, "softcap": softcap, "dropout": dropout, "extra": sorted(extra)})
        dropout = 0.0
    layout = attention_mask
    if isinstance(layout, Layout):
        layout = layout.given(kwargs)
        is_served = layout.has_spans and layout.shape[2:] == (query.shape[2], key.shape[2])
        if is_served and not extra.keys() - {SINKS, BIAS} and not asks_for_weights(module, kwargs):
            q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in same_dtype(query, key, value))
            sinks, bias = kwargs.get(SINKS), kwargs.get(BIAS)
            if bias is not None and bias.numel() == 1:
                bias = None  # the same for all scores, it changes none of their weights
            out = None
            if bias is None and (sinks is None or dropout == 0):
                out = attend(q, k, v, layout, scale=scaling, softcap=softcap, sinks=sinks, dropout_p=dropout)
            elif layout.cu_seqlens is not None and softcap is sinks is None:
                out = biased(q, k, v, layout, bias, scale=scaling, dropout_p=dropout)
            if out is not None:
                return out.unflatten(0, (layout.batch, layout.length)), None
    elif kwargs.get(KEYS) is not None:
        raise ModelError(f"{type(module).__name__} makes a mask of its own, which knows nothing of shared keys")
    return _as_transformers_does(module, query, key, value, layout, dropout, scaling, softcap, kwargs)


def asks_for_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller wants the attention weights: by keyword, by config, or through transformers' recorder."""
    collector = output_capturing._active_collector.get()
    if collector and any("attentions" in key for key in collector):
        return True
    asked = kwargs.get("output_attentions")
    return bool(getattr(getattr(module, "config", None), "output_attentions", False) if asked is None else asked)


def same_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as scaled_dot_product_attention would see them under autocast."""
    device = q.device.type
    if torch.is_autocast_enabled(device) and q.is_floating_point():
        dtype = torch.get_autocast_dtype(device)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _as_transformers_does(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Layout | Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """scaled_dot_product_attention, or the model's own eager function where that one cannot do it."""
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    needs_eager = softcap is not None or kwargs.get(SINKS) is not None or asks_for_weights(module, kwargs)
    is_plain = isinstance(mask, Layout) and mask.padding is mask.documents is mask.cu_seqlens is mask.window is None
    if isinstance(mask, Layout):
        kwargs = {**kwargs, "is_causal": mask.causal}
        mask = None if is_plain and query.shape[2] == key.shape[2] else mask.dense
    if not needs_eager or eager is None:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **{**kwargs, "softcap": softcap}
        )
    is_causal = kwargs.get("is_causal")
    if mask is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril(key.shape[2] - query.shape[2])[None, None]
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if softcap is not None:
        kwargs = {**kwargs, "softcap": softcap}
    return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def register() -> None:
    """Put "fastpt" into transformers' tables of attention and mask functions."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
