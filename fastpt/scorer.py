"""The model as objectives see it: packed tokens in, losses out, no logits in between."""

from __future__ import annotations

from torch import Tensor, nn

from fastpt.data.batches import Batch
from fastpt.fusion.head import LanguageHead, hidden_states
from fastpt.ops import TokenStats


class ModelScorer:
    """Implements objectives.base.Scorer for a causal language model, bare or PEFT-wrapped, fused or not."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.head = LanguageHead.of(model)

    def hidden(self, batch: Batch) -> Tensor:
        return hidden_states(
            self.model,
            batch.input_ids,
            position_ids=batch.position_ids,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )

    def cross_entropy(self, hidden: Tensor, batch: Batch, **options: float) -> Tensor:
        if batch.weights is None:
            return self.head.cross_entropy(hidden, batch.targets, kept=batch.kept, reduction="sum", **options)
        losses = self.head.cross_entropy(hidden, batch.targets, kept=batch.kept, reduction="none", **options)
        return (losses[batch.kept] * batch.weights).sum()

    def stats(self, hidden: Tensor, batch: Batch) -> TokenStats:
        return self.head.stats(hidden, batch.targets, kept=batch.kept)
