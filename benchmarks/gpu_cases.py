"""What `benchmarks.kernels` times on a GPU: the cases of gpu_evidence at their real sizes, forward and backward together,
against eager PyTorch, torch.compile and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import calls
from benchmarks.evidence.case import Case, Inputs
from benchmarks.harness import Case as Timed
from benchmarks.harness import wanted
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
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_(grad)

    return make


def cases(op: str, device: str, dtype: torch.dtype, peers: str | None, *, toy: bool) -> Iterator[Timed]:
    """Timed cases of an op; toy takes the small shape that traffic is counted at."""
    with torch.device(device):  # what a case builds itself
        for case in of(op):
            make = make_on(device, dtype)
            for inputs in [case.traffic(make)] if toy else case.real(make):
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


def _provider(function: Callable[..., Any], inputs: Inputs) -> Callable[[], list[Tensor]] | None:
    """The function's forward and backward on the inputs; None for a peer that is not installed."""
    try:
        return both_passes(function, inputs)
    except ImportError as absent:
        print(f"left out: {absent}")
        return None


def both_passes(function: Callable[..., Any], inputs: Inputs) -> Callable[[], list[Tensor]]:
    """Forward and backward from a fixed incoming gradient: what a call of it returns are outputs, then gradients."""
    incoming = [torch.randn_like(o) if o.requires_grad else None for o in calls.forward(function, inputs)]

    def run() -> list[Tensor]:
        outputs = calls.forward(function, inputs)
        gradients = calls.backward(outputs, inputs, incoming)
        return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]

    return run
