"""Decoding with a static KV cache: prompts packed through the fused model, then one token a step for every sequence.

What surrounds the blocks (rotary tables, windows, which norm comes last) is learnt from a pass of the model's own forward
whose blocks only take notes, and checked there. Sequences sit in slots and end when they end: a step takes those that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpt.fusion.blocks import NormRecipe, Recipe
from fastpt.fusion.decoder import Block, decoder_block
from fastpt.fusion.fuse import Handle
from fastpt.fusion.head import LanguageHead, backbone_of, hidden_states
from fastpt.fusion.pieces import Linears, Norm
from fastpt.fusion.projection import NotFusable, Projection, check_no_global_hooks, check_unhooked
from fastpt.ops import Layer, decode_block, decode_logits
from fastpt.ops._library import serving_kernel
from fastpt.ops.decode import BlockWeights, copy_cache, empty_cache, fill_cache

MOVING_TABLES = ("dynamic", "longrope")  # rotary tables that depend on the longest position of a call


Prompt = tuple[int, ...]


class CachedBlock(NamedTuple):
    """One decoder block of a Decoder: what a step needs of it."""

    cos: Tensor  # [P, R]
    sin: Tensor
    keys: Tensor
    values: Tensor
    weights: BlockWeights


class Decoder:
    """The state of a model's decoding: weights as they are now, and a cache of `slots` sequences of up to `capacity` tokens.

    The model has to be fused (`handle`) and in eval mode. Made for one batch of work: weights and adapters that change later
    are not seen.
    Raises: NotFusable with the reason when only the model's own generate is right.
    """

    def __init__(self, handle: Handle, model: nn.Module, slots: int, capacity: int):
        self.model = model
        self.backbone = backbone_of(model)
        self.embedding = self.backbone.get_input_embeddings()
        self._check(handle)
        self.recipes = {
            handle.model.get_submodule(path): recipe
            for path, recipe in handle.recipes.items()
            if isinstance(recipe, Recipe)
        }
        self.head = LanguageHead.of(model)
        try:
            read = Projection.read(self.head.module, "the language head")
            self.head_projection: Projection | None = read if isinstance(read.weight, Tensor) else None
        except NotFusable:
            self.head_projection = None
        self.blocks: dict[nn.Module, CachedBlock] = {}
        self._held: dict[int, Prompt] = {}  # the prompt whose keys and values a slot begins with
        self._next: dict[Prompt, Tensor] = {}  # logits [V] after each of these
        self.norm = self._take_notes(handle, slots, capacity)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Fill one slot with each prompt; the logits of what comes next, float32 [N, V].

        What no slot holds is packed into one forward, once for each different prompt; the rest (of the groups of online RL)
        is copied from slot to slot.
        """
        asked, taken = [tuple(prompt) for prompt in prompts], set(slots)
        new: dict[Prompt, list[int]] = {}
        for prompt, slot in zip(asked, slots, strict=True):
            if self._held.get(slot) == prompt:
                continue
            source = next((s for s, held in self._held.items() if held == prompt and s not in taken), None)
            if source is None:
                new.setdefault(prompt, []).append(slot)
                continue
            for block in self.blocks.values():
                copy_cache(block.keys, block.values, source, slot, len(prompt))
        if new:
            self._next.update(zip(new, self._compute(list(new), list(new.values())), strict=True))
        self._held.update(zip(slots, asked, strict=True))
        held = set(self._held.values())
        self._next = {prompt: logits for prompt, logits in self._next.items() if prompt in held}
        return torch.stack([self._next[prompt] for prompt in asked])

    def _compute(self, prompts: Sequence[Prompt], slots: Sequence[Sequence[int]]) -> Tensor:
        """One forward over the prompts, whose keys and values go to several slots each; logits [N, V]."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([torch.arange(length) for length in lengths])
        bounds = torch.tensor([0, *lengths]).cumsum(0)

        def run(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            block = self.recipes[module].read(module, hidden, kwargs)
            cached = self.blocks[module]
            sink = _Sink(cached.keys, cached.values, slots, lengths)
            return decoder_block(hidden, block._replace(call=block.call._replace(cache=sink)))

        with self._blocks_run_by(run):
            hidden = hidden_states(
                self.model, ids, position_ids=positions, cu_seqlens=bounds.int(), max_seqlen=max(lengths)
            )
        return self._logits(hidden[bounds[1:] - 1])

    @torch.no_grad()
    def step(self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Append tokens[m] as token positions[m] of the sequence in slots[m]; the logits of what comes next [M, V]."""
        where, when = torch.tensor(slots), torch.tensor(positions)
        x = self.embedding(torch.tensor(tokens))
        for cos, sin, keys, values, weights in self.blocks.values():
            x = decode_block(x, cos, sin, where, when, keys, values, weights)
        return self._logits(self.norm.forward(x)[0])

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.head_projection
        if head is None:
            return self.head.logits(hidden).float()
        weight, bias, lora_a, lora_b, scale = head.layer(hidden.dtype)
        hidden = hidden.to(weight.dtype)
        logits = decode_logits(hidden, weight, bias)
        if lora_a is not None and lora_b is not None:
            logits += (scale * (hidden.float() @ lora_a.float().t())) @ lora_b.float().t()
        logits *= self.head.logit_scale
        softcap = self.head.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _check(self, handle: Handle) -> None:
        """Raise NotFusable for what steps would pass by."""
        device = self.embedding.weight.device.type
        if serving_kernel("decode_block", device) == "reference":
            raise NotFusable(f"decode_block has no kernel for {device} here")
        if torch.is_autocast_enabled(device):
            raise NotFusable("autocast is on")
        check_no_global_hooks()
        around = {"the model": self.model, "its backbone": self.backbone, "its embedding": self.embedding}
        for path, recipe in handle.recipes.items():
            if recipe is not None:
                around[path] = handle.model.get_submodule(path)
        for what, module in around.items():
            check_unhooked(module, what)
        kinds = [getattr(module, "rope_type", "") for module in self.backbone.modules()]
        moving = [kind for kind in kinds if any(name in str(kind) for name in MOVING_TABLES)]
        if moving:
            raise NotFusable(f"rotary tables of type {moving[0]} change with the length")

    def _take_notes(self, handle: Handle, slots: int, capacity: int) -> Norm:
        """Run the model's forward over `capacity` positions with blocks that pass hidden states on; returns the last norm.

        Fills self.blocks. Raises NotFusable when more happens on the way than embedding, recognised blocks and a norm.
        """
        embedded: list[Tensor] = []

        def note(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            block = self.recipes[module].read(module, hidden, kwargs)
            embedded.append(hidden)
            if not block.call.layout.causal or not block.call.layout.has_spans:
                raise NotFusable("a block without causal attention")
            self.blocks[module] = _cached(block, slots, capacity, hidden)
            return hidden

        ids = torch.arange(capacity) % self.embedding.weight.shape[0]
        with torch.no_grad(), self._blocks_run_by(note):
            out = hidden_states(self.model, ids, position_ids=torch.arange(capacity), cu_seqlens=None, max_seqlen=None)
            if not embedded or not torch.equal(embedded[0][0], self.embedding(ids)):
                raise NotFusable("something else than the embedding goes into the first block")
            for path, recipe in handle.recipes.items():
                if isinstance(recipe, NormRecipe):
                    norm = recipe.of(handle.model.get_submodule(path), out.dtype)
                    if norm.weight.shape == out.shape[-1:] and torch.equal(norm.forward(embedded[-1][0])[0], out):
                        return norm
        raise NotFusable("something else than a known norm follows the last block")

    @contextmanager
    def _blocks_run_by(self, run: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
        """Let `run(module, hidden, kwargs)` be the forward of every recognised block."""

        def forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args:
                raise NotFusable("blocks are called with positional arguments")
            return run(module, hidden_states, kwargs)

        before = {module: module.__dict__["forward"] for module in self.recipes}
        try:
            for module in self.recipes:
                module.__dict__["forward"] = partial(forward, module)
            yield
        finally:
            for module, own in before.items():
                module.__dict__["forward"] = own


class _Sink(NamedTuple):
    """Stands where a block expects a cache to put the keys and values of a prefill."""

    keys: Tensor
    values: Tensor
    slots: Sequence[Sequence[int]]  # of each prompt
    lengths: Sequence[int]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:  # [1, Hkv, T, K]
        rows = zip(
            self.slots,
            keys[0].transpose(0, 1).split(list(self.lengths)),
            values[0].transpose(0, 1).split(list(self.lengths)),
            strict=True,
        )
        for slots, new_keys, new_values in rows:
            for slot in slots:
                fill_cache(self.keys, self.values, slot, new_keys, new_values)


def _cached(block: Block, slots: int, capacity: int, hidden: Tensor) -> CachedBlock:
    """A block's weights as decode_block takes them, and an empty cache for it."""
    qkv, mlp, call = block.qkv, block.mlp, block.call
    if any(group.has_nf4 for group in (qkv.projections, mlp.output, mlp.gate_up, mlp.down)):
        raise NotFusable("4-bit weights")
    inner, kv = call.heads * call.head_dim, call.kv_heads * call.head_dim
    layers = [
        *_apart(qkv.projections, (inner, kv, kv)),
        *mlp.output.layers,
        *_apart(mlp.gate_up, (mlp.down.layers[0].weight.shape[1],) * 2),
        *mlp.down.layers,
    ]
    norms = [qkv.norm, qkv.q_norm, qkv.k_norm, mlp.after_attention, mlp.norm, mlp.after_mlp]
    rounding = {norm.casts_first for norm in norms if norm is not None}
    if len(rounding) > 1:
        raise NotFusable("a block's norms round differently")
    weights = BlockWeights(
        [layer.weight.to(hidden.dtype) for layer in layers],
        [None if layer.bias is None else layer.bias.to(hidden.dtype) for layer in layers],
        [_wide(layer.lora_a) for layer in layers],
        [_wide(layer.lora_b) for layer in layers],
        [layer.scale for layer in layers],
        [None if norm is None else norm.weight.float() + norm.offset for norm in norms],
        [0.0 if norm is None else norm.eps for norm in norms],
        rounding.pop(), mlp.activation.name, call.layout.window, call.softcap,
        call.head_dim**-0.5 if call.scale is None else call.scale,
    )  # fmt: skip
    cos, sin = (table[0].contiguous() for table in (block.cos, block.sin))
    return CachedBlock(cos, sin, *empty_cache(slots, call.kv_heads, capacity, call.head_dim, hidden), weights)


def _apart(group: Linears, widths: Sequence[int]) -> Sequence[Layer]:
    """The layers of one input, one for each width; a packed layer is cut into views of its rows."""
    if len(group.layers) > 1:
        return group.layers
    (layer,) = group.layers
    bounds = torch.tensor([0, *widths]).cumsum(0).tolist()
    parts = [slice(start, end) for start, end in pairwise(bounds)]

    def rows(tensor: Tensor | None, part: slice) -> Tensor | None:
        return None if tensor is None else tensor[part]

    return [
        layer._replace(weight=layer.weight[part], bias=rows(layer.bias, part), lora_b=rows(layer.lora_b, part))
        for part in parts
    ]


def _wide(adapter: Tensor | None) -> Tensor | None:
    return None if adapter is None else adapter.float().contiguous()
