"""linear_divergence against divergences of eager logits in float64, against TRL, and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import TeacherHead, linear_divergence
from fastpt.ops import _head as head
from fastpt.ops.linear_divergence import _forward, rows_reference
from tests.helpers import DTYPES, check_against_eager, check_compiles, check_opcheck, check_retain_graph

BETAS = [0.0, 0.1, 0.5, 1.0]


def make(tokens, width, vocab, teacher_width=20):
    draw = torch.Generator().manual_seed(tokens)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    hidden, weight, bias = normal(tokens, width), normal(vocab, width) / 2, normal(vocab)
    teacher = normal(tokens, teacher_width), normal(vocab, teacher_width) / 2
    kept = torch.arange(0, tokens, 2) if tokens > 2 else torch.arange(tokens)
    return [x.requires_grad_() for x in (hidden, weight, bias)], teacher, kept


def divergences(log_s, log_t, beta):
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_t, log_s) if beta == 0 else kl(log_s, log_t)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def eager(hidden, weight, bias, teacher, kept, beta=0.0, temperature=1.0, row_weight=None, softcap=None, scale=1.0):
    def log_p(hidden, weight, bias=None):
        logits = F.linear(hidden.to(weight.dtype), weight, bias)[kept]
        logits = scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    log_s, log_t = log_p(hidden, weight, bias), log_p(*(x.to(weight.dtype) for x in teacher))
    rows = divergences(log_s, log_t, beta)
    return (rows if row_weight is None else rows * row_weight.to(rows.dtype)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 5), (9, 33, 131), (70, 64, 1000)])
@pytest.mark.parametrize("beta", BETAS)
def test_not_worse_than_eager(beta, shape, dtype):
    """Over eight draws: of a single sum it is luck which of two roundings comes nearer."""
    (_, weight, bias), teacher, kept = make(*shape)
    hidden = torch.randn(8, *shape[:2], generator=torch.Generator().manual_seed(1)).requires_grad_()
    rounded = tuple(x.to(dtype) for x in teacher)
    options = {"beta": beta, "temperature": 1.7}
    check_against_eager(
        lambda h, w, b: torch.stack(
            [linear_divergence(x, w, TeacherHead(*rounded), kept, bias=b, **options) for x in h]
        ),
        lambda h, w, b: torch.stack([eager(x, w, b, rounded, kept, **options) for x in h]),
        [hidden, weight, bias],
        dtype=dtype,
    )


def test_what_the_config_does_to_logits_and_weights_of_rows(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 131 * 4 * 16)  # several chunks
    inputs, teacher, kept = make(90, 24, 131)
    row_weight = torch.rand(len(kept))
    options = {"beta": 0.3, "temperature": 2.0, "row_weight": row_weight}
    with_cap = TeacherHead(*teacher, None, 3.0, 0.7)
    check_against_eager(
        lambda h, w, b: linear_divergence(h, w, with_cap, kept, bias=b, softcap=3.0, logit_scale=0.7, **options),
        lambda h, w, b: eager(h, w, b, teacher, kept, softcap=3.0, scale=0.7, **options),
        inputs,
        dtype=torch.float32,
    )


def test_an_adapter_on_the_head():
    (_, weight, _), teacher, kept = make(20, 24, 90)
    draw = torch.Generator().manual_seed(3)
    hidden, lora_a, lora_b = (
        torch.randn(*shape, generator=draw).requires_grad_() for shape in ((8, 20, 24), (4, 24), (90, 4))
    )
    theirs = TeacherHead(*teacher)

    def plain(x, w, a, b):
        logits = F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b)
        log_t = F.linear(*(t.to(w.dtype) for t in teacher))[kept].log_softmax(-1)
        return divergences(logits[kept].log_softmax(-1), log_t, 0.0).sum()

    options = {"lora_scale": 0.5}
    check_against_eager(
        lambda h, w, a, b: torch.stack(
            [linear_divergence(x, w, theirs, kept, lora_a=a, lora_b=b, **options) for x in h]
        ),
        lambda h, w, a, b: torch.stack([plain(x, w, a, b) for x in h]),
        [hidden, weight.detach(), lora_a, lora_b],
        dtype=torch.float32,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_is_what_trl_computes(beta):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    (hidden, weight, bias), teacher, kept = make(40, 24, 90)
    labels = torch.full((1, 40), -100)
    labels[0, kept] = 1
    logits = F.linear(hidden, weight, bias)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        logits[None], F.linear(*teacher)[None], labels, beta=beta, temperature=0.9, reduction="sum"
    )
    ours = linear_divergence(hidden, weight, TeacherHead(*teacher), kept, bias=bias, beta=beta, temperature=0.9)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, [hidden, weight, bias]) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_classes_by_hand():
    """The student says 3/4 and 1/4, the teacher 1/2 each."""
    weight = torch.tensor([[1.0], [0.0]])
    hidden, teacher = torch.tensor([[math.log(3)]], requires_grad=True), TeacherHead(torch.zeros(1, 1), weight)
    kept = torch.zeros(1, dtype=torch.long)
    forward = linear_divergence(hidden, weight, teacher, kept)
    assert forward.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert torch.autograd.grad(forward, hidden)[0].item() == pytest.approx(0.75 - 0.5, rel=1e-6)
    reverse = linear_divergence(hidden, weight, teacher, kept, beta=1.0)
    assert reverse.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert torch.autograd.grad(reverse, hidden)[0].item() == pytest.approx(0.75 * 0.25 * math.log(3), rel=1e-6)


def test_misfits_are_told():
    (hidden, weight, _), teacher, kept = make(4, 8, 5)
    with pytest.raises(RuntimeError, match="need as many rows and as large a vocabulary"):
        linear_divergence(hidden, weight, TeacherHead(teacher[0], teacher[1][:-1]), kept)
    with pytest.raises(RuntimeError, match="beta lies in"):
        linear_divergence(hidden, weight, TeacherHead(*teacher), kept, beta=1.5)


def test_registration():
    (hidden, weight, bias), teacher, kept = make(6, 8, 5)
    wants = [True, True, True, False, False]
    with torch.no_grad():
        inputs = [x.detach() for x in (hidden, weight, bias)]
        check_opcheck(_forward, *inputs, None, None, None, 1.0, *teacher, None, None, 1.0, kept, None, 0.5, 1.0, wants)
    call = lambda h, w: linear_divergence(h, w, TeacherHead(*teacher), kept, beta=0.5)  # noqa: E731
    check_retain_graph(call, hidden, weight)
    check_compiles(call, hidden, weight)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_rows_in_place_are_the_reference(dtypes, beta):
    """Both native kernels of a row, wide enough for several blocks of sums; the logits' place takes the gradient."""
    draw = torch.Generator().manual_seed(0)
    z, teacher = (3 * torch.randn(5, 2700, generator=draw).to(dtype) for dtype in dtypes)
    weights = torch.rand(5, generator=draw)
    expected = torch.empty(5, 2700, dtype=torch.float64)
    found = rows_reference(z.double(), teacher.double(), weights.double(), beta, 1.7, expected)
    ours = z.clone()
    divergences = torch.ops.fastpt.divergence_rows(ours, teacher, weights, beta, 1.7, ours)
    torch.testing.assert_close(divergences.double(), found, rtol=1e-5, atol=1e-6)
    near = {"rtol": 1e-4, "atol": 1e-7} if dtypes[0] == torch.float32 else {"rtol": 4e-3, "atol": 1e-6}
    torch.testing.assert_close(ours.double(), expected, **near)


def test_the_log_of_the_kernel_is_exact_to_its_last_bits():
    """A teacher of two classes with a chosen share: the mixture's logs are of ratios over many powers of two."""
    logits = torch.linspace(-80, 80, 4001)
    z = torch.stack([logits, torch.zeros(4001)], 1)
    teacher = torch.zeros(4001, 2)
    wide = torch.empty(4001, 2, dtype=torch.float64)
    expected = rows_reference(z.double(), teacher.double(), None, 0.5, 1.0, wide)
    found = torch.ops.fastpt.divergence_rows(z, teacher, None, 0.5, 1.0, z)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-7)


def test_rows_of_other_shapes_are_refused():
    z = torch.zeros(2, 3)
    for teacher, gradient in ((torch.zeros(2, 4), z), (z, torch.zeros(3, 3)), (z, z.bfloat16())):
        with pytest.raises(RuntimeError, match="divergence_rows: z is"):
            torch.ops.fastpt.divergence_rows(z, teacher, None, 0.5, 1.0, gradient)
