"""geglu against float64 truth, exact and tanh: dtypes, odd and empty shapes, layouts, subsets of gradients, compile."""

import pytest
import torch

from fastpt.ops import geglu
from fastpt.ops.geglu import _backward, _forward, reference
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph, needs_native

FORMS = ["tanh", "none"]


def check(gate, up, approximate, dtype):
    check_against_eager(
        lambda g, u: geglu(g, u, approximate=approximate),
        lambda g, u: reference(g, u, approximate),
        [gate, up],
        dtype=dtype,
    )


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 37), (2, 5, 129), (70, 1536), (0, 8)])
def test_not_worse_than_eager(shape, dtype, approximate):
    check((torch.randn(shape) * 3).requires_grad_(), torch.randn(shape).requires_grad_(), approximate, dtype)


@needs_native
@pytest.mark.parametrize("approximate", FORMS)
def test_each_gate_on_a_grid_is_as_good_as_the_largest(approximate):
    # The fitted tail of the normal distribution, region by region: a bound relative to the largest value hides a bad one.
    for lo in torch.arange(-12, 12, 0.5).tolist():
        gate = torch.linspace(lo, lo + 0.5, 257)
        wide = gate.double().requires_grad_()
        exact = reference(wide, torch.ones_like(wide), approximate)
        (slope,) = torch.autograd.grad(exact.sum(), wide)
        ours = geglu(gate.requires_grad_(), torch.ones_like(gate), approximate=approximate)
        (dgate,) = torch.autograd.grad(ours.sum(), gate)
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5 if lo < -4 else 1e-6, atol=2e-8)
        torch.testing.assert_close(dgate.double(), slope, rtol=2e-5 if lo < -4 else 2e-6, atol=3e-7)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates_saturate_without_nan(dtype, approximate):
    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4], dtype=dtype).requires_grad_()
    out = geglu(gate, torch.ones_like(gate), approximate=approximate)
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(out, gate.clamp(min=0), rtol=0, atol=1e-30)
    assert dgate.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_expanded(dtype):
    gate, up = torch.randn(64, 33).t().requires_grad_(), torch.randn(1, 64).expand(33, 64).requires_grad_()
    check(gate, up, "tanh", dtype)


@pytest.mark.parametrize(("wants_gate", "wants_up"), [(True, False), (False, True)])
def test_subsets_of_requires_grad(wants_gate, wants_up):
    gate, up = torch.randn(5, 7).requires_grad_(wants_gate), torch.randn(5, 7).requires_grad_(wants_up)
    check(gate, up, "none", torch.float32)


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck_opcheck_compile_retain_graph(approximate):
    def fused(gate, up):
        return geglu(gate, up, approximate=approximate)

    assert torch.autograd.gradcheck(fused, [torch.randn(3, 5).double().requires_grad_() for _ in range(2)])
    for dtype in (torch.bfloat16, torch.float64):  # a native dtype and one that the reference serves
        plain = [torch.randn(3, 5, dtype=dtype) for _ in range(3)]
        check_opcheck(_forward, *plain[:2], approximate)
        check_opcheck(_backward, *plain, approximate)
    wanted = [torch.randn(3, 5).requires_grad_() for _ in range(2)]
    check_compiles(fused, *wanted)
    check_retain_graph(fused, *wanted)


@needs_native
def test_wrong_inputs_are_named():
    with pytest.raises(RuntimeError, match=r"\[2, 3\].*\[2, 4\]"):
        geglu(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="'sigmoid'; use 'tanh' or 'none'"):
        geglu(torch.randn(2, 3), torch.randn(2, 3), approximate="sigmoid")
