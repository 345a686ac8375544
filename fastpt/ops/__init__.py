"""The public ops. Each lives in the file of its stem; importing them here binds the function over its submodule."""

from fastpt.ops.adamw import adamw, grad_norm
from fastpt.ops.adamw_8bit import adamw_8bit
from fastpt.ops.attention import attention
from fastpt.ops.bias_gelu import bias_gelu
from fastpt.ops.cross_entropy import cross_entropy, cross_entropy_and_gradient
from fastpt.ops.decode import decode_block, decode_logits
from fastpt.ops.dora_norm import dora_norm
from fastpt.ops.embedding import embedding
from fastpt.ops.geglu import geglu
from fastpt.ops.grouped_linear import grouped_linear
from fastpt.ops.layer_norm import add_layer_norm, layer_norm
from fastpt.ops.linear_cross_entropy import linear_cross_entropy
from fastpt.ops.linear_divergence import TeacherHead, linear_divergence
from fastpt.ops.lora_linear import Layer, linear_group, lora_linear, lora_swiglu
from fastpt.ops.nf4 import NF4Weight, nf4_dequantize, nf4_quantize
from fastpt.ops.nf4_linear import nf4_linear
from fastpt.ops.rms_norm import add_rms_norm, rms_norm
from fastpt.ops.rope import rope
from fastpt.ops.swiglu import swiglu
from fastpt.ops.token_stats import TokenStats, token_stats

__all__ = [
    "Layer",
    "NF4Weight",
    "TeacherHead",
    "TokenStats",
    "adamw",
    "adamw_8bit",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "cross_entropy",
    "cross_entropy_and_gradient",
    "decode_block",
    "decode_logits",
    "dora_norm",
    "embedding",
    "geglu",
    "grad_norm",
    "grouped_linear",
    "layer_norm",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_group",
    "lora_linear",
    "lora_swiglu",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_quantize",
    "rms_norm",
    "rope",
    "swiglu",
    "token_stats",
]
