"""The model as it was before training, where it cannot answer as that itself."""

from __future__ import annotations

import copy
from typing import Any


def frozen_copy(model: Any) -> Any:
    """The model as it is now, fused; what is not trained is shared with it."""
    from fastpt.fusion import fuse

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared).eval().requires_grad_(False)
    fuse(twin)
    return twin
