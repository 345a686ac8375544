"""Loading models with 4-bit weights through transformers: each weight is quantised as it is read, or read as it was saved.

transformers reads shards, renames and converts as for any model; a quantiser, registered under a name of our own, gives it
the layers and what makes their weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from fastpt.errors import ModelError
from fastpt.nf4 import EXTRAS, NF4Linear, can_quantise, from_state
from fastpt.ops import nf4_quantize

METHOD = "fastpt_nf4"


def settings(nested: bool = True, skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """What transformers finds our quantiser by."""
    return {"quant_method": METHOD, "nested": nested, "skipped": list(skipped)}


def is_bitsandbytes(config: Any) -> bool:
    """Whether a model's config says that its checkpoint holds 4-bit weights of bitsandbytes.

    Raises: ModelError for its other kinds, which need bitsandbytes itself.
    """
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes":
        return False
    if not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type") != "nf4":
        kind = f"4-bit {found.get('bnb_4bit_quant_type')}" if found.get("load_in_4bit") else "8-bit"
        raise ModelError(f"the checkpoint is {kind} of bitsandbytes; of its formats only NF4 is read")
    return True


def settings_of(config: Any) -> dict[str, Any]:
    """The settings for a checkpoint of bitsandbytes."""
    found = config.quantization_config
    skipped = found.get("llm_int8_skip_modules") or ()
    return settings(bool(found.get("bnb_4bit_use_double_quant")), tuple(skipped))


@cache
def register() -> type:
    """Make our quantiser known to transformers, once; the class of its settings."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizers_utils import should_convert_module
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(METHOD)
    class NF4Config(QuantizationConfigMixin):
        def __init__(self, quant_method: Any = METHOD, nested: bool = True, skipped: Any = ()):
            self.quant_method: Any = quant_method
            self.nested, self.skipped = nested, list(skipped)

        def to_dict(self) -> dict[str, Any]:
            """What a saved model's config says: bitsandbytes' own settings, so that others can load it too."""
            return {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": self.nested,
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_compute_dtype": "bfloat16",
                "llm_int8_skip_modules": self.skipped or None,
            }

    class Quantise(ConversionOps):
        def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Any]:
            return {name: _hold(model, name, *_quantised(_only(value))) for name, value in input_dict.items()}

    class Deserialise(ConversionOps):
        def __init__(self, quantizer: Any):
            self.hf_quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any) -> Any:
            if len(input_dict) == 1:
                return input_dict
            state = {name.removeprefix("weight."): _only(value) for name, value in input_dict.items()}
            weight = state.pop("weight")
            return {"weight": _hold(model, full_layer_name, *from_state(weight, state))}

    @register_quantizer(METHOD)
    class NF4Quantizer(HfQuantizer):
        serialized_names: dict[str, Any] = {"weight": ["weight", *(f"weight.{name}" for name in EXTRAS)]}  # noqa: RUF012
        quantized_element_size = 0.5
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            path, name = param_name.rpartition(".")[::2]
            return name == "weight" and isinstance(model.get_submodule(path), NF4Linear)

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            skipped = self.get_modules_to_not_convert(
                model, self.quantization_config.skipped or None, model._keep_in_fp32_modules
            )
            for path, module in list(model.named_modules()):
                if can_quantise(module) and should_convert_module(path, skipped):
                    model.set_submodule(path, NF4Linear(module))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            """Saving takes the layers' state as it is, which is bitsandbytes' format again."""
            done = model._weight_conversions or []
            model._weight_conversions = [one for one in done if not _is_made_by(one, Deserialise)]

        def get_quantize_ops(self) -> Any:
            return Quantise()

        def get_load_operations(self) -> dict[str, Any]:
            return {"deserialize": Deserialise}

    return NF4Config


def _is_made_by(conversion: Any, kind: type) -> bool:
    return any(isinstance(operation, kind) for operation in getattr(conversion, "operations", ()))


def _only(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, list) else value


def _quantised(weight: torch.Tensor) -> tuple[Any, torch.dtype]:
    return nf4_quantize(weight), weight.dtype


def _hold(model: Any, name: str, weight: Any, stored_dtype: torch.dtype) -> nn.Parameter:
    """Give a layer its weight; its bytes are what transformers sets as the parameter."""
    layer = model.get_submodule(name.rpartition(".")[0])
    layer.hold(weight, stored_dtype)
    layer._is_hf_initialized = True
    return layer.weight
