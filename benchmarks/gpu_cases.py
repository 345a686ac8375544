"""What `benchmarks.kernels` times on a GPU: the cases of gpu_evidence at their real sizes, forward and backward together,
against eager PyTorch, torch.compile and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.case import Case, Inputs
from benchmarks.harness import Case as Timed
from benchmarks.harness import forward_backward, wanted
from fastpt.ops._library import Cost


def stems() -> list[str]:
    """Ops that have cases."""
    folder = Path(__file__).parent / "evidence" / "cases"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def of(op: str) -> list[Case]:
    """The evidence cases of an op's stem."""
    return importlib.import_module(f"benchmarks.evidence.cases.{op}").CASES


def make_on(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """How a case gets its tensors: random ones on a device."""

    def make(*shape: int, grad: bool = False, dtype: torch.dtype | None = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_(grad)

    return make


def cases(op: str, device: str, dtype: torch.dtype, peers: str | None, *, toy: bool) -> Iterator[Timed]:
    """Timed cases of an op; toy takes the small odd shapes that the numbers are checked at."""
    with torch.device(device):  # what a case builds itself
        for case in of(op):
            make = make_on(device, dtype)
            for inputs in islice(case.numbers(make), 2) if toy else case.real(make):
                yield _timed(case, inputs, dtype, peers)


def _timed(case: Case, inputs: Inputs, dtype: torch.dtype, peers: str | None) -> Timed:
    functions = {
        "fastpt": case.function,
        "eager": case.reference,
        "compile": torch.compile(case.reference),
        **case.peers,
    }
    providers = {name: _provider(function, inputs) for name, function in wanted(functions, peers).items()}
    forward, backward = case.floor(*inputs.args, **inputs.kwargs)
    flops = 3 * case.flops(*inputs.args, **inputs.kwargs) if case.flops else 0
    there = {name: run for name, run in providers.items() if run is not None}
    return Timed(
        case.name,
        inputs.name,
        str(dtype).removeprefix("torch."),
        "forward+backward",
        there,
        Cost(forward + backward, 0, flops),
    )


def _provider(function: Callable[..., Any], inputs: Inputs) -> Callable[[], Any] | None:
    """The function's forward and backward on the inputs; None for a peer that is not installed."""

    def call(*args: Any) -> tuple[Tensor, ...]:
        found = function(*args, **inputs.kwargs)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(o for o in outputs if isinstance(o, Tensor) and o.requires_grad)

    try:
        return forward_backward(call, *inputs.args)
    except ImportError as absent:
        print(f"left out: {absent}")
        return None
