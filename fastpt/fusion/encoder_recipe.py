"""Which modules make a post-norm encoder block (BERT, RoBERTa, DistilBERT and their kin), and its forward on real tokens alone.

As for decoders, names and structure come first and a probe decides; a recipe holds names and options only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from fastpt.fusion.attention import HARMLESS, asks_for_weights, recording
from fastpt.fusion.blocks import is_checkpointing, linears_of
from fastpt.fusion.encoder import EncoderBlock, EncoderCall, LayerNorm, encoder_block
from fastpt.fusion.layout import Layout
from fastpt.fusion.patch import Patch
from fastpt.fusion.pieces import APPROXIMATIONS, Linears
from fastpt.fusion.projection import (
    NotFusable,
    Projection,
    check_no_global_hooks,
    check_unhooked,
    check_untouched,
    out_features,
)
from fastpt.fusion.recognise import PROBE_TOKENS, activation_of, evaluating
from fastpt.ops._dropout import drawn_seed


@dataclass(frozen=True)
class Names:
    """Where a family keeps the parts of a block; `attention` is the module that calls the attention function."""

    attention: str
    qkv: tuple[str, str, str]
    attention_dropout: str
    output: str
    norm: str
    up: str
    activation: str
    down: str
    mlp_norm: str
    mlp_dropout: str
    output_dropout: str | None = None

    @cached_property
    def paths(self) -> list[str]:
        """All parts, and the modules that hold them."""
        leaves = [*self.qkv, self.attention_dropout, self.output, self.norm, self.up, self.activation, self.down]
        leaves += [self.mlp_norm, self.mlp_dropout, *([self.output_dropout] if self.output_dropout else [])]
        return sorted({".".join(leaf.split(".")[:n]) for leaf in leaves for n in range(1, leaf.count(".") + 2)})

    @cached_property
    def containers(self) -> list[str]:
        paths = self.paths
        return [path for path in paths if any(other.startswith(f"{path}.") for other in paths)]


FAMILIES = (
    Names(
        attention="attention.self", qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_dropout="attention.self.dropout", output="attention.output.dense", norm="attention.output.LayerNorm",
        up="intermediate.dense", activation="intermediate.intermediate_act_fn", down="output.dense",
        mlp_norm="output.LayerNorm", mlp_dropout="output.dropout", output_dropout="attention.output.dropout",
    ),
    Names(
        attention="attention", qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_dropout="attention.dropout", output="attention.out_lin", norm="sa_layer_norm", up="ffn.lin1",
        activation="ffn.activation", down="ffn.lin2", mlp_norm="output_layer_norm", mlp_dropout="ffn.dropout",
    ),
)  # fmt: skip


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a path, or None."""
    for name in path.split("."):
        module = module._modules.get(name)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def names_of(block: nn.Module) -> Names | None:
    """The family whose outline a module has."""
    return next((names for names in FAMILIES if all(at(block, path) is not None for path in names.paths)), None)


