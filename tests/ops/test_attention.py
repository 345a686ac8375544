"""attention against float64 truth: masks, packs, groups, layouts, gradients, and what must never leak between sequences."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastpt.ops import attention
from fastpt.ops.attention import _backward, _forward, _sinks_backward
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph


def eager(
    q, k, v, sinks=None, *, cu_seqlens_q=None, cu_seqlens_k=None, causal=True, window=None, softcap=None, scale=None
):
    """What transformers runs on each sequence: torch's SDPA with a mask; with softcap or sinks, its eager attention."""
    cu_q = [0, len(q)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    parts = [torch.zeros_like(q[:0])]
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        query = q[q0:q1].transpose(0, 1)
        key, value = (x[k0:k1].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        distance = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0) + (q1 - q0)
        seen = distance <= 0 if causal else distance < k1 - k0 + q1 - q0
        if window:
            seen = seen & (distance.abs() < window)
        if softcap or sinks is not None:
            scores = query @ key.transpose(1, 2) * scale
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            scores = scores.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, q1 - q0, 1)], -1)
            weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
            out = weights[..., : k1 - k0] @ value
        else:
            heads = query[None], key[None], value[None]
            out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale)[0]
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(tokens_q: int, heads_q: int, heads_kv: int, dim: int, *, tokens_k: int | None = None, dtype=torch.float32):
    tokens_k = tokens_q if tokens_k is None else tokens_k
    shapes = (tokens_q, heads_q, dim), (tokens_k, heads_kv, dim), (tokens_k, heads_kv, dim)
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def check(qkv, *, dtype, **options):
    check_against_eager(lambda *x: attention(*x, **options), lambda *x: eager(*x, **options), qkv, dtype=dtype)


MASKS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 7},
    "wide window": {"window": 150},
    "window of two": {"window": 2},
    "symmetric window": {"causal": False, "window": 33},
    "softcap": {"softcap": 1.5},
    "softcap, window, scale": {"softcap": 2.0, "window": 20, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_on_a_pack(mask, dtype):
    check(inputs(232, 6, 2, 32), dtype=dtype, cu_seqlens_q=cu(150, 1, 0, 64, 17), **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads_q", "heads_kv", "dim"),
    [(2, 1, 1, 8), (3, 2, 2, 5), (65, 3, 1, 1), (129, 4, 1, 80), (200, 9, 3, 64), (40, 2, 2, 128), (70, 2, 1, 160)],
)
def test_shapes(tokens, heads_q, heads_kv, dim, dtype):
    check(inputs(tokens, heads_q, heads_kv, dim), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "window"), [(1, None), (100, 1)])
def test_a_single_visible_key_is_copied(tokens, window, dtype):
    """Exact in forward and for dv; dq and dk are 0 = dp - delta, two sums of the same products in different order."""
    qkv = inputs(tokens, 4, 2, 64, dtype=dtype)
    out = attention(*qkv, window=window)
    dq, dk, dv = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(out, qkv[2].repeat_interleave(2, 1))
    assert torch.equal(dv, torch.full_like(dv, 2.0))
    assert max(dq.abs().max(), dk.abs().max()) < 64 * 5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 9}])
def test_fewer_queries_than_keys(options, dtype):
    qkv = inputs(1 + 70 + 30, 4, 2, 16, tokens_k=150 + 70 + 200)
    check(qkv, dtype=dtype, cu_seqlens_q=cu(1, 70, 30), cu_seqlens_k=cu(150, 70, 200), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [None, [0], [0, 0, 0]])
