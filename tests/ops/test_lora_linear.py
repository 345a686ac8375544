"""lora_linear against PEFT's formula in float64: one dtype and float32 adapters, dropout by seed, DoRA."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import linear_group, lora_linear, lora_swiglu, swiglu
from fastpt.ops.lora_linear import Layer, backward, forward, forward_swiglu, reference, reference_backward
from tests.helpers import (
    DTYPES,
    assert_not_worse,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    run_with_grads,
)

SCALE = 0.7


def eager(x, weight, bias, lora_a, lora_b, magnitude=None):
    """PEFT's forward without dropout: the base in x's dtype, the low-rank term in the adapter's."""
    base = F.linear(x, weight)
    low = SCALE * F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b)
    if magnitude is None:
        return (base + low).to(x.dtype) + bias
    norm = torch.linalg.norm(weight.to(lora_a.dtype) + SCALE * (lora_b @ lora_a), dim=1).detach()
    ratio = magnitude / norm
    return (base + (ratio - 1) * base + ratio * low).to(x.dtype) + bias


def op(x, weight, bias, lora_a, lora_b, magnitude=None):
    return lora_linear(x, weight, bias, lora_a, lora_b, SCALE, magnitude=magnitude)


def make(leading, width, out, rank, *, with_magnitude=False):
    inputs = [
        torch.randn(*leading, width),
        torch.randn(out, width) / width**0.5,
        torch.randn(out),
        torch.randn(rank, width) / width**0.5,
        torch.randn(out, rank),
    ]
    if with_magnitude:
        inputs.append(torch.rand(out) + 0.5)
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "shape", [((1,), 40, 65, 8), ((3, 7), 33, 65, 4), ((70,), 64, 96, 16), ((0, 4), 8, 6, 2), ((), 48, 66, 16)]
)
def test_not_worse_than_eager(shape, dtype):
    check_against_eager(op, eager, make(*shape), dtype=dtype)
    check_against_eager(op, eager, make(*shape, with_magnitude=True), dtype=dtype)


@pytest.mark.parametrize("with_magnitude", [False, True])
@pytest.mark.parametrize("tokens", [5, 1057])
def test_float32_adapters_on_a_bfloat16_base(tokens, with_magnitude):
    exact_inputs = make((tokens,), 48, 40, 8, with_magnitude=with_magnitude)
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 3
    inputs = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(exact_inputs, dtypes, strict=False)]
    grads = [torch.randn(tokens, 40).bfloat16()]
    got, got_grads = run_with_grads(op, inputs, grads, None)
    base, base_grads = run_with_grads(eager, inputs, grads, None)
    exact, exact_grads = run_with_grads(eager, inputs, grads, torch.float64)
    for i, (a, b, c) in enumerate(zip([*got, *got_grads], [*base, *base_grads], [*exact, *exact_grads], strict=True)):
        assert_not_worse(a, b, c, what=f"result {i}")
    assert got_grads[3].dtype == got_grads[4].dtype == torch.float32


@pytest.mark.parametrize("wanted", [[0], [3, 4], [3], [4], [0, 1, 2], [0, 3, 4]])
def test_subsets_of_requires_grad(wanted):
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(make((9,), 12, 10, 3))]
    check_against_eager(op, eager, inputs, dtype=torch.float32)


