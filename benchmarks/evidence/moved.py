"""Part 3: bytes moved over the floor, launches, host syncs, races and memory, of our kernels and the peers' on one shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import calls
from benchmarks.evidence.case import Case, Inputs
from benchmarks.evidence.interpreter import TritonServes
from benchmarks.evidence.traffic import Meter, Traffic

OURS = "fastpt"
PACKAGES = {"Liger": "liger_kernel"}


def records(case: Case, with_peers: bool = True) -> list[dict[str, Any]]:
    found = [_record(case, OURS, case.function)]
    for peer, function in case.peers.items() if with_peers else ():
        if find_spec(PACKAGES[peer]) is None:
            found.append(
                {"case": case.name, "provider": peer, "absent": "not installed: pip install 'fastpt[evidence]'"}
            )
            continue
        try:
            found.append(_record(case, peer, function))
        except Exception as error:  # noqa: BLE001 (a peer that the interpreter cannot run is told, and is not our fault)
            found.append({"case": case.name, "provider": peer, "absent": f"{type(error).__name__}: {error}"[:200]})
    return found


def _record(case: Case, provider: str, function: Callable) -> dict[str, Any]:
    inputs = calls.as_leaves(case.traffic(calls.random(torch.bfloat16)))
    floors = case.floor(*inputs.args, **inputs.kwargs)
    product = case.flops(*inputs.args, **inputs.kwargs) if case.flops else None
    exact = _exact_gradients(case, inputs)  # before: a peer may overwrite its inputs
    serving = TritonServes() if provider == OURS else nullcontext()
    first, second, gradients, saved_beyond = metered(function, inputs, serving, case.bars.gemms)
    moved = first.moved, second.moved
    return {
        "case": case.name,
        "provider": provider,
        "inputs": inputs.name,
        "floor": floors,
        "moved": moved,
        "forward": moved[0] / floors[0],
        "backward": moved[1] / floors[1] if floors[1] else None,
        "together": sum(moved) / sum(floors),
        "by_tile": sum(t.moved_by_tile for t in (first, second)) / sum(floors),
        "once": sum(t.moved_once for t in (first, second)) / sum(floors),
        "launches": (first.launches, second.launches),
        "triton_launches": (first.triton_launches, second.triton_launches),
        "kernels": first.kernels | second.kernels,
        "host_syncs": first.host_syncs + second.host_syncs,
        "hazards": first.hazards | second.hazards,
        "flops": (first.flops + second.flops) / product if product else None,
        "peak_extra": (first.peak_extra, second.peak_extra),
        "saved": first.saved,
        "saved_new": first.saved_new,
        "saved_beyond": saved_beyond,
        "gradient_error": _worst_error(gradients, exact),
    }


def metered(
    function: Callable, inputs: Inputs, serving, gemms: tuple[str, ...] = ()
) -> tuple[Traffic, Traffic, list[Tensor | None], int]:
    """The traffic of forward and of backward, the gradients, and the bytes saved for them beyond inputs and outputs."""
    with Meter(gemms) as first, serving:
        outputs = calls.forward(function, inputs)
    saved_beyond = first.saved_beyond(outputs)
    incoming = calls.random_like(outputs)
    with Meter(gemms) as second, serving:
        gradients = calls.backward(outputs, inputs, incoming)
    return first.traffic(), second.traffic(), gradients, saved_beyond


def _exact_gradients(case: Case, inputs: Inputs) -> list[Tensor | None]:
    leaves = calls.as_leaves(inputs)
    incoming = calls.random_like(calls.forward(case.reference, leaves))
    return calls.run(case.reference, leaves, torch.float64, incoming=incoming).gradients


def _worst_error(gradients: list[Tensor | None], exact: list[Tensor | None]) -> float | None:
    """Relative, in L2."""
    pairs = [
        (g.detach().double(), e.detach())
        for g, e in zip(gradients, exact, strict=False)
        if g is not None and e is not None
    ]
    return max((float((g - e).norm() / e.norm().clamp_min(1e-30)) for g, e in pairs), default=None)
