"""explain: one row per part of a model, with the kernel that serves it or the reason why none does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastpt.fusion.blocks import Recipe
from fastpt.fusion.encoder_recipe import EncoderRecipe, dropout_of
from fastpt.fusion.experts import innermost, is_swiglu
from fastpt.fusion.patch import Patch, patch_of
from fastpt.fusion.pieces import Linears, product_dtype
from fastpt.fusion.projection import NotFusable
from fastpt.ops._attention_gpu import call_of, serving
from fastpt.ops._library import serving_kernel

if TYPE_CHECKING:
    from fastpt.fusion.fuse import Handle

GATED = {"silu": "swiglu", "gelu_tanh": "geglu", "gelu": "geglu"}


class Row(NamedTuple):
    """One part: `op` and `kernel` are empty, and `reason` says why, when its original code runs.

    Where several kernels could serve an op, `reason` says why those before this one do not.
    """

    module: str
    op: str
    kernel: str
    reason: str


def rows_of(handle: Handle) -> list[Row]:
    """The rows of a fused model as it is now, in the order of its modules."""
    device = next((p.device.type for p in handle.model.parameters()), "cpu")
    rows: list[Row] = []
    covered: set[nn.Module] = set()
    for path, module in handle.model.named_modules():
        if module in covered:
            continue
        patch = patch_of(module.__dict__.get("forward"))
        recipe = handle.recipes.get(path)
        if path in handle.heads:
            head = module.get_output_embeddings()
            covered.update(head.modules())
            name = next((name for name, part in handle.model.named_modules() if part is head), path)
            reason = patch.fallback if patch is not None else None
            rows += [_served(name, "token_stats", device)]
            rows.append(
                Row(name, "", "", f"last call: {reason}") if reason else _served(name, "linear_cross_entropy", device)
            )
        if path in handle.backbones:
            rows.append(_attention_of(path, handle.backbones[path][0], handle.model))
        if isinstance(recipe, Recipe) and patch is not None:
            covered.update(module.modules())
            rows += _block_rows(path, module, recipe, patch, device)
        elif isinstance(recipe, EncoderRecipe) and patch is not None:
            covered.update(module.modules())
            rows += _encoder_rows(path, module, recipe, patch, device)
        elif path in handle.experts:
            covered.update(module.modules())
            rows += _expert_rows(path, module, patch, device)
        elif path in handle.stacks and patch is not None:
            reason = f"last call: {patch.fallback}" if patch.fallback else ""
            rows.append(Row(path, "" if reason else "unpadding", "" if reason else "torch", reason))
        elif path in handle.recipes and patch is not None:
            op = "layer_norm" if recipe is None else "rms_norm"
            rows.append(Row(path, "", "", patch.fallback) if patch.fallback else _served(path, op, device))
        elif path in handle.embeddings and patch is not None:
            rows.append(_served(path, "embedding", device))
        elif path in handle.reasons:
            rows.append(Row(path, "", "", handle.reasons[path]))
        elif not module._modules and (module._parameters or path.endswith(("act_fn", "activation_fn"))):
            rows.append(Row(path, "", "", "no op for it: runs as it is"))
    return rows


def _served(module: str, op: str, device: str) -> Row:
    return Row(module, op, serving_kernel(op, device), "")


def _attention(
    module: str, op: str, weight: Tensor, head_dim: int, window: object = None, softcap: object = None,
    sinks: object = None,
) -> Row:  # fmt: skip
    """Attention over activations of a weight's dtype: on a GPU any of several kernels may serve it."""
    if not weight.is_cuda:
        return _served(module, op, weight.device.type)
    dtype, dropout_p = product_dtype(weight.dtype, weight.device), float(op == "attention_dropout")
    return Row(module, op, *serving(call_of(weight.device, dtype, head_dim, window, softcap, dropout_p, sinks)))


