"""Which kernels serve attention on a GPU: the choice for every architecture, and FlashAttention behind the op's arguments.

FlashAttention runs on GPUs only: here stand-ins with its signatures, made of the reference, take its place.
"""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastpt.ops import _attention_gpu as gpu
from fastpt.ops import _flash_attention as flash
from fastpt.ops import _sdpa as sdpa
from fastpt.ops._attention_choice import FLASH_ATTENTION, REFERENCE, SDPA, TRITON, Call, choose
from fastpt.ops.attention import reference, reference_backward
from tests.helpers import check_against_eager
from tests.ops.test_attention import eager

BF16 = torch.bfloat16
NOTHING = dict.fromkeys(FLASH_ATTENTION, "not installed")


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (Call(80, BF16, 64), "FlashAttention 2"),
        (Call(86, BF16, 128, window=True, softcap=True), "FlashAttention 2"),
        (Call(89, torch.float16, 256), "FlashAttention 2"),
        (Call(90, BF16, 128), "FlashAttention 3"),
        (Call(90, BF16, 256, softcap=True), "FlashAttention 3"),
        (Call(100, BF16, 128, window=True), "FlashAttention 4"),
        (Call(100, BF16, 128, softcap=True), TRITON),
        (Call(100, BF16, 256), TRITON),
        (Call(120, BF16, 128), TRITON),
        (Call(90, torch.float32, 128), TRITON),
        (Call(90, BF16, 100), TRITON),
        (Call(90, BF16, 64, dropout=True), TRITON),
        (Call(90, BF16, 64, window=True, sinks=True), TRITON),
        (Call(90, BF16, 512), SDPA),
        (Call(90, BF16, 512, sinks=True), REFERENCE),
        (Call(120, torch.float32, 264), SDPA),
        (Call(90, BF16, 260), REFERENCE),
        (Call(90, BF16, 512, window=True), REFERENCE),
        (Call(90, BF16, 512, softcap=True), REFERENCE),
        (Call(90, BF16, 512, dropout=True), REFERENCE),
        (Call(75, torch.float16, 64), REFERENCE),
    ],
)
def test_all_installed(call, kernel):
    assert choose(call, {}).kernel == kernel


def test_the_reasons_name_what_comes_before():
    found = choose(Call(90, BF16, 128), {"FlashAttention 3": "not installed"})
    assert found == ("FlashAttention 2", "FlashAttention 4: not for sm_90; FlashAttention 3: not installed")
    found = choose(Call(80, torch.float32, 512), {"FlashAttention 2": "broken"})
    assert found.kernel == SDPA
    for reason in ("FlashAttention 2: broken", "FlashAttention 3: not for sm_80", "Triton: head size 512 > 256"):
        assert reason in found.reason
    assert "SDPA: no window and softcap" in choose(Call(90, BF16, 512, window=True, softcap=True), {}).reason
    dropped = choose(Call(90, BF16, 64, dropout=True), {}).reason
    assert "FlashAttention 3: drops by a rule of its own" in dropped


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_without_flash_attention_ours(arch):
    assert choose(Call(arch, BF16, 96, window=True, softcap=True, dropout=True), NOTHING).kernel == TRITON
    assert choose(Call(arch, BF16, 96), {**NOTHING, TRITON: "not installed"}).kernel == SDPA


def packed(dtype, *, head_size=264, tokens_k=40):
    return [torch.randn(n, h, head_size).to(dtype).requires_grad_() for n, h in ((33, 4), (tokens_k, 2), (tokens_k, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([0, 33], [0, 40]), ([0, 20, 20, 33], [0, 20, 27, 40]), ([0, 12, 13, 33], [0, 7, 40, 40])],
)
def test_sdpa_where_it_is_chosen(lengths_q, lengths_k, causal, dtype, monkeypatch):
    """Fewer queries than keys and more, one query, none, no key; the CPU's SDPA stands for the GPU's."""
    monkeypatch.setattr(gpu, "_kernel", lambda *_: SDPA)
    q, k, v = packed(dtype)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in (lengths_q, lengths_k)]

    def by_sdpa(*qkv):
        return _BySDPA.apply(*qkv, *bounds, causal)

    def by_definition(q, k, v):
        return eager(q, k, v, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], causal=causal, scale=0.1)

    check_against_eager(by_sdpa, by_definition, [q, k, v], dtype=dtype)
    plain = [x.detach() for x in (q, k, v)]
    out, lse = gpu.forward(*plain, *bounds, causal, None, None, 0.1)
    expected = reference(*plain, *bounds, causal, None, None, 0.1)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_sdpas_backward_is_right_beside_sinks(causal):
    """They are in lse: no backward asks for them, so any may serve."""
    q, k, v = (x.detach() for x in packed(torch.float32))
    tail = torch.tensor([0, 20, 33]), torch.tensor([0, 12, 40]), causal
    out, lse = reference(q, k, v, *tail, None, None, 0.1, sinks=torch.linspace(-2, 4, 4))
    expected = reference_backward(out + 1, q, k, v, out, lse, *tail, None, None, 0.1)
    for a, b in zip(sdpa.backward(out + 1, q, k, v, out, lse, *tail, 0.1), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _BySDPA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal):
        out, lse = gpu.forward(q, k, v, cu_q, cu_k, causal, None, None, 0.1)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, grad):
        return *gpu.backward(grad, *ctx.saved_tensors, ctx.causal, None, None, 0.1), None, None, None


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_sdpa_calls_the_gpus_kernels_as_they_are_declared(dtype):
    """On fake CUDA tensors: the arguments fit, and every result has its place."""
    with FakeTensorMode(), torch.no_grad():
        q, k, v = (torch.empty(1, 4, 40, 264, device="cuda", dtype=dtype) for _ in range(3))
        out, lse = sdpa._attend(q, k, v, True, 0.1)
        padded = lse.new_empty(1, 4, 64)
        gradients = sdpa._attend_backward(out, q, k, v, out, padded, True, 0.1)
    assert (out.device.type, out.shape, lse.dtype) == ("cuda", q.shape, torch.float32)
    assert lse.shape == padded.shape
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_what_is_missing_here(monkeypatch):
    flash.missing.cache_clear()
    assert flash.missing()["FlashAttention 3"] == "not installed"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    flash.missing.cache_clear()
    assert "takes no" in flash.missing()["FlashAttention 3"]
    flash.missing.cache_clear()


