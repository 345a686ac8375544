"""The classification head of a transformers model over packed hidden states, whatever the family calls its parts.

The head is the model's own forward, run with the hidden states at hand in place of its backbone: pooler, dense layers,
dropout, adapters and trained copies are those of the model, and no family needs code here. A probe decides.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fastpt.errors import ModelError
from fastpt.fusion.head import backbone_of, causal_lm, first_position, hidden_states, is_causal
from fastpt.fusion.recognise import PROBE_TOKENS, evaluating


class _Given(nn.Module):
    """Stands in for a backbone whose last hidden states are known."""

    def __init__(self, backbone: Any, hidden: Tensor):
        super().__init__()
        pooler = getattr(backbone, "pooler", None)
        self.output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden)
        )

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@dataclass(frozen=True)
class ClassHead:
    """The head of a model for sequence or token classification, bare or PEFT-wrapped."""

    model: Any  # the transformers model, PEFT's layers inside

    @classmethod
    def of(cls, model: nn.Module) -> ClassHead:
        """Raises: ModelError for a model without such a head, or with one that does something else on packed documents."""
        inner = causal_lm(model)
        backbone_of(model)
        if getattr(inner.config, "num_labels", None) is None or "Classification" not in type(inner).__name__:
            raise ModelError(
                f"{type(inner).__name__} has no classification head; give a model such as "
                "AutoModelForSequenceClassification, or a path or hub id, which is loaded so"
            )
        if getattr(inner.config, "is_encoder_decoder", False):
            raise ModelError(f"{type(inner).__name__} is an encoder-decoder; classify with an encoder or a decoder")
        text_config = inner.config.get_text_config()
        if text_config.pad_token_id is None:  # without one, decoders take no batches
            eos = text_config.eos_token_id
            text_config.pad_token_id = eos[0] if isinstance(eos, (list, tuple)) else eos if eos is not None else 0
        head = cls(inner)
        head._verify(model)
        return head

    @property
    def is_of_tokens(self) -> bool:
        return "TokenClassification" in type(self.model).__name__

    def document_logits(self, hidden: Tensor, cu_seqlens: Tensor, stops: Tensor | None = None) -> Tensor:
        """hidden [T, D] of documents at cu_seqlens [N + 1] -> [N, C], float32.

        Where documents share a prompt (of a decoder), `stops` [N] says where each ends.
        """
        stops = cu_seqlens[1:] if stops is None else stops
        return self._logits(self._pooled(hidden, cu_seqlens, stops)[:, None])

    def token_logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> [T, C], float32."""
        return self._logits(hidden[None])[0]

    def _pooled(self, hidden: Tensor, cu_seqlens: Tensor, stops: Tensor) -> Tensor:
        """What of each document the head reads, [N, D]: a decoder's last token, an encoder's first, or the mean."""
        if is_causal(self.model):
            return hidden.index_select(0, stops - 1)
        if getattr(self.model.config, "classifier_pooling", None) == "mean":
            lengths = cu_seqlens.diff().long()
            return torch.segment_reduce(hidden, "mean", lengths=lengths, unsafe=True)
        return hidden.index_select(0, cu_seqlens[:-1])

    def _logits(self, hidden: Tensor) -> Tensor:
        inner = self.model
        backbone = inner.base_model
        name = next(name for name, module in inner._modules.items() if module is backbone)
        shell = copy.copy(inner)  # the same parts in a dict of its own
        shell.__dict__["_modules"] = {**inner._modules, name: _Given(backbone, hidden)}
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return type(inner).forward(shell, input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()

    @torch.no_grad()
    def _verify(self, model: nn.Module) -> None:
        """Raises: ModelError unless the head gives what the model itself does on a few random tokens."""
        inner = self.model
        device = inner.get_input_embeddings().weight.device
        generator = torch.Generator().manual_seed(0)
        vocabulary = inner.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary // 2, vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)
        positions = (torch.arange(PROBE_TOKENS, device=device) + first_position(model))[None]
        with evaluating(inner):
            theirs = inner(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
            hidden = hidden_states(model, ids, position_ids=positions, cu_seqlens=None, max_seqlen=None)
            bounds = torch.tensor([0, PROBE_TOKENS], dtype=torch.int32, device=device)
            ours = self.token_logits(hidden) if self.is_of_tokens else self.document_logits(hidden, bounds)[0]
        if ours.shape != theirs.shape or not torch.allclose(
            ours, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item()
        ):
            raise ModelError(
                f"the head of {type(inner).__name__} reads something else than one token of each document or their mean; "
                "give a model such as BERT, RoBERTa, DistilBERT or Llama"
            )
