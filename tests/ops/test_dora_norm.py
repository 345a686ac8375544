"""dora_norm against float64: dtypes of weight and adapter, odd shapes, ranks, layouts, an adapter that cancels the weight."""

import pytest
import torch

from fastpt.ops import dora_norm
from fastpt.ops.dora_norm import _op, reference
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck

SCALE = 1.75


def make(out, width, rank):
    return torch.randn(out, width), torch.randn(rank, width) / max(rank, 1) ** 0.5, torch.randn(out, rank)


def fused(*tensors):
    return dora_norm(*tensors, SCALE)


def eager(*tensors):
    return reference(*tensors, SCALE)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 5, 2), (70, 129, 8), (130, 300, 16), (33, 64, 20), (5, 700, 80), (0, 4, 2), (4, 0, 2), (4, 6, 0)],
)
def test_not_worse_than_eager(shape, dtype):
    check_against_eager(fused, eager, make(*shape), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_lower_weight(dtype):
    weight, a, b = make(40, 260, 16)
    weight = weight.to(dtype)
    exact = reference(weight.double(), a.double(), b.double(), SCALE)
    error = (fused(weight, a, b).double() - exact).abs().max()
    assert (
        error <= 2 * (eager(weight, a, b).double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    )


def test_an_adapter_that_cancels_the_weight():
    """|W|² + 2s <W, BA> + s² |BA|² would leave 1e-3 of rounding here."""
    _, a, b = make(40, 260, 16)
    left = 1e-3 * torch.randn(40, 260, dtype=torch.float64)
    weight = (left - SCALE * b.double() @ a.double()).float()
    exact = reference(weight.double(), a.double(), b.double(), SCALE)
    torch.testing.assert_close(fused(weight, a, b).double(), exact, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    weight, a, b = make(33, 72, 8)
    for w in (weight.t().contiguous().t(), torch.cat((weight, weight), 1)[:, 72:], weight[:1].expand(33, 72)):
        check_against_eager(fused, eager, (w, a.t().contiguous().t(), torch.cat((b, b), 1)[:, 8:]), dtype=dtype)


def test_same_bits_for_any_number_of_threads():
    tensors, threads, found = make(300, 200, 16), torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(fused(*tensors))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_it_is_a_constant_opcheck_compile():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check_opcheck(_op, *(t.to(dtype) for t in make(6, 10, 4)), SCALE)
    tensors = [t.requires_grad_() for t in make(6, 10, 4)]
    assert not fused(*tensors).requires_grad
    magnitude = torch.randn(6).requires_grad_()
    check_compiles(lambda m, *rest: m / fused(*rest), magnitude, *(t.detach() for t in tensors))


def test_errors_name_the_values():
    weight, a, b = make(4, 6, 2)
    for wrong in ((weight, a, b.t()), (weight.t(), a, b), (weight, a.double(), b), (weight[0], a, b)):
        with pytest.raises(RuntimeError, match=r"dora_norm: weight, lora_a and lora_b are \[.*must be \[O, D\]"):
            fused(*wrong)
