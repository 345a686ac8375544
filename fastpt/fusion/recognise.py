"""Finding parts that the ops can serve: by attributes and shapes first, then by running both on a few random tokens.

Rounding, activation, attention scale and softcap come from probes, so a class is never trusted by its name: a block whose
fused form does not reproduce its original (a residual multiplier, say) is left alone and listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpt.fusion.attention import recording
from fastpt.fusion.blocks import NormRecipe, Recipe
from fastpt.fusion.decoder import Block, decoder_block
from fastpt.fusion.layout import Layout
from fastpt.fusion.projection import NotFusable, check_untouched, out_features, unwrapped
from fastpt.nf4 import weight_of
from fastpt.ops.rms_norm import reference as rms_norm_definition

PROBE_TOKENS = 6
EPS_NAMES = ("variance_epsilon", "eps")
_known_norms: dict[tuple, tuple[float, bool] | None] = {}


def norm_recipe(parent: nn.Module, name: str) -> NormRecipe | None:
    """How the RMS norm at `parent.name` rounds, or None when it is no RMS norm."""
    module: Any = parent._modules.get(name)
    if module is None or module._modules or set(module._parameters) != {"weight"} or module.weight is None:
        return None
    eps_name = next((eps for eps in EPS_NAMES if isinstance(getattr(module, eps, None), float)), None)
    if module.weight.dim() != 1 or eps_name is None or module.weight.is_meta:
        return None
    check_untouched(module, name)
    key = (type(module), module.weight.shape, getattr(module, eps_name))
    if key not in _known_norms:
        _known_norms[key] = _probe_norm(module, getattr(module, eps_name))
    found = _known_norms[key]
    return None if found is None else NormRecipe(name, type(module), eps_name, *found)


@torch.no_grad()
def _probe_norm(module: nn.Module, eps: float) -> tuple[float, bool] | None:
    """(offset, casts_first) of the variant that agrees with the module in bfloat16 on random weights, if one does."""
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.numel(), generator=generator) * torch.logspace(-4, 1, 8)[:, None]  # small rows show eps
    x = x.to(weight.device, torch.bfloat16)
    probe = (torch.randn(weight.shape, generator=generator) / 2).to(weight.device, torch.bfloat16)
    theirs = torch.func.functional_call(module, {"weight": probe}, (x,))
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape or theirs.dtype != x.dtype:
        return None
    differing = {
        variant: (rms_norm_definition(x, probe, eps, *variant) != theirs).float().mean().item()
        for variant in itertools.product((0.0, 1.0), (True, False))
    }
    best = min(differing, key=lambda variant: differing[variant])
    return best if differing[best] < 0.02 else None


def activation_of(module: nn.Module) -> str | None:
    """Which of the gated activations a module computes, found by applying it."""
    x = torch.linspace(-6, 6, 97)
    try:
        y = module(x)
    except (TypeError, RuntimeError, ValueError):  # not a function of one tensor
        return None
    candidates = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh"), "gelu": F.gelu(x)}
    is_same = {name: isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, atol=1e-6)
               for name, expected in candidates.items()}  # fmt: skip
    return next((name for name, same in is_same.items() if same), None)


def looks_like_block(module: nn.Module) -> bool:
    """Whether a module has the outline of a decoder block: something with an output projection, and a gated MLP."""
    return _child_with(module, "o_proj") is not None and _child_with(module, "down_proj") is not None


def _child_with(module: nn.Module, name: str) -> str | None:
    return next(
        (child for child, inner in module._modules.items() if inner is not None and name in inner._modules), None
    )


def block_recipe(block: nn.Module) -> Recipe:
    """The recipe of a decoder block by structure alone; raises NotFusable with what does not fit."""
    attention_name, mlp_name = _child_with(block, "o_proj"), _child_with(block, "down_proj")
    if attention_name is None or mlp_name is None:
        raise NotFusable("no o_proj or no down_proj in its parts")
    attention: Any = block._modules[attention_name]
    mlp: Any = block._modules[mlp_name]
    check_untouched(attention, attention_name)
    check_untouched(mlp, mlp_name)
    qkv = _present(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    gate_up = _present(mlp, ("gate_proj", "up_proj"), ("gate_up_proj",))
    activation_name = next((name for name in ("act_fn", "activation_fn") if name in mlp._modules), None)
    if activation_name is None:
        raise NotFusable(f"{mlp_name} has no activation module")
    activation = activation_of(mlp._modules[activation_name])
    if activation is None:
        raise NotFusable(f"{mlp_name}.{activation_name} is not SiLU or GELU")
    norms = _block_norms(block)
    dropouts = tuple(name for name, child in block._modules.items() if type(child) is nn.Dropout)
    head_norms = [name for name in ("q_norm", "k_norm") if name in attention._modules]
    _no_others(block, {attention_name, mlp_name, *dropouts, *(norm.name for norm in norms.values() if norm)}, "it")
    _no_others(attention, {*qkv, "o_proj", *head_norms}, attention_name)
    _no_others(mlp, {*gate_up, "down_proj", activation_name}, mlp_name)
    heads, kv_heads, head_dim = _heads(attention, qkv)
    return Recipe(
        attention_name, type(attention), mlp_name, type(mlp), qkv=qkv, output="o_proj", gate_up=gate_up, down="down_proj",
        activation=activation, activation_name=activation_name, activation_kind=type(mlp._modules[activation_name]),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, dropouts=dropouts,
        q_norm=_required_norm(attention, "q_norm") if head_norms else None,
        k_norm=_required_norm(attention, "k_norm") if head_norms else None, **norms,  # type: ignore[arg-type]
    )  # fmt: skip


def _present(module: nn.Module, *choices: tuple[str, ...]) -> tuple[str, ...]:
    for names in choices:
        if all(name in module._modules for name in names):
            return names
    raise NotFusable(f"no {' or '.join(', '.join(names) for names in choices)}")


def _no_others(module: nn.Module, known: set[str], what: str) -> None:
    if others := [name for name, child in module._modules.items() if child is not None and name not in known]:
        raise NotFusable(f"{what} also has {', '.join(others)}")
    if module._parameters:
        raise NotFusable(f"{what} has parameters of its own: {', '.join(module._parameters)}")


def _required_norm(parent: nn.Module, name: str) -> NormRecipe:
    recipe = norm_recipe(parent, name)
    if recipe is None:
        raise NotFusable(f"{name} is not an RMS norm of a known rounding")
    return recipe


def _block_norms(block: nn.Module) -> dict[str, NormRecipe | None]:
    """Two norms before their branches (Llama), or four around them (Gemma 2 and 3)."""
    if "pre_feedforward_layernorm" in block._modules:
        return {
            "norm": _required_norm(block, "input_layernorm"),
            "after_attention": _required_norm(block, "post_attention_layernorm"),
            "mlp_norm": _required_norm(block, "pre_feedforward_layernorm"),
            "after_mlp": _required_norm(block, "post_feedforward_layernorm"),
        }
    return {
        "norm": _required_norm(block, "input_layernorm"),
        "mlp_norm": _required_norm(block, "post_attention_layernorm"),
    }


def _heads(attention: Any, qkv: tuple[str, ...]) -> tuple[int, int, int]:
    """Query heads, key heads and head dim, from the projections' shapes."""
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim % 2:
        raise NotFusable(f"head_dim is {head_dim}")
    widths = [out_features(attention._modules[name]) for name in qkv]
    inner = int(getattr(unwrapped(attention._modules["o_proj"]), "in_features", 0))
    if len(widths) == 1:
        widths = [inner, (widths[0] - inner) // 2, (widths[0] - inner) // 2]
    heads, kv_heads = widths[0] // head_dim, widths[1] // head_dim
    if not kv_heads or widths != [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim] or inner != widths[0]:
        raise NotFusable(f"projections of {widths} columns do not make heads of {head_dim}")
    return heads, kv_heads, head_dim


def difference(states: Tensor, expected: Tensor) -> str:
    """What to say of hidden states that are not those expected; "" where only rounding differs."""
    error = (states.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20)
    if error <= (1e-4 if expected.dtype.itemsize >= 4 else 3e-2):
        return ""
    return f"its hidden states are others then (relative difference {error:.1e} on a few tokens)"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The state in which both forms are compared, put back after: eval mode, no autocast, one thread.

    Six tokens are no work to share: on two busy cores the threads' barriers made fusing 30 layers take 13 s, without 0.8 s.
    """
    was, threads = {part: part.training for part in module.modules()}, torch.get_num_threads()
    device = next((p.device.type for p in module.parameters()), "cpu")
    module.eval()
    for part in module.modules():
        if weight_of(part) is not None:
            part.training = True  # bitsandbytes' Linear4bit would pack its weights anew, for good
    torch.set_num_threads(1)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        for part, training in was.items():
            part.training = training


@torch.no_grad()
def verified(block: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe with what the block passes to its attention function, once both forms agree on random tokens.

    Raises: NotFusable when they do not.
    """
    weight = next((p for p in block.parameters() if p.dim() == 2), None)
    if weight is None or weight.is_meta:
        raise NotFusable("weights are not loaded")
    dtype = recipe.norm_weight(block).dtype
    generator = torch.Generator().manual_seed(0)
    width = next(p.numel() for p in block._modules[recipe.norm.name].parameters())  # type: ignore[union-attr]
    x = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(weight.device, dtype)
    angles = (torch.rand(1, PROBE_TOKENS, recipe.head_dim // 2, generator=generator) * 6).repeat(1, 1, 2)
    cos, sin = (table.to(weight.device, dtype) for table in (angles.cos(), angles.sin()))
    layout = Layout(1, PROBE_TOKENS, weight.device, causal=True)
    position_ids = torch.arange(PROBE_TOKENS, device=weight.device)[None]
    with evaluating(block):
        attention = block._modules[recipe.attention]
        attention.training = True  # type: ignore[union-attr]  # shows the dropout it would pass; recording drops none
        with recording() as calls:
            theirs = type(block).forward(
                block, x, attention_mask=layout.dense, position_embeddings=(cos, sin), position_ids=position_ids
            )
        if len(calls) != 1 or calls[0]["extra"]:
            raise NotFusable(f"attention is called with {calls[0]['extra'] if calls else 'no attention function'}")
        passed = {"scale": calls[0]["scaling"], "softcap": calls[0]["softcap"]}
        recipe = replace(recipe, **passed, attention_dropout=float(calls[0]["dropout"]))
        ours = decoder_block(x, Block(*recipe.read_weights(block, dtype), cos, sin, recipe.call(layout)))
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        raise NotFusable("its forward returns something else than hidden states")
    error = (ours.float() - theirs.float()).norm() / (theirs.float() - x.float()).norm().clamp(min=1e-20)
    if not error <= (1e-4 if dtype.itemsize >= 4 else 3e-2):
        raise NotFusable(f"its forward computes something else (relative difference {error:.1e} on random tokens)")
    return recipe
