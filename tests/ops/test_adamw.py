"""adamw against torch.optim.AdamW in float64: dtypes, masters, gradient scale, many shapes, layouts, threads, opcheck."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpt.ops import adamw, grad_norm
from fastpt.ops.adamw import _norm, _step, random_bits, reference, round_stochastically
from tests.helpers import assert_not_worse, check_opcheck, needs_native

SETTINGS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(), (1,), (0, 4), (37,), (5, 129), (3, 8192)]  # the last spans two blocks
STEPS = 4


def values(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
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


def test_a_list_of_several_dtypes():
    """A launch for each pair of dtypes: a tensor keeps its place in the list, and with it its random bits."""
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    shapes = [(37,), (5, 129), (64,), (3, 16)]
    params, twins = ([p.to(d) for p, d in zip(values(shapes), dtypes, strict=True)] for _ in range(2))
    grads = [g.to(d) for g, d in zip(values(shapes, seed=1), reversed(dtypes), strict=True)]
    adamw(params, grads, *states(params, torch.float32), seed=3, **SETTINGS)
    reference(twins, grads, *states(twins, torch.float32), [], None, *SETTINGS.values(), 3)
    for ours, expected, dtype in zip(params, twins, dtypes, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(ours, expected)
        torch.testing.assert_close(ours, expected)


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
    arguments = (masters, torch.tensor(0.5), *SETTINGS.values(), None)
    check_opcheck(_step, params, values([(3,), (2, 5)], dtype, 1), *kept, *arguments)

    expected = [p.clone() for p in params]
    adamw(expected, params, *states(params, kept[0][0].dtype), **SETTINGS)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, g, *s: adamw(p, g, *s, **SETTINGS), fullgraph=True, backend="aot_eager")
    with _disable_current_modes():
        compiled(params, [p.clone() for p in params], *states(params, kept[0][0].dtype))
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_masters_reach_parameters_that_are_not_aligned():
    """Aligned runs of a parameter are stored past the cache, the rest is not."""
    for offset in (0, 1, 32):
        memory = torch.zeros(3 * 8192 + offset, dtype=torch.bfloat16)
        param, master = memory[offset:], torch.randn(3 * 8192)
        run([param], masters=[master])
        assert torch.equal(param, master.bfloat16())
        assert not memory[:offset].any()


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_stochastic_rounding_is_the_reference_bit_for_bit(grad_dtype):
    params = values(dtype=torch.bfloat16)
    twins, grads = [p.clone() for p in params], [g.to(grad_dtype) for g in values(seed=1)]
    kept, others = states(params, torch.float32), states(twins, torch.float32)
    for step in (*kept[2], *others[2]):
        step.fill_(6)
    adamw(params, grads, *kept, seed=-7, **SETTINGS)
    reference(twins, grads, *others, [], None, *SETTINGS.values(), -7)
    same = [torch.equal(a, b) for a, b in zip(params, twins, strict=True)]
    different = sum((a != b).sum().item() for a, b in zip(params, twins, strict=True))
    assert all(same[:4])
    assert different <= 3, "float32 results one ulp apart round apart once in 65536 values"


def test_stochastic_rounding_depends_on_seed_step_and_place_alone():
    found = []
    for seed, threads in ((1, 1), (1, 3), (2, 1)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        params = values(dtype=torch.bfloat16)
        kept = states(params, torch.float32)
        for step in range(2):
            adamw(params, values(seed=step + 1), *kept, seed=seed, **SETTINGS)
        torch.set_num_threads(before)
        found.append(params)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][-1], found[2][-1])
    bits = [random_bits((4096,), *key, device="cpu") for key in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))]
    for other in bits[1:]:
        agree = (bits[0] ^ other).view(-1, 1) >> torch.arange(32) & 1
        assert abs(agree.double().mean() - 0.5) < 5 / (2 * (4096 * 32) ** 0.5)  # five standard deviations


def test_stochastic_rounding_is_unbiased():
    """The mean of n roundings of a value errs by about half an ulp / sqrt(n); neighbours and steps are independent."""
    n = 1 << 18
    for value in (1.001, -3.1403, 1e-20, 2.0):
        exact = torch.full((n,), value)
        rounded = round_stochastically(exact, random_bits((n,), 3, 1, 0, device="cpu"))
        low, high = rounded.min(), rounded.max()
        assert torch.equal(rounded, rounded.bfloat16().float())
        ulp = (high - low).double()
        error = rounded.double().mean() - exact[0].double()
        assert error.abs() <= 5 * ulp / (2 * n**0.5)
        up = (rounded == high).double()
        if low != high:
            p = up.mean()
            for lag in (1, 2, 16):
                assert abs((up[lag:] * up[:-lag]).mean() - p * p) < 5 / (2 * n**0.5)
    inf = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(round_stochastically(inf, torch.full((3,), 65535)).isnan(), inf.isnan())
    assert torch.equal(round_stochastically(inf, torch.full((3,), 65535))[:2], inf[:2])


def test_stochastic_rounding_adds_up_what_is_below_resolution():
    """25 steps of 4e-4 from 1, where bfloat16 steps by 2^-8 or more: rounding to nearest would stay at 1."""
    param = torch.ones(4096, dtype=torch.bfloat16)
    kept = states([param], torch.float32)
    for _ in range(25):
        adamw([param], [torch.ones(4096)], *kept, seed=0, lr=4e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
    assert abs(param.float().mean() - 0.99) < 5 * 0.5 * 2**-8 * 5 / 4096**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grad_norm_is_the_norm(dtype):
    grads = values(dtype=dtype)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    norm = grad_norm(grads)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(norm.double() - exact) <= exact * (1e-14 if dtype == torch.float64 else torch.finfo(norm.dtype).eps)
    assert grad_norm([]) == 0
    assert torch.equal(grad_norm([g.t().contiguous().t() if g.dim() == 2 else g for g in grads]), norm)
    assert grad_norm([*grads, torch.tensor([torch.inf])]).isinf()
    assert grad_norm([*grads, torch.tensor([torch.nan])]).isnan()
    for size in (1e30, 1e-20):  # squares beyond float32
        assert abs(grad_norm([torch.full((3,), size)]) - size * 3**0.5) < 1e-6 * size
    assert abs(grad_norm([torch.tensor([3e9, 5e9])]) - 34**0.5 * 1e9) < 1e3
    check_opcheck(_norm, grads)


def test_grad_norm_does_not_depend_on_the_thread_count():
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(grad_norm(values([(300, 1000), (7,), (40, 900)])))
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_masters_and_a_seed_exclude_each_other():
    params = values(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="masters and seed 5"):
        adamw(params, params, *states(params), masters=values(), seed=5, **SETTINGS)


@needs_native
def test_wrong_inputs_are_named():
    params = values([(3,), (2, 5)])
    first, second, steps = states(params)
    with pytest.raises(RuntimeError, match="2 params, 1 grads"):
        adamw(params, params[:1], first, second, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"params\[1\] is \[2, 5\], its gradient \[3\]"):
        adamw(params, [params[0], params[0]], first, second, steps, **SETTINGS)
