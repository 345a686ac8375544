"""The model as objectives see it: packed tokens in, losses out, no logits in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.data.batches import Batch, collate
from fastpt.data.example import Example
from fastpt.fusion.class_head import ClassHead
from fastpt.fusion.encoder_decoder import answers, decoder_states
from fastpt.fusion.fuse import handle_of
from fastpt.fusion.head import LanguageHead, causal_lm, first_position, hidden_states
from fastpt.fusion.shared_prefix import shares_prefix
from fastpt.generate import generate_tokens
from fastpt.ops import TokenStats


class ModelScorer:
    """Implements objectives.base.Scorer for a model, bare or PEFT-wrapped, fused or not."""

    def __init__(self, model: nn.Module, has_reference: bool = False, neftune: float | None = None):
        self.model = model
        self.has_reference = has_reference  # a fresh adapter, without which the model is what it was
        self._noise = EmbeddingNoise(model, neftune) if neftune else None

    def of(self, model: nn.Module) -> ModelScorer:
        return ModelScorer(model)

    @cached_property
    def head(self) -> LanguageHead:
        return LanguageHead.of(self.model)

    @cached_property
    def class_head(self) -> ClassHead:
        return ClassHead.of(self.model)

    @cached_property
    def first_position(self) -> int:
        return first_position(self.model)

    @cached_property
    def reads_token_types(self) -> bool:
        return any(name.endswith("token_type_embeddings") for name, _ in self.model.named_modules())

    @cached_property
    def shares_prefix(self) -> bool:
        """Whether a prompt before several documents is computed once."""
        handle = handle_of(self.model)
        return handle is not None and shares_prefix(handle)

    def batch(self, examples: list[Example]) -> Batch:
        shares = any(example.shares for example in examples) and self.shares_prefix
        return collate(examples, shares).to(self.device)

    def size(self, example: Example) -> int:
        return example.tokens if not example.shares or self.shares_prefix else example.expanded().tokens

    def hidden(self, batch: Batch) -> Tensor:
        if self._noise is not None:
            self._noise.lengths = (batch.source or batch).cu_seqlens.diff()
        if batch.source is not None:
            return decoder_states(self.model, batch, batch.source)
        return hidden_states(
            self.model,
            batch.input_ids,
            position_ids=batch.position_ids + self.first_position,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            keys=batch.keys,
            cu_seqlens_k=batch.cu_seqlens_k,
            max_seqlen_k=batch.max_seqlen_k,
            token_type_ids=_token_types(batch) if self.reads_token_types else None,
        )

    def cross_entropy(self, hidden: Tensor, batch: Batch, **options: float) -> Tensor:
        if batch.weights is None:
            return self.head.cross_entropy(hidden, batch.targets, kept=batch.kept, reduction="sum", **options)
        losses = self.head.cross_entropy(hidden, batch.targets, kept=batch.kept, reduction="none", **options)
        return (losses[batch.kept] * batch.weights).sum()

    def stats(self, hidden: Tensor, batch: Batch, *, temperature: float = 1.0) -> TokenStats:
        return self.head.stats(hidden, batch.targets, kept=batch.kept, temperature=temperature)

    def divergence(self, hidden: Tensor, batch: Batch, teacher: Any, **options: float) -> Tensor:
        with torch.no_grad():
            theirs = teacher.hidden(batch)
        return self.head.divergence(hidden, batch.kept, teacher.head, theirs, row_weight=batch.weights, **options)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def class_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self.class_head.document_logits(hidden, batch.cu_seqlens, batch.stops)

    def token_logits(self, hidden: Tensor) -> Tensor:
        return self.class_head.token_logits(hidden)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def reference(self) -> Iterator[None]:
        with self.frozen(), self.model.disable_adapter():  # type: ignore[operator]
            yield

    def answers(self, sources: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        return answers(self.model, sources, **options)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        return generate_tokens(self.model, prompts, **options)


class EmbeddingNoise:
    """NEFTune (Jain et al. 2023, https://arxiv.org/abs/2310.05914): uniform noise on the embeddings of a model that is training.

    Within alpha / sqrt(L d) of 0, for a document of L tokens and d features, however documents are packed. An encoder-decoder
    gets it on what its encoder reads.
    """

    def __init__(self, model: nn.Module, alpha: float):
        self.alpha = alpha
        self.lengths = torch.zeros(0)  # of the documents at hand
        inner = causal_lm(model)
        reads = inner.get_encoder() if inner.config.is_encoder_decoder else model
        reads.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        if not module.training or not torch.is_grad_enabled():
            return embedded
        shape, lengths = embedded.shape[:-1], self.lengths
        if shape[0] == len(lengths) and shape[0] > 1:  # a padded row each
            tokens = lengths[:, None].expand(shape)
        else:
            tokens = lengths.repeat_interleave(lengths, output_size=shape.numel()).view(shape)
        bound = self.alpha / (tokens.float() * embedded.shape[-1]).sqrt()
        noise = torch.rand(embedded.shape, device=embedded.device).mul_(2).sub_(1)
        return embedded + (noise * bound[..., None]).to(embedded.dtype)


def _token_types(batch: Batch) -> Tensor | None:
    """Of documents that are two texts, [T]: 0 in the first, 1 in the second, which begins at fields["second_from"]."""
    if "second_from" not in batch.fields:
        return None
    second = batch.fields["second_from"].repeat_interleave(
        batch.cu_seqlens.diff(), output_size=batch.input_ids.shape[1]
    )
    return (batch.position_ids[0] >= second).long()
