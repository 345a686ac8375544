"""The error rule of docs/design.md and the checks that every op passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastpt.ops._library import MISSING_NATIVE

DTYPES = [torch.float32, torch.bfloat16]
needs_native = pytest.mark.skipif(MISSING_NATIVE is not None, reason=str(MISSING_NATIVE))


def assert_not_worse(
    actual: Tensor, eager: Tensor, exact: Tensor, *, what: str = "output", factor: float = 2.0
) -> None:
    """`actual` errs at most `factor` times what eager PyTorch errs in the same dtype, plus half an ulp of the largest value.

    Both in the maximum and in L2. `exact` is the float64 truth. NaN and shape or dtype mismatches fail.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, eager has {eager.dtype}"
    if exact.numel() == 0:
        return
    half_ulp = torch.finfo(eager.dtype).eps / 2
    error, allowed = (actual.double() - exact), (eager.double() - exact)
    for norm, name in ((lambda x: x.abs().max(), "max"), (lambda x: x.norm(), "L2")):
        budget = factor * norm(allowed) + half_ulp * norm(exact) * (1 if name == "max" else 0.5)
        measured = norm(error)
        assert measured <= budget, (
            f"{what}: {name} error {measured:.3e} exceeds {budget:.3e} (eager {norm(allowed):.3e}) "
            f"at {tuple(actual.shape)}, {actual.dtype}"
        )


def run_with_grads(
    function: Callable, inputs: Sequence[Any], grads: Sequence[Tensor] | None, dtype: torch.dtype | None
):
    """Outputs, then the gradient of each floating input that asks for one, with every floating input cast to dtype."""

    def leaf(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        cast = value.detach().to(dtype or value.dtype)
        return (cast.clone() if cast.is_contiguous() else cast).requires_grad_(value.requires_grad)

    leaves = [leaf(value) for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted:
        return list(outputs), []
    grads = grads or [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(1), device="cpu").double().to(o.device)
        for o in outputs
    ]
    differentiable = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in differentiable], wanted, [g for _, g in differentiable], allow_unused=True
    )
    return [o.detach() for o in outputs], list(found)


def check_against_eager(
    op: Callable, eager: Callable, inputs: Sequence[Any], *, dtype: torch.dtype, factor: float = 2.0
):
    """Compare op with eager on the same inputs in dtype, both against eager in float64: outputs and every gradient.

    Floating tensors of `inputs` that require grad get their gradient compared; values are first rounded to dtype so that
    all three see the same numbers.
    """
    rounded = [
        v.detach().to(dtype).requires_grad_(v.requires_grad) if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in inputs
    ]
    names = [f"gradient of input {i}" for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.requires_grad]
    got, got_grads = run_with_grads(op, rounded, None, None)
    base, base_grads = run_with_grads(eager, rounded, None, None)
    exact, exact_grads = run_with_grads(eager, rounded, None, torch.float64)
    for i, (a, b, c) in enumerate(zip(got, base, exact, strict=True)):
        assert_not_worse(a, b, c, what=f"output {i}", factor=factor)
    for name, a, b, c in zip(names, got_grads, base_grads, exact_grads, strict=True):
        assert a is not None, f"{name} is missing"
        assert_not_worse(a, b, c, what=name, factor=factor)


def check_opcheck(overload: Callable, *args: Any, **kwargs: Any) -> None:
    """torch.library.opcheck on inputs without grad (gradients are tested through the Function)."""
    with _disable_current_modes():  # what it checks belongs to the dispatcher, not to a kernel
        torch.library.opcheck(overload, args, kwargs)


def check_compiles(function: Callable, *inputs: Any) -> None:
    """`torch.compile(fullgraph=True)` with aot_eager gives the eager result and gradients."""
    with _disable_current_modes():
        torch._dynamo.reset()
        expected, expected_grads = run_with_grads(function, inputs, None, None)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got, got_grads = run_with_grads(compiled, inputs, None, None)
        for a, b in zip([*got, *got_grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(a, b)


def check_retain_graph(function: Callable, *inputs: Any) -> None:
    """Two backward passes over one graph give the same gradients, and forward leaves its inputs alone."""
    before = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
    output = function(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for old, new in zip(before, inputs, strict=True):
        if isinstance(old, Tensor):
            assert torch.equal(old, new.detach()), "an input was changed in place"
