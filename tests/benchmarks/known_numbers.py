"""Known answers of the interpreter as set right, run by test_gpu_evidence with the interpreter on (pytest --triton)."""

import pytest
import torch
import triton
import triton.language as tl

FACTOR = 2.0


@triton.jit
def adds_bf16(x, y, out, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(out + at, tl.load(x + at) + tl.load(y + at))


@triton.jit
def rounds(x, out, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def reduces(x, out, B: tl.constexpr):
    block = tl.load(x + tl.arange(0, B))
    tl.store(out, tl.sum(block, 0))
    tl.store(out + 1, tl.max(block, 0))
    tl.store(out + 2, tl.min(block, 0))
    tl.store(out + 3, tl.argmax(block, 0))


@triton.jit
def sums_columns(x, out, whole, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    block = tl.load(x + tl.arange(0, ROWS)[:, None] * COLUMNS + column[None, :])
    tl.store(out + column[None, :], tl.sum(block, 0, keep_dims=True))
    tl.store(whole, tl.sum(block))


@triton.jit
def takes_the_smaller(x, y, out, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(out + at, min(tl.load(x + at), tl.load(y + at)))


@triton.jit
def both_hold(x, y, out, B: tl.constexpr):
    at = tl.arange(0, B)
    both = (tl.load(x + at) > 0) and (tl.load(y + at) > 0)
    tl.store(out + at, tl.where(both, 1.0, 0.0))


@triton.jit
def branches_on_a_block(x, out, B: tl.constexpr):
    if tl.load(x + tl.arange(0, B)) > 0:
        tl.store(out, 1.0)


@triton.jit
def breaks(x, out, n):
    for i in range(n):
        if i == 2:
            break
        tl.store(out + i, 1.0)


@triton.jit
def reads_a_global(x, out):
    tl.store(out, tl.load(x) * FACTOR)


@triton.jit
def converts_a_stride(x, out, stride):
    tl.store(out, tl.load(x + stride.to(tl.int64)))


@triton.jit
def takes_a_float(out, eps):
    tl.store(out, eps.to(tl.float32))


def test_bf16_is_added_in_float32_and_rounded_to_nearest():
    x, y = (torch.randn(256).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    adds_bf16[(1,)](x, y, out, 256)
    assert torch.equal(out, x + y)
    numbers, rounded = torch.randn(4096), torch.empty(4096, dtype=torch.bfloat16)
    rounds[(1,)](numbers, rounded, 4096)
    assert torch.equal(rounded, numbers.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype):
    x, out = torch.randn(128).to(dtype), torch.empty(4)
    reduces[(1,)](x, out, 128)
    assert out[1:].tolist() == [x.max().item(), x.min().item(), x.argmax().item()]
    assert abs(out[0] - x.float().sum()) <= (1e-4 if dtype == torch.float32 else 0.05 * out[0].abs())


def test_sums_are_added_in_a_tree():
    """One after the other, 4096 times 0.1 loses 6e-5 of the sum, and ones after 2^24 are all lost."""
    x, out, whole = torch.full((4096, 4), 0.1), torch.empty(4), torch.empty(1)
    x[:, 3] = 1.0
    x[0, 3] = 2.0**24
    sums_columns[(1,)](x, out, whole, 4096, 4)
    assert torch.equal(out[:3], torch.full((3,), 4096 * torch.tensor(0.1).item()))
    assert abs(out[3].item() - (2**24 + 4095)) <= 2 + 12  # half an ulp at every level
    assert whole.item() == pytest.approx(x.double().sum().item(), rel=1e-6)


def test_python_words_work_element_by_element():
    x, y, out = torch.randn(64), torch.randn(64), torch.empty(64)
    takes_the_smaller[(1,)](x, y, out, 64)
    assert torch.equal(out, torch.minimum(x, y))
    both_hold[(1,)](x, y, out, 64)
    assert torch.equal(out, ((x > 0) & (y > 0)).float())


@pytest.mark.parametrize(
    ("kernel", "arguments", "words"),
    [
        (branches_on_a_block, (64,), "more than one value"),
        (breaks, (4,), "no Break"),
        (reads_a_global, (), "global FACTOR"),
        (converts_a_stride, (1,), "to"),
    ],
)
def test_what_the_compiler_refuses_is_refused(kernel, arguments, words):
    with pytest.raises(Exception, match=words):
        kernel[(1,)](torch.randn(64), torch.empty(64), *arguments)


def test_a_float_argument_is_a_float32():
    out = torch.empty(1, dtype=torch.float64)
    takes_a_float[(1,)](out, 0.1)
    assert out.item() == torch.tensor(0.1).item()
