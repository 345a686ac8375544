"""swiglu against float64 truth: dtypes, odd and empty shapes, layouts, subsets of gradients, compile, opcheck."""

import pytest
import torch

from fastpt.ops import swiglu
from fastpt.ops.swiglu import _backward, _forward, reference
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 37), (2, 5, 129), (70, 1536), (0, 8)])
def test_not_worse_than_eager(shape, dtype):
    gate, up = (torch.randn(shape) * 3).requires_grad_(), torch.randn(shape).requires_grad_()
    check_against_eager(swiglu, reference, [gate, up], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_saturate_without_nan(dtype):
    gate = torch.tensor([-1e4, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4], dtype=dtype)
    out = swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(out, reference(gate, torch.ones_like(gate)), rtol=2e-2, atol=1e-30)
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_expanded(dtype):
    gate = torch.randn(64, 33).t().to(dtype).requires_grad_()
    up = torch.randn(1, 64).expand(33, 64).to(dtype).requires_grad_()
    check_against_eager(swiglu, reference, [gate, up], dtype=dtype)


@pytest.mark.parametrize(("wants_gate", "wants_up"), [(True, False), (False, True)])
def test_subsets_of_requires_grad(wants_gate, wants_up):
    gate, up = torch.randn(5, 7).requires_grad_(wants_gate), torch.randn(5, 7).requires_grad_(wants_up)
    check_against_eager(swiglu, reference, [gate, up], dtype=torch.float32)


def test_gradcheck_opcheck_compile_retain_graph():
    gate, up = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain = [torch.randn(3, 5, dtype=dtype) for _ in range(3)]
        check_opcheck(_forward, *plain[:2])
        check_opcheck(_backward, *plain)
    wanted = [torch.randn(3, 5).requires_grad_() for _ in range(2)]
    check_compiles(swiglu, *wanted)
    check_retain_graph(swiglu, *wanted)


def test_unequal_shapes_are_named():
    with pytest.raises(RuntimeError, match=r"\[2, 3\].*\[2, 4\]"):
        swiglu(torch.randn(2, 3), torch.randn(2, 4))
