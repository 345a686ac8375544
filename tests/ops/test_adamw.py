"""adamw against torch.optim.AdamW in float64: dtypes, masters, gradient scale, many shapes, layouts, threads, opcheck."""

import pytest
import torch

from fastpt.ops import adamw
from fastpt.ops.adamw import _step
from tests.helpers import assert_not_worse, needs_native

SETTINGS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(), (1,), (0, 4), (37,), (5, 129), (3, 8192)]  # the last spans two blocks
STEPS = 4


def values(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def states(params, dtype=torch.float32):
    zeros = [[torch.zeros_like(p, dtype=dtype) for p in params] for _ in range(2)]
    return *zeros, [torch.zeros(()) for _ in params]


def run(params, grad_dtype=torch.float32, masters=None, grad_scale=None, settings=SETTINGS):
    """STEPS steps of the op in place; returns its states."""
    kept = states(params, torch.promote_types(params[0].dtype, torch.float32))
    for seed in range(STEPS):
        grads = [g.to(grad_dtype) for g in values([p.shape for p in params], grad_dtype, seed + 1)]
        before = [g.clone() for g in grads]
        adamw(params, grads, *kept, masters=masters, grad_scale=grad_scale, **settings)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    return kept


def run_torch(params, dtype, grad_dtype=torch.float32, scale=1.0, settings=SETTINGS):
    """torch.optim.AdamW from the same values and gradients, computed in dtype."""
    params = [p.to(dtype).clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(
        params, lr=settings["lr"], betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"],
        weight_decay=settings["weight_decay"], foreach=False,
    )  # fmt: skip
    for seed in range(STEPS):
        for p, g in zip(params, values([p.shape for p in params], grad_dtype, seed + 1), strict=True):
            p.grad = g.to(dtype) * scale
        optimizer.step()
    state = [optimizer.state[p] for p in params]
    return [p.detach() for p in params], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_worse_than_torch(dtype, grad_dtype):
    params = values(dtype=dtype)
    eager, exact = run_torch(params, dtype, grad_dtype), run_torch(params, torch.float64, grad_dtype)
    kept = run(params, grad_dtype)
    for ours, theirs, truth, name in zip(params, eager[0], exact[0], SHAPES, strict=True):
        assert_not_worse(ours, theirs, truth, what=f"param {name}")
    for i in (0, 1):
        for ours, theirs, truth in zip(kept[i], eager[i + 1], exact[i + 1], strict=True):
            assert_not_worse(ours, theirs.to(ours.dtype), truth, what=f"state {i}")
    assert all(step == STEPS for step in kept[2])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_masters_go_where_float32_parameters_go(grad_dtype):
    params = values(dtype=torch.bfloat16)
    masters = [p.float() for p in params]
    plain = [p.clone() for p in masters]
    run(params, grad_dtype, masters=masters)
    run(plain, grad_dtype)
    for param, master, expected in zip(params, masters, plain, strict=True):
        assert torch.equal(master, expected)
        assert torch.equal(param, master.bfloat16())


def test_grad_scale_multiplies_the_gradients():
    params = values()
    exact, eager = run_torch(params, torch.float64, scale=0.25), run_torch(params, torch.float32, scale=0.25)
    run(params, grad_scale=torch.tensor(0.25))
    for ours, theirs, truth in zip(params, eager[0], exact[0], strict=True):
        assert_not_worse(ours, theirs, truth)


def test_the_reference_is_torch_in_float64():
    params = values(dtype=torch.float64)
    expected = run_torch(params, torch.float64)[0]
    run(params)
    for ours, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_any_layout_and_reference_agree():
    dense = values([(6, 5), (33, 4)])
    transposed = [p.t().contiguous().t() for p in dense]
    assert not transposed[0].is_contiguous()
    run(dense)
    run(transposed)
    for a, b in zip(dense, transposed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_results_do_not_depend_on_the_thread_count():
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(values())
            run(found[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_a_changed_weight_is_noticed_by_autograd():
    weight = torch.randn(3, 3, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    out = (x @ weight).sum()
    adamw([weight], [torch.randn(3, 3)], *states([weight]), **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_and_compile(dtype):
    params = values([(3,), (2, 5)], dtype)
    kept = states(params, torch.promote_types(dtype, torch.float32))
    masters = [p.float() for p in params] if dtype == torch.bfloat16 else []
    arguments = (masters, torch.tensor(0.5), *SETTINGS.values())
    torch.library.opcheck(_step, (params, values([(3,), (2, 5)], dtype, 1), *kept, *arguments))

    expected = [p.clone() for p in params]
    adamw(expected, params, *states(params, kept[0][0].dtype), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, g, *s: adamw(p, g, *s, **SETTINGS), fullgraph=True, backend="aot_eager")
    compiled(params, [p.clone() for p in params], *states(params, kept[0][0].dtype))
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
def test_wrong_inputs_are_named():
    params = values([(3,), (2, 5)])
    first, second, steps = states(params)
    with pytest.raises(RuntimeError, match="2 params, 1 grads"):
        adamw(params, params[:1], first, second, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"params\[1\] is \[2, 5\], its gradient \[3\]"):
        adamw(params, [params[0], params[0]], first, second, steps, **SETTINGS)
