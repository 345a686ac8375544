"""One module's forward replaced on the instance, and put back: no class is ever edited."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Patch:
    """`make(patch)` gives a function (self, *args, **kwargs) that takes everything from `self`, so copies of it work."""

    def __init__(self, module: nn.Module, make: Callable[[Patch], Callable], *, attribute: str = "forward"):
        self.module = module
        self.attribute = attribute
        self.previous: Any = module.__dict__.get(attribute)  # someone's own, such as a trainer's wrapper
        self.is_active = True
        self.fallback: str | None = None  # why the original ran last
        function = functools.wraps(getattr(type(module), attribute))(make(self))
        function.fastpt = self  # type: ignore[attr-defined]
        self.bound = MethodType(function, module)
        module.__dict__[attribute] = self.bound

    def below(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(module), self.attribute)(module, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there; under someone's later wrapper become a pass-through."""
        self.is_active = False
        if self.module.__dict__.get(self.attribute) is not self.bound:
            return
        if self.previous is None:
            del self.module.__dict__[self.attribute]
        else:
            self.module.__dict__[self.attribute] = self.previous


def patch_of(bound: Any) -> Patch | None:
    """The patch behind an instance attribute, if fastpt put it there."""
    return getattr(getattr(bound, "__func__", None), "fastpt", None)
