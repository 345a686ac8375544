"""token_stats against log_softmax of eager logits in float64, with separate gradients for each of its outputs."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import token_stats
from fastpt.ops.token_stats import _backward, _forward
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph
from tests.ops.test_linear_cross_entropy import make


def eager(hidden, weight, bias, targets, lora_a=None, lora_b=None, *, softcap=None, logit_scale=1.0, lora_scale=1.0):
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None:
        logits = logits + lora_scale * F.linear(F.linear(hidden, lora_a), lora_b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(1)
    kept = targets != -100
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return tuple(torch.where(kept, x, 0) for x in (logprob, entropy, logits.logsumexp(1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 5), (7, 33, 131), (70, 64, 1000), (130, 129, 515), (0, 8, 4)])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap and scale"])
def test_not_worse_than_eager(options, shape, dtype):
    *inputs, targets = make(*shape)
    check_against_eager(
        lambda h, w, b: tuple(token_stats(h, w, targets, bias=b, **options))[:3],
        lambda h, w, b: eager(h, w, b, targets, **options),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("output", [0, 1, 2])
def test_each_output_alone(output):
    *inputs, targets = make(20, 24, 90)
    check_against_eager(
        lambda h, w, b: token_stats(h, w, targets, bias=b)[output],
        lambda h, w, b: eager(h, w, b, targets)[output],
        inputs,
        dtype=torch.float32,
    )


def test_adapter_on_the_head_and_frozen_weight():
    hidden, weight, _, targets = make(20, 24, 90)
    lora_a, lora_b = torch.randn(4, 24).requires_grad_(), torch.randn(90, 4).requires_grad_()
    check_against_eager(
        lambda h, w, a, b: tuple(token_stats(h, w, targets, lora_a=a, lora_b=b, lora_scale=0.5))[:3],
        lambda h, w, a, b: eager(h, w, None, targets, a, b, lora_scale=0.5),
        [hidden, weight.detach(), lora_a, lora_b],
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_top1_and_ignored_rows(dtype):
    hidden, weight, _, targets = make(40, 16, 30)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    best = (hidden.double() @ weight.double().t()).argmax(1)
    targets = torch.where((targets != -100) & (torch.arange(40) % 2 == 0), best, targets)
    stats = token_stats(hidden, weight, targets)
    assert torch.equal(stats.is_top1, (targets == best))
    for values in stats:
        assert not values[targets == -100].any()
    kept = (targets != -100).nonzero().squeeze(1)
    assert all(torch.equal(a, b) for a, b in zip(stats, token_stats(hidden, weight, targets, kept=kept), strict=True))


def test_tiles_without_a_likely_class():
    """A row that a GPU reads in tiles, whole ones of which are -inf, or as low as a mask goes, before the others."""
    hidden, weight, bias, _ = (x.detach() for x in make(2, 8, 40_000))
    for lowest in (-torch.inf, torch.finfo(torch.bfloat16).min):
        bias[:20_000] = lowest
        targets = torch.tensor([30_000, 39_999])
        got = token_stats(hidden, weight, targets, bias=bias)
        wide = token_stats(hidden.double(), weight[20_000:].double(), targets - 20_000, bias=bias[20_000:].double())
        for a, b in zip(got, wide, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=0)


def test_entropy_of_a_certain_row_is_zero():
    hidden = torch.tensor([[1000.0, 0.0]]).requires_grad_()
    stats = token_stats(hidden, torch.eye(2), torch.tensor([0]))
    assert stats.entropy == 0
    assert stats.logprob == 0
    assert torch.autograd.grad(stats.entropy.sum(), hidden)[0].isfinite().all()


def test_gradcheck_opcheck_compile_retain_graph():
    hidden, weight, bias, targets = make(6, 5, 9)
    wanted = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: tuple(token_stats(h, w, targets, bias=b, softcap=4.0))[:3], wanted)
    for dtype in (*DTYPES, torch.float64):
        h, w, b = (x.detach().to(dtype) for x in (hidden, weight, bias))
        head = h, w, targets, None, -100, b, None, None, None, None, 1.0
        check_opcheck(_forward, *head)
        vectors = torch.randn(7, 6, dtype=torch.promote_types(dtype, torch.float32)).unbind()
        check_opcheck(_backward, *[v.clone() for v in vectors], *head, [True, True, True, False, False])
    check_compiles(lambda h, w, b: tuple(token_stats(h, w, targets, bias=b))[:3], hidden, weight, bias)
    check_retain_graph(lambda h, w, b: token_stats(h, w, targets, bias=b).entropy, hidden, weight, bias)
