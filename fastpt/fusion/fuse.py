"""fuse: recognise the parts of one model instance, route them through the ops, and put everything back on request."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpt.errors import ModelError
from fastpt.fusion.attention import NAME
from fastpt.fusion.blocks import NormRecipe, Recipe, is_checkpointing
from fastpt.fusion.causal_lm import fused_forward, verified_head, watching_train
from fastpt.fusion.decoder import decoder_block
from fastpt.fusion.encoder_recipe import (
    EncoderRecipe,
    block_forward,
    encoder_recipe,
    names_of,
    stack_forward,
    stack_of,
)
from fastpt.fusion.experts import check_experts, innermost, looks_like_experts, wrapper_forward
from fastpt.fusion.explain import Row, rows_of, show
from fastpt.fusion.patch import Patch, patch_of
from fastpt.fusion.positions import position_patches
from fastpt.fusion.projection import NotFusable, trained_rows
from fastpt.fusion.recognise import block_recipe, looks_like_block, norm_recipe, verified
from fastpt.ops import embedding, layer_norm, rms_norm

# transformers 5.23 checkpoints in the layer class's forward, which a fused block replaces; before, it was in its __call__.
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


class Handle:
    """What fuse did to one model; `remove()`, or leaving its `with` block, undoes it."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.patches: list[Patch] = []
        self.recipes: dict[
            str, Recipe | EncoderRecipe | NormRecipe | None
        ] = {}  # module path -> recipe; None: nn.LayerNorm
        self.backbones: dict[str, tuple[Any, Any]] = {}  # module path -> config, attention before
        self.experts: dict[str, tuple[Any, Any]] = {}  # path of a mixture's experts -> config, experts function before
        self.embeddings: set[str] = set()  # module paths
        self.stacks: list[str] = []  # module paths of encoders whose layers see real tokens alone
        self.heads: list[str] = []  # module paths of causal language models
        self.reasons: dict[str, str] = {}  # module path -> why it was left alone
        # Why it cannot share prompts (shared_prefix.py), or take packed sources (encoder_decoder.py); "": it can; None: unknown
        self.no_sharing: str | None = None
        self.no_packing: str | None = None

    def remove(self) -> None:
        """Give every module its own forward back; under wrappers that others put on top since, ours pass through."""
        for patch in reversed(self.patches):
            patch.remove()
        for config, before in self.backbones.values():
            if config._attn_implementation_internal == NAME:
                config._attn_implementation_internal = before
        for config, before in self.experts.values():
            if config._experts_implementation_internal == NAME:
                config._experts_implementation_internal = before
        self.patches.clear()
        self.experts.clear()
        self.backbones.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def rows(self) -> list[Row]:
        """One row per part, as `explain` prints them."""
        return rows_of(self)


def fuse(model: nn.Module) -> Handle:
    """Route the recognised parts of a transformers or PEFT model through fastpt's kernels, on this instance only.

    Parameters, adapters, hooks and checkpointing stay where they are; what is not recognised stays as it was, and
    `explain(model)` lists it. A model that is fused already gives the handle it has.
    Raises: ModelError when `model` holds no transformers model.
    """
    if (handle := handle_of(model)) is not None:
        return handle
    handle = Handle(model)
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    if not named:
        raise ModelError(
            f"{type(model).__name__} holds no transformers model; fuse takes a PreTrainedModel or a PeftModel"
        )
    try:
        for path, module in named:
            _use_attention(handle, path, module)
        _fuse_experts(handle, model)
        inside = _fuse_blocks(handle, model) | _fuse_encoders(handle, model)
        _fuse_norms(handle, model, inside)
        _fuse_embeddings(handle, model, inside)
        for path, module in named:
            _fuse_head(handle, path, module)
        if any(module.config.is_encoder_decoder for _, module in named):
            handle.patches += position_patches(model)
    except BaseException:
        handle.remove()
        raise
    for patch in handle.patches:
        patch.handle = handle  # type: ignore[attr-defined]
    return handle