def test_non_contiguous_and_expanded():
    x, *rest = make((9,), 12, 10, 3)
    check_against_eager(op, eager, [torch.randn(12, 9).t().requires_grad_(), *rest], dtype=torch.float32)
    check_against_eager(op, eager, [torch.randn(1, 12).expand(4, 12).requires_grad_(), *rest], dtype=torch.float32)
    check_against_eager(lambda *a: op(*a).sum(), lambda *a: eager(*a).sum(), [x, *rest], dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_by_seed(dtype):
    """With a zero base and identity adapters the output is the dropped-out input and its gradient shows the same mask."""
    tokens, width, p = 1124, 16, 0.25
    x = (torch.rand(tokens, width) + 0.5).to(dtype).requires_grad_()
    eye, zero = torch.eye(width), torch.zeros(width, width).to(dtype)

    def dropped(seed):
        return lora_linear(x, zero, None, eye, eye, 1.0, dropout_p=p, seed=seed)

    y = dropped(3)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.02
    torch.testing.assert_close(y, torch.where(kept, (x.float() / (1 - p)), 0).to(dtype))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.where(kept, 1 / (1 - p), 0.0).to(dtype))
    assert torch.equal(dropped(3), y)
    assert not torch.equal(dropped(4) != 0, kept)
    torch.manual_seed(0)
    first = dropped(None)
    torch.manual_seed(0)
    assert torch.equal(first, dropped(None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_kernel_and_reference_draw_one_mask(p, dtype):
    x, weight, _, lora_a, lora_b = (t.detach() for t in make((150,), 33, 40, 8))
    args = [x.to(dtype), [weight.to(dtype)], [None], [lora_a], [lora_b], [SCALE], p, [7 << 40]]
    (y,), (xa,) = forward(*args)
    (expected,), (expected_xa,) = reference(*args)
    torch.testing.assert_close(xa, expected_xa, rtol=1e-5, atol=1e-5)
    assert (y - expected).norm() <= 0.01 * expected.norm()  # the reference rounds twice in bfloat16
    grads, rest = [torch.randn_like(y)], (args[0], args[1], args[3], args[4], [xa], [SCALE], p, [7 << 40])
    wants = [False, False, True, True]
    (dx, _, _, (da,), _), (ddx, _, _, (dda,), _) = (
        f(grads, *rest, True, wants) for f in (backward, reference_backward)
    )
    torch.testing.assert_close(da, dda, rtol=1e-4, atol=1e-4)
    assert (dx - ddx).norm() <= 0.01 * ddx.norm()


def test_gradcheck_opcheck_compile_retain_graph():
    for with_magnitude in (False, True):
        inputs = make((2, 3), 5, 4, 2, with_magnitude=with_magnitude)
        if not with_magnitude:
            double = [x.detach().double().requires_grad_() for x in inputs]
            assert torch.autograd.gradcheck(lambda *a: lora_linear(*a, SCALE, dropout_p=0.3, seed=1), double)
        check_compiles(op, *inputs)
        check_retain_graph(op, *inputs)
    check_compiles(lambda *a: lora_linear(*a, SCALE, dropout_p=0.3, seed=1), *make((2, 3), 5, 4, 2))
    for dtype in (*DTYPES, torch.float64):
        x, *tensors = (t.detach().to(dtype) for t in make((2, 3), 5, 4, 2))
        more = [t.detach().to(dtype) for t in make((2, 3), 5, 7, 3)[1:]]
        adapters = [[tensors[2], None, more[2]], [tensors[3], None, more[3]]]
        weights = [tensors[0], more[0], more[0]]
        for dropout in ((0.0, []), (0.3, [1, 2, 3])):
            given = (x, weights, [tensors[1], None, more[1]], *adapters, [SCALE] * 3, *dropout)
            check_opcheck(forward, *given)
            ys, xas = forward(*given)
            grads = [torch.randn_like(y) for y in ys]
            for wants in ([True] * 12, [False, True] * 6):
                check_opcheck(backward, grads, x, weights, *adapters, xas, [SCALE] * 3, *dropout, wants[0], wants)


@pytest.mark.parametrize("tokens", [0, 70])
def test_gradients_are_rounded_once_to_what_takes_them(tokens):
    """By the op itself where parameters take their own dtype; sums in float32 where one asks for that."""
    inputs = [t.detach().bfloat16().requires_grad_() for t in make((tokens,), 48, 40, 8)]
    dy = torch.randn(tokens, 40).bfloat16()
    x, weight, _, lora_a, lora_b = (t.detach() for t in inputs)
    (_,), xas = forward(x, [weight], [None], [lora_a], [lora_b], [SCALE], 0.0, [])
    given = ([dy], x, [weight], [lora_a], [lora_b], xas, [SCALE], 0.0, [], True, [True] * 4)
    wide, narrow = (backward(*given, in_float32) for in_float32 in (True, False))
    for found, expected in zip((wide, narrow), (torch.float32, torch.bfloat16), strict=True):
        assert [found[kind][0].dtype for kind in (1, 3, 4)] == [expected] * 3
        assert found[2][0].dtype == torch.float32
    grads = torch.autograd.grad(op(*inputs), inputs, dy)
    for i, (kind, grad) in enumerate(zip((1, 2, 3, 4), grads[1:], strict=True)):
        assert torch.equal(grad, wide[kind][0].bfloat16())
        assert torch.equal(grad, narrow[kind][0].bfloat16())
        inputs[i + 1].grad_dtype = torch.float32
    for kind, grad in zip((1, 2, 3, 4), torch.autograd.grad(op(*inputs), inputs, dy)[1:], strict=True):
        assert torch.equal(grad, wide[kind][0])
    check_opcheck(backward, *given, False)


def eager_group(x, *tensors):
    return tuple(
        eager(x, *tensors[i : i + 4]) if len(tensors[i : i + 4]) == 4 else F.linear(x, *tensors[i : i + 2])
        for i in range(0, len(tensors), 4)
    )


def op_group(x, *tensors):
    layers = [Layer(*tensors[i : i + 4]) for i in range(0, len(tensors), 4)]
    return linear_group(x, [layer._replace(scale=SCALE) for layer in layers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [17, 130, 300])
@pytest.mark.parametrize("width", [33, 96])
def test_a_group_is_its_layers(tokens, width, dtype):
    """Layers of different widths and ranks, the last without an adapter: dx sums over them."""
    x, *first = make((tokens,), width, 150, 16)
    second, third = make((tokens,), width, 70, 3)[1:], make((tokens,), width, 64, 1)[1:3]
    check_against_eager(op_group, eager_group, [x, *first, *second, *third], dtype=dtype)


def test_ranks_beyond_one_block_and_adapters_of_two_dtypes():
    """65 + 3 packed ranks; one adapter in bfloat16 and one in float32 beside bfloat16 activations."""
    x, *first = make((40,), 33, 70, 65)
    second = make((40,), 33, 64, 3)[1:]
    dtypes = [torch.bfloat16] * 5 + [torch.bfloat16] * 2 + [torch.float32] * 2
    inputs = [t.detach().to(dtype).requires_grad_() for t, dtype in zip([x, *first, *second], dtypes, strict=True)]
    got, got_grads = run_with_grads(op_group, inputs, None, None)
    base, base_grads = run_with_grads(eager_group, inputs, None, None)
    exact, exact_grads = run_with_grads(eager_group, inputs, None, torch.float64)
    for i, (a, b, c) in enumerate(zip([*got, *got_grads], [*base, *base_grads], [*exact, *exact_grads], strict=True)):
        assert_not_worse(a, b, c, what=f"result {i}")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("tokens", "width", "out"), [(70, 33, 65), (130, 64, 96), (0, 8, 6)])
def test_swiglu_of_a_group(tokens, width, out, dtype):
    """Another rank for up, which has no bias."""
    x, *gate = make((tokens,), width, out, 16)
    up = make((tokens,), width, out, 3)[1:]
    up[1] = None

    def group(x, *tensors):
        gate, up = (Layer(*tensors[i : i + 4])._replace(scale=SCALE) for i in (0, 4))
        return lora_swiglu(x, gate, up)

    def formula(x, *tensors):
        gate = eager(x, *tensors[:4])
        return F.silu(gate) * eager(x, tensors[4], 0, *tensors[6:])

    check_against_eager(group, formula, [x, *gate, *up], dtype=dtype)


def test_swiglu_of_a_group_is_its_parts():
    x, *gate = make((70,), 48, 65, 16)
    up = make((70,), 48, 65, 3)[1:]
    seeds = [3, 7 << 40]

    def parts(x, *tensors):
        layers = [Layer(*tensors[i : i + 4]) for i in (0, 4)]
        return swiglu(*linear_group(x, layers, dropout_p=0.3, seeds=seeds))

    def group(x, *tensors):
        return lora_swiglu(x, *(Layer(*tensors[i : i + 4]) for i in (0, 4)), dropout_p=0.3, seeds=seeds)

    inputs = [
        t.detach().to(dtype).requires_grad_() for t, dtype in zip([x, *gate, *up], [torch.bfloat16] * 9, strict=True)
    ]
    got, grads = run_with_grads(group, inputs, None, None)
    expected, expected_grads = run_with_grads(parts, inputs, None, None)
    for a, b in zip([*got, *grads], [*expected, *expected_grads], strict=True):
        assert torch.equal(a, b)
    check_compiles(group, *inputs)
    check_retain_graph(group, *inputs)
    plain = [t.detach() for t in inputs]
    sides = [[plain[1 + kind], plain[5 + kind]] for kind in range(4)]
    check_opcheck(forward_swiglu, plain[0], *sides, [1.0, 1.0], 0.3, seeds)


def test_weights_of_float32_beside_bfloat16_activations():
    """Rounded as autocast rounds them, and their gradients are sums in float32."""
    x, weight, bias, lora_a, lora_b = make((200,), 48, 70, 8)
    bias = bias.detach().bfloat16().float().requires_grad_()  # a float32 bias would enter unrounded
    inputs = [x.detach().bfloat16().requires_grad_(), weight, bias, lora_a, lora_b]
    got, got_grads = run_with_grads(op, inputs, None, None)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs[:3]]
    expected, grads = run_with_grads(op, [*rounded, lora_a, lora_b], None, None)
    assert torch.equal(got[0], expected[0])
    assert [g.dtype for g in got_grads] == [torch.bfloat16, *[torch.float32] * 4]
    for a, b in zip(got_grads, grads, strict=True):
        assert torch.equal(a.to(b.dtype), b)


def test_rows_do_not_depend_on_how_many_there_are(pytestconfig):
    start = 256 if pytestconfig.getoption("--triton") else 200  # numpy rounds a product by the row's place in its tile
    x, weight, _, lora_a, lora_b = make((301,), 96, 70, 8)
    for dtype in DTYPES:
        rows, parts = x.detach().to(dtype), [t.detach().to(dtype) for t in (weight, lora_a, lora_b)]

        def run(some, parts=parts):
            return lora_linear(some, parts[0], None, parts[1], parts[2], SCALE)

        assert torch.equal(run(rows)[start : start + 33], run(rows[start : start + 33].clone()))


def test_autocast():
    x, weight, bias, lora_a, lora_b = make((6,), 5, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x, weight, bias, lora_a, lora_b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, op(x.bfloat16(), weight.bfloat16(), bias, lora_a, lora_b))


def test_shapes_that_do_not_fit_are_named():
    x, weight, bias, lora_a, lora_b = make((6,), 5, 4, 2)
    with pytest.raises(RuntimeError, match=r"weight \(4, 5.*lora_b \(2, 4"):
        op(x, weight, bias, lora_a, lora_b.t())
    with pytest.raises(RuntimeError, match=r"dropout_p is 1\.5"):
        lora_linear(x, weight, bias, lora_a, lora_b, SCALE, dropout_p=1.5)
