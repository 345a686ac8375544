"""cross_entropy against F.cross_entropy in float64: options, shapes, gradients, and the form that writes them at once."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import cross_entropy, cross_entropy_and_gradient
from fastpt.ops.cross_entropy import _and_gradient, _backward, _forward
from tests.helpers import (
    DTYPES,
    assert_not_worse,
    check_against_eager,
    check_compiles,
    check_opcheck,
    check_retain_graph,
    run_with_grads,
)
from tests.ops.test_linear_cross_entropy import OPTIONS

ALL_DTYPES = [*DTYPES, torch.float16]


def make(tokens, classes, *, ignored=3):
    """Logits that want a gradient, and targets of which every `ignored`-th is -100."""
    targets = torch.randint(classes, (tokens,))
    targets[1::ignored] = -100
    return (2 * torch.randn(tokens, classes)).requires_grad_(), targets


def eager(
    logits, targets, *, softcap=None, logit_scale=1.0, z_loss=0.0, class_weight=None, reduction="mean", **options
):
    """Eager PyTorch as Hugging Face models do it: logits to float32 first."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    class_weight = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, targets, weight=class_weight, reduction=reduction, **options)
    extra = torch.where(targets == -100, 0, z_loss * z.logsumexp(1) ** 2)
    if reduction == "none":
        return loss + extra
    kept = targets[targets != -100]
    total = len(kept) if class_weight is None else class_weight[kept].sum()
    return loss + (extra.sum() / total if reduction == "mean" else extra.sum())


def by_groups(loss, targets, groups, **options):
    """Of one number the error may be 0 by chance: the losses of groups of rows, for the error rule."""

    def call(logits):
        parts = zip(logits.chunk(groups), targets.chunk(groups), strict=True)
        return torch.stack([loss(x, y, **options) for x, y in parts])

    return call


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (7, 131), (37, 1000), (3, 4096), (4, 1), (2, 32768 + 48)])
def test_not_worse_than_eager(shape, dtype):
    logits, targets = make(*shape)
    check_against_eager(
        lambda x: cross_entropy(x, targets, reduction="none"),
        lambda x: eager(x, targets, reduction="none"),
        [logits],
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "class weights"])
def test_options(is_weighted, option, reduction, dtype):
    logits, targets = make(36, 300)
    options = OPTIONS[option] | {"reduction": reduction}
    if is_weighted:
        options["class_weight"] = torch.rand(300)
    ours, theirs = (lambda x, f=f: f(x, targets, **options) for f in (cross_entropy, eager))
    if reduction != "none":
        ours, theirs = (by_groups(f, targets, 9, **options) for f in (cross_entropy, eager))
    check_against_eager(ours, theirs, [logits], dtype=dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [300, 32768 + 48])
