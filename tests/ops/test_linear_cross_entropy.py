"""linear_cross_entropy against F.cross_entropy on eager logits in float64: options, shapes, gradients, chunks, compile."""

import pytest
import torch
import torch.nn.functional as F

from fastpt.ops import linear_cross_entropy
from fastpt.ops.linear_cross_entropy import _forward, _scale, reference
from tests.helpers import DTYPES, assert_not_worse, check_against_eager, check_compiles, check_opcheck

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "together": {"softcap": 3.0, "logit_scale": 1.7, "label_smoothing": 0.2, "z_loss": 1e-2},
}


def make(tokens, width, classes, *, ignored=3):
    """hidden, weight, bias that want gradients, and targets of which every `ignored`-th is -100."""
    hidden = torch.randn(tokens, width).requires_grad_()
    weight = (torch.randn(classes, width) * 2 / width**0.5).requires_grad_()
    targets = torch.randint(classes, (tokens,))
    targets[1::ignored] = -100
    return hidden, weight, torch.randn(classes).requires_grad_(), targets


def eager(hidden, weight, bias, targets, lora_a=None, lora_b=None, *, softcap=None, logit_scale=1.0, z_loss=0.0,
          class_weight=None, lora_scale=1.0, reduction="mean", **options):  # fmt: skip
    """Eager PyTorch as Hugging Face models do it: logits in the model's dtype, then float32."""
    logits = F.linear(hidden, weight, bias)
    if lora_a is not None:
        logits = logits + lora_scale * F.linear(F.linear(hidden, lora_a), lora_b)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits, targets, weight=class_weight, reduction=reduction, **options)
    z = torch.where(targets == -100, 0, z_loss * logits.logsumexp(1) ** 2)
    if reduction == "none":
        return loss + z
    kept = targets[targets != -100]
    total = len(kept) if class_weight is None else class_weight[kept].sum()
    return loss + (z.sum() / total if reduction == "mean" else z.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 5), (7, 33, 131), (70, 64, 1000), (130, 129, 515), (60, 700, 7), (4, 16, 1)])
