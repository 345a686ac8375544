"""The public ops. Each lives in the file of its stem; importing them here binds the function over its submodule."""

from fastpt.ops.adamw import adamw
from fastpt.ops.attention import attention
from fastpt.ops.geglu import geglu
from fastpt.ops.layer_norm import layer_norm
from fastpt.ops.rms_norm import add_rms_norm, rms_norm
from fastpt.ops.rope import rope
from fastpt.ops.swiglu import swiglu

__all__ = ["adamw", "add_rms_norm", "attention", "geglu", "layer_norm", "rms_norm", "rope", "swiglu"]
