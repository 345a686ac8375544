"""Parts of encoder-decoders that number tokens by their place in a row, told the place in the document that they belong to.

BART and its kin look positions up by the shape of their input, T5 biases its scores by the places of query and key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.data.batches import Packed
from fastpt.fusion.layout import Layout
from fastpt.fusion.patch import Patch
from fastpt.ops import embedding

_documents: ContextVar[Packed | None] = ContextVar("documents of the row at hand", default=None)


@contextmanager
def numbering(documents: Packed) -> Iterator[None]:
    """Within it, position embeddings are those of packed documents."""
    token = _documents.set(documents)
    try:
        yield
    finally:
        _documents.reset(token)


def position_patches(model: nn.Module) -> list[Patch]:
    """Patches of the parts of a model that number tokens; without `numbering` and packed layouts these do what they did."""
    found = []
    for path, module in model.named_modules():
        if "forward" in module.__dict__:
            continue
        if path.endswith("embed_positions") and isinstance(module, nn.Embedding):
            found.append(Patch(module, _embedding_forward))
        if hasattr(module, "has_relative_attention_bias") and hasattr(module, "compute_bias"):
            found.append(Patch(module, _biased_forward))
    return found


def _embedding_forward(patch: Patch) -> Callable:
    def forward(self: nn.Module, row: Tensor | torch.Size, *args: Any, **kwargs: Any) -> Tensor:
        documents = _documents.get()
        if not patch.is_active or documents is None:
            return patch.below(self, row, *args, **kwargs)
        shape = (1, documents.max_seqlen)
        table = patch.below(self, row.new_zeros(shape) if isinstance(row, Tensor) else torch.Size(shape))
        return embedding(documents.position_ids, table.flatten(0, -2))

    return forward


def _biased_forward(patch: Patch) -> Callable:
    def forward(self: Any, hidden_states: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        longest = mask.longest if isinstance(mask, Layout) else None
        if patch.is_active and longest is not None and not args and kwargs.get("position_bias") is None:
            has_bias = self.has_relative_attention_bias
            # None would be made a tensor of zeros of the whole row.
            bias = (
                self.compute_bias(*longest, hidden_states.device) if has_bias else hidden_states.new_zeros(1, 1, 1, 1)
            )
            kwargs["position_bias"] = bias
        return patch.below(self, hidden_states, mask, *args, **kwargs)

    return forward
