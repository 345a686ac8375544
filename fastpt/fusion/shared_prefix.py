"""Which models can compute a prompt once for several documents: those whose every layer takes keys from other sequences.

Layers that ignore the keys would give wrong numbers without a word, so no class is trusted by its name: a model must give
both documents of a small batch what it gives them apart.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastpt.data.prefix import shared_keys
from fastpt.errors import ModelError
from fastpt.fusion.attention import NAME
from fastpt.fusion.fuse import Handle, handle_of
from fastpt.fusion.head import backbone_of, hidden_states
from fastpt.fusion.recognise import difference, evaluating

PREFIX, DOCUMENTS = 5, (4, 3)
BY_KEYS = {
    "full_attention",
    "sliding_attention",
}  # of transformers' kinds of layers; others mix tokens in ways of their own


def shares_prefix(handle: Handle) -> bool:
    """Whether `hidden_states` of a fused model may be given `keys`; the first call runs the model on a few tokens."""
    return _reason(handle) == ""


def check_shares_prefix(model: nn.Module) -> None:
    """Raise ModelError with the reason where `hidden_states` of a model may not be given `keys`."""
    handle = handle_of(model)
    reason = "it is not fused: call fastpt.fuse(model)" if handle is None else _reason(handle)
    if reason:
        raise ModelError(f"{type(model).__name__} cannot share prompts between documents: {reason}")


def _reason(handle: Handle) -> str:
    """Why a fused model cannot share prompts, found out once; "" when it can."""
    if handle.no_sharing is None:
        handle.no_sharing, found = "", None  # hidden_states asks here too
        try:
            found = _found(handle.model)
        except (ModelError, TypeError) as error:  # TypeError: a forward without **kwargs
            found = str(error)
        finally:
            handle.no_sharing = found
    return handle.no_sharing


@torch.no_grad()
def _found(model: nn.Module) -> str:
    config = backbone_of(model).config
    if config._attn_implementation != NAME:
        return "its attention does not go through transformers' attention table"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    others = set(getattr(config.get_text_config(), "layer_types", None) or ()) - BY_KEYS
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    with evaluating(model):
        alone, shared = _states(model, is_shared=False), _states(model, is_shared=True)
    return difference(shared, alone)


def _states(model: nn.Module, is_shared: bool) -> Tensor:
    """Hidden states of both documents, behind one prompt or behind a copy each."""
    device = next(model.parameters()).device
    vocabulary = backbone_of(model).get_input_embeddings().num_embeddings
    ids = torch.arange(1, PREFIX + sum(DOCUMENTS) + 1, device=device) * 7 % vocabulary
    prompt, *documents = ids.split([PREFIX, *DOCUMENTS])
    if is_shared:
        arrays = shared_keys([PREFIX], [DOCUMENTS])
    else:
        ids = torch.cat([tokens for document in documents for tokens in (prompt, document)])
        arrays = shared_keys([0], [tuple(PREFIX + length for length in DOCUMENTS)])
    cu_seqlens, keys, cu_seqlens_k, position_ids = (torch.from_numpy(array).to(device) for array in arrays)
    lengths = [int(np.diff(arrays[i]).max()) for i in (0, 2)]
    hidden = hidden_states(
        model, ids, position_ids=position_ids, cu_seqlens=cu_seqlens, max_seqlen=lengths[0],
        **({"keys": keys, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": lengths[1]} if is_shared else {}),
    )  # fmt: skip
    starts = arrays[0][1:] if is_shared else arrays[0][:-1] + PREFIX
    return torch.cat([hidden[start : start + length] for start, length in zip(starts, DOCUMENTS, strict=False)])
