"""Known answers of the meter, run by test_gpu_evidence in a process with the interpreter on (pytest --triton)."""

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.evidence.traffic import Meter, nbytes


@triton.jit
def copies(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, at < n), at < n)


@triton.jit
def reads_twice(x, w, y, n, B: tl.constexpr):
    row = tl.program_id(0) * n
    at = tl.arange(0, B)
    total = tl.load(x + row + at, at < n) + tl.load(x + row + at, at < n) + tl.load(w + at, at < n)
    tl.store(y + row + at, total, at < n)


@triton.jit
def transposes(x, y, n, B: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, B)
    tl.store(y + row * n + at, tl.load(x + at * n + row))


@triton.jit
def multiplies(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left, right = tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(left, right, input_precision="ieee"))


@triton.jit
def adds_atomically(x, total, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(total, tl.sum(tl.load(x + at, at < n, 0.0), 0))


@triton.jit
def all_write_one_row(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + tl.program_id(0) * B + at) + tl.load(y + at))


@triton.jit
def writes_what_the_one_before_read(y, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(y + B + at))


@triton.jit
def runs_over(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at))


def metered(kernel, grid, *args, gemms=()):
    with Meter(gemms) as meter:
        kernel[grid](*args)
    return meter.traffic(), meter.by_tensor


def test_a_copy():
    x, y = torch.randn(1000), torch.empty(1000)
    traffic, _ = metered(copies, (8,), x, y, 1000, 128)
    assert (traffic.loaded, traffic.stored, traffic.moved_once) == (4000, 4000, 8000)
    assert (traffic.launches, traffic.hazards, traffic.host_syncs) == (1, {}, 0)
    assert torch.equal(x, y)


def test_what_is_read_again_counts_again_but_not_for_an_ideal_cache():
    x, w, y = torch.randn(64, 100), torch.randn(100), torch.empty(64, 100)
    traffic, by_tensor = metered(reads_twice, (64,), x, w, y, 100, 128)
    assert by_tensor["x"]["load"] == 2 * nbytes(x)
    assert by_tensor["w"]["load"] == 64 * nbytes(w)
    assert traffic.moved_once == nbytes(x, w, y)


def test_strided_elements_are_each_counted_once():
    x, y = torch.randn(64, 64), torch.empty(64, 64)
    traffic, _ = metered(transposes, (64,), x, y, 64, 64)
    assert traffic.moved == traffic.moved_once == nbytes(x, y)
    assert torch.equal(x.T, y)


def test_dots_and_atomics():
    a, b, c = torch.randn(32, 16), torch.randn(16, 64), torch.empty(32, 64)
    traffic, _ = metered(multiplies, (1,), a, b, c, 32, 64, 16)
    assert (traffic.dot_flops, traffic.loaded) == (2 * 32 * 64 * 16, nbytes(a, b))
    for gemms, read in (((), 3), (("multiplies",), 1), (("copies",), 3)):  # three tiles of the same operands
        traffic, _ = metered(multiplies, (3,), a, b, c, 32, 64, 16, gemms=gemms)
        assert traffic.moved == read * nbytes(a, b) + 3 * nbytes(c)
        assert traffic.moved_by_tile == 3 * nbytes(a, b, c)
    traffic, _ = metered(adds_atomically, (8,), torch.randn(1000), torch.zeros(1), 1000, 128)
    assert traffic.atomic == 32
    assert traffic.moved == 4000 + 2 * 32


def test_races_between_programs_are_found():
    traffic, _ = metered(all_write_one_row, (4,), torch.randn(4, 128), torch.zeros(128), 128)
    assert traffic.hazards == {"ww": 384, "rw": 384}
    traffic, _ = metered(writes_what_the_one_before_read, (4,), torch.zeros(5, 128), 128)
    assert traffic.hazards == {"wr": 384}


def test_lanes_outside_stop_the_kernel():
    with pytest.raises(Exception, match="28 lanes of a load in runs_over"):
        metered(runs_over, (1,), torch.randn(100), torch.empty(128), 128)


def test_torch_ops_memory_and_waits():
    a, b = torch.randn(64, 32), torch.randn(32, 128)
    with Meter() as meter:
        product = a @ b
        turned = product.t().contiguous()
        del product
        scratch = torch.empty(1 << 20)
        del scratch
        turned.sum().item()
    traffic, size = meter.traffic(), 64 * 128 * 4
    assert traffic.torch_read == nbytes(a, b) + 2 * size
    assert traffic.torch_written == 2 * size + 4
    assert traffic.torch_flops == 2 * 64 * 32 * 128
    assert (traffic.torch_launches, traffic.host_syncs) == (3, 1)
    assert traffic.peak_extra == size + (4 << 20)


@pytest.mark.parametrize("beta", [0, 1])
def test_an_accumulator_is_read_only_where_it_counts(beta):
    total, a, b = torch.zeros(64, 128), torch.randn(64, 32), torch.randn(32, 128)
    with Meter() as meter:
        total.addmm_(a, b, beta=beta)
    assert meter.traffic().torch_read == nbytes(a, b) + beta * nbytes(total)
    assert meter.traffic().torch_written == nbytes(total)


def test_saved_for_backward_is_old_or_new():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            sums = x.sum(1)
            ctx.save_for_backward(x, sums)
            return x * sums[:, None]

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.randn(64, 128, requires_grad=True)
    with Meter() as meter:
        scaled = Scaled.apply(x)
    assert meter.saved_beyond([scaled]) == 256
    with Meter() as kept:
        root = x.sqrt()  # keeps its own result
    assert (kept.traffic().saved_new, kept.saved_beyond([root])) == (nbytes(x), 0)
    assert (meter.traffic().saved, meter.traffic().saved_new) == (nbytes(x) + 256, 256)