@dataclass(frozen=True)
class EncoderRecipe:
    """An encoder block as recognition found it."""

    names: Names
    kinds: tuple[type, ...]  # of names.containers
    activation: str
    activation_kind: type
    head_dim: int
    scale: float = 0.0  # what the block passes to its attention function

    def read(self, block: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """(EncoderBlock, EncoderCall) for this call; raises NotFusable with the reason when the original has to run."""
        check_no_global_hooks()
        attention = at(block, self.names.attention)
        if attention is not None and asks_for_weights(attention, kwargs):
            raise NotFusable("attention weights are asked for")
        layout = self._layout(hidden, args, kwargs)
        weights = self.read_weights(block, hidden.dtype)
        weights = weights._replace(norm=_seeded(weights.norm), mlp_norm=_seeded(weights.mlp_norm))
        dropout_p = dropout_of(block, self.names.attention_dropout)
        return weights, EncoderCall(layout, self.scale, self.head_dim, dropout_p, drawn_seed(dropout_p))

    def norm_weight(self, block: nn.Module) -> Tensor:
        """It has the dtype of the block's activations outside autocast; adapters may have another."""
        if (weight := _norm(block, self.names.norm, None).weight) is None:
            raise NotFusable(f"{self.names.norm} has no weight")
        return weight

    def read_weights(self, block: nn.Module, dtype: torch.dtype) -> EncoderBlock:
        """The weights as they are now, for hidden states of `dtype`; no seeds are drawn yet."""
        names = self.names
        for path, kind in zip(names.containers, self.kinds, strict=True):
            module = at(block, path)
            if type(module) is not kind:
                raise NotFusable(f"{path} is no longer a {kind.__name__}")
            check_untouched(module, path)
        activation = at(block, names.activation)
        if type(activation) is not self.activation_kind:
            raise NotFusable(f"{names.activation} is no longer a {self.activation_kind.__name__}")
        check_untouched(activation, names.activation)

        def linears(*paths: str) -> Linears:
            return linears_of([Projection.read(at(block, path), path) for path in paths], dtype)

        up = linears(names.up)
        return EncoderBlock(
            linears(*names.qkv), linears(names.output), _norm(block, names.norm, names.output_dropout),
            up._replace(layers=(up.layers[0]._replace(bias=None),)), up.layers[0].bias, self.activation,
            linears(names.down), _norm(block, names.mlp_norm, names.mlp_dropout),
        )  # fmt: skip

    def _layout(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Layout:
        given = dict(kwargs)
        if args:
            given["attention_mask"] = args[0]
        if any(value is not None for value in args[1:]):
            raise NotFusable("called with more positional arguments than a mask")
        for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask"):
            if given.pop(name, None) is not None:
                raise NotFusable(f"called with {name}")
        known = HARMLESS | {"attention_mask"}
        if unknown := [name for name, value in given.items() if value is not None and name not in known]:
            raise NotFusable(f"called with {', '.join(unknown)}")
        layout = given.get("attention_mask")
        if not isinstance(layout, Layout):
            raise NotFusable("a dense mask")
        layout = layout.given(given)
        if not layout.has_spans or (layout.batch, layout.length) != tuple(hidden.shape[:2]):
            raise NotFusable("a mask that only a dense one can express")
        return layout


def dropout_of(block: nn.Module, path: str | None) -> float:
    """The probability that a Dropout module drops with now."""
    if path is None:
        return 0.0
    module = at(block, path)
    if type(module) is not nn.Dropout:
        raise NotFusable(f"{path} is a {type(module).__name__}")
    check_untouched(module, path)
    return module.p if module.training else 0.0


def _norm(block: nn.Module, path: str, dropout: str | None) -> LayerNorm:
    module = at(block, path)
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        raise NotFusable(f"{path} is a {type(module).__name__}")
    check_untouched(module, path)
    return LayerNorm(module.weight, module.bias, module.eps, dropout_of(block, dropout))


def _seeded(norm: LayerNorm) -> LayerNorm:
    return norm._replace(seed=drawn_seed(norm.dropout_p))


@torch.no_grad()
def encoder_recipe(block: nn.Module, names: Names) -> EncoderRecipe:
    """The recipe of a block, once both forms agree on random tokens; raises NotFusable with what does not fit."""
    paths, containers = set(names.paths), names.containers
    for path in ["", *containers]:
        module = at(block, path) if path else block
        inside = f"{path}." if path else ""
        if others := [n for n, child in module._modules.items() if child is not None and inside + n not in paths]:
            raise NotFusable(f"{path or 'it'} also has {', '.join(others)}")
        if module._parameters:
            raise NotFusable(f"{path or 'it'} has parameters of its own: {', '.join(module._parameters)}")
    activation = activation_of(at(block, names.activation))
    if activation not in APPROXIMATIONS:
        raise NotFusable(f"{names.activation} is not GELU")
    attention = at(block, names.attention)
    head_dim = getattr(attention, "attention_head_size", None)
    if not isinstance(head_dim, int) or out_features(at(block, names.qkv[0])) % head_dim:
        raise NotFusable(f"attention_head_size is {head_dim}")
    recipe = EncoderRecipe(
        names,
        tuple(type(at(block, path)) for path in containers),
        activation,
        type(at(block, names.activation)),
        head_dim,
    )
    return _verified(block, recipe)


def _verified(block: nn.Module, recipe: EncoderRecipe) -> EncoderRecipe:
    weight = next((p for p in block.parameters() if p.dim() == 2), None)
    if weight is None or weight.is_meta:
        raise NotFusable("weights are not loaded")
    dtype, names = recipe.norm_weight(block).dtype, recipe.names
    width = at(block, names.norm).normalized_shape[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(weight.device, dtype)
    layout = Layout(1, PROBE_TOKENS, weight.device, causal=False)
    with evaluating(block):
        attention = at(block, names.attention)
        attention.training = True  # shows the dropout it would pass; recording drops none
        with recording() as calls:
            theirs = type(block).forward(block, x, attention_mask=layout)
        attention.training = False
        if len(calls) != 1 or calls[0]["extra"] or calls[0]["softcap"] is not None:
            raise NotFusable(f"attention is called with {calls[0] if calls else 'no attention function'}")
        if calls[0]["dropout"] != at(block, names.attention_dropout).p:
            raise NotFusable(f"attention drops {calls[0]['dropout']}, {names.attention_dropout} says otherwise")
        scale = calls[0]["scaling"]
        recipe = replace(recipe, scale=recipe.head_dim**-0.5 if scale is None else scale)
        ours = encoder_block(x, recipe.read_weights(block, dtype), EncoderCall(layout, recipe.scale, recipe.head_dim))
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise NotFusable("its forward returns something else than hidden states")
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-20)
    if not error <= (1e-4 if dtype.itemsize >= 4 else 3e-2):
        raise NotFusable(f"its forward computes something else (relative difference {error:.1e} on random tokens)")
    return recipe


def block_forward(recipe: EncoderRecipe, checkpoints_forward: bool, patch: Patch) -> Callable:
    """forward(self, hidden_states, ...) of a recognised block."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not patch.is_active:
            return patch.below(self, hidden_states, *args, **kwargs)
        try:
            block, call = recipe.read(self, hidden_states, args, kwargs)
        except NotFusable as reason:
            patch.fallback = str(reason)
            return patch.below(self, hidden_states, *args, **kwargs)
        patch.fallback = None
        if is_checkpointing(self) and checkpoints_forward:
            return self._gradient_checkpointing_func(partial(encoder_block, block=block, call=call), hidden_states)
        return encoder_block(hidden_states, block, call)

    return forward


def stack_of(module: nn.Module, path: str, recipes: dict[str, Any]) -> tuple[str, tuple[EncoderRecipe, ...]] | None:
    """The list that holds a module's blocks and their recipes, if it is a stack of nothing but recognised blocks."""
    if len(module._modules) != 1:
        return None
    ((name, blocks),) = module._modules.items()
    if type(blocks) is not nn.ModuleList or not len(blocks):
        return None
    inside = f"{path}.{name}." if path else f"{name}."
    listed = [recipes.get(f"{inside}{i}") for i in range(len(blocks))]
    found = tuple(recipe for recipe in listed if isinstance(recipe, EncoderRecipe))
    return (name, found) if len(found) == len(listed) else None


def stack_forward(name: str, recipes: tuple[EncoderRecipe, ...], patch: Patch) -> Callable:
    """forward(self, hidden_states, ...) of a stack of blocks: padding is left out once, around all layers."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not patch.is_active:
            return patch.below(self, hidden_states, *args, **kwargs)
        try:
            layout = _layout_to_pack(self._modules[name], recipes, hidden_states, args, kwargs)
        except NotFusable as reason:
            patch.fallback = str(reason)
            return patch.below(self, hidden_states, *args, **kwargs)
        patch.fallback = None
        if layout.padding is None:
            return patch.below(self, hidden_states, *args, **kwargs)
        real, packed = layout.packed
        args, kwargs = args[1:], {**kwargs, "attention_mask": packed}
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        outputs = patch.below(self, flat.index_select(0, real)[None], *args, **kwargs)
        tokens = outputs.last_hidden_state[0]
        outputs.last_hidden_state = (
            tokens.new_zeros(flat.shape).index_copy(0, real, tokens).view(hidden_states.shape)
        )  # fmt: skip
        return outputs

    return forward


def _layout_to_pack(
    blocks: Any, recipes: tuple[EncoderRecipe, ...], hidden: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Layout:
    """The layout of a call whose layers may all see packed tokens; raises NotFusable with the reason when one may not."""
    if output_capturing._active_collector.get() or kwargs.get("output_hidden_states"):
        raise NotFusable("inner outputs are asked for")
    if len(args) > 1:
        raise NotFusable("called with more positional arguments than a mask")
    check_no_global_hooks()
    layout = None
    for i, (block, recipe) in enumerate(zip(blocks, recipes, strict=True)):
        check_unhooked(block, f"layer {i}")
        layout = recipe._layout(hidden, args, kwargs)
        recipe.read_weights(block, hidden.dtype)
    assert layout is not None
    if layout.padding is not None and layout.window is not None:
        raise NotFusable("a window over padded rows")
    if layout.padding is not None and not bool(layout.padding[:, 0].all()):
        raise NotFusable("padding on the left, where a pooler would read it")
    return layout
