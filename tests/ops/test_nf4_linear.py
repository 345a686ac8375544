"""nf4_linear bit for bit against lora_linear on the dequantised weights: dtypes, odd sizes, mixed groups, memory, opcheck."""

import pytest
import torch

from benchmarks.harness import peak_extra_bytes
from fastpt.ops import Layer, linear_group, nf4_linear, nf4_quantize
from fastpt.ops.nf4 import NF4Weight
from fastpt.ops.nf4_linear import backward, forward, operands
from tests.helpers import DTYPES, check_compiles, check_opcheck, check_retain_graph, needs_native, run_with_grads

SCALE = 0.7
# (tokens, D, O): rows of a group of scales, rows that share them, odd O, several tiles and panels, one token
SIZES = [(5, 64, 10), (7, 20, 33), (1, 130, 65), (300, 192, 129), (2, 576, 64)]


@pytest.fixture(autouse=True)
def both_are_served_alike(request):
    if request.config.getoption("--triton"):
        pytest.skip("it has no Triton kernel: on a GPU the reference dequantises and calls lora_linear's")


def make(tokens, width, outs, *, dtype, adapter_dtype=None, nested=True, bias=True, rank=4, seed=0):
    """(x, layers with 4-bit weights, with the same weights dequantised)."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    quantised, plain = [], []
    for out in outs:
        weight = nf4_quantize(torch.randn(out, width) / width**0.5, nested=nested)
        rest = [torch.randn(out).to(dtype).requires_grad_() if bias else None]
        if rank:
            shapes = (rank, width), (out, rank)
            rest += [torch.randn(shape).to(adapter_dtype or dtype).requires_grad_() for shape in shapes]
        quantised.append(Layer(weight, *rest, scale=SCALE))
        plain.append(Layer(weight.dequantize(dtype), *rest, scale=SCALE))
    return x, quantised, plain


def results(op, x, layers, **options):
    """Outputs and gradients of x and everything that is trained."""
    ys = op(x, layers, **options)
    wanted = [x, *(t for layer in layers for t in layer[1:4] if t is not None)]
    torch.manual_seed(1)
    grads = [torch.randn(y.shape).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, wanted, grads)]


def check_same(x, quantised, plain, **options):
    for a, b in zip(
        results(nf4_linear, x, quantised, **options), results(linear_group, x, plain, **options), strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_is_lora_linear_on_the_dequantised_weight(size, dtype, nested):
    tokens, width, out = size
    check_same(*make(tokens, width, (out, 24), dtype=dtype, nested=nested))
    check_same(*make(tokens, width, (out,), dtype=dtype, nested=nested, rank=0, bias=False))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_float32_adapters_and_dropout(dropout_p):
    inputs = make(150, 192, (96, 32, 32), dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check_same(*inputs, dropout_p=dropout_p, seeds=[1, 2, 3] if dropout_p else None)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_tiles_and_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_same(*make(1300, 64, (70,), dtype=torch.bfloat16))  # fewer panels than tasks that threads want
    finally:
        torch.set_num_threads(before)


def test_a_trained_weight_in_the_same_group():
    x, quantised, plain = make(40, 64, (48, 32), dtype=torch.bfloat16)
    trained = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    quantised[1], plain[1] = (layer._replace(weight=trained) for layer in (quantised[1], plain[1]))
    check_same(x, quantised, plain)
    a, b = (torch.autograd.grad(op(x, layers)[1].sum(), trained)[0]
            for op, layers in ((nf4_linear, quantised), (linear_group, plain)))  # fmt: skip
    assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [[0], [2, 3], [1], [0, 3]])
def test_subsets_of_requires_grad(wanted):
    x, (layer,), (other,) = make(9, 12, (10,), dtype=torch.float32)
    inputs = [x, *layer[1:4]]
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    found = [
        run_with_grads(lambda x, *rest, w=w, op=op: op(x, [Layer(w, *rest, scale=SCALE)])[0], inputs, None, None)
        for w, op in ((layer.weight, nf4_linear), (other.weight, linear_group))
    ]
    for a, b in zip(*([*outputs, *grads] for outputs, grads in found), strict=True):
        assert torch.equal(a, b)


def test_empty_and_non_contiguous():
    check_same(*make(0, 64, (16,), dtype=torch.bfloat16))
    x, quantised, plain = make(24, 64, (16,), dtype=torch.bfloat16)
    turned = x.detach().t().contiguous().t().requires_grad_()
    check_same(turned, quantised, plain)


def test_autocast_and_double_backward_of_the_graph():
    x, quantised, plain = make(24, 64, (16,), dtype=torch.float32, adapter_dtype=torch.float32)
    plain = [layer._replace(weight=layer.weight.bfloat16()) for layer in plain]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nf4_linear(x, quantised)[0], linear_group(x, plain)[0])
    layer = quantised[0]
    function = lambda x, *rest: nf4_linear(x, [Layer(layer.weight, *rest, scale=SCALE)])  # noqa: E731
    check_retain_graph(function, x, *layer[1:4])


@needs_native
def test_no_weight_is_unpacked_as_a_whole(runs_on_cpu_kernels):
    if not runs_on_cpu_kernels:
        pytest.skip("a GPU dequantises a group's weights before its products")
    width, out = 2048, 4096
    x, quantised, plain = make(64, width, (out,), dtype=torch.bfloat16, rank=0, bias=False)
    whole = 2 * width * out
    grad = torch.ones(64, out, dtype=torch.bfloat16)

    def both(op, layers):
        return lambda: torch.autograd.grad(op(x, layers)[0], x, grad)

    panel = 2 * 64 * max(width, out)
    assert peak_extra_bytes(both(linear_group, plain)) >= whole  # packed for each pass
    assert peak_extra_bytes(both(nf4_linear, quantised)) < 4 * torch.get_num_threads() * panel < whole / 2


def test_wrong_shapes_are_said():
    x, quantised, _ = make(4, 64, (16,), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="lora_linear: got x"):
        nf4_linear(x[:, :32], quantised)
    weight = quantised[0].weight
    short = NF4Weight(weight.packed, weight.absmax[1:], weight.nested, weight.shape)
    with pytest.raises(RuntimeError, match="nf4: packed is"):
        nf4_linear(x, [Layer(short)])
    with pytest.raises(RuntimeError, match="no whole bytes"):
        nf4_linear(torch.randn(2, 5), [Layer(nf4_quantize(torch.randn(4, 5)))])


def test_opcheck_and_compile():
    x, quantised, _ = make(6, 64, (10, 7), dtype=torch.bfloat16)
    weights, absmax, nested = zip(*(operands(layer.weight) for layer in quantised), strict=True)
    biases, lora_a, lora_b = ([layer[i].detach() for layer in quantised] for i in (1, 2, 3))
    rest = [SCALE, SCALE], 0.0, []
    check_opcheck(forward, x.detach(), weights, absmax, nested, biases, lora_a, lora_b, *rest)
    ys, xas = forward(x.detach(), weights, absmax, nested, biases, lora_a, lora_b, *rest)
    wants = [False, True, True, True] * 2
    check_opcheck(backward, ys, x.detach(), weights, absmax, nested, lora_a, lora_b, xas, *rest, True, wants)
    layer = quantised[0]
    function = lambda x, *rest: nf4_linear(x, [Layer(layer.weight, *rest, scale=SCALE)])[0]  # noqa: E731
    check_compiles(function, x, *layer[1:4])
