"""embedding against F.embedding in float64: dtypes, repeated and padding ids, layouts, tied weights, accumulation."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import embedding, linear_cross_entropy
from fastpt.ops.embedding import _backward, _forward
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    needs_native,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize(("ids", "shape"), [((1,), (1, 1)), ((2, 7), (5, 33)), ((600,), (50, 8)), ((0,), (4, 4))])
def test_not_worse_than_eager(ids, shape, padding_idx, dtype):
    ids, weight = torch.randint(shape[0], ids), torch.randn(shape).requires_grad_()
    padding_idx = padding_idx if padding_idx is None or shape[0] > 3 else 0
    check_against_eager(
        lambda i, w: embedding(i, w, padding_idx=padding_idx),
        lambda i, w: F.embedding(i, w, padding_idx=padding_idx),
        [ids, weight],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    ids = torch.randint(40, (6, 5)).t()
    for weight in (torch.randn(16, 40).t(), torch.randn(40, 32)[:, ::2]):
        for i in (ids, ids[:, :1].expand(5, 3), ids.int()):
            check_against_eager(embedding, F.embedding, [i, weight.requires_grad_()], dtype=dtype)
    expanded = torch.randn(1, 16).expand(5, 6, 16).to(dtype)
    assert torch.equal(
        _backward(expanded, ids, 40, -1, dtype), _backward(expanded.contiguous(), ids.contiguous(), 40, -1, dtype)
    )


def test_the_gradient_is_float32_where_the_weight_takes_it():
    """512 ones on one row: a bfloat16 sum stops at 256."""
    weight = torch.randn(9, 4, dtype=torch.bfloat16).requires_grad_()
    weight.grad_dtype = torch.float32
    embedding(torch.full((512,), 2), weight).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.zeros(9, 4).index_fill_(0, torch.tensor([2]), 512.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    ids, grad = torch.randint(30, (450,)).square() // 10, torch.randn(450, 128).to(dtype)  # three threads' worth
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(_backward(grad, ids, 90, 0, torch.float32))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = torch.zeros(90, 128, dtype=torch.float64).index_add_(0, ids[ids != 0], grad[ids != 0].double())
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_sums_of_any_length_and_place(dtype):
    """Frequent ids, whose sums are cut into pieces, beside rare ones."""
    lengths = torch.tensor([1, 126, 2, 300, 0, 83, 128, 129, 1])
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)[torch.randperm(int(lengths.sum()))]
    grad = torch.randn(len(ids), 40).to(dtype)
    for padding_idx in (-1, 3):
        kept = ids != padding_idx
        exact = torch.zeros(12, 40, dtype=torch.float64).index_add_(0, ids[kept], grad[kept].double())
        torch.testing.assert_close(
            _backward(grad, ids, 12, padding_idx, torch.float32).double(), exact, rtol=1e-5, atol=1e-5
        )


def test_tied_with_the_head_and_over_micro_batches():
    """Both gradients of a tied weight are one tensor, and .grad adds up over calls; the weight itself stays as it was."""
    weight = torch.randn(60, 16)
    twins = [weight.clone().requires_grad_(), weight.double().requires_grad_()]
    for step in range(3):
        ids, targets = torch.randint(
            60, (2, 20), generator=torch.Generator(torch.get_default_device()).manual_seed(step)
        )
        linear_cross_entropy(embedding(ids, twins[0]), twins[0], targets).backward()
        F.cross_entropy(F.embedding(ids, twins[1]) @ twins[1].t(), targets).backward()
    torch.testing.assert_close(twins[0].grad.double(), twins[1].grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(twins[0], weight)


def test_large_gradients_are_zero_where_no_token_was():
    weight = torch.zeros(5000, 700, requires_grad=True)
    for _ in range(2):  # memory that was used and freed in between
        torch.full((5000, 700), 7.0)
        (grad,) = torch.autograd.grad(embedding(torch.tensor([1, 4999, 1]), weight).sum(), weight)
        assert grad.data_ptr() % 64 == 0
        expected = torch.zeros(5000, 700)
        expected[1], expected[4999] = 2.0, 1.0
        assert torch.equal(grad, expected)


def test_gradcheck_opcheck_compile_retain_graph():
    ids, weight = torch.tensor([[1, 0, 1], [4, 1, 2]]), torch.randn(6, 3)
    wanted = weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: embedding(ids, w, padding_idx=5), wanted)
    for dtype in (*DTYPES, torch.float64):
        check_opcheck(_forward, ids, weight.to(dtype))
        check_opcheck(_backward, torch.randn(2, 3, 3).to(dtype), ids, 6, 2, weight.dtype)
    weight.requires_grad_()
    check_compiles(lambda i, w: embedding(i, w, padding_idx=2), ids, weight)
    check_retain_graph(embedding, ids, weight)


@needs_native
def test_errors_name_the_values():
    weight = torch.randn(6, 3)
    with pytest.raises(IndexError, match=r"id 6 of token 1 is not in \[0, 6\)"):
        embedding(torch.tensor([0, 6]), weight)
    with pytest.raises(IndexError, match="id -1"):
        embedding(torch.tensor([-1]), weight)
    with pytest.raises(RuntimeError, match=r"float32"):
        embedding(torch.tensor([0.0]), weight)