def _attention_of(path: str, config: Any, model: nn.Module) -> Row:
    """The one of a whole model, from its config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    options = getattr(config, "sliding_window", None), getattr(config, "attn_logit_softcapping", None)
    sinks = next((part.sinks for part in model.modules() if "sinks" in part._parameters), None)
    return _attention(f"{path} attention".strip(), "attention", next(model.parameters()), head_dim, *options, sinks)


def _op_of(linears: Linears) -> str:
    return "nf4_linear" if linears.has_nf4 else "lora_linear"


def _block_rows(path: str, block: nn.Module, recipe: Recipe, patch: Patch, device: str) -> list[Row]:
    try:
        qkv, mlp = recipe.read_weights(block, recipe.norm_weight(block).dtype)
    except NotFusable as reason:
        return [Row(path, "", "", str(reason))]
    if patch.fallback:
        return [Row(path, "", "", f"last call: {patch.fallback}")]
    attention, gated = f"{path}.{recipe.attention}", f"{path}.{recipe.mlp}"
    rows = [_served(f"{path}.{recipe.norm.name}", "rms_norm", device)]
    rows += [_served(f"{attention}.{name}", _op_of(qkv.projections), device) for name in recipe.qkv]
    rows += [_served(f"{attention}.{norm.name}", "rms_norm", device) for norm in (recipe.q_norm, recipe.k_norm) if norm]
    window = getattr(block._modules[recipe.attention], "sliding_window", None)
    options = recipe.norm_weight(block), recipe.head_dim, window, recipe.softcap
    rows += [_served(attention, "rope", device), _attention(attention, "attention", *options)]
    rows.append(_served(f"{attention}.{recipe.output}", _op_of(mlp.output), device))
    rows += [_served(f"{path}.{n.name}", "rms_norm", device) for n in (recipe.after_attention, recipe.after_mlp) if n]
    rows.append(_served(f"{path}.{recipe.mlp_norm.name}", "add_rms_norm", device))
    rows += [_served(f"{gated}.{name}", _op_of(mlp.gate_up), device) for name in recipe.gate_up]
    rows.append(_served(gated, GATED[recipe.activation], device))
    return [*rows, _served(f"{gated}.{recipe.down}", _op_of(mlp.down), device)]


def _expert_rows(path: str, module: nn.Module, patch: Patch | None, device: str) -> list[Row]:
    """Of a mixture's experts, which serve themselves where PEFT adds its adapters to their weights before."""
    experts, wrappers = innermost(module)
    reason = ""
    if wrappers and (patch is None or patch.fallback):
        reason = f"adapters are added to all weights: {patch.fallback if patch else 'added after fusing, fuse again'}"
    kernel = serving_kernel("grouped_linear", device)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = [Row(f"{path}.{name}", "grouped_linear", kernel, reason) for name in (first, "down_proj")]
    if experts.has_gate and is_swiglu(experts):
        rows.insert(1, _served(f"{path}.act_fn", "swiglu", device))
    return rows


def _encoder_rows(path: str, block: nn.Module, recipe: EncoderRecipe, patch: Patch, device: str) -> list[Row]:
    names = recipe.names
    try:
        recipe.read_weights(block, recipe.norm_weight(block).dtype)
        drops = dropout_of(block, names.attention_dropout)
    except NotFusable as reason:
        return [Row(path, "", "", str(reason))]
    if patch.fallback:
        return [Row(path, "", "", f"last call: {patch.fallback}")]
    rows = [_served(f"{path}.{name}", "lora_linear", device) for name in names.qkv]
    op, weight = "attention_dropout" if drops else "attention", next(block.parameters())
    rows.append(_attention(f"{path}.{names.attention}", op, weight, recipe.head_dim))
    ops = {names.output: "lora_linear", names.norm: "add_layer_norm", names.up: "lora_linear"}
    ops |= {names.activation: "bias_gelu", names.down: "lora_linear", names.mlp_norm: "add_layer_norm"}
    return rows + [_served(f"{path}.{name}", op, device) for name, op in ops.items()]


def show(rows: list[Row]) -> list[Row]:
    """Print the rows as a table, layers that are alike on one line; returns the rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "op", "kernel", "why not", box=None, header_style="bold")
    seen: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        layer = re.search(r"\.(\d+)(?=\.|$)", row.module)
        name = row.module if layer is None else f"{row.module[: layer.start(1)]}*{row.module[layer.end(1) :]}"
        seen.setdefault((name, *row[1:]), []).append(-1 if layer is None else int(layer.group(1)))
    for (name, op, kernel, reason), layers in seen.items():
        table.add_row(name.replace("*", _ranges(layers), 1), op, kernel, reason)
    console = Console()
    console.width = max(console.width, 140)  # module paths are not worth cutting
    console.print(table)
    return rows


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
