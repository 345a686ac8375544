"""layer_norm against float64 truth: dtypes, shapes, layouts, absent and frozen parameters, compile, opcheck."""

import pytest
import torch

from fastpt.ops import add_layer_norm, layer_norm
from fastpt.ops._dropout import factors
from fastpt.ops.layer_norm import _add_backward, _add_forward, _backward, _forward, reference, reference_sum
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (1, 768), (3, 37), (2, 5, 129), (0, 8), (700, 40), (20, 2100), (2, 9000)])
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


def test_results_do_not_depend_on_the_thread_count(request):
    rows = 300 if request.config.getoption("--triton") else 5000
    threads, inputs, found = torch.get_num_threads(), leaves((rows, 64)), []
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
        check_opcheck(_backward, x, x, mean, rstd, w, dtype, torch.float32)
        check_opcheck(_backward, x, x, mean, rstd, None, None, dtype)
    check_compiles(fused, *leaves((3, 5), torch.bfloat16))
    check_retain_graph(fused, *leaves((3, 5)))


@pytest.mark.parametrize("has_residual", [False, True])
def test_parameter_gradients_are_float32_where_asked_for(has_residual):
    """512 ones in a column: a bfloat16 sum stops at 256, and 513 is not a bfloat16."""
    x, w, b = (v.detach().bfloat16().requires_grad_() for v in leaves((513, 8)))
    b.grad_dtype = torch.float32
    y = add_layer_norm(x, torch.zeros_like(x), w, b, EPS)[0] if has_residual else layer_norm(x, w, b, EPS)
    y.backward(torch.ones_like(x))
    assert (w.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(b.grad, torch.full((8,), 513.0))


@needs_native
def test_wrong_shapes_are_named():
    with pytest.raises(RuntimeError, match=r"weight is \[4\], x is \[2, 3\]"):
        layer_norm(torch.randn(2, 3), torch.randn(4), None, EPS)


SEED = 2**61 + 12345


def fused_add(x, residual, weight, bias, p=0.0):
    return add_layer_norm(x, residual, weight, bias, EPS, dropout_p=p, seed=SEED)


def eager_add(x, residual, weight, bias, p=0.0):
    summed = reference_sum(x, residual, p, SEED)
    return reference(summed, weight, bias, EPS), summed


def add_leaves(shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_(), *leaves(shape, dtype)]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(129,), (1, 768), (3, 37), (2, 5, 129), (0, 8), (700, 40)])
def test_add_is_not_worse_than_eager(shape, dtype, p):
    check_against_eager(fused_add, eager_add, [*add_leaves(shape), p], dtype=dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("used", [0, 1])
def test_add_with_one_output_used_and_absent_parameters(used, p):
    x, residual, _, b = add_leaves((40, 7))
    inputs = [x, residual, None, b if used == 0 else b.detach(), p]
    check_against_eager(
        lambda *i: fused_add(*i)[used], lambda *i: eager_add(*i)[used], inputs, dtype=torch.float32
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_bfloat16_branch_beside_a_float32_stream(p):
    x, residual, w, b = add_leaves((65, 96))
    x = x.detach().bfloat16().requires_grad_()
    got = run_with_grads(fused_add, [x, residual, w, b, p], None, None)
    wide = x.detach().float().requires_grad_()
    expected = run_with_grads(fused_add, [wide, residual, w, b, p], None, None)
    assert [o.dtype for o in got[0]] == [torch.float32] * 2
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
    assert torch.equal(got[1][0], expected[1][0].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got[1][1:], expected[1][1:], strict=True))


def test_the_kernel_drops_what_the_definition_drops_and_about_the_right_share():
    x, zeros = torch.ones(257, 130), torch.zeros(257, 130)
    for p in (0.1, 0.5):
        _, summed = add_layer_norm(x, zeros, None, None, EPS, dropout_p=p, seed=SEED)
        assert torch.equal(summed, factors(257, 130, p, SEED, x.device).float())
        dropped = (summed == 0).float()
        assert abs(dropped.mean() - p) < 0.01
        for axis in (0, 1):  # neither rows nor columns are alike
            spread = (dropped.mean(axis) - p).std()
            assert 0.6 < spread / (p * (1 - p) / dropped.shape[axis]) ** 0.5 < 1.6
    other = factors(257, 130, 0.5, SEED + 1, x.device)
    agree = (other == factors(257, 130, 0.5, SEED, x.device)).float().mean()
    assert abs(agree - 0.5) < 0.02


def test_without_a_seed_torchs_generator_gives_one():
    x, residual, w, b = (v.detach() for v in add_leaves((9, 33)))

    def draw():
        return add_layer_norm(x, residual, w, b, EPS, dropout_p=0.5)[0]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_add_does_not_depend_on_the_thread_count(request):
    rows = 300 if request.config.getoption("--triton") else 5000
    threads, inputs, found = torch.get_num_threads(), [*add_leaves((rows, 64)), 0.2], []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outputs, grads = run_with_grads(fused_add, inputs, None, None)
            found.append(outputs + grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_add_gradcheck_opcheck_compile_retain_graph(p):
    assert torch.autograd.gradcheck(lambda *i: fused_add(*i, p), add_leaves((3, 5), torch.float64))
    for dtype in (torch.bfloat16, torch.float64):
        x, residual, w, b = (v.detach() for v in add_leaves((3, 5), dtype))
        check_opcheck(_add_forward, x, residual, w, None, EPS, p, SEED)
        _, summed, mean, rstd = _add_forward(x, residual, w, b, EPS, p, SEED)
        check_opcheck(_add_backward, x, residual, summed, mean, rstd, w, dtype, p, SEED, torch.float32, dtype)
        check_opcheck(_add_backward, x, None, summed, mean, rstd, None, dtype, p, SEED, None, dtype)
    check_compiles(lambda *i: fused_add(*i, p), *add_leaves((3, 5), torch.bfloat16))
    check_retain_graph(lambda *i: fused_add(*i, p), *add_leaves((3, 5)))


def test_add_names_wrong_inputs():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"dropout_p is 1\.5"):
        add_layer_norm(x, x, None, None, EPS, dropout_p=1.5)
