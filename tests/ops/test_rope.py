"""rope against float64 truth: halves and interleaved, partial, positions, strided inputs, the exact transpose."""

import pytest
import torch

from fastpt.ops import rope
from fastpt.ops.rope import _rope, reference
from tests.helpers import (
    DTYPES,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    needs_native,
    run_with_grads,
)


def heads(T, Hq, Hkv, K, dtype=torch.float32):
    return [torch.randn(T, H, K).to(dtype).requires_grad_() for H in (Hq, Hkv)]


def tables(P, R, dtype=torch.float32):
    """As a model makes them: equal halves, here with an attention scaling of 1.3."""
    angles = torch.arange(P)[:, None] / 10000 ** (torch.arange(0, R, 2) / R)
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * 1.3).to(dtype), (angles.sin() * 1.3).to(dtype)


def check(q, k, cos, sin, dtype, **settings):
    check_against_eager(
        lambda q, k: rope(q, k, cos.to(q.dtype), sin.to(q.dtype), **settings),
        lambda q, k: reference(q, k, cos.to(q.dtype), sin.to(q.dtype), **settings),
        [q, k], dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "Hq", "Hkv", "K", "R"),
    [(1, 1, 1, 2, 2), (5, 9, 3, 64, 64), (3, 4, 1, 80, 32), (7, 2, 2, 6, 6), (0, 2, 1, 8, 8), (70, 3, 1, 34, 34)],
)
def test_not_worse_than_eager(T, Hq, Hkv, K, R, dtype, interleaved):
    check(*heads(T, Hq, Hkv, K), *(t.to(dtype) for t in tables(T + 2, R)), dtype, interleaved=interleaved)


def test_is_what_llama_computes():
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    (q, k), (cos, sin) = heads(6, 4, 2, 16), tables(6, 16)
    expected = modeling.apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    for ours, theirs in zip(rope(q, k, cos, sin), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0])


def test_is_what_cohere_computes():
    modeling = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    (q, k), (cos, sin) = heads(6, 4, 2, 16), (t[:, :8].repeat_interleave(2, -1) for t in tables(6, 16))
    expected = modeling.apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None], unsqueeze_dim=2)
    for ours, theirs in zip(rope(q, k, cos, sin, interleaved=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_the_transpose_whatever_the_tables(dtype, interleaved):
    # Random tables: halves that differ, which no rotation would have.
    cos, sin = torch.randn(5, 6).to(dtype), torch.randn(5, 6).to(dtype)
    check(*heads(5, 3, 1, 8), cos, sin, dtype, interleaved=interleaved)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_positions_pick_rows(dtype):
    (q, k), (cos, sin) = heads(4, 3, 1, 8), tables(9, 8, dtype)
    check(q, k, cos, sin, dtype, position_ids=torch.tensor([8, 0, 3, 3]))
    check(q, k, cos, sin, dtype, position_ids=torch.tensor([2, 0, 1, 1], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_strided_and_expanded_inputs(dtype):
    packed = torch.randn(7, 6, 16).to(dtype)  # q, k and v of one projection
    views = [packed[:, :4], packed[:, 4:5].expand(7, 3, 16)]
    cos, sin = tables(14, 16, dtype)
    every_other, one_row = cos[::2], sin[:1].expand(7, 16)
    outputs = rope(*views, every_other, one_row)
    expected = rope(*(v.contiguous() for v in views), every_other.contiguous(), one_row.contiguous())
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(outputs, expected, strict=True))
    check(packed.permute(2, 1, 0).requires_grad_(), packed.permute(2, 1, 0)[:, :2].requires_grad_(),
          *(t[:, :6].contiguous() for t in tables(16, 6, dtype)), dtype)  # fmt: skip


def test_tables_in_another_dtype():
    (q, k), (cos, sin) = heads(5, 2, 1, 16, torch.bfloat16), tables(5, 16)
    exact = reference(q.double(), k.double(), cos.double(), sin.double())
    for tables_dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        got = rope(q, k, cos.to(tables_dtype), sin.to(tables_dtype))
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1.6e-2, atol=1e-2)
        assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(rope(q, k, cos, sin)[0].double(), exact[0], rtol=2**-8, atol=1e-6)  # one rounding


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_subsets_of_requires_grad_and_of_outputs(wanted):
    inputs = [v.detach().requires_grad_(w) for v, w in zip(heads(4, 3, 1, 8), wanted, strict=True)]
    check(*inputs, *tables(4, 8), torch.float32)
    index = wanted.index(True)
    rope(*inputs, *tables(4, 8))[index].sum().backward()
    assert inputs[index].grad is not None


def test_gradcheck_opcheck_compile_retain_graph():
    positions = torch.tensor([8, 0, 3])
    for interleaved in (False, True):
        cos, sin = torch.randn(9, 6).double(), torch.randn(9, 6).double()
        doubles = heads(3, 2, 1, 8, torch.float64)
        assert torch.autograd.gradcheck(
            lambda q, k, cos=cos, sin=sin, i=interleaved: rope(q, k, cos, sin, position_ids=positions, interleaved=i),
            doubles,
        )
        for dtype in (torch.bfloat16, torch.float64):  # a native dtype and one that the reference serves
            plain = [v.detach().to(dtype) for v in (*doubles, cos, sin)]
            check_opcheck(_rope, *plain, None if interleaved else positions, interleaved, interleaved)
    wanted = heads(3, 2, 1, 8, torch.bfloat16)
    check_compiles(lambda q, k: rope(q, k, *tables(9, 8), position_ids=positions), *wanted)
    check_retain_graph(lambda q, k: rope(q, k, *tables(9, 8)), *wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    (q, k), (cos, sin) = heads(300, 3, 1, 16, dtype), tables(300, 16, dtype)
    alone = rope(q[200:201], k[200:201], cos[200:201], sin[200:201])
    for one, many in zip(alone, run_with_grads(rope, [q, k, cos, sin], None, None)[0], strict=True):
        assert torch.equal(one, many[200:201])


@needs_native
def test_wrong_shapes_are_named():
    (q, k), (cos, sin) = heads(4, 3, 1, 8), tables(3, 8)
    for error, arguments, settings in (
        ("4 tokens, but cos has 3 rows", (q, k, cos, sin), {}),
        (r"\[P, R\]", (q, k, *tables(4, 10)), {}),
        (r"\[T, Hkv, K\]", (q, k[:3], cos, sin), {}),
        (r"position_ids are \[1, 4\] for 4 tokens", (q, k, cos, sin), {"position_ids": torch.zeros(1, 4).long()}),
    ):
        with pytest.raises(RuntimeError, match=error):
            rope(*arguments, **settings)


@needs_native
@pytest.mark.parametrize("wrong", [3, -1])
def test_a_position_outside_the_tables_is_not_read(wrong, pytestconfig):
    (q, k), (cos, sin) = heads(4, 3, 1, 8), tables(3, 8)
    position_ids = torch.tensor([0, 1, wrong, 0])
    if not pytestconfig.getoption("--triton"):
        with pytest.raises(IndexError, match=rf"position_ids\[2\] is {wrong}"):
            rope(q, k, cos, sin, position_ids=position_ids)
        return
    for out in rope(q, k, cos, sin, position_ids=position_ids):  # a GPU can only stop for it by a sync
        assert out.isnan().any(-1).any(-1).tolist() == [False, False, True, False]
