"""bias_gelu against float64 truth, exact and tanh: dtypes, odd and empty shapes, layouts, subsets of gradients, compile."""

import pytest
import torch

from fastpt.ops import bias_gelu
from fastpt.ops.bias_gelu import _backward, _forward, reference
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    needs_native,
    run_with_grads,
)

FORMS = ["tanh", "none"]


def check(x, bias, approximate, dtype):
    check_against_eager(
        lambda x, b: bias_gelu(x, b, approximate=approximate),
        lambda x, b: reference(x, b, approximate),
        [x, bias],
        dtype=dtype,
    )


def leaves(*shape):
    return (torch.randn(shape) * 3).requires_grad_(), torch.randn(shape[-1]).requires_grad_()


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 37), (2, 5, 129), (70, 1536), (700, 40), (0, 8)])
def test_not_worse_than_eager(shape, dtype, approximate):
    check(*leaves(*shape), approximate, dtype)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias(dtype, approximate):
    check(leaves(9, 33)[0], None, approximate, dtype)


def test_a_float32_bias_beside_bfloat16_is_not_rounded():
    x, bias = torch.full((4, 8), 1.0, dtype=torch.bfloat16), torch.full((8,), 2.0**-10)
    exact = reference(x.double() + bias.double(), None)
    out = bias_gelu(x, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))
    bias.requires_grad_()
    (dbias,) = torch.autograd.grad(bias_gelu(x, bias).sum(), bias)
    assert dbias.dtype == torch.float32


@pytest.mark.parametrize("approximate", FORMS)
def test_extreme_values_saturate_without_nan(approximate):
    x = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4]).requires_grad_()
    out = bias_gelu(x, torch.zeros(7), approximate=approximate)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, x.clamp(min=0), rtol=0, atol=1e-30)
    assert dx.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_expanded(dtype):
    check(torch.randn(64, 33).t().requires_grad_(), torch.randn(1).expand(64).requires_grad_(), "tanh", dtype)


@pytest.mark.parametrize(("wants_x", "wants_bias"), [(True, False), (False, True)])
def test_subsets_of_requires_grad(wants_x, wants_bias):
    x, bias = leaves(40, 7)
    check(x.detach().requires_grad_(wants_x), bias.detach().requires_grad_(wants_bias), "none", torch.float32)


def test_results_do_not_depend_on_the_thread_count(request):
    rows = 300 if request.config.getoption("--triton") else 5000
    threads, inputs, found = torch.get_num_threads(), leaves(rows, 64), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outputs, grads = run_with_grads(bias_gelu, inputs, None, None)
            found.append(outputs + grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck_opcheck_compile_retain_graph(approximate):
    def fused(x, bias):
        return bias_gelu(x, bias, approximate=approximate)

    assert torch.autograd.gradcheck(fused, [v.detach().double().requires_grad_() for v in leaves(3, 5)])
    for dtype in (torch.bfloat16, torch.float64):  # a native dtype and one that the reference serves
        x, bias = (v.detach().to(dtype) for v in leaves(3, 5))
        check_opcheck(_forward, x, bias, approximate)
        check_opcheck(_forward, x, None, approximate)
        check_opcheck(_backward, x, x, bias, approximate, dtype)
        check_opcheck(_backward, x, x, None, approximate, None)
    check_compiles(fused, *leaves(3, 5))
    check_retain_graph(fused, *leaves(3, 5))


def test_bias_gradient_is_float32_where_asked_for():
    """The slope of gelu at 20 is one: a bfloat16 sum stops at 256, and 513 is not a bfloat16."""
    x, bias = torch.full((513, 8), 20.0).bfloat16(), torch.zeros(8).bfloat16().requires_grad_()
    bias.grad_dtype = torch.float32
    bias_gelu(x, bias).backward(torch.ones_like(x))
    assert torch.equal(bias.grad, torch.full((8,), 513.0))


@needs_native
def test_wrong_inputs_are_named():
    with pytest.raises(RuntimeError, match=r"bias is \[4\], x is \[2, 3\]"):
        bias_gelu(torch.randn(2, 3), torch.randn(4))
    with pytest.raises(RuntimeError, match="'sigmoid'; use 'tanh' or 'none'"):
        bias_gelu(torch.randn(2, 3), torch.randn(3), approximate="sigmoid")
