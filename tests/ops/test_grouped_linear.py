"""grouped_linear against a loop over experts: empty experts, few tokens, adapters, views, rows of no expert."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import grouped_linear
from fastpt.ops.grouped_linear import Routing, backward, forward
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph

SCALE = 0.7


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def eager(x, offsets, weight, lora_a=None, lora_b=None, scale=SCALE):
    parts = []
    for e in range(len(weight)):
        rows = x[offsets[e] : offsets[e + 1]]
        y = F.linear(rows, weight[e])
        parts.append(y if lora_a is None else y + scale * F.linear(F.linear(rows, lora_a[e]), lora_b[e]))
    return torch.cat([*parts, x.new_zeros(len(x) - int(offsets[-1]), weight.shape[1])])


def op(x, offsets, *tensors):
    return grouped_linear(x, offsets, *tensors, scale=SCALE)


def make(counts, width, out, rank=None, nobody=0):
    experts = len(counts)
    tensors = [
        torch.randn(sum(counts) + nobody, width),
        offsets_of(counts),
        torch.randn(experts, out, width) / width**0.5,
    ]
    if rank is not None:
        tensors += [torch.randn(experts, rank, width) / width**0.5, torch.randn(experts, out, rank)]
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [((3, 0, 70, 1, 0), 40, 65), ((0, 0), 8, 6), ((5,), 33, 130), ((0, 130, 2), 64, 96)],
)
def test_not_worse_than_eager(shape, dtype):
    check_against_eager(op, eager, make(*shape), dtype=dtype)
    check_against_eager(op, eager, make(*shape, rank=5), dtype=dtype)


@pytest.mark.parametrize("rank", [1, 16, 65])
def test_ranks(rank):
    check_against_eager(op, eager, make((3, 0, 70), 33, 24, rank), dtype=torch.bfloat16)


@pytest.mark.parametrize("rank", [None, 4])
def test_rows_of_no_expert_are_zero(rank):
    inputs = make((3, 0, 4), 12, 10, rank, nobody=5)
    assert torch.equal(op(*inputs)[7:], torch.zeros(5, 10))
    check_against_eager(op, eager, inputs, dtype=torch.float32)


@pytest.mark.parametrize("wanted", [[0], [2], [3, 4], [3], [4], [0, 3, 4]])
def test_subsets_of_requires_grad(wanted):
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(make((3, 0, 6), 12, 10, 3))]
    check_against_eager(op, eager, inputs, dtype=torch.float32)


def test_views_as_models_hold_them():
    """gpt-oss keeps [E, D, O]; PEFT keeps b as [O, R E]; x may be a transposed or expanded view."""

    def both(function):
        def call(x, offsets, weight, a, b):
            b = b.reshape(b.shape[0], -1, len(weight)).permute(2, 0, 1)
            return function(x.t(), offsets, weight.mT, a.reshape(len(weight), -1, a.shape[1]), b)

        return call

    tensors = [
        torch.randn(12, 9),
        offsets_of((4, 0, 5)),
        torch.randn(3, 12, 10),
        torch.randn(6, 12),
        torch.randn(10, 6),
    ]
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    check_against_eager(both(op), both(eager), inputs, dtype=torch.float32)
    x, *rest = make((4, 0, 5), 12, 10, 2)
    check_against_eager(op, eager, [x[:1].detach().expand(9, 12).requires_grad_(), *rest], dtype=torch.float32)
    check_against_eager(lambda *a: op(*a).sum(), lambda *a: eager(*a).sum(), [x, *rest], dtype=torch.float32)


def test_float32_adapters_get_float32_gradients():
    x, offsets, weight, a, b = make((4, 0, 5), 12, 10, 2)
    y = op(x.bfloat16(), offsets, weight.bfloat16(), a, b)
    grads = torch.autograd.grad(y.float().square().sum(), (a, b))
    assert y.dtype == torch.bfloat16
    assert all((grad != grad.bfloat16()).any() for grad in grads)


@pytest.mark.parametrize("rank", [None, 5])
def test_gradients_are_rounded_where_they_are_summed(rank):
    """The raw backward in the dtype of bfloat16 parameters is that in float32, rounded once; an empty expert's is zero."""
    x, offsets, weight, *low = (
        t.detach().bfloat16() if t.is_floating_point() else t for t in make((3, 0, 70), 33, 140, rank)
    )
    low = low or [None, None]
    y, xa = forward(x, offsets, weight, *low, SCALE)
    inputs = torch.randn_like(y), x, offsets, weight, *low, xa, SCALE, [True, True, rank is not None, rank is not None]
    exact, rounded = backward(*inputs, True), backward(*inputs, False)
    assert all(t.dtype == torch.float32 for t in exact[1:])
    assert all(t.dtype == x.dtype for t in rounded)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert torch.equal(wide.bfloat16(), narrow)
    for narrow in rounded[1:2] if rank is None else rounded[1:]:
        assert not narrow[1].any()
        assert narrow[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 5])
