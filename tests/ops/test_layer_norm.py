"""layer_norm against float64 truth: dtypes, shapes, layouts, absent and frozen parameters, compile, opcheck."""

import pytest
import torch

from fastpt.ops import layer_norm
from fastpt.ops.layer_norm import _backward, _forward, reference
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    needs_native,
    run_with_grads,
)

EPS = 1e-5


def fused(*inputs):
    return layer_norm(*inputs, EPS)


def eager(*inputs):
    return reference(*inputs, EPS)


def leaves(shape, dtype=torch.float32):
    return [torch.randn(s).to(dtype).requires_grad_() for s in (shape, shape[-1:], shape[-1:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (1, 768), (3, 37), (2, 5, 129), (0, 8), (700, 40)])
def test_not_worse_than_eager(shape, dtype):
    check_against_eager(fused, eager, leaves(shape), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_does_not_cancel(dtype):
    x, w, b = leaves((17, 96))
    check_against_eager(fused, eager, [(x.detach() + 1000).requires_grad_(), w, b], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_absent_parameters(has_weight, has_bias, dtype):
    x, w, b = leaves((9, 33))
    check_against_eager(fused, eager, [x, w if has_weight else None, b if has_bias else None], dtype=dtype)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_subsets_of_requires_grad(wanted):
    inputs = [v.detach().requires_grad_(w) for v, w in zip(leaves((40, 7)), wanted, strict=True)]
    check_against_eager(fused, eager, inputs, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_expanded(dtype):
    x = torch.randn(64, 33).t().requires_grad_()
    w, b = torch.randn(128)[::2].requires_grad_(), torch.randn(1).expand(64).requires_grad_()
    check_against_eager(fused, eager, [x, w, b], dtype=dtype)


def test_results_do_not_depend_on_the_thread_count():
    threads, inputs, found = torch.get_num_threads(), leaves((5000, 64)), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outputs, grads = run_with_grads(fused, inputs, None, None)
            found.append(outputs + grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_gradcheck_opcheck_compile_retain_graph():
    assert torch.autograd.gradcheck(fused, leaves((3, 5), torch.float64))
    for dtype in (torch.bfloat16, torch.float64):  # a native dtype and one that the reference serves
        x, w, b = (v.detach() for v in leaves((3, 5), dtype))
        _, mean, rstd = _forward(x, w, b, EPS)
        check_opcheck(_forward, x, w, None, EPS)
        check_opcheck(_backward, x, x, mean, rstd, w, True, True)
        check_opcheck(_backward, x, x, mean, rstd, None, False, True)
    check_compiles(fused, *leaves((3, 5), torch.bfloat16))
    check_retain_graph(fused, *leaves((3, 5)))


@needs_native
def test_wrong_shapes_are_named():
    with pytest.raises(RuntimeError, match=r"weight is \[4\], x is \[2, 3\]"):
        layer_norm(torch.randn(2, 3), torch.randn(4), None, EPS)
