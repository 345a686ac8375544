"""The public ops. Each lives in the file of its stem; importing them here binds the function over its submodule."""

from fastpt.ops.attention import attention
from fastpt.ops.swiglu import swiglu

__all__ = ["attention", "swiglu"]
