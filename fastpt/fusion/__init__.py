"""fuse(model): a live transformers or PEFT model through the kernels, instance by instance, reversibly.

Importing this puts the name "fastpt" into transformers' tables of attention, mask and experts functions, so that
attn_implementation="fastpt" and experts_implementation="fastpt" work on models that are not fused as well. Nothing else of
transformers, PEFT or TRL is touched.
"""

from __future__ import annotations

from fastpt.fusion import attention, experts
from fastpt.fusion.fuse import Handle, explain, fuse

attention.register()
experts.register()

__all__ = ["Handle", "explain", "fuse"]
