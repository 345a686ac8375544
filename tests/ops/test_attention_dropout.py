"""attention with dropout of its weights: against the definition in float64, its share and independence, seeds, threads."""

import pytest
import torch

from fastpt.ops import attention
from fastpt.ops.attention import _dropout_backward, _dropout_forward, _sequences, _visible
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    run_with_grads,
)

SEED = 2**61 + 77


def cu(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def leaves(tokens, heads_q, heads_kv, dim, dtype=torch.float32):
    shapes = (tokens, heads_q, dim), (tokens, heads_kv, dim), (tokens, heads_kv, dim)
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def kept_factors(tokens, heads, keys, p):
    """What the op multiplies its weights by, read off values that are one-hot: [T, H, keys]."""
    q, k = torch.zeros(tokens, heads, keys), torch.zeros(keys, heads, keys)
    v = torch.eye(keys)[:, None].expand(keys, heads, keys)
    lengths = {"cu_seqlens_q": cu(tokens), "cu_seqlens_k": cu(keys)}
    return attention(q, k, v, causal=False, dropout_p=p, seed=SEED, **lengths) * keys


def eager(q, k, v, lengths, p, **options):
    """softmax, dropout by given factors, product: as transformers' eager attention, one sequence at a time."""
    group, parts = q.shape[1] // k.shape[1], []
    longest = int(lengths.diff().max())
    drawn = _factors(q.shape[0], q.shape[1], longest, p)
    for rows, _ in _sequences(q, k, lengths, None):
        query = q[rows].transpose(0, 1)
        key, value = (x[rows].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        scores = (query @ key.mT) * q.shape[2] ** -0.5
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        seen = _visible(q[rows], k[rows], options["causal"], options.get("window"))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        kept = drawn[rows, :, : seen.shape[1]].transpose(0, 1).to(q.dtype)
        parts.append((weights * kept @ value).transpose(0, 1))
    return torch.cat(parts)


def _factors(tokens, heads, keys, p):
    from fastpt.ops._dropout import factors

    return factors(tokens * heads, keys, p, SEED, torch.device("cpu")).view(tokens, heads, keys)


CASES = {
    "bidirectional": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "symmetric window": {"causal": False, "window": 5},
    "softcap": {"causal": False, "softcap": 2.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_not_worse_than_eager(case, dtype):
    options, lengths = CASES[case], cu(20, 1, 33, 5)
    check_against_eager(
        lambda *x: attention(*x, cu_seqlens_q=lengths, dropout_p=0.3, seed=SEED, **options),
        lambda *x: eager(*x, lengths, 0.3, **options),
        leaves(59, 6, 3, 24), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 2, 8), (33, 2, 5), (17, 2, 64), (130, 1, 80)])
def test_shapes(tokens, heads, dim, dtype):
    check_against_eager(
        lambda *x: attention(*x, causal=False, dropout_p=0.2, seed=SEED),
        lambda *x: eager(*x, cu(tokens), 0.2, causal=False),
        leaves(tokens, heads, heads, dim), dtype=dtype,
    )  # fmt: skip


def test_the_share_that_is_dropped_and_its_independence():
    p = 0.2
    found = kept_factors(96, 4, 128, p)
    torch.testing.assert_close(found, _factors(96, 4, 128, p).float(), rtol=1e-5, atol=1e-6)
    dropped = (found == 0).float()
    assert abs(dropped.mean() - p) < 0.005
    deviation = (p * (1 - p)) ** 0.5
    for axes in ((0, 1), (0, 2), (1, 2)):
        share = dropped.mean(axes)
        count = dropped.numel() / share.numel()
        assert (share - p).abs().max() < 4.5 * deviation / count**0.5
    centred = (dropped - p) / deviation  # neighbours along each axis are unrelated
    for axis in range(3):
        a, b = centred.narrow(axis, 1, centred.shape[axis] - 1), centred.narrow(axis, 0, centred.shape[axis] - 1)
        assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5


def test_all_dropped_and_none_dropped():
    q, k, v = leaves(9, 2, 2, 8)
    out = attention(q, k, v, causal=False, dropout_p=1.0, seed=SEED)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))
    torch.testing.assert_close(
        attention(q, k, v, causal=False, dropout_p=1e-12, seed=SEED), attention(q, k, v, causal=False)
    )


def test_torchs_generator_gives_the_seed():
    qkv = [x.detach() for x in leaves(9, 2, 2, 8)]
    torch.manual_seed(4)
    first, second = (attention(*qkv, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(attention(*qkv, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_results_do_not_depend_on_the_thread_count(request):
    if request.config.getoption("--triton"):
        pytest.skip("threads are the CPU kernels' matter")
    threads, found, lengths = torch.get_num_threads(), [], cu(*range(1, 24))
    qkv = leaves(int(lengths[-1]), 4, 2, 32)
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outputs, grads = run_with_grads(
                lambda *x: attention(*x, cu_seqlens_q=lengths, causal=False, dropout_p=0.3, seed=SEED), qkv, None, None
            )
            found.append(outputs + grads)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_gradcheck_opcheck_compile_retain_graph():
    lengths = cu(3, 2)

    def fused(*x):
        return attention(*x, cu_seqlens_q=lengths, dropout_p=0.4, seed=SEED)

    assert torch.autograd.gradcheck(fused, leaves(5, 2, 1, 3, torch.float64))
    options = lengths, None, True, None, None, 0.5, 0.4, SEED
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (x.detach() for x in leaves(5, 2, 1, 4, dtype))
        out, lse = _dropout_forward(q, k, v, *options)
        check_opcheck(_dropout_forward, q, k, v, *options)
        check_opcheck(_dropout_backward, out, q, k, v, out, lse, *options)
    check_compiles(fused, *leaves(5, 2, 1, 4))
    check_retain_graph(fused, *leaves(5, 2, 1, 4))


def test_wrong_inputs_are_named():
    qkv = leaves(5, 1, 1, 4)
    with pytest.raises(RuntimeError, match="dropout_p is -1"):
        attention(*qkv, dropout_p=-1.0)
    qkv = [x.double() for x in qkv]  # the reference's: a GPU kernel cannot raise for values that it alone sees
    with pytest.raises(RuntimeError, match="rise from 0 to the 5"):
        attention(*qkv, cu_seqlens_q=cu(2, 2), dropout_p=0.1)