def test_same_bits_on_any_number_of_threads(rank, dtype):
    """With one expert that all threads share and others beside each other, and with all beside each other."""

    def run(threads, x, offsets, weight, *low):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = op(x, offsets, weight, *low)
            return y, *torch.autograd.grad(y.float().square().sum(), (x, weight, *low))
        finally:
            torch.set_num_threads(before)

    for counts in ((3, 0, 200, 1, 50), (30, 31, 32, 29, 30)):
        inputs = [
            t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in make(counts, 48, 80, rank)
        ]
        expected = run(1, *inputs)
        for threads in (2, 3):
            assert all(torch.equal(a, b) for a, b in zip(run(threads, *inputs), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_routing(dtype):
    """Dispatch, two layers and combine against the loop over tokens; expert 4 is nobody's."""
    experts = torch.tensor([[0, 3], [3, 1], [4, 0], [1, 3], [3, 4]])

    def routed(x, weight, weights):
        routing = Routing(experts, 4)
        return routing.combine(grouped_linear(routing.dispatch(x), routing.offsets, weight), weights)

    def by_token(x, weight, weights):
        rows = []
        for t, chosen in enumerate(experts.tolist()):
            parts = [weights[t, j] * F.linear(x[t], weight[e]) for j, e in enumerate(chosen) if e < 4]
            rows.append(sum(parts))
        return torch.stack(rows)

    inputs = [torch.randn(5, 12), torch.randn(4, 10, 12), torch.rand(5, 2)]
    check_against_eager(routed, by_token, [t.requires_grad_() for t in inputs], dtype=dtype)


def test_deterministic_and_repeatable():
    inputs = make((3, 0, 70), 33, 24, 4)
    check_retain_graph(op, *inputs)
    assert torch.equal(op(*inputs), op(*inputs))


@pytest.mark.parametrize(
    ("change", "value"),
    [(1, offsets_of((3, 6))), (1, offsets_of((3, 0, 6)).long()), (3, torch.randn(3, 2, 11)), (4, None)],
)
def test_wrong_inputs_raise(change, value):
    inputs = make((3, 0, 6), 12, 10, 2)
    inputs[change] = value
    with pytest.raises(RuntimeError, match="grouped_linear"):
        op(*inputs)


@pytest.mark.parametrize("rank", [None, 4])
def test_registration(rank):
    inputs = [t.detach() for t in make((3, 0, 6), 12, 10, rank)]
    x, offsets, weight, *low = inputs
    low = low or [None, None]
    check_opcheck(forward, x, offsets, weight, *low, SCALE)
    y, xa = forward(x, offsets, weight, *low, SCALE)
    wants = [True, True, rank is not None, rank is not None]
    check_opcheck(backward, torch.randn_like(y), x, offsets, weight, *low, xa, SCALE, wants)
    check_compiles(op, *make((3, 0, 6), 12, 10, rank))