def test_empty(bounds, dtype):
    qkv = inputs(0, 4, 2, 16, dtype=dtype)
    out = attention(*qkv, cu_seqlens_q=None if bounds is None else torch.tensor(bounds, dtype=torch.int32))
    out.sum().backward()
    assert out.shape == (0, 4, 16)
    assert all(x.grad.shape == x.shape for x in qkv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_nothing_give_zeros(dtype):
    qkv = inputs(100 + 5, 4, 2, 16, tokens_k=30, dtype=dtype)  # the first 70 stand before the keys; 5 have none at all
    out = attention(*qkv, cu_seqlens_q=cu(100, 5), cu_seqlens_k=cu(30, 0))
    dq, dk, dv = torch.autograd.grad(out, qkv, torch.randn_like(out))
    blind = torch.cat([torch.arange(70), torch.arange(100, 105)])
    assert out[blind].eq(0).all()
    assert dq[blind].eq(0).all()
    seeing = [qkv[0][70:100].detach().requires_grad_(), *qkv[1:]]
    torch.testing.assert_close(out[70:100], attention(*seeing), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert all(x.isfinite().all() and x.ne(0).any() for x in (dk, dv))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
def test_sinks(mask, dtype):
    """Above all scores, below them and between; lengths 100 and 30: the first 70 see no key, nor do the last 5."""
    options = {"cu_seqlens_q": cu(100, 1, 0, 49, 5), "cu_seqlens_k": cu(30, 1, 0, 120, 0), **MASKS[mask]}
    sinks = torch.tensor([0.5, -3.0, 12.0, 0.0]).requires_grad_()
    given = [*inputs(155, 4, 2, 32, tokens_k=151), sinks]
    check_against_eager(
        lambda *x: attention(*x[:3], sinks=x[3], **options), lambda *x: eager(*x, **options), given, dtype=dtype
    )
    q, k, v, sinks = (x.detach().to(dtype) for x in given)
    tail = None, MASKS[mask].get("softcap"), 0.3
    out, lse = _forward(q[:5], k[:0], v[:0], cu(5), cu(0), True, *tail, sinks=sinks.float())
    assert out.eq(0).all()
    torch.testing.assert_close(lse, sinks.float().expand(5, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_other_layouts_and_dtypes(dtype):
    """Many tokens, an odd head size, strided sinks in float32 beside q in bfloat16; frozen ones cost and get nothing."""
    qkv = inputs(170, 3, 1, 5, dtype=dtype)
    strided = torch.randn(3, 2)[:, 0].requires_grad_()
    out = attention(*qkv, sinks=strided)
    grad = torch.randn_like(out)
    first = torch.autograd.grad(out, [*qkv, strided], grad, retain_graph=True)
    second = torch.autograd.grad(attention(*qkv, sinks=strided.detach()), qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=False))
    assert torch.equal(first[3], torch.autograd.grad(out, strided, grad)[0])
    wide = [x.detach().double().requires_grad_() for x in (*qkv, strided)]
    expected = torch.autograd.grad(eager(*wide), wide, grad.double())
    torch.testing.assert_close(first[3], expected[3].float(), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def test_no_tokens_leave_sinks_without_gradient():
    sinks = torch.randn(4, requires_grad=True)
    attention(*inputs(0, 4, 2, 16), sinks=sinks).sum().backward()
    assert sinks.grad.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, request):
    tokens = 90 if request.config.getoption("--triton") else 150
    projected = torch.randn(tokens, 8, 24).to(dtype)
    q, k, v = (x.requires_grad_() for x in projected.split((4, 2, 2), dim=1))
    check([q, k, v], dtype=dtype)  # one projection's pieces
    heads_first = [torch.randn(h, tokens, 24).to(dtype).transpose(0, 1).requires_grad_() for h in (4, 2, 2)]
    check(heads_first, dtype=dtype)
    last_strided = [torch.randn(tokens, 24, h).to(dtype).transpose(1, 2).requires_grad_() for h in (4, 2, 2)]
    check(last_strided, dtype=dtype)
    expanded = [torch.randn(tokens, 1, 24).to(dtype).expand(-1, h, -1).requires_grad_() for h in (4, 2, 2)]
    check(expanded, dtype=dtype)
    out = attention(q, k, v)  # an incoming gradient of stride 0, as sum() makes it
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    q, k, v = inputs(90, 2, 1, 32)
    check([(q.detach() * 30).requires_grad_(), k, v], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_and_fall_along_the_keys(dtype):
    """The running maximum is raised by a later panel of keys, or is far above all that follow."""
    q, k, v = inputs(300, 2, 1, 32)
    for slope in (torch.linspace(0, 30, 300), torch.linspace(30, 0, 300)):
        rising = q.detach().abs(), k.detach().abs() * slope[:, None, None] / 20, v
        check([x.detach().requires_grad_() for x in rising], dtype=dtype, causal=False)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_subsets_of_requires_grad(wanted):
    qkv = [x.detach().requires_grad_(w) for x, w in zip(inputs(70, 4, 2, 16), wanted, strict=True)]
    check(qkv, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_and_determinism(threads, dtype, request):
    if threads > 1 and request.config.getoption("--triton"):
        pytest.skip("threads are the CPU kernels' matter")
    qkv = inputs(200, 3, 1, 16)  # one key head: backward splits it among the threads and adds up
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(qkv, dtype=dtype)
        narrow = [x.detach().to(dtype).requires_grad_() for x in qkv]
        first, second = (torch.autograd.grad(attention(*narrow).square().sum(), narrow) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False, "window": 50}])
def test_packing_changes_no_bit_and_leaks_nothing(options, dtype):
    before, n, after = 37, 90, 21
    q, k, v = inputs(before + n + after, 6, 2, 32, dtype=dtype)
    packed = [x.detach().clone() for x in (q, k, v)]
    for x in packed:  # the neighbours are poison
        x[:before] = float("nan")
        x[before + n :] = float("inf")
    alone = [x.detach()[before : before + n].clone().requires_grad_() for x in (q, k, v)]
    packed = [x.requires_grad_() for x in packed]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = attention(*alone, **options)
        among = attention(*packed, cu_seqlens_q=cu(before, n, after), **options)
        grad = torch.randn_like(among)
        expected = torch.autograd.grad(single, alone, grad[before : before + n])
        got = torch.autograd.grad(among, packed, grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(among[before : before + n], single)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a[before : before + n], b)


def test_gradcheck_opcheck_compile_retain_graph():
    wide = inputs(9, 2, 1, 3, dtype=torch.float64)
    for options in ({}, {"window": 3, "softcap": 2.0}, {"causal": False, "window": 2}):
        assert torch.autograd.gradcheck(lambda *x, o=options: attention(*x, cu_seqlens_q=cu(3, 0, 6), **o), wide)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x[:3], cu_seqlens_q=cu(3, 6), sinks=x[3]), [*wide, sinks])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain = [x.detach() for x in inputs(20, 4, 2, 8, dtype=dtype)]
        options = (cu(5, 15), None, True, 9, None, 0.5)
        check_opcheck(_forward, *plain, *options)
        check_opcheck(_backward, plain[0] + 1, *plain, *_forward(*plain, *options), *options)
        sinks = torch.randn(4, dtype=torch.promote_types(dtype, torch.float32))
        check_opcheck(_forward, *plain, *options, sinks=sinks)
        check_opcheck(_sinks_backward, plain[0] + 1, *_forward(*plain, *options, sinks=sinks), sinks)
    wanted = inputs(20, 4, 2, 8)
    check_compiles(attention, *wanted)
    check_compiles(lambda *x: attention(*x, cu_seqlens_q=cu_pack, cu_seqlens_k=cu_pack, window=4), *wanted)
    check_compiles(lambda *x: attention(*x[:3], sinks=x[3]), *wanted, torch.randn(4, requires_grad=True))
    check_retain_graph(attention, *wanted)


cu_pack = cu(5, 15)


def test_half_precision():
    q, k, v = (x.detach() for x in inputs(20, 4, 2, 8))
    torch.testing.assert_close(attention(q.half(), k.half(), v.half()).float(), attention(q, k, v), rtol=0, atol=5e-3)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """Some of the above in a process whose kernels are held to a lower instruction set."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "test_masks_on_a_pack and window and not softcap"],
        env={**os.environ, "FASTPT_CPU_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:]


def test_wrong_cu_seqlens_reach_nothing_outside(request):
    """A GPU kernel cannot raise for values that it alone sees; it holds them within the tensors."""
    if not request.config.getoption("--triton"):
        pytest.skip("the other kernels raise")
    around = torch.full((30, 2, 8), float("nan"))
    around[10:20] = torch.randn(10, 2, 8)
    inside = around[10:20].requires_grad_()
    for bad in ([0, 25], [-4, 10]):
        out = attention(inside, inside, inside, cu_seqlens_q=torch.tensor(bad, dtype=torch.int32))
        assert torch.equal(out, attention(inside, inside, inside))
        (grad,) = torch.autograd.grad(out, inside, torch.ones_like(out))
        assert grad.isfinite().all()


def test_errors_name_the_shapes(request):
    q, k, v = (x.detach() for x in inputs(10, 4, 2, 8))
    with pytest.raises(RuntimeError, match=r"q \[10, 4, 8\].*k \[10, 3, 8\].*multiple"):
        attention(q, torch.randn(10, 3, 8), torch.randn(10, 3, 8))
    with pytest.raises(RuntimeError, match="one dtype"):
        attention(q, k.double(), v.double())
    with pytest.raises(RuntimeError, match="cu_seqlens_k without cu_seqlens_q"):
        attention(q, k, v, cu_seqlens_k=cu(10))
    with pytest.raises(RuntimeError, match="window is 0"):
        attention(q, k, v, window=0)
    with pytest.raises(RuntimeError, match=r"sinks is \[2\]; it must be \[4\]"):
        attention(q, k, v, sinks=torch.randn(2))
    with pytest.raises(RuntimeError, match="beside sinks"):
        attention(q, k, v, sinks=torch.randn(4), dropout_p=0.1)
    with pytest.raises(RuntimeError, match="softcap is -1"):
        attention(q, k, v, softcap=-1.0)
    with pytest.raises(RuntimeError, match=r"scale is -0\.5"):
        attention(q, k, v, scale=-0.5)
    for dtype in (torch.float32, torch.float64):  # the kernel and the reference
        x = [t.to(dtype) for t in (q, k, v)]
        sees_values = dtype == torch.float64 or not request.config.getoption("--triton")
        for bad in ([0, 9], [1, 10], [0, 7, 5, 10]) if sees_values else ():
            with pytest.raises(RuntimeError, match=r"cu_seqlens_q is .* the 10 tokens"):
                attention(*x, cu_seqlens_q=torch.tensor(bad, dtype=torch.int32))
        with pytest.raises(RuntimeError, match="cu_seqlens_q has 2 sequences, cu_seqlens_k 1"):
            attention(*x, cu_seqlens_q=cu(3, 7), cu_seqlens_k=cu(10))
