"""Which token sees which, described once per model forward instead of as a [S, S] mask.

transformers asks its mask table for a mask before the first layer; fastpt answers with a Layout, which every layer then
reads as cumulative sequence lengths. Patterns that cumulative lengths cannot express get transformers' own dense mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from fastpt.data.batches import Packed
from fastpt.errors import ModelError

KEYS = "fastpt_keys"  # by this keyword models hand on the keys of sequences that share some


class Spans(NamedTuple):
    """Sequences of one flattened batch: `queries` and `keys` index tokens of [B * S] (None: all of them)."""

    queries: Tensor | None  # int64
    keys: Tensor | None  # int64
    cu_seqlens_q: Tensor  # int32 [N + 1]
    cu_seqlens_k: Tensor  # int32 [N + 1]


@dataclass(eq=False)
class Layout:
    """A batch of B rows of S tokens, and which keys they see: their own, or those of `sources` other tokens."""

    batch: int
    length: int
    device: torch.device
    causal: bool
    window: int | None = None  # keys j with i - window < j, or |i - j| < window when not causal
    padding: Tensor | None = None  # bool [B, S], True for real tokens
    documents: Tensor | None = None  # [B, S], tokens of one packed document share a number
    cu_seqlens: tuple[Tensor, Tensor] | None = None  # as the caller gave them, over the flattened batch
    keys: Tensor | None = (
        None  # int64, tokens that several sequences share come several times; the second cu_seqlens is theirs
    )
    sources: int | None = None  # of an encoder, which a decoder's tokens see; the second cu_seqlens is theirs
    longest: tuple[int, int] | None = None  # most queries and keys of a sequence, where the caller knows
    _packed: list[Layout] = field(default_factory=list)
    ndim: ClassVar[int] = 4  # as a mask's: what has two dimensions, transformers takes for the padding of rows

    def given(self, call: Mapping[str, Any]) -> Layout:
        """The same layout with what the caller knows of the sequences, which saves looking for them (kept, all layers ask).

        Raises: ModelError for shared keys that the layout cannot take.
        """
        cu_seqlens_q, cu_seqlens_k, keys = (call.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", KEYS))
        if keys is not None and (cu_seqlens_k is None or self.padding is not None or self.batch > 1 or not self.causal):
            raise ModelError(
                "keys are given for padded rows, or without causality: they are of one row of packed tokens"
            )
        if cu_seqlens_q is None or cu_seqlens_k is None or self.padding is not None:
            return self
        if not self._packed or self._packed[0].cu_seqlens[0] is not cu_seqlens_q:  # type: ignore[index]
            given = (cu_seqlens_q.to(self.device, torch.int32), cu_seqlens_k.to(self.device, torch.int32))
            self._packed[:] = [replace(self, documents=None, cu_seqlens=given, keys=keys, _packed=[])]
        return self._packed[0]

    @classmethod
    def of_packed(cls, queries: Packed, keys: Packed | None = None, *, causal: bool) -> Layout:
        """One row of packed documents, whose tokens see their own document or, given keys, the n-th document of those."""
        seen = queries if keys is None else keys
        return cls(
            1, queries.input_ids.shape[1], queries.input_ids.device, causal, cu_seqlens=(queries.cu_seqlens, seen.cu_seqlens),
            sources=None if keys is None else keys.input_ids.shape[1], longest=(queries.max_seqlen, seen.max_seqlen),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, 1, queries, keys], of the mask that says the same."""
        return self.batch, 1, self.length, self.length if self.sources is None else self.sources

    @property
    def has_spans(self) -> bool:
        """False when only a dense mask is right: a window over padded rows with gaps or without causality."""
        return self.padding is None or self.window is None or (self.causal and self._is_gapless)

    @cached_property
    def _is_gapless(self) -> bool:
        padding = self.padding.int()  # type: ignore[union-attr]
        return not bool((padding.diff(dim=1, prepend=padding.new_zeros(self.batch, 1)) == 1).sum(1).gt(1).any())

    @cached_property
    def spans(self) -> Spans:
        """One host sync at most, and only when padding or packing has to be found out."""
        rows = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.length
        if self.cu_seqlens is not None:
            return Spans(None, self.keys, *self.cu_seqlens)
        if self.documents is not None:
            starts = self.documents.diff(dim=1, prepend=self.documents[:, :1] - 1) != 0
            cu_seqlens = torch.cat([starts.flatten().nonzero().flatten().int(), rows[-1:]])
            return Spans(None, None, cu_seqlens, cu_seqlens)
        if self.padding is None:
            return Spans(None, None, rows, rows)
        real = self.padding.flatten().nonzero().flatten()
        cu_seqlens = torch.nn.functional.pad(
            self.padding.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)
        )
        # Without causality every query, padded ones too, sees the real keys, as under a dense mask.
        return Spans(real, real, cu_seqlens, cu_seqlens) if self.causal else Spans(None, real, rows, cu_seqlens)

    @cached_property
    def packed(self) -> tuple[Tensor, Layout]:
        """The real tokens of padded rows (int64, over [B * S]), and the layout of one row that holds them alone."""
        _, real, _, cu_seqlens = self.spans
        assert real is not None
        return real, Layout(1, len(real), self.device, self.causal, cu_seqlens=(cu_seqlens, cu_seqlens))

    @cached_property
    def dense(self) -> Tensor:  # [B, 1, S, S]
        """The boolean mask that says the same, for what the attention op does not do."""
        if self.keys is not None:
            return self._dense_of_keys
        if self.sources is not None:
            return self._dense_of_sources
        index = torch.arange(self.length, device=self.device)
        distance = index[:, None] - index  # [S, S]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= distance.abs() < self.window
        seen = seen.expand(self.batch, 1, -1, -1)
        documents = self.documents
        if self.cu_seqlens is not None:
            tokens = torch.arange(self.batch * self.length, device=self.device)
            documents = torch.bucketize(tokens, self.cu_seqlens[0], right=True).view(self.batch, -1)
        if documents is not None:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        return seen if self.padding is None else seen & self.padding[:, None, None, :]

    @property
    def _dense_of_sources(self) -> Tensor:  # [1, 1, S, sources]
        assert self.cu_seqlens is not None
        assert self.sources is not None
        own, theirs = (
            torch.bucketize(torch.arange(count, device=self.device), starts, right=True)
            for count, starts in zip((self.length, self.sources), self.cu_seqlens, strict=True)
        )
        return (own[:, None] == theirs)[None, None]

    @property
    def _dense_of_keys(self) -> Tensor:  # [1, 1, S, S]
        """The same for keys that sequences share: which of them each query sees, then which tokens these are."""
        assert self.keys is not None
        assert self.cu_seqlens is not None
        starts = self.cu_seqlens
        places = [torch.arange(count, device=self.device) for count in (self.length, len(self.keys))]
        sequence, key_sequence = (torch.bucketize(p, s, right=True) for p, s in zip(places, starts, strict=True))
        # From the end of its sequence, where the last query stands at the last key.
        query, key = (p - s[n] for p, s, n in zip(places, starts, (sequence, key_sequence), strict=True))
        seen = (sequence[:, None] == key_sequence) & (key <= query[:, None])
        if self.window is not None:
            seen &= key > query[:, None] - self.window
        tokens = torch.zeros(self.length, self.length, dtype=torch.int32, device=self.device)
        return tokens.index_add_(1, self.keys, seen.int()).bool()[None, None]

    def contiguous(self) -> Tensor:
        """The dense mask: what generate() calls on the masks that it makes in advance for static caches."""
        return self.dense


