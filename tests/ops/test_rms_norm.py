"""rms_norm and add_rms_norm against float64 truth, rounded as Llama and as Gemma: dtypes, shapes, layouts, gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpt.ops import add_rms_norm, rms_norm
from fastpt.ops.rms_norm import _add_forward, _backward, _forward, reference
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    needs_native,
    run_with_grads,
)

EPS = 1e-6
FAMILIES = {"llama": {"offset": 0.0, "casts_first": True}, "gemma": {"offset": 1.0, "casts_first": False}}


def fused(family):
    return lambda x, w: rms_norm(x, w, EPS, **FAMILIES[family])


def eager(family):
    return lambda x, w: reference(x, w, EPS, **FAMILIES[family])


def fused_add(family):
    return lambda x, r, w: add_rms_norm(x, r, w, EPS, **FAMILIES[family])


def eager_add(family):
    return lambda x, r, w: (reference(x + r, w, EPS, **FAMILIES[family]), x + r)


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1,), (1, 1), (1, 576), (3, 37), (2, 5, 129), (0, 8), (4, 0), (33, 3, 64), (700, 40), (20, 2100), (2, 9000)],
)
def test_not_worse_than_eager(shape, dtype, family):
    check_against_eager(fused(family), eager(family), leaves(shape, shape[-1:]), dtype=dtype)
    check_against_eager(fused_add(family), eager_add(family), leaves(shape, shape, shape[-1:]), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_where_the_family_does(family, dtype):
    x, w = torch.randn(64, 256).to(dtype), torch.randn(256).to(dtype)
    same = (fused(family)(x, w) == eager(family)(x, w)).float().mean()
    assert same > (0.995 if dtype == torch.bfloat16 else 0.5)
    if dtype == torch.bfloat16:
        other = eager({"llama": "gemma", "gemma": "llama"}[family])
        assert (fused(family)(x, w - FAMILIES[family]["offset"]) != other(x, w)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_huge_and_zero_rows(dtype):
    x = torch.cat([torch.randn(1, 16) * v for v in (0.0, 1e-12, 1e4, -3e15)]).requires_grad_()
    check_against_eager(fused("llama"), eager("llama"), [x, torch.randn(16).requires_grad_()], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_expanded(dtype):
    x, r = torch.randn(64, 33).t().to(dtype).requires_grad_(), torch.randn(1, 64).expand(33, 64).requires_grad_()
    w = torch.randn(128)[::2].requires_grad_()
    check_against_eager(fused_add("llama"), eager_add("llama"), [x, r, w], dtype=dtype)
    grad = torch.randn(1, 64).to(dtype).expand(33, 64)
    strided, dense = (run_with_grads(fused("llama"), [x, w], [g], dtype)[1] for g in (grad, grad.contiguous()))
    torch.testing.assert_close(strided, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_lie_apart(dtype):
    qkv = torch.randn(2, 7, 5, 3 * 64).requires_grad_()  # what the projection of q, k and v gives
    for part in range(3):
        check_against_eager(
            lambda x, w, part=part: fused("llama")(x[..., 64 * part : 64 * (part + 1)], w),
            lambda x, w, part=part: eager("llama")(x[..., 64 * part : 64 * (part + 1)], w),
            [qkv, torch.randn(64).requires_grad_()],
            dtype=dtype,
        )


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_subsets_of_requires_grad(wanted):
    inputs = [v.detach().requires_grad_(w) for v, w in zip(leaves((5, 7), (5, 7), (7,)), wanted, strict=True)]
    check_against_eager(fused_add("gemma"), eager_add("gemma"), inputs, dtype=torch.float32)
    if wanted[0] or wanted[2]:
        check_against_eager(fused("gemma"), eager("gemma"), inputs[::2], dtype=torch.float32)


@pytest.mark.parametrize("output", [0, 1])
def test_either_output_alone(output):
    inputs = leaves((5, 7), (5, 7), (7,))
    found = torch.autograd.grad(fused_add("llama")(*inputs)[output].sin().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(eager_add("llama")(*inputs)[output].sin().sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b) if a is not None else None


def test_frozen_weight_forms_no_gradient():
    x, w = torch.randn(4, 8), torch.randn(8)
    _, rstd = _forward(x, w, EPS, 0.0, True)
    assert _backward(x, None, x, rstd, w, 0.0, None)[1].numel() == 0


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_weight_gradient_is_float32_where_asked_for(is_checkpointed):
    x, w = torch.randn(300, 8).bfloat16(), torch.randn(8).bfloat16().requires_grad_()
    w.grad_dtype = torch.float32
    function = fused("llama")
    y = checkpoint(function, x, w, use_reentrant=False) if is_checkpointed else function(x, w)
    y.backward(torch.ones(300, 8).bfloat16())
    normed = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad.double(), normed.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_stores_the_weight_gradient_rounded_once(dtype):
    x, w = torch.randn(300, 8).bfloat16(), torch.randn(8).bfloat16()
    rstd = _forward(x, w, EPS, 0.0, True)[1]
    exact = _backward(x, None, x, rstd, w, 0.0, torch.float32)[1]
    assert torch.equal(_backward(x, None, x, rstd, w, 0.0, dtype)[1], exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_weight_over_lower_activations(dtype):
    x, w = torch.randn(9, 8).to(dtype), torch.randn(8)
    assert fused("llama")(x, w).dtype == dtype
    y, s = add_rms_norm(x, torch.randn(9, 8), w, EPS)  # autocast's float32 stream
    assert y.dtype == s.dtype == torch.float32


def test_weight_gradient_does_not_depend_on_the_thread_count(request):
    rows = 300 if request.config.getoption("--triton") else 5000
    x, w = torch.randn(rows, 64).requires_grad_(), torch.randn(64).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(run_with_grads(fused("llama"), [x, w], None, None))
    finally:
        torch.set_num_threads(threads)
    for outputs, grads in found[1:]:
        assert torch.equal(outputs[0], found[0][0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0][1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_around_it(dtype):
    x, w = torch.randn(97, 576).to(dtype), torch.randn(576).to(dtype)
    assert torch.equal(fused("llama")(x, w)[40:41], fused("llama")(x[40:41], w))


def test_gradcheck_opcheck_compile_retain_graph():
    doubles = leaves((3, 5), (3, 5), (5,), dtype=torch.float64)
    for family in FAMILIES:
        assert torch.autograd.gradcheck(fused_add(family), doubles)
        assert torch.autograd.gradcheck(fused(family), doubles[::2])
    for dtype in (torch.bfloat16, torch.float64):  # a native dtype and one that the reference serves
        x, r, w = (v.detach().to(dtype) for v in doubles)
        _, s, rstd = _add_forward(x, r, w, EPS, 0.0, True)
        check_opcheck(_forward, x, w, EPS, 1.0, False)
        check_opcheck(_add_forward, x, r, w, EPS, 0.0, True)
        check_opcheck(_backward, r, None, s, rstd, w, 1.0, dtype)
        check_opcheck(_backward, r, x, s, rstd, w, 0.0, None)
    wanted = leaves((3, 5), (3, 5), (5,), dtype=torch.bfloat16)
    check_compiles(fused_add("llama"), *wanted)
    check_compiles(lambda x, r, w: fused_add("llama")(x, r, w)[1], *wanted[:2], wanted[2].detach())
    check_retain_graph(fused_add("llama"), *wanted)


@needs_native
def test_wrong_shapes_are_named():
    with pytest.raises(RuntimeError, match=r"weight is \[4\], x is \[2, 3\]"):
        rms_norm(torch.randn(2, 3), torch.randn(4), EPS)
    with pytest.raises(RuntimeError, match=r"\[2, 3\].*\[3\]"):
        add_rms_norm(torch.randn(2, 3), torch.randn(3), torch.randn(3), EPS)
