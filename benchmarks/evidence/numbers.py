"""Part 1: every kernel in the interpreter against float64, outputs and gradients, at odd shapes and option combinations.

The rule of docs/numerics.md: the error is at most twice that of eager PyTorch in the same dtype, plus half an ulp of the
largest value, in the maximum and in L2. Memory that nobody wrote reads as NaN, which no bound allows. The meter runs along:
a lane outside its tensors, two programs on one element and a wait of the host are faults at any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.evidence import calls
from benchmarks.evidence.case import Case, Inputs
from benchmarks.evidence.interpreter import TritonServes
from benchmarks.evidence.traffic import Meter

FACTOR = 2.0
QUICK_INPUTS = 2
DRAWS, FEW = 8, 64  # the extreme of a few values is luck: results of fewer are judged over so many draws together


def records(case: Case, quick: bool) -> list[dict[str, Any]]:
    dtypes = [torch.float32, torch.bfloat16] if quick else [torch.float32, torch.bfloat16, torch.float16]
    found = []
    for dtype in dtypes:
        every = zip(*(case.numbers(calls.random(dtype, seed)) for seed in range(DRAWS)), strict=True)
        for draws in islice(every, QUICK_INPUTS if quick else None):
            about = {"case": case.name, "inputs": draws[0].name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                found.append({**about, **compared(case, draws)})
            except Exception as error:  # noqa: BLE001 (a kernel that fails is a finding)
                found.append({**about, "error_over_budget": None, "faults": [f"{type(error).__name__}: {error}"[:600]]})
    return found


def compared(case: Case, draws: Sequence[Inputs]) -> dict[str, Any]:
    """The worst error over its budget (at most 1), and what is wrong beside it; of small results over all draws."""
    sides, faults = _sides(case, draws[0])
    if any(0 < t.numel() < FEW for result in (sides[1].outputs, sides[1].gradients) for t in result if t is not None):
        for inputs in draws[1:]:
            more, wrong = _sides(case, inputs)
            sides = [_joined(one, other) for one, other in zip(sides, more, strict=True)]
            faults += [fault for fault in wrong if fault not in faults]
    worst = 0.0
    for what in ("outputs", "gradients"):
        mine, plain, truth = (getattr(side, what) for side in sides)
        if len(mine) != len(plain):
            faults.append(f"{len(mine)} {what}, the definition has {len(plain)}")
        for i, triple in enumerate(zip(mine, plain, truth, strict=False)):
            over, fault = _over_budget(*triple)
            worst = max(worst, over)
            faults += [f"{what.removesuffix('s')} {i}: {fault}"] if fault else []
    return {"error_over_budget": worst, "faults": faults}


def _sides(case: Case, inputs: Inputs) -> tuple[list[calls.Result], list[str]]:
    """Our kernels, eager PyTorch and float64 on the same numbers, and what was wrong on the way."""
    before = [t.detach().clone() for t in _tensors(inputs)]
    torch.use_deterministic_algorithms(True, warn_only=True)  # what torch.empty returns is NaN
    try:
        with Meter() as meter, TritonServes():
            ours = calls.run(case.function, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    traffic = meter.traffic()
    faults = [f"{count} elements of kind {kind} in a race" for kind, count in traffic.hazards.items()]
    if traffic.triton_launches == 0:
        faults.append("no Triton kernel ran")
    if any(not torch.equal(a, b.detach()) for a, b in zip(before, _tensors(inputs), strict=True)):
        faults.append("an input was changed in place")
    eager = calls.run(case.reference, inputs, incoming=ours.incoming)
    exact = calls.run(case.reference, inputs, torch.float64, incoming=ours.incoming)
    return [ours, eager, exact], faults


def _joined(one: calls.Result, other: calls.Result) -> calls.Result:
    """Two draws of the same small results as one."""

    def both(a: list[Any], b: list[Any]) -> list[Any]:
        return [x if x is None or y is None else torch.stack([x, y]) if x.shape == y.shape else torch.cat([x, y[None]])
                for x, y in zip(a, b, strict=True)]  # fmt: skip

    return calls.Result(both(one.outputs, other.outputs), one.incoming, both(one.gradients, other.gradients))


def _over_budget(mine: Tensor | None, eager: Tensor | None, exact: Tensor | None) -> tuple[float, str]:
    """How much of its budget the error takes, and what is wrong."""
    if mine is None or eager is None or exact is None:
        return 0.0, "" if mine is None and eager is None else "is missing on one side"
    if mine.shape != exact.shape or mine.dtype != eager.dtype:
        return 0.0, f"is {list(mine.shape)} {mine.dtype}, the definition has {list(eager.shape)} {eager.dtype}"
    if not mine.is_floating_point():
        return 0.0, "" if torch.equal(mine, eager) else "integers differ"
    if mine.numel() == 0:
        return 0.0, ""
    lost = ~mine.isfinite() & eager.isfinite()
    if lost.any():
        return 0.0, f"{int(lost.sum())} values are NaN or infinite"
    half_ulp = torch.finfo(eager.dtype).eps / 2
    finite = exact.isfinite() & eager.isfinite()
    error, allowed, size = ((t.double() - zero)[finite] for t, zero in ((mine, exact), (eager, exact), (exact, 0.0)))
    overs = []
    for norm, ulps in ((_largest, 1.0), (torch.linalg.vector_norm, 0.5)):
        budget = FACTOR * norm(allowed) + ulps * half_ulp * norm(size)
        overs.append(float(norm(error) / budget) if budget > 0 else (0.0 if norm(error) == 0 else float("inf")))
    over = max(overs)
    return over, f"error is {over:.2f} of its budget" if not over <= 1 else ""


def _largest(values: Tensor) -> Tensor:
    return values.abs().max() if values.numel() else values.new_zeros(())


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, Tensor)]