def explain(model: nn.Module) -> list[Row]:
    """Print which kernel serves each part of a model, or the reason why none does; return the rows.

    A model that is not fused is fused for the look, and put back.
    """
    handle = handle_of(model)
    if handle is not None:
        return show(handle.rows)
    with fuse(model) as handle:
        rows = handle.rows
    return show(rows)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a fused model, found through any of its parts."""
    for module in model.modules():
        patch = patch_of(module.__dict__.get("train")) or patch_of(module.__dict__.get("forward"))
        if patch is not None and patch.is_active and patch.module is module:
            return getattr(patch, "handle", None)
    return None


def _use_attention(handle: Handle, path: str, module: Any) -> None:
    """Point a transformers model's config at the attention function, where its code goes through the table."""
    config = module.config
    if (
        any(config is seen for seen, _ in handle.backbones.values())
        or getattr(module, "base_model", module) is not module
    ):
        return
    is_known = module._supports_attention_backend or config.is_encoder_decoder  # whose masks come from the same table
    if not is_known or not module._can_set_attn_implementation():
        handle.reasons[path] = "its attention does not go through transformers' attention table"
        return
    handle.backbones[path] = config, config._attn_implementation_internal
    config._attn_implementation_internal = NAME


def _fuse_blocks(handle: Handle, model: nn.Module) -> set[nn.Module]:
    """Patch every decoder block that is recognised; returns their modules."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside or not looks_like_block(module):
            continue
        try:
            if "forward" in module.__dict__:
                raise NotFusable("it has a forward of its own")
            recipe = verified(module, block_recipe(module))
        except NotFusable as reason:
            handle.reasons[path] = str(reason)
            continue
        inside.update(module.modules())
        handle.recipes[path] = recipe
        handle.patches.append(Patch(module, partial(_block_forward, recipe)))
    return inside


def _block_forward(recipe: Recipe, patch: Patch) -> Any:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not patch.is_active:
            return patch.below(self, hidden_states, *args, **kwargs)
        try:
            if args:
                raise NotFusable("called with positional arguments")
            block = recipe.read(self, hidden_states, kwargs)
        except NotFusable as reason:
            patch.fallback = str(reason)
            return patch.below(self, hidden_states, *args, **kwargs)
        patch.fallback = None
        if is_checkpointing(self) and CHECKPOINTS_FORWARD:
            through = partial(decoder_block, block=block)
            through.recomputed = partial(through, recomputes=True)  # type: ignore[attr-defined]
            return self._gradient_checkpointing_func(through, hidden_states)
        return decoder_block(hidden_states, block)

    return forward


def _fuse_experts(handle: Handle, model: nn.Module) -> None:
    """Point the configs of mixtures at the experts function, and patch the wrappers of PEFT's adapters on experts."""
    found = {path: module for path, module in model.named_modules() if looks_like_experts(innermost(module)[0])}
    inner = {part for module in found.values() for part in list(module.modules())[1:]}
    mixtures = {path: (module, *innermost(module)) for path, module in found.items() if module not in inner}
    refused = set()
    for path, (outer, experts, _) in mixtures.items():
        try:
            check_experts(experts)
            if "forward" in outer.__dict__:
                raise NotFusable("it has a forward of its own")
        except NotFusable as reason:
            handle.reasons[path] = str(reason)
            refused.add(id(experts.config))  # which all layers share
    before = {id(experts.config): experts.config._experts_implementation for _, experts, _ in mixtures.values()}
    for path, (outer, experts, wrappers) in mixtures.items():
        if id(experts.config) in refused:
            handle.reasons.setdefault(path, "other experts of the same config are not served")
            continue
        handle.experts[path] = experts.config, before[id(experts.config)]
        experts.config._experts_implementation_internal = NAME
        if wrappers:
            handle.patches.append(Patch(outer, wrapper_forward))


