"""Linear layers on NF4 weights, kept and saved as bitsandbytes keeps Params4bit, without bitsandbytes.

Its checkpoints hold, beside `weight`, the scales, both maps, and a JSON text with all that is no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpt.errors import ModelError
from fastpt.ops import Layer, NF4Weight, nf4_linear, nf4_quantize
from fastpt.ops.nf4 import BLOCK, CODE, SCALE_BLOCK

TEXT = "quant_state.bitsandbytes__nf4"
EXTRAS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", TEXT)


class NF4Linear(nn.Linear):
    """x Wᵀ + b on a frozen 4-bit weight; the parameter `weight` is its bytes [N / 2, 1].

    `stored_dtype` is what the weight was quantised from; products run in x's dtype. The scales are no buffers: casts must
    not reach them, and transformers fills buffers that are in no checkpoint with values of its own.
    """

    weight: nn.Parameter
    absmax: Tensor
    nested: Tensor | None

    def __init__(self, linear: nn.Linear, *, device: Any = "meta"):
        """A layer of the shape of `linear`, with its bias, that has no weight yet."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.stored_dtype = linear.weight.dtype
        packed = torch.empty(self.out_features * self.in_features // 2, 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax, self.nested = torch.empty(0), None
        self.train(linear.training)

    @property
    def nf4(self) -> NF4Weight:
        """The weight."""
        return NF4Weight(self.weight, self.absmax, self.nested, (self.out_features, self.in_features))

    def hold(self, weight: NF4Weight, stored_dtype: torch.dtype) -> None:
        """Make `weight` the layer's own."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ModelError(
                f"a 4-bit weight of shape {tuple(weight.shape)} does not fit a layer of {self.out_features} rows of "
                f"{self.in_features}"
            )
        self.weight = nn.Parameter(weight.packed.reshape(-1, 1), requires_grad=False)
        self.absmax, self.nested, self.stored_dtype = weight.absmax, weight.nested, stored_dtype

    def forward(self, input: Tensor) -> Tensor:
        return nf4_linear(input, [Layer(self.nf4, self.bias)])[0]  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        scales = "float32 scales" if self.nested is None else "nested scales"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {scales}"
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> NF4Linear:
        """Moves take the scales along."""
        super()._apply(fn, recurse)
        self.absmax = self.absmax.to(self.weight.device)
        self.nested = None if self.nested is None else self.nested.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.is_meta:
            state = to_state(self.nf4, self.stored_dtype)
            destination.update({f"{prefix}weight.{name}": value for name, value in state.items()})

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        extras = {name: f"{prefix}weight.{name}" for name in EXTRAS if f"{prefix}weight.{name}" in state_dict}
        if extras:
            self.hold(*from_state(state_dict[f"{prefix}weight"], {n: state_dict[key] for n, key in extras.items()}))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in extras.values()]


def to_state(weight: NF4Weight, stored_dtype: torch.dtype) -> dict[str, Tensor]:
    """What a checkpoint holds beside the bytes, by bitsandbytes' names."""
    state = {"absmax": weight.absmax, "quant_map": CODE.to(weight.device, copy=True)}
    text: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": _name(stored_dtype),
        "shape": weight.shape,
    }
    if weight.nested is not None:
        scales_map, offset, maxima = weight.nested.split([SCALE_BLOCK, 1, len(weight.nested) - SCALE_BLOCK - 1])
        state |= {"nested_absmax": maxima.clone(), "nested_quant_map": scales_map.clone()}
        text |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    return state | {TEXT: torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)}


def from_state(packed: Tensor, state: dict[str, Tensor]) -> tuple[NF4Weight, torch.dtype]:
    """The weight that bytes and to_state's tensors stand for, and what it was quantised from.

    Raises: ModelError for FP4, other block sizes and other maps.
    """
    if TEXT not in state:
        raise ModelError(f"a 4-bit weight lacks {TEXT} (it has {', '.join(state)}); only NF4 is read")
    text = json.loads(bytes(state[TEXT].cpu().tolist()))
    blocks = {text["blocksize"]: BLOCK, text.get("nested_blocksize", SCALE_BLOCK): SCALE_BLOCK}
    if any(found != known for found, known in blocks.items()) or not _is_nf4(state["quant_map"]):
        raise ModelError(
            f"a 4-bit weight of {text['quant_type']} in blocks of {text['blocksize']} is not read; only NF4 in blocks of "
            f"{BLOCK} is, with scales in blocks of {SCALE_BLOCK}"
        )
    nested = None
    if "nested_absmax" in state:
        offset = torch.tensor([text["nested_offset"]], device=packed.device)
        nested = torch.cat([state["nested_quant_map"].float(), offset, state["nested_absmax"].float()])
    absmax = state["absmax"] if nested is not None else state["absmax"].float()
    return NF4Weight(packed.view(torch.uint8), absmax, nested, tuple(text["shape"])), getattr(torch, text["dtype"])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_nf4(numbers: Tensor) -> bool:
    return len(numbers) == len(CODE) and torch.allclose(numbers.float().cpu(), CODE, atol=1e-6, rtol=0)


def weight_of(module: nn.Module) -> NF4Weight | None:
    """The 4-bit weight of an NF4Linear, or of bitsandbytes' Linear4bit by what it holds; None for anything else."""
    if isinstance(module, NF4Linear):
        return module.nf4
    weight: Any = getattr(module, "weight", None)
    state: Any = getattr(weight, "quant_state", None)
    if (
        not isinstance(module, nn.Linear)
        or state is None
        or state.quant_type != "nf4"
        or getattr(state, "packing_format_for_cpu", False)
    ):
        return None
    inner = state.state2
    if state.blocksize != BLOCK or (inner is not None and inner.blocksize != SCALE_BLOCK):
        return None
    nested = None if inner is None else torch.cat([inner.code, state.offset.reshape(1), inner.absmax])
    return NF4Weight(weight.data.view(torch.uint8), state.absmax, nested, tuple(state.shape))


def can_quantise(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer whose rows are whole bytes."""
    return type(module) is nn.Linear and module.in_features % 2 == 0


def layers_of(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """The layers on 4-bit weights, by path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, NF4Linear))


def is_quantised(model: nn.Module) -> bool:
    """Whether it has such layers."""
    return next(layers_of(model), None) is not None


def quantise_model(model: nn.Module, skipped: set[str]) -> nn.Module:
    """Replace the linear layers of a model, but for those at `skipped` paths, one after another and in place."""
    for path, module in list(model.named_modules()):
        if can_quantise(module) and path not in skipped:
            layer = NF4Linear(module)  # type: ignore[arg-type]
            layer.hold(nf4_quantize(module.weight), module.weight.dtype)  # type: ignore[arg-type]
            model.set_submodule(path, layer)
    return model


def dequantise_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model plain linear layers again, in place, each weight rounded once to dtype."""
    for path, layer in list(layers_of(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.nf4.dequantize(dtype), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    return model
