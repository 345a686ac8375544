"""fuse(model): a live transformers or PEFT model through the kernels, instance by instance, reversibly.

Importing this puts the name "fastpt" into transformers' attention and mask tables, so that attn_implementation="fastpt"
works on models that are not fused as well. Nothing else of transformers, PEFT or TRL is touched.
"""

from __future__ import annotations

from fastpt.fusion.attention import register
from fastpt.fusion.fuse import Handle, explain, fuse

register()

__all__ = ["Handle", "explain", "fuse"]