def _fuse_encoders(handle: Handle, model: nn.Module) -> set[nn.Module]:
    """Patch every encoder block that is recognised, and the stacks they make; returns the blocks' modules."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        names = names_of(module)
        if module in inside or names is None:
            continue
        try:
            if "forward" in module.__dict__:
                raise NotFusable("it has a forward of its own")
            recipe = encoder_recipe(module, names)
        except NotFusable as reason:
            handle.reasons[path] = str(reason)
            continue
        inside.update(module.modules())
        handle.recipes[path] = recipe
        handle.patches.append(Patch(module, partial(block_forward, recipe, CHECKPOINTS_FORWARD)))
    for path, module in model.named_modules():
        found = stack_of(module, path, handle.recipes)
        if found is not None and "forward" not in module.__dict__:
            name, recipes = found
            handle.stacks.append(path)
            handle.patches.append(Patch(module, partial(stack_forward, name, recipes)))
    return inside


def _fuse_norms(handle: Handle, model: nn.Module, inside: set[nn.Module]) -> None:
    """Patch the norms that are not part of a fused block."""
    for path, parent in model.named_modules():
        if parent in inside:
            continue
        for name, module in parent._modules.items():
            if module is None or module in inside or "forward" in module.__dict__:
                continue
            where = f"{path}.{name}" if path else name
            if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
                handle.recipes[where] = None
                handle.patches.append(Patch(module, _layer_norm_forward))
                continue
            try:
                recipe = norm_recipe(parent, name)
            except NotFusable as reason:
                handle.reasons[where] = str(reason)
                continue
            if recipe is not None:
                handle.recipes[where] = recipe
                handle.patches.append(Patch(module, partial(_norm_forward, recipe)))


def _norm_forward(recipe: NormRecipe, patch: Patch) -> Any:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        try:
            if not patch.is_active or len(args) != 1 or kwargs:
                raise NotFusable("called with more than one tensor")
            norm = recipe.of(self, args[0].dtype)
        except NotFusable as reason:
            patch.fallback = str(reason)
            return patch.below(self, *args, **kwargs)
        patch.fallback = None
        return rms_norm(args[0], norm.weight, norm.eps, offset=norm.offset, casts_first=norm.casts_first)

    return forward


def _layer_norm_forward(patch: Patch) -> Any:
    def forward(self: Any, input: Tensor) -> Tensor:
        is_mixed = self.weight is not None and self.weight.dtype != input.dtype
        if not patch.is_active or is_mixed or torch.is_autocast_enabled(input.device.type):
            patch.fallback = "autocast, or parameters of another dtype"
            return patch.below(self, input)
        patch.fallback = None
        return layer_norm(input, self.weight, self.bias, self.eps)

    return forward


def _fuse_embeddings(handle: Handle, model: nn.Module, inside: set[nn.Module]) -> None:
    """Patch the embeddings, whose gradient then touches only the rows that were used."""
    for path, module in model.named_modules():
        if module in inside or "forward" in module.__dict__:
            continue
        if (rows := trained_rows(module)) is not None and type(rows[0]) is nn.Embedding:
            handle.patches.append(Patch(module, _trained_rows_forward))
        if type(module) is not nn.Embedding:
            continue
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            handle.reasons[path] = "max_norm, scale_grad_by_freq or sparse"
            continue
        handle.embeddings.add(path)
        handle.patches.append(Patch(module, _embedding_forward))


def _embedding_forward(patch: Patch) -> Any:
    def forward(self: Any, input: Tensor) -> Tensor:
        if not patch.is_active:
            return patch.below(self, input)
        return embedding(input, self.weight, padding_idx=self.padding_idx)

    return forward


def _trained_rows_forward(patch: Patch) -> Any:
    """Rows of added tokens beside those of the table, which gets no gradient and is not copied."""

    def forward(self: Any, input: Tensor) -> Tensor:
        rows = trained_rows(self) if patch.is_active else None
        if rows is None:
            return patch.below(self, input)
        table, ids, values = rows
        ids, order = ids.sort()
        at = torch.searchsorted(ids, input).clamp(max=len(ids) - 1)
        is_new = ids[at] == input
        # An embedding whose row counts for nothing gets a gradient of zeros.
        new = embedding(order[at], values).to(table.weight.dtype)  # type: ignore[arg-type]
        return torch.where(is_new[..., None], new, table(input))

    return forward


def _fuse_head(handle: Handle, path: str, module: Any) -> None:
    """Patch the forward of a causal language model, so that its loss needs no logits."""
    if getattr(module, "base_model", module) is module or module.get_output_embeddings() is None:
        return
    try:
        verified_head(module)
    except (NotFusable, ModelError) as reason:
        handle.reasons[path or type(module).__name__] = str(reason)
        return
    handle.heads.append(path)
    handle.patches.append(Patch(module, fused_forward))
    handle.patches.append(Patch(module, watching_train(handle.patches), attribute="train"))
