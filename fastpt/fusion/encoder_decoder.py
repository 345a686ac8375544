"""Encoder-decoders (T5, BART, Marian and their kin): hidden states of the decoder, and answers, from packed sources.

Their positions follow the place in a row, and T5's attention adds a bias of its own, so documents are laid out as padded rows
for the model's own layers; the head and its loss see the real tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.data.batches import Packed
from fastpt.errors import ModelError
from fastpt.fusion.head import causal_lm


def decoder_states(model: nn.Module, target: Packed, source: Packed) -> Tensor:
    """Hidden states [T, D] of packed decoder inputs, the n-th document beside the n-th of the encoder's.

    Raises: ModelError for a model without an encoder and a decoder.
    """
    inner = causal_lm(model)
    if not inner.config.is_encoder_decoder:
        raise ModelError(f"{type(inner).__name__} is no encoder-decoder: give a model such as T5, BART or Marian")
    encoder, decoder = inner.get_encoder(), inner.get_decoder()
    ids, is_source = padded(source)
    mask = is_source.long()
    encoded = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    ids, is_real = padded(target)
    out = decoder(
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
