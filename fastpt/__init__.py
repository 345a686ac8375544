"""fastpt: fast, lean post-training of language models on one GPU or a plain CPU.

Importing it costs milliseconds: torch, transformers and the kernels are imported when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastpt.errors import FastptError as FastptError
    from fastpt.evaluation import evaluate as evaluate
    from fastpt.fusion.fuse import explain as explain
    from fastpt.fusion.fuse import fuse as fuse
    from fastpt.memory_plan import plan as plan
    from fastpt.run import Run as Run
    from fastpt.run import load_run as load_run
    from fastpt.trainer import train as train

_HOME = {
    "train": "fastpt.trainer",
    "evaluate": "fastpt.evaluation",
    "fuse": "fastpt.fusion",
    "explain": "fastpt.fusion",
    "plan": "fastpt.memory_plan",
    "Run": "fastpt.run",
    "load_run": "fastpt.run",
    "FastptError": "fastpt.errors",
}

__all__ = ["FastptError", "Run", "__version__", "evaluate", "explain", "fuse", "load_run", "plan", "train"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastpt' has no attribute {name!r}; it has: {', '.join(_HOME)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