def test_not_worse_than_eager(shape, dtype):
    *inputs, targets = make(*shape)
    check_against_eager(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b),
        lambda h, w, b: eager(h, w, b, targets),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, reduction, dtype):
    *inputs, targets = make(41, 40, 300)
    options = OPTIONS[option] | {"reduction": reduction}
    check_against_eager(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, **options),
        lambda h, w, b: eager(h, w, b, targets, **options),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_weight_and_adapter_on_the_head(reduction, dtype):
    *inputs, targets = make(37, 40, 300)
    inputs += [torch.randn(4, 40).requires_grad_(), torch.randn(300, 4).requires_grad_()]
    options = {
        "class_weight": torch.rand(300),
        "lora_scale": 0.5,
        "label_smoothing": 0.1,
        "softcap": 9.0,
        "z_loss": 0.1,
    }
    check_against_eager(
        lambda h, w, b, lora_a, lora_b: linear_cross_entropy(
            h, w, targets, bias=b, lora_a=lora_a, lora_b=lora_b, reduction=reduction, **options
        ),
        lambda h, w, b, lora_a, lora_b: eager(h, w, b, targets, lora_a, lora_b, reduction=reduction, **options),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_and_no_rows(reduction, dtype):
    for tokens in (0, 6):
        hidden, weight, bias, targets = make(tokens, 8, 11, ignored=1)
        targets[:] = -100
        inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2], reduction=reduction)
        assert torch.equal(loss, torch.zeros(loss.shape))
        for grad in torch.autograd.grad(loss.sum(), inputs):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_certain_rows_keep_their_gradient(dtype):
    """Where p is near 1, p - 1 must be formed before it is rounded to bfloat16."""
    weight = torch.eye(16).to(dtype)
    hidden = (torch.eye(16)[:6] * torch.tensor([4.0, 6, 8, 9, 10, 12])[:, None]).to(dtype).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, torch.arange(6), reduction="sum"), hidden)[0]
    want = torch.autograd.grad(F.cross_entropy(exact @ weight.double(), torch.arange(6), reduction="sum"), exact)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_and_huge_logits(dtype):
    hidden, weight, bias, targets = make(9, 16, 40)
    bias.data[targets.max() - 1 :: 7] = -torch.inf
    targets[targets >= 0] = 3
    bias.data[3], hidden.data[0] = 0.0, hidden.data[0] * 1e3
    inputs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2])
    per_row = linear_cross_entropy(inputs[0], inputs[1], targets, bias=inputs[2], reduction="none")
    torch.testing.assert_close(loss, eager(*inputs, targets), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(per_row, eager(*inputs, targets, reduction="none"), rtol=1e-2, atol=5e-2)
    for found in (loss, per_row.sum()):
        assert all(g.isfinite().all() for g in torch.autograd.grad(found, inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_subsets(dtype):
    targets = torch.randint(50, (12,))
    hidden = torch.randn(20, 12).t().to(dtype).requires_grad_()
    weight = torch.randn(50, 40)[:, ::2].to(dtype).requires_grad_()
    one_row = torch.randn(1, 20).expand(12, 20).to(dtype).requires_grad_()
    for inputs in ([hidden, weight], [hidden, weight.detach()], [hidden.detach(), weight], [one_row, weight]):
        check_against_eager(
            lambda h, w: linear_cross_entropy(h, w, targets),
            lambda h, w: eager(h, w, None, targets),
            inputs,
            dtype=dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("steps", [(20.0, 0.0), (0.0, 30.0)], ids=["falling", "rising"])
def test_maxima_that_move_along_the_vocabulary(steps, threads, dtype):
    """What was summed, and kept for the weight's gradient, under an earlier maximum is brought to the last one."""
    hidden, weight, bias, targets = make(70, 24, 2000)
    bias = (bias.detach() + torch.linspace(*steps, 2000)).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_against_eager(
            lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b),
            lambda h, w, b: eager(h, w, b, targets),
            [hidden, weight, bias],
            dtype=dtype,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_backward_scales_in_place_and_ends_the_graph(dtype):
    hidden, weight, _, targets = make(37, 40, 300)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    once = torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves)
    loss = linear_cross_entropy(*leaves, targets)
    (4 * loss).backward(retain_graph=True)
    (4 * loss).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 8 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, runs_on_cpu_kernels):
    if not runs_on_cpu_kernels:
        pytest.skip("the GEMM is not ours: cuBLAS chooses by the number of rows")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hidden, weight, _, targets = make(150, 72, 600, ignored=1000)
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    whole = linear_cross_entropy(hidden, weight, targets, reduction="none")
    for rows in ([7], [149, 3, 80]):
        assert torch.equal(linear_cross_entropy(hidden[rows], weight, targets[rows], reduction="none"), whole[rows])
    torch.set_num_threads(threads)


def test_many_chunks_sum_to_the_whole(runs_on_cpu_kernels):
    """At 100k classes a chunk holds 146 rows."""
    if not runs_on_cpu_kernels:
        pytest.skip("test_many_chunks_on_a_gpu")
    hidden, weight, bias, targets = make(300, 8, 100_000)
    kept = (targets != -100).nonzero().squeeze(1)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias, kept=kept)
    head = [x.detach().double() for x in (hidden, weight, bias)]
    exact = reference(*head[:2], targets, kept, -100, head[2], None, None, None, None, 1.0, 0.0, 0.0, True,
                      [True, True, True, False, False])  # fmt: skip
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight, bias)), exact[1:4], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("ignored", [3, 1000], ids=["some kept", "all kept"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_chunks_on_a_gpu(reduction, ignored, dtype, runs_on_cpu_kernels, monkeypatch):
    """Three chunks of 128 rows at most; rows of 300 classes lie 304 apart."""
    if runs_on_cpu_kernels:
        pytest.skip("test_many_chunks_sum_to_the_whole")
    monkeypatch.setattr("fastpt.kernels.head.CHUNK_BYTES", 1)
    monkeypatch.setattr("fastpt.kernels.head.LEAST_ROWS", 128)
    *inputs, targets = make(290, 24, 300, ignored=ignored)
    targets[1] = 0 if ignored > 290 else -100
    inputs += [torch.randn(4, 24).requires_grad_(), torch.randn(300, 4).requires_grad_()]
    check_against_eager(
        lambda h, w, b, lora_a, lora_b: linear_cross_entropy(
            h, w, targets, bias=b, lora_a=lora_a, lora_b=lora_b, reduction=reduction
        ),
        lambda h, w, b, lora_a, lora_b: eager(h, w, b, targets, lora_a, lora_b, reduction=reduction),
        inputs,
        dtype=dtype,
    )


@pytest.mark.parametrize("classes", [32768 + 16, 40001])
@pytest.mark.parametrize("option", ["plain", "together"])
def test_rows_longer_than_a_tile(option, classes):
    """On a GPU such a row is read twice, in tiles."""
    *inputs, targets = make(3, 8, classes)
    options = OPTIONS[option] | {"class_weight": torch.rand(classes)}
    check_against_eager(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, **options),
        lambda h, w, b: eager(h, w, b, targets, **options),
        inputs,
        dtype=torch.bfloat16,
    )


def test_a_scale_of_one_leaves_the_gradient_alone():
    gradient = torch.randn(5, 7)
    for factor in (1.0, 3.0):
        scaled = gradient.clone()
        _scale(scaled, torch.tensor(factor))
        assert torch.equal(scaled, gradient * factor)


def test_weight_gradient_reaches_autograd_in_float32():
    hidden, weight, _, targets = make(37, 40, 300)
    leaf = weight.detach().bfloat16().requires_grad_()
    leaf.grad_dtype = torch.float32
    linear_cross_entropy(hidden.detach().bfloat16(), leaf, targets).backward()
    exact = weight.detach().bfloat16().double().requires_grad_()
    eager(hidden.detach().bfloat16().double(), exact, None, targets).backward()
    assert_not_worse(leaf.grad, leaf.grad.bfloat16().float(), exact.grad, factor=1.0)


def test_gradcheck_opcheck_compile_retain_graph():
    hidden, weight, bias, targets = make(6, 5, 9)
    wanted = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: linear_cross_entropy(
                h, w, targets, bias=b, reduction=reduction, softcap=4.0, label_smoothing=0.1, z_loss=0.1
            ),
            wanted,
        )
    for dtype in (*DTYPES, torch.float64):
        h, w, b = (x.detach().to(dtype) for x in (hidden, weight, bias))
        wants = [True, True, True, False, False]
        check_opcheck(_forward, h, w, targets, None, -100, b, None, None, None, None, 1.0, 0.0, 0.0, True, wants)
    check_compiles(lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b), hidden, weight, bias)
    check_compiles(lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, reduction="none"), hidden, weight, bias)
    loss = linear_cross_entropy(hidden, weight, targets, bias=bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(3.0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_and_no_grad():
    hidden, weight, _, targets = make(6, 5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss == linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (hidden, weight)))
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_errors_name_the_values(runs_on_cpu_kernels):
    hidden, weight, _, targets = make(6, 5, 9)
    with pytest.raises(RuntimeError, match=r"\(6, 5\).*\(9, 4\)"):
        linear_cross_entropy(hidden, weight[:, :4], targets)
    with pytest.raises(RuntimeError, match="'average'"):
        linear_cross_entropy(hidden, weight, targets, reduction="average")
    targets = torch.tensor([0, 1, 9, 0, 0, 0])
    if runs_on_cpu_kernels:
        with pytest.raises(RuntimeError, match="target 9 of row 2"):
            linear_cross_entropy(hidden, weight, targets)
    else:  # a GPU does not wait for the targets to be looked at: the row's loss says it
        assert linear_cross_entropy(hidden, weight, targets).isnan()
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, reduction="none").isnan(), targets == 9)
