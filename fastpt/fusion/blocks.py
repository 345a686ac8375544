"""The recipe of a decoder block: which of its modules are what, read into the pieces of decoder.py on every call.

A recipe holds names and options only, never a module, so a deep copy of a fused model is a fused model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.fusion.attention import HARMLESS, asks_for_weights
from fastpt.fusion.decoder import QKV, Block, Call, OutputMLP
from fastpt.fusion.layout import Layout
from fastpt.fusion.pieces import Activation, Linears, Norm, product_dtype
from fastpt.fusion.projection import NotFusable, Projection, check_no_global_hooks, check_untouched
from fastpt.ops.lora_linear import new_seeds


@dataclass(frozen=True)
class NormRecipe:
    """Where a norm sits and how it rounds."""

    name: str
    kind: type
    eps_name: str
    offset: float
    casts_first: bool

    def read(self, parent: nn.Module, dtype: torch.dtype) -> Norm:
        """The norm as it is now, for activations of `dtype`."""
        return self.of(part(parent, self.name, self.kind), dtype)

    def of(self, module: nn.Module, dtype: torch.dtype) -> Norm:
        """The same for the module itself."""
        weight: Any = module.weight
        if weight.dtype != dtype and not torch.is_autocast_enabled(weight.device.type):
            raise NotFusable(f"{self.name} holds {weight.dtype} weights under {dtype} activations")
        return Norm(weight, getattr(module, self.eps_name), self.offset, self.casts_first)


def part(parent: nn.Module, name: str, kind: type) -> nn.Module:
    """The submodule that recognition saw; raises NotFusable when it was replaced or hooked."""
    module = parent._modules.get(name)
    if module is None or type(module) is not kind:
        raise NotFusable(f"{name} is no longer a {kind.__name__}")
    check_untouched(module, name)
    return module


@dataclass(frozen=True)
class Recipe:
    """A decoder block as recognition found it: names, kinds and options."""

    attention: str
    attention_kind: type
    mlp: str
    mlp_kind: type
    norm: NormRecipe
    mlp_norm: NormRecipe
    qkv: tuple[str, ...]
    output: str
    gate_up: tuple[str, ...]
    down: str
    activation: str
    activation_name: str
    activation_kind: type
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: NormRecipe | None = None
    k_norm: NormRecipe | None = None
    after_attention: NormRecipe | None = None
    after_mlp: NormRecipe | None = None
    dropouts: tuple[str, ...] = ()
    attention_dropout: float = 0.0  # this and the next two are what the block passes to its attention function
    scale: float | None = None
    softcap: float | None = None

    def read(self, block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Block:
        """The block's state for this call; raises NotFusable with the reason when the original has to run."""
        check_no_global_hooks()
        attention = part(block, self.attention, self.attention_kind)
        if asks_for_weights(attention, kwargs):
            raise NotFusable("attention weights are asked for")
        layout, cos, sin = self._read_call(hidden, kwargs)
        if self.attention_dropout > 0 and attention.training:
            raise NotFusable(f"attention dropout {self.attention_dropout} in training")
        for name in self.dropouts:
            dropout: Any = part(block, name, nn.Dropout)
            if dropout.p > 0 and dropout.training:
                raise NotFusable(f"{name} {dropout.p} in training")
        cache = None if is_checkpointing(block) else kwargs.get("past_key_values")
        qkv, mlp = self.read_weights(block, hidden.dtype)
        call = self.call(layout)._replace(cache=cache, layer_idx=getattr(attention, "layer_idx", 0))
        return Block(qkv, mlp, cos, sin, call)

    def call(self, layout: Layout) -> Call:
        """A call on a whole batch, without a cache."""
        return Call(layout, self.scale, self.softcap, self.heads, self.kv_heads, self.head_dim)

    def norm_weight(self, block: nn.Module) -> Tensor:
        """It has the dtype of the block's activations outside autocast; adapters may have another."""
        return part(block, self.norm.name, self.norm.kind).weight  # type: ignore[return-value]

    def read_weights(self, block: nn.Module, dtype: torch.dtype) -> tuple[QKV, OutputMLP]:
        """The two pieces that hold weights, as they are now, for hidden states of `dtype`."""
        attention = part(block, self.attention, self.attention_kind)
        mlp = part(block, self.mlp, self.mlp_kind)
        part(mlp, self.activation_name, self.activation_kind)

        def norm(recipe: NormRecipe | None, parent: nn.Module) -> Norm | None:
            return None if recipe is None else recipe.read(parent, dtype)

        def linears(parent: nn.Module, where: str, *names: str) -> Linears:
            return linears_of([Projection.read(parent._modules[name], f"{where}.{name}") for name in names], dtype)  # type: ignore

        qkv = QKV(
            self.norm.read(block, dtype), linears(attention, self.attention, *self.qkv),
            norm(self.q_norm, attention), norm(self.k_norm, attention),
        )  # fmt: skip
        return qkv, OutputMLP(
            linears(attention, self.attention, self.output), self.mlp_norm.read(block, dtype),
            linears(mlp, self.mlp, *self.gate_up), Activation(self.activation), linears(mlp, self.mlp, self.down),
            norm(self.after_attention, block), norm(self.after_mlp, block),
        )  # fmt: skip

    def _read_call(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Layout, Tensor, Tensor]:
        known = HARMLESS | {"attention_mask", "position_embeddings"}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise NotFusable(f"called with {', '.join(unknown)}")
        layout, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if not isinstance(layout, Layout):
            raise NotFusable("a dense mask, or keys from the cache")
        layout = layout.given(kwargs)
        if not layout.has_spans or (layout.batch, layout.length) != tuple(hidden.shape[:2]):
            raise NotFusable("a mask that only a dense one can express")
        if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].shape[-1] > self.head_dim:
            raise NotFusable("rotary tables of another form than (cos, sin)")
        return layout, *tables


def linears_of(projections: list[Projection], dtype: torch.dtype) -> Linears:
    """The projections of one input, for activations of `dtype`; their dropouts must agree."""
    probabilities = {p.dropout_p for p in projections if p.lora_a is not None} or {0.0}
    if len(probabilities) > 1:
        raise NotFusable(f"adapters of one input drop out with different probabilities {sorted(probabilities)}")
    (dropout_p,) = probabilities
    seeds = tuple(new_seeds(dropout_p, len(projections)))
    products = product_dtype(dtype, projections[0].weight.device)
    return Linears(tuple(p.layer(products) for p in projections), dropout_p, seeds)


def is_checkpointing(block: Any) -> bool:
    """Whether transformers' gradient checkpointing is on for this layer (it drops the cache then, as we do)."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training