# The functions of each generation: its argument names, the reference's arithmetic, lse as [H, T].


def _options(causal, window_size_left, window_size_right, softcap, softmax_scale):
    assert window_size_right in ((0, -1) if causal else (window_size_left,))
    window = None if window_size_left < 0 else window_size_left + 1
    return causal, window, softcap or None, softmax_scale


def _run(q, k, v, cu_seqlens_q, cu_seqlens_k, *tail):
    out, lse = reference(q, k, v, cu_seqlens_q, cu_seqlens_k, *_options(*tail))
    return out, lse.t().contiguous()


def _run_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *tail):
    assert lse.shape == (q.shape[1], q.shape[0])
    return reference_backward(dout, q, k, v, out, lse.t(), cu_seqlens_q, cu_seqlens_k, *_options(*tail))


def _forward_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
              window_size_left=-1, window_size_right=-1, softcap=0.0):  # fmt: skip
    assert (max_seqlen_q, max_seqlen_k, dropout_p) == (len(q), len(k), 0.0)
    return *_run(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size_left, window_size_right, softcap,
                softmax_scale), None, None  # fmt: skip


def _backward_2(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
               dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
               deterministic):  # fmt: skip
    assert deterministic
    found = _run_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, causal, window_size_left,
                         window_size_right, softcap, softmax_scale)  # fmt: skip
    for target, value in zip((dq, dk, dv), found, strict=True):
        target.copy_(value)


def _forward_3(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
              softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0):  # fmt: skip
    return *_run(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size_left, window_size_right, softcap,
                softmax_scale), None, None  # fmt: skip


def _backward_3(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
               max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
               window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False):  # fmt: skip
    _backward_2(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
               0.0, softmax_scale, is_causal, window_size_left, window_size_right, softcap, None, deterministic)  # fmt: skip


def _forward_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
              softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
              return_lse=False):  # fmt: skip
    assert return_lse
    return _forward_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                     *(-1 if side is None else side for side in (window_size_left, window_size_right)),
                     softcap)[:2]  # fmt: skip


def _backward_4(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
               window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
               deterministic=False):  # fmt: skip
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    sides = (-1 if side is None else side for side in (window_size_left, window_size_right))
    _backward_2(dout, q, k, v, out, lse, *gradients, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
               softmax_scale, causal, *sides, softcap, None, deterministic)  # fmt: skip
    return tuple(gradients)


def _stand_in(name):
    generation, functions = name[-1], flash.FUNCTIONS[name]
    module = ModuleType(functions.module)
    setattr(module, functions.forward, globals()[f"_forward_{generation}"])
    setattr(module, functions.backward, globals()[f"_backward_{generation}"])
    return module


@pytest.mark.parametrize("options", [(True, None), (False, None), (True, 4), (False, 4)])
@pytest.mark.parametrize("lengths", [None, [0, 5, 12]])
@pytest.mark.parametrize("name", FLASH_ATTENTION)
def test_flash_attention_gets_the_ops_arguments(name, lengths, options, monkeypatch):
    module = _stand_in(name)
    for parent in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    flash.missing.cache_clear()
    assert name not in flash.missing()
    flash.missing.cache_clear()
    q, k, v, grad = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8), torch.randn(12, 4, 8)
    bounds = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    tail = bounds, None, *options, None, 0.3
    out, lse = flash.forward(name, q, k, v, *tail)
    expected = reference(q, k, v, *tail)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert lse.is_contiguous()
    got = flash.backward(name, grad, q, k, v, out, lse, *tail)
    for a, b in zip(got, reference_backward(grad, q, k, v, out, lse, *tail), strict=True):
        assert torch.equal(a, b)


def test_both_implementations_take_the_references_arguments():
    for function, model in ((gpu.forward, reference), (gpu.backward, reference_backward)):
        assert list(inspect.signature(function).parameters) == list(inspect.signature(model).parameters)
