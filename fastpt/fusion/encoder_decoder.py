"""Encoder-decoders (T5, BART, Marian and their kin): hidden states of the decoder, and answers, from packed sources.

Both sides are one row of documents end to end, and a document's tokens see those of its own source by cumulative lengths. A
model that is not fused, or that gives other states so, gets padded rows; the head and its loss see real tokens alone anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.data.batches import Packed
from fastpt.errors import ModelError
from fastpt.fusion.attention import NAME
from fastpt.fusion.fuse import Handle, handle_of
from fastpt.fusion.head import causal_lm
from fastpt.fusion.layout import Layout
from fastpt.fusion.positions import numbering
from fastpt.fusion.recognise import difference, evaluating

SOURCES, TARGETS = (5, 2), (3, 4)  # lengths of the documents that tell whether a model takes packed ones


def decoder_states(model: nn.Module, target: Packed, source: Packed) -> Tensor:
    """Hidden states [T, D] of packed decoder inputs, the n-th document beside the n-th of the encoder's.

    Raises: ModelError for a model without an encoder and a decoder.
    """
    inner = causal_lm(model)
    if not inner.config.is_encoder_decoder:
        raise ModelError(f"{type(inner).__name__} is no encoder-decoder: give a model such as T5, BART or Marian")
    handle = handle_of(model)
    if handle is not None and takes_packed(handle):
        return _states_of_packed(inner, target, source)
    return _states_of_rows(inner, target, source)


def takes_packed(handle: Handle) -> bool:
    """Whether a fused model gives packed documents what it gives padded rows; the first call tries it on a few tokens."""
    if handle.no_packing is None:
        try:
            handle.no_packing = _reason(causal_lm(handle.model))
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # masks or positions unknown here
            handle.no_packing = f"{type(error).__name__}: {error}"
    return handle.no_packing == ""


@torch.no_grad()
def _reason(model: Any) -> str:
    if any(stack.config._attn_implementation != NAME for stack in (model.get_encoder(), model.get_decoder())):
        return "its attention does not go through transformers' attention table"
    source, target = (_documents(model, lengths) for lengths in (SOURCES, TARGETS))
    with evaluating(model):
        return difference(_states_of_packed(model, target, source), _states_of_rows(model, target, source))


def _documents(model: Any, lengths: tuple[int, ...]) -> Packed:
    table = model.get_input_embeddings().weight
    ids = torch.arange(1, sum(lengths) + 1, device=table.device) * 7 % len(table)
    places = torch.cat([torch.arange(length) for length in lengths])
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return Packed(ids[None], places[None].to(ids.device), starts.to(ids.device), max(lengths))


def _states_of_packed(model: Any, target: Packed, source: Packed) -> Tensor:
    with numbering(source):
        mask = Layout.of_packed(source, causal=False)
        encoded = model.get_encoder()(input_ids=source.input_ids, attention_mask=mask).last_hidden_state
    with numbering(target):
        out = model.get_decoder()(
            input_ids=target.input_ids, attention_mask=Layout.of_packed(target, causal=True), encoder_hidden_states=encoded,
            encoder_attention_mask=Layout.of_packed(target, source, causal=False), use_cache=False,
        )  # fmt: skip
    return out.last_hidden_state[0]


def _states_of_rows(model: Any, target: Packed, source: Packed) -> Tensor:
    ids, is_source = padded(source)
    mask = is_source.long()
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    ids, is_real = padded(target)
    out = model.get_decoder()(
        input_ids=ids, attention_mask=is_real.long(), encoder_hidden_states=encoded, encoder_attention_mask=mask,
        use_cache=False,
    )  # fmt: skip
    return out.last_hidden_state[is_real]


def padded(packed: Packed) -> tuple[Tensor, Tensor]:
    """Ids [N, longest] of packed documents, 0 behind their ends, and which of them are real."""
    lengths = packed.cu_seqlens.diff()
    is_real = torch.arange(packed.max_seqlen, device=lengths.device) < lengths[:, None]
    ids = packed.input_ids.new_zeros(is_real.shape)
    return ids.masked_scatter(is_real, packed.input_ids[0]), is_real


@torch.no_grad()
def answers(
    model: nn.Module, sources: Sequence[Sequence[int]], batch_size: int = 32, **options: Any
) -> list[list[int]]:
    """Tokens that the decoder says to each source, without its start and padding; options are those of transformers' generate."""
    inner = causal_lm(model)
    device, found = next(inner.parameters()).device, [[0]] * len(sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    special = {
        inner.config.pad_token_id,
        inner.config.decoder_start_token_id,
        inner.generation_config.decoder_start_token_id,
    }
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(sources[i]) for i in chosen)
        ids = torch.tensor([[*sources[i], *[0] * (longest - len(sources[i]))] for i in chosen], device=device)
        mask = torch.tensor([[1] * len(sources[i]) + [0] * (longest - len(sources[i])) for i in chosen], device=device)
        made = inner.generate(input_ids=ids, attention_mask=mask, **options).tolist()
        for i, tokens in zip(chosen, made, strict=True):
            found[i] = [token for token in tokens if token not in special]
    return found
