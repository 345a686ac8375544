"""AdamW's state of one parameter in 32 and in 8 bits, and as bitsandbytes names it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpt.ops.adamw_8bit import BLOCK, dequantize, dynamic_map, quantize

SMALLEST_IN_8_BITS = 4096  # values; bitsandbytes' min_8bit_size
CODE_OF_ZERO = {True: 127, False: 1}  # by sign: what quantize makes of a block of zeros
NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes' state_dict() puts what FSDP must not gather
MOMENTS = (("exp_avg", 1, True), ("exp_avg_sq", 2, False))  # our name, bitsandbytes' number, whether it has a sign


def has_8_bits(state: dict[str, Any]) -> bool:
    return state["exp_avg"].dtype == torch.uint8


def new_moments(parameter: Tensor, bits: int) -> dict[str, Tensor]:
    """Both moments of a parameter before its first step: zeros, in 8 bits without ever being in 32."""
    if bits == 8 and parameter.numel() >= SMALLEST_IN_8_BITS:
        scales = [-(-parameter.numel() // BLOCK)]
        return {
            key: value
            for name, _, is_signed in MOMENTS
            for key, value in (
                (
                    name,
                    torch.full(parameter.shape, CODE_OF_ZERO[is_signed], dtype=torch.uint8, device=parameter.device),
                ),
                (f"{name}_absmax", torch.zeros(scales, device=parameter.device)),
            )
        }
    return {
        name: torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
        for name, _, _ in MOMENTS
    }


def as_bits(state: dict[str, Any], bits: int) -> dict[str, Any]:
    """The state with moments of 8 or 32 bits; small ones are always of 32."""
    wanted = bits == 8 and state["exp_avg"].numel() >= SMALLEST_IN_8_BITS
    if has_8_bits(state) == wanted:
        return state
    result = {key: value for key, value in state.items() if not key.endswith("_absmax")}
    for name, _, is_signed in MOMENTS:
        if wanted:
            result[name], result[f"{name}_absmax"] = quantize(state[name], is_signed)
        else:
            result[name] = dequantize(state[name], state[f"{name}_absmax"], is_signed)
    return result


def from_bitsandbytes(state: dict[str, Any]) -> dict[str, Any]:
    """Ours of a state of bitsandbytes' Adam or AdamW; one that is ours already is copied."""
    flat = {**state, **state.get(NESTED, {})}
    if "state1" not in flat:
        return flat
    result: dict[str, Any] = {"step": torch.tensor(float(flat["step"]))}
    for name, number, is_signed in MOMENTS:
        moment: Tensor = flat[f"state{number}"]
        if moment.dtype == torch.uint8:
            scale: Tensor = flat[f"absmax{number}"]
            code: Tensor = flat[f"qmap{number}"]
            if not torch.equal(code, dynamic_map(is_signed).to(code.device)):  # numbers of another map, as their values
                scales = scale.repeat_interleave(BLOCK)[: moment.numel()].view(moment.shape)
                values = code[moment.long()] * scales
                moment, scale = quantize(values, is_signed)
            result[f"{name}_absmax"] = scale
        result[name] = moment
    return result


def to_bitsandbytes(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A whole state_dict of ours as bitsandbytes' optimizers of two moments load it."""
    groups = [{"alpha": 0.0, "t_alpha": None, "t_beta3": None, **group} for group in state_dict["param_groups"]]
    states = {}
    for index, state in state_dict["state"].items():
        states[index] = {"step": int(state["step"])}
        for name, number, is_signed in MOMENTS:
            states[index][f"state{number}"] = state[name]
            if has_8_bits(state):
                states[index][f"absmax{number}"] = state[f"{name}_absmax"]
                states[index][f"qmap{number}"] = dynamic_map(is_signed).to(state[name].device, copy=True)
    return {"state": states, "param_groups": groups}