class _Pattern(NamedTuple):
    causal: bool = False
    window: int | None = None
    documents: Tensor | None = None


def _pattern(mask_function: Callable) -> _Pattern | None:
    """What one of transformers' composed mask functions says; None for any that is not known here."""
    if mask_function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    held = dict(
        zip(mask_function.__code__.co_freevars, (c.cell_contents for c in mask_function.__closure__ or ()), strict=True)
    )
    made_by = mask_function.__qualname__.split(".")[0]
    if made_by == "and_masks":
        parts = [_pattern(part) for part in held["mask_functions"]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        windows = [part.window for part in known if part.window is not None]
        documents = [part.documents for part in known if part.documents is not None]
        causal = any(part.causal for part in known)
        return _Pattern(causal, min(windows, default=None), documents[0] if documents else None)
    if made_by == "remap_positions_for_packed_sequence":  # positions rise by one within a document, as indices do
        return _pattern(held["mask_function"])
    if made_by == "packed_sequence_mask_function":
        return _Pattern(documents=held["packed_sequence_mask"])
    if made_by == "sliding_window_overlay":
        return _Pattern(causal=True, window=held["sliding_window"])  # one-sided: only ever used on top of a causal mask
    if made_by == "sliding_window_bidirectional_overlay":
        return _Pattern(window=held["sliding_window"] + 1)
    return None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | Layout | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Layout | Tensor | None:
    """The entry "fastpt" of transformers' mask table: a Layout, or the mask of "sdpa" where a Layout cannot say it."""
    if isinstance(attention_mask, Layout):  # made in advance, by generate()
        return attention_mask
    pattern = None if use_vmap else _pattern(mask_function)
    is_whole = q_length == kv_length and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    has_fitting_padding = attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length)
    if pattern is None or not is_whole or not has_fitting_padding:
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    window = None if pattern.window is None or pattern.window >= kv_length else pattern.window
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    return Layout(batch_size, q_length, torch.device(device), pattern.causal, window, padding, pattern.documents)
