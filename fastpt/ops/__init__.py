"""The public ops. Each lives in the file of its stem; importing them here binds the function over its submodule."""

from fastpt.ops.linear_cross_entropy import linear_cross_entropy
from fastpt.ops.lora_linear import lora_linear
from fastpt.ops.swiglu import swiglu
from fastpt.ops.token_stats import TokenStats, token_stats

__all__ = ["TokenStats", "linear_cross_entropy", "lora_linear", "swiglu", "token_stats"]
