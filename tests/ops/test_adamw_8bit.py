"""adamw_8bit against its definition, bitsandbytes' format and step, and adamw: dtypes, masters, odd sizes, threads, opcheck."""

import pytest
import torch

from fastpt.ops import adamw, adamw_8bit
from fastpt.ops.adamw_8bit import BLOCK, _step, dequantize, dynamic_map, quantize, reference
from tests.helpers import check_opcheck, needs_native

SETTINGS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(1,), (0, 4), (37,), (256,), (5, 129), (3, 8192 + 3)]  # the last spans two tasks and ends inside a block


def values(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def spread(n, seed=0):
    """Magnitudes over ten decades of both signs, with zeros and a block of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-10 * torch.rand(n, generator=generator))
    x[5::97] = 0
    x[BLOCK : 2 * BLOCK] = 0
    return x


def states(params):
    codes = [[torch.zeros_like(p, dtype=torch.uint8) for p in params] for _ in range(2)]
    scales = [[torch.zeros(-(-p.numel() // BLOCK)) for p in params] for _ in range(2)]
    return *codes, *scales, [torch.zeros(()) for _ in params]


def used_states(params):
    """As after many steps."""
    found = states(params)
    for i, p in enumerate(params):
        for k, is_signed in ((0, True), (1, False)):
            x = spread(p.numel(), seed=i).view(p.shape)
            found[k][i], found[k + 2][i] = quantize(x if is_signed else x.square(), is_signed)
        found[4][i].fill_(6)
    return found


def copies(lists):
    return tuple([t.clone() for t in column] for column in lists)


def halfway(is_signed):
    """Between each two codes, as float32 has it, and 1."""
    code = dynamic_map(is_signed)
    return torch.nn.functional.pad((code[1:] + code[:-1]) / 2, (0, 1), value=1.0)


@pytest.mark.parametrize("is_signed", [True, False])
def test_codes_are_the_nearest(is_signed):
    code = dynamic_map(is_signed)
    x = spread(BLOCK * 40 + 3) if is_signed else spread(BLOCK * 40 + 3).square()
    for sample in (x, halfway(is_signed), code):
        index, absmax = quantize(sample, is_signed)
        scale = absmax.repeat_interleave(BLOCK)[: len(sample)]
        scaled = sample * torch.where(scale == 0, 0.0, 1 / scale)
        nearest = (scaled[:, None] - code).abs().argmin(1)
        if not is_signed:
            nearest = nearest.clamp(min=1)
        assert torch.equal(index.long(), nearest)
    assert torch.equal(dequantize(*quantize(code, is_signed), is_signed)[1:], code[1:])


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_map_is_that_of_bitsandbytes(is_signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(is_signed), functional.create_dynamic_map(is_signed))


def around_halfway(is_signed):
    """And next to it: the kernel decides near the ends of the map's decades in another way than between them."""
    middle = halfway(is_signed)
    moved = [(middle.view(torch.int32) + k).view(torch.float32) for k in (-65, -64, -63, -9, -1, 0, 1, 9, 63, 64, 65)]
    return torch.cat([x.where(middle < 1, 1.0) for x in moved])


@pytest.mark.parametrize(
    "grad", [spread(n) for n in (1, 255, 256, 257, 40001)] + [around_halfway(True), around_halfway(False).sqrt()]
)
def test_the_kernel_rounds_as_defined(grad):
    """With betas of 0 the moments are the gradient and its square: codes and scales to the bit."""
    found = states([grad])
    adamw_8bit([torch.zeros_like(grad)], [grad], *found, lr=0.1, beta1=0.0, beta2=0.0, eps=1e-8, weight_decay=0.0)
    for k, expected in enumerate((quantize(grad, True), quantize(grad * grad, False))):
        assert torch.equal(found[k][0], expected[0])
        assert torch.equal(found[k + 2][0], expected[1])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["none", "masters", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_definition_agree(dtype, rounding, grad_dtype):
    params, grads = values(dtype=dtype), values(dtype=grad_dtype, seed=1)
    found, twins = used_states(params), [p.clone() for p in params]
    expected = copies(found)
    masters = [p.float() for p in params] if rounding == "masters" else []
    masters_twins, scale, seed = copies([masters])[0], torch.tensor(0.5), 3 if rounding == "stochastic" else None
    adamw_8bit(params, grads, *found, masters=masters, grad_scale=scale, seed=seed, **SETTINGS)
    reference(twins, grads, *expected, masters_twins, scale, *SETTINGS.values(), seed)
    for i, param in enumerate(params):
        tolerance = {"rtol": 2**-7, "atol": 1e-30} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(param, twins[i], **tolerance)
        assert (param != twins[i]).sum() <= (3 if dtype == torch.bfloat16 else param.numel())
        for k in (0, 1):  # a moment one ulp apart rounds apart once in some thousands
            apart = (found[k][i].int() - expected[k][i].int()).abs()
            assert (apart > 0).sum() <= 2 + param.numel() // 1000
            assert (apart <= 1).all()
            torch.testing.assert_close(found[k + 2][i], expected[k + 2][i], rtol=1e-6, atol=0)
        assert found[4][i] == 7
    for ours, theirs, param in zip(masters, masters_twins, params, strict=bool(masters)):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
        assert torch.equal(param, ours.to(dtype))


def test_a_step_is_that_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    params, grads = values([(9000,)]), values([(9000,)], seed=1)
    found = used_states(params)
    theirs, kept = params[0].clone(), copies(found)
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", grads[0], theirs, kept[0][0], kept[1][0], 0.9, 0.98, 0.0, 0.0, 1e-8, 7, 0.05, dynamic_map(True).clone(),
        dynamic_map(False).clone(), kept[2][0], kept[3][0], 0.1, 1.0,
    )  # fmt: skip
    adamw_8bit(params, grads, *found, **SETTINGS)
    torch.testing.assert_close(params[0], theirs, rtol=2e-6, atol=1e-7)
    for k in (2, 3):
        torch.testing.assert_close(found[k][0], kept[k][0], rtol=1e-6, atol=0)


def test_float32_moments_go_as_adamw_does():
    params, grads = values([(37,), (5, 129), (4097,)]), values([(37,), (5, 129), (4097,)], seed=1)
    twins = [p.clone() for p in params]
    found = used_states(params)
    for i in (0, 1):
        for k in (0, 1):
            found[k][i], found[k + 2][i] = torch.ones_like(params[i]), torch.zeros(0)
    plain = [torch.ones_like(p) for p in twins], [torch.ones_like(p) for p in twins], [s.clone() for s in found[4]]
    adamw_8bit(params, grads, *found, **SETTINGS)
    adamw(twins, grads, *plain, **SETTINGS)
    for i in (0, 1):
        assert torch.equal(params[i], twins[i])
        assert torch.equal(found[1][i], plain[1][i])
    assert not torch.equal(params[2], twins[2])
    assert found[0][2].dtype == torch.uint8


def test_follows_float32_moments():
    """Forty steps under a noisy gradient: the distance to adamw's parameters is a few percent of the way they went."""
    start = values([(64, 256)])[0]
    params, twins, found = [start.clone()], [start.clone()], states([start])
    plain = [torch.zeros_like(start)], [torch.zeros_like(start)], [torch.zeros(())]
    for seed in range(40):
        grads = [0.3 * start * 10 ** (values([(64, 1)], seed=99)[0]) + values([(64, 256)], seed=seed + 1)[0]]
        adamw_8bit(params, grads, *found, **{**SETTINGS, "lr": 1e-3})
        adamw(twins, grads, *plain, **{**SETTINGS, "lr": 1e-3})
    assert (params[0] - twins[0]).norm() < 0.05 * (twins[0] - start).norm()


def test_states_take_two_bytes_and_a_bit():
    params = values([(512, 4096 // 8)])
    found = states(params)
    assert sum(t.numel() * t.element_size() for column in found[:4] for t in column) <= 2.1 * params[0].numel()


def test_a_second_moment_never_becomes_zero():
    """An element far below its block's largest would divide by the root of nothing but its next square."""
    grad = torch.full((BLOCK,), 1e-6)
    grad[0] = 1.0
    found = states([grad])
    adamw_8bit([torch.zeros(BLOCK)], [grad], *found, **SETTINGS)
    assert (dequantize(found[1][0], found[3][0], False) > 0).all()


def test_what_is_not_finite_stays_in_its_block():
    grad = torch.ones(3 * BLOCK)
    grad[BLOCK + 7] = torch.nan
    param, found = torch.zeros(3 * BLOCK), states([grad])
    adamw_8bit([param], [grad], *found, **SETTINGS)
    assert found[2][0].isnan().tolist() == [False, True, False]
    assert param.isnan().nonzero().tolist() == [[BLOCK + 7]]


def test_any_layout():
    dense = values([(60, 75)])
    transposed = [p.t().contiguous().t() for p in dense]
    grads = [g.t().contiguous().t() for g in values([(60, 75)], seed=1)]
    found = used_states(dense)
    others = copies(found)
    adamw_8bit(dense, grads, *found, **SETTINGS)
    adamw_8bit(transposed, grads, *others, **SETTINGS)
    torch.testing.assert_close(dense[0], transposed[0], rtol=1e-6, atol=1e-7)


def test_results_do_not_depend_on_the_thread_count():
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            params = values(dtype=torch.bfloat16)
            kept = used_states(params)
            adamw_8bit(params, values(seed=1), *kept, seed=1, **SETTINGS)
            found.append([*params, *kept[0], *kept[1], *kept[2], *kept[3]])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


def test_opcheck():
    params = values([(3,), (2, 300)], torch.bfloat16)
    check_opcheck(
        _step, params, values([(3,), (2, 300)], seed=1), *used_states(params), [], None, *SETTINGS.values(), 5
    )


def test_a_changed_weight_is_noticed_by_autograd():
    weight = torch.randn(3, 3, requires_grad=True)
    out = (torch.randn(2, 3, requires_grad=True) @ weight).sum()
    adamw_8bit([weight], [torch.randn(3, 3)], *states([weight]), **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ["none", "masters", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_as_defined(dtype, rounding):
    """All sizes and kinds of moments in one launch: codes, scales and parameters as the definition has them on the CPU."""
    sizes = [(1,), (255,), (4096,), (4097,), (3, 8195), (16385,)]
    params, grads = values(sizes, dtype), values(sizes, seed=1)
    found = used_states(params)
    for k in (0, 1):  # the first two in float32
        for i in (0, 1):
            found[k][i], found[k + 2][i] = values(sizes, seed=7)[i].abs(), torch.zeros(0)
    masters = [p.float() for p in params] if rounding == "masters" else []
    there = [[t.cuda() for t in column] for column in (params, grads, *found[:4])]
    steps, masters_there = [s.clone() for s in found[4]], [t.cuda() for t in masters]
    scale, seed = torch.tensor(0.5), 3 if rounding == "stochastic" else None
    adamw_8bit(*there, steps, masters=masters_there, grad_scale=scale.cuda(), seed=seed, **SETTINGS)
    reference(params, grads, *found, masters, scale, *SETTINGS.values(), seed)
    for i, param in enumerate(params):
        torch.testing.assert_close(there[0][i].cpu(), param, rtol=2**-7 if dtype != torch.float32 else 2e-6, atol=1e-7)
        for k in (0, 1):
            apart = (there[2 + k][i].cpu().double() - found[k][i].double()).abs()
            assert (apart > 1e-6).sum() <= 2 + param.numel() // 1000
            assert apart.max() <= 1
            torch.testing.assert_close(there[4 + k][i].cpu(), found[2 + k][i], rtol=1e-6, atol=0)
    assert steps == found[4]


@needs_native
def test_wrong_inputs_are_named():
    params = values([(3,), (2, 5)])
    first, second, absmax, absmax_sq, steps = states(params)
    with pytest.raises(RuntimeError, match="2 params, 1 grads"):
        adamw_8bit(params, params[:1], first, second, absmax, absmax_sq, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"params\[1\] is \[2, 5\], its gradient \[3\]"):
        adamw_8bit(params, [params[0]] * 2, first, second, absmax, absmax_sq, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match=r"scale of params\[0\] is \[2\] Float; it must be float32 \[1\]"):
        adamw_8bit(params, params, first, second, [torch.zeros(2)] * 2, absmax_sq, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match="Byte and Float; they must both be"):
        adamw_8bit(params, params, first, params, absmax, absmax_sq, steps, **SETTINGS)
    with pytest.raises(RuntimeError, match="masters and seed 5"):
        adamw_8bit(params, params, first, second, absmax, absmax_sq, steps, masters=params, seed=5, **SETTINGS)
