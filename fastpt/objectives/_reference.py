"""The model as it was before training, where it cannot answer as that itself."""

from __future__ import annotations

import copy
from typing import Any

from fastpt.adapters import is_adapter_model


def is_fresh(model: Any) -> bool:
    """Whether the model without its adapter is the model as it is: an adapter whose update is still zero."""
    if not is_adapter_model(model):
        return False
    updates = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(updates) and not any(bool(p.detach().any()) for p in updates)


def frozen_copy(model: Any) -> Any:
    """The model as it is now, fused; what is not trained is shared with it."""
    from fastpt.fusion import fuse

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared).eval().requires_grad_(False)
    fuse(twin)
    return twin