@pytest.mark.parametrize("is_over_the_logits", [False, True], ids=["beside", "over the logits"])
def test_the_gradient_at_once(is_over_the_logits, classes, reduction, dtype):
    logits, targets = make(20 if classes < 1000 else 6, classes)
    logits = logits.detach().to(dtype)
    options = {"softcap": 9.0, "label_smoothing": 0.1, "z_loss": 1e-2, "reduction": reduction}
    scale = torch.rand(len(logits)) + 1 if reduction == "none" else torch.tensor(1.7)
    sides = []
    for side in (None, torch.float64):
        x = logits.to(side or dtype).requires_grad_()
        loss = eager(x, targets, **options)
        sides.append((loss.detach(), torch.autograd.grad(loss, x, scale.to(loss.dtype))[0]))
    given = logits.clone()
    out = given if is_over_the_logits else torch.empty_like(logits)
    loss = cross_entropy_and_gradient(given, targets, scale, out=out, **options)
    torch.testing.assert_close(loss.double(), sides[1][0], rtol=1e-6, atol=0)
    assert_not_worse(out, *(side[1] for side in sides), what="gradient")
    assert is_over_the_logits or torch.equal(given, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_and_no_rows(reduction, dtype):
    for tokens in (0, 6):
        logits = torch.randn(tokens, 11, dtype=dtype).requires_grad_()
        targets = torch.full((tokens,), -100)
        loss = cross_entropy(logits, targets, reduction=reduction)
        assert torch.equal(loss, torch.zeros(loss.shape))
        grad = torch.autograd.grad(loss.sum(), logits)[0]
        assert torch.equal(grad, torch.zeros_like(grad))
        out = torch.ones_like(logits)
        scale = torch.ones(loss.shape)
        assert torch.equal(cross_entropy_and_gradient(logits, targets, scale, out=out, reduction=reduction), loss)
        assert not out.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_and_masked_rows(dtype):
    """Where p is near 1, p - 1 is formed before it is rounded; -inf and the dtype's lowest number are never likely."""
    targets = torch.arange(48) % 6
    logits = torch.randn(48, 20) / 4
    logits[range(48), targets] = torch.tensor([4.0, 6, 8, 9, 10, 12]).repeat(8)
    logits[:, 15:18] = -torch.inf
    logits[:, 18:] = torch.finfo(torch.bfloat16).min
    logits = logits.to(dtype).requires_grad_()
    check_against_eager(
        lambda x: cross_entropy(x, targets, reduction="none"),
        lambda x: eager(x, targets, reduction="none"),
        [logits],
        dtype=dtype,
    )
    grad = torch.autograd.grad(cross_entropy(logits, targets, reduction="sum"), logits)[0]
    others = logits.detach().double().softmax(1)
    others[range(48), targets] = 0
    certain = grad[range(48), targets].double() / -others.sum(1)
    assert (certain - 1).abs().max() < 1e-2


def test_rows_beyond_a_tile_are_masked_alike():
    """In a long row whole tiles are -inf, or as low as float32 goes, before the first logit that counts."""
    logits, targets = make(3, 40_000, ignored=10)
    logits.data[0, :20_000] = -torch.inf
    logits.data[1, :20_000] = torch.finfo(torch.float32).min
    logits.data[2, 100] = torch.nan
    targets[:] = 30_000
    loss = cross_entropy(logits, targets, reduction="none")
    want = eager(logits.double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), want, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    targets = torch.randint(20, (12,))
    for logits in (
        torch.randn(20, 12).t(),
        torch.randn(12, 40)[:, ::2],
        torch.randn(12, 33)[:, 3:23],
        torch.randn(1, 20).expand(12, 20),
    ):
        leaf = logits.to(dtype).requires_grad_()
        check_against_eager(
            lambda x: cross_entropy(x, targets, reduction="none"),
            lambda x: eager(x, targets, reduction="none"),
            [leaf],
            dtype=dtype,
        )
        for out in (torch.empty(12, 20, dtype=dtype), torch.empty(20, 12, dtype=dtype).t()):
            cross_entropy_and_gradient(leaf, targets, torch.tensor(1.0), out=out)
            torch.testing.assert_close(out, torch.autograd.grad(cross_entropy(leaf, targets), leaf)[0])


def test_gradcheck_opcheck_compile_retain_graph():
    logits, targets = make(6, 9)
    wide = logits.detach().double().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: cross_entropy(
                x, targets, reduction=reduction, softcap=4.0, label_smoothing=0.1, z_loss=0.1
            ),
            wide,
        )
        for dtype in (*DTYPES, torch.float64):
            x = logits.detach().to(dtype)
            options = targets, None, -100, None, 1.0, 0.1, 0.0, reduction
            check_opcheck(_forward, x, *options)
            loss, *saved = _forward(x, *options)
            check_opcheck(_backward, torch.ones_like(loss), *(s.clone() for s in saved), x, *options)
            check_opcheck(_and_gradient, torch.ones_like(loss), x, *options, torch.empty_like(x))
    check_compiles(lambda x: cross_entropy(x, targets), logits)
    check_retain_graph(lambda x: cross_entropy(x, targets), logits)


def test_incoming_gradients_and_expanded_ones():
    logits, targets = make(6, 9)
    per_row = torch.rand(6)
    for grads in ([per_row], [torch.tensor(2.0).expand(6)]):
        _, got = run_with_grads(lambda x: cross_entropy(x, targets, reduction="none"), [logits], grads, None)
        _, want = run_with_grads(lambda x: eager(x, targets, reduction="none"), [logits], grads, None)
        torch.testing.assert_close(got[0], want[0])


def test_errors_name_the_values(runs_on_cpu_kernels):
    logits, targets = make(6, 9)
    with pytest.raises(RuntimeError, match=r"\(6, 9\).*\(5,\)"):
        cross_entropy(logits, targets[:5])
    with pytest.raises(RuntimeError, match="'average'"):
        cross_entropy(logits, targets, reduction="average")
    with pytest.raises(RuntimeError, match=r"\(8,\).*\[9\]"):
        cross_entropy(logits, targets, class_weight=torch.ones(8))
    with pytest.raises(RuntimeError, match=r"\(6, 8\).*\(6, 9\)"):
        cross_entropy_and_gradient(logits, targets, torch.tensor(1.0), out=torch.empty(6, 8))
    wrong = torch.tensor([0, 1, 9, 0, 0, 0])
    if runs_on_cpu_kernels:
        with pytest.raises(RuntimeError, match="target 9 of row 2"):
            cross_entropy(logits, wrong)
    else:  # a GPU does not wait for the targets to be looked at: the row's loss says it
        assert torch.equal(cross_entropy(logits, wrong, reduction="none").isnan(), wrong == 9)
