"""A decoder block in three pieces: (norm, qkv, rope), attention, (output, add + norm, gated MLP).

Each piece is a function of tensors and of a frozen description of its weights and options, read from the modules on every
call. A recipe holds names and options only, never a module, so a deep copy of a fused model is a fused model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpt.fusion.attention import HARMLESS, asks_for_weights, attend, same_dtype
from fastpt.fusion.layout import Layout
from fastpt.fusion.projection import NotFusable, Projection, check_no_global_hooks, check_untouched
from fastpt.ops import add_rms_norm, geglu, rms_norm, rope, swiglu

ACTIVATIONS = {
    "silu": swiglu,
    "gelu_tanh": lambda gate, up: geglu(gate, up, approximate="tanh"),
    "gelu": lambda gate, up: geglu(gate, up, approximate="none"),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm with its family's rounding."""

    weight: Tensor  # [D]
    eps: float
    offset: float
    casts_first: bool

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, offset=self.offset, casts_first=self.casts_first)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset, casts_first=self.casts_first)


@dataclass(frozen=True, eq=False)
class QKV:
    """What the first piece needs: one packed projection or three, and the norms of the heads where there are any."""

    norm: Norm
    projections: tuple[Projection, ...]
    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class OutputMLP:
    """What the last piece needs; the two `after` norms are Gemma's."""

    output: Projection
    norm: Norm
    gate_up: tuple[Projection, ...]
    activation: str
    down: Projection
    after_attention: Norm | None = None
    after_mlp: Norm | None = None


def norm_qkv_rope(x: Tensor, cos: Tensor, sin: Tensor, w: QKV) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], cos and sin [T, R] -> q [T, H, K], k and v [T, Hkv, K]."""
    y = w.norm(x)
    sizes = [w.heads * w.head_dim, w.kv_heads * w.head_dim, w.kv_heads * w.head_dim]
    projected = [projection(y) for projection in w.projections]
    parts = projected if len(projected) == 3 else projected[0].split(sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, w.head_dim)) for part in parts)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = w.q_norm(q), w.k_norm(k)
    return *rope(q, k, cos, sin), v


def output_norm_mlp(attended: Tensor, residual: Tensor, w: OutputMLP) -> Tensor:
    """attended [T, H * K], residual [T, D] -> the block's output [T, D]."""
    y = w.output(attended)
    if w.after_attention is not None:
        y = w.after_attention(y)
    y, residual = w.norm.add(y, residual)
    projected = [projection(y) for projection in w.gate_up]
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
    y = w.down(ACTIVATIONS[w.activation](gate, up))
    if w.after_mlp is not None:
        y = w.after_mlp(y)
    return residual + y


class Block(NamedTuple):
    """Everything one call of a fused block needs besides the hidden states."""

    qkv: QKV
    mlp: OutputMLP
    cos: Tensor  # [1 or B, S, R]
    sin: Tensor
    layout: Layout
    scale: float | None
    softcap: float | None
    cache: Any
    layer_idx: int


def decoder_block(hidden: Tensor, block: Block) -> Tensor:
    """hidden [B, S, D] through the three pieces."""
    shape, layout = hidden.shape, block.layout
    x = hidden.reshape(-1, shape[-1])  # [T, D]
    cos, sin = (table.expand(*shape[:2], -1).reshape(-1, table.shape[-1]) for table in (block.cos, block.sin))
    q, k, v = norm_qkv_rope(x, cos, sin, block.qkv)
    if block.cache is not None:  # a prefill: the layout says that these are all the keys there are
        block.cache.update(*(t.unflatten(0, shape[:2]).transpose(1, 2) for t in (k, v)), block.layer_idx)
    attended = attend(*same_dtype(q, k, v), layout, scale=block.scale, softcap=block.softcap).flatten(1)
    return output_norm_mlp(attended, x, block.mlp).view(shape)


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
        return Block(qkv, mlp, cos, sin, layout, self.scale, self.softcap, cache, getattr(attention, "layer_idx", 0))

    def read_weights(self, block: nn.Module, dtype: torch.dtype) -> tuple[QKV, OutputMLP]:
        """The two pieces that hold weights, as they are now."""
        attention = part(block, self.attention, self.attention_kind)
        mlp = part(block, self.mlp, self.mlp_kind)
        part(mlp, self.activation_name, self.activation_kind)

        def norm(recipe: NormRecipe | None, parent: nn.Module) -> Norm | None:
            return None if recipe is None else recipe.read(parent, dtype)

        def project(parent: nn.Module, where: str, name: str) -> Projection:
            return Projection.read(parent._modules[name], f"{where}.{name}")  # type: ignore[arg-type]

        qkv = QKV(
            self.norm.read(block, dtype),
            tuple(project(attention, self.attention, name) for name in self.qkv),
            self.heads, self.kv_heads, self.head_dim, norm(self.q_norm, attention), norm(self.k_norm, attention),
        )  # fmt: skip
        return qkv, OutputMLP(
            project(attention, self.attention, self.output), self.mlp_norm.read(block, dtype),
            tuple(project(mlp, self.mlp, name) for name in self.gate_up), self.activation,
            project(mlp, self.mlp, self.down), norm(self.after_attention, block), norm(self.after_mlp, block),
        )  # fmt: skip

    def _read_call(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Layout, Tensor, Tensor]:
        known = HARMLESS | {"attention_mask", "position_embeddings"}
        if unknown := [name for name, value in kwargs.items() if value is not None and name not in known]:
            raise NotFusable(f"called with {', '.join(unknown)}")
        layout, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        if not isinstance(layout, Layout):
            raise NotFusable("a dense mask, or keys from the cache")
        layout = layout.given(kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
        if not layout.has_spans or (layout.batch, layout.length) != tuple(hidden.shape[:2]):
            raise NotFusable("a mask that only a dense one can express")
        if not isinstance(tables, tuple) or len(tables) != 2 or tables[0].shape[-1] > self.head_dim:
            raise NotFusable("rotary tables of another form than (cos, sin)")
        return layout, *tables


def is_checkpointing(block: Any) -> bool:
    """Whether transformers' gradient checkpointing is on for this layer (it drops the cache then, as we do)."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training
