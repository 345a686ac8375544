"""AdamW as an optimizer: torch's own trajectory, bfloat16 masters, 8 bits, bitsandbytes' states, exact round trips."""

import copy

import pytest
import torch

from fastpt.optim.adamw import AdamW


def _trajectory(make, parameters, steps=6, dtype=torch.float32):
    parameters = [torch.nn.Parameter(p.detach().clone().to(dtype)) for p in parameters]
    optimizer = make([{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}])
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return parameters, optimizer


def test_same_trajectory_as_torch():
    start = [torch.randn(7, 5), torch.randn(33), torch.randn(4, 4)]
    ours, _ = _trajectory(lambda g: AdamW(g, lr=1e-2), start)
    exact, _ = _trajectory(lambda g: torch.optim.AdamW(g, lr=1e-2), start, dtype=torch.float64)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=2e-7)


def test_bfloat16_weights_follow_a_float32_master():
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    optimizer = AdamW([weight], lr=1e-4)  # each step moves by 1e-4, far below bfloat16's resolution of 2^-8 at 1
    for _ in range(100):
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
        optimizer.step()
    master = optimizer.state[weight]["master"]
    torch.testing.assert_close(master, torch.full_like(master, 1 - 100 * 1e-4), rtol=0, atol=1e-5)
    assert torch.equal(weight.detach(), master.bfloat16())
    assert (weight < 1).all()


def test_grad_scale_is_the_gradient_scaled():
    start = [torch.randn(9, 3)]
    results = []
    for scale in (None, 0.25):
        p = torch.nn.Parameter(start[0].clone())
        optimizer = AdamW([p], lr=1e-2, eps=1e-3)
        p.grad = torch.ones_like(p) * (1.0 if scale is None else 4.0)
        optimizer.step(grad_scale=None if scale is None else torch.tensor(scale))
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_state_round_trip_is_exact():
    parameters, optimizer = _trajectory(
        lambda g: AdamW(g, lr=1e-2), [torch.randn(5, 2), torch.randn(3), torch.randn(2)], dtype=torch.bfloat16
    )
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = AdamW([{"params": twins[:2]}, {"params": twins[2:]}], lr=1.0)
    other.load_state_dict(saved)
    for p, q in zip(parameters, twins, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
        assert other.state[q]["master"].dtype == torch.float32
    optimizer.step()
    other.step()
    for p, q in zip(parameters, twins, strict=True):
        assert torch.equal(p, q)


def test_stochastic_rounding_needs_no_master_and_resumes():
    start = torch.randn(40, 3)
    twins = []
    for _ in range(2):
        p = torch.nn.Parameter(start.bfloat16())
        optimizer = AdamW([p], lr=1e-3, rounding_seed=5)
        for step in range(4):
            if step == 2 and twins:  # the second goes on from a saved state
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW([p], lr=1.0, rounding_seed=5)
                optimizer.load_state_dict(state)
            p.grad = torch.full_like(p, 0.1 * step)
            optimizer.step()
        assert "master" not in optimizer.state[p]
        twins.append(p.detach())
    assert torch.equal(*twins)
    assert not torch.equal(twins[0], start.bfloat16())


SHAPES = [(80, 64), (5000,), (33,)]  # the last stays in float32


def _steps(optimizer, parameters, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def _twins(dtype=torch.float32):
    start = [torch.randn(s).to(dtype) for s in SHAPES]
    return [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]


@pytest.mark.parametrize("rounding_seed", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_resume_to_the_bit(dtype, rounding_seed):
    whole, cut = _twins(dtype)
    straight = AdamW(whole, lr=1e-2, bits=8, rounding_seed=rounding_seed)
    _steps(straight, whole, 3)
    _steps(straight, whole, 3, seed=4)
    first = AdamW(cut, lr=1e-2, bits=8, rounding_seed=rounding_seed)
    _steps(first, cut, 3)
    second = AdamW(cut, lr=1.0, bits=8, rounding_seed=rounding_seed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    _steps(second, cut, 3, seed=4)
    for p, q in zip(whole, cut, strict=True):
        assert torch.equal(p, q)
    assert [second.state[p]["exp_avg"].dtype for p in cut] == [torch.uint8, torch.uint8, torch.float32]
    assert ("master" in second.state[cut[0]]) == (dtype == torch.bfloat16 and rounding_seed is None)


def test_8_bit_states_take_two_bytes_and_a_bit():
    p = torch.nn.Parameter(torch.randn(640, 512))
    optimizer = AdamW([p], lr=1e-2, bits=8)
    _steps(optimizer, [p], 1)
    assert sum(t.nbytes for t in optimizer.state[p].values()) <= 2.1 * p.numel()


@pytest.mark.parametrize("bits", [8, 32])
def test_states_go_to_bitsandbytes_and_back(bits):
    optim = pytest.importorskip("bitsandbytes.optim")
    ours, theirs = _twins()
    first = AdamW(ours, lr=1e-2, bits=bits)
    _steps(first, ours, 3)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    second = (optim.AdamW8bit if bits == 8 else optim.AdamW32bit)(theirs, lr=1e-2, weight_decay=0.0)
    second.load_state_dict(first.bitsandbytes_state_dict())
    _steps(first, ours, 1, seed=9)
    _steps(second, theirs, 1, seed=9)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    third = AdamW(theirs, lr=1e-2, bits=bits)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    assert all(int(third.state[q]["step"]) == 4 for q in theirs)
    for q in theirs:
        for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
            assert torch.equal(third.state[q][name], second.state[q][f"state{number}"])
    _steps(second, theirs, 1, seed=10)
    after = [q.detach().clone() for q in theirs]
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            p.copy_(q)  # where both were before, up to rounding
    _steps(third, theirs, 1, seed=10)
    for p, q in zip(theirs, after, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_states_of_another_map_keep_their_values():
    from fastpt.optim.states import from_bitsandbytes

    code = torch.linspace(-1, 1, 256)
    state = {
        "step": 4,
        "state1": torch.arange(256, dtype=torch.uint8),
        "state2": torch.full((256,), 255, dtype=torch.uint8),
    }
    state |= {"qmap1": code, "qmap2": code, "absmax1": torch.tensor([3.0]), "absmax2": torch.tensor([2.0])}
    found = from_bitsandbytes(state)
    from fastpt.ops.adamw_8bit import dequantize

    moment = dequantize(found["exp_avg"], found["exp_avg_absmax"], True)
    torch.testing.assert_close(moment, 3 * code, rtol=0.05, atol=0.03)
    assert (dequantize(found["exp_avg_sq"], found["exp_avg_sq_absmax"], False) == 2).all()


@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8)])
def test_moments_of_other_bits_are_converted(before, after):
    ours, _ = _twins()
    first = AdamW(ours, lr=1e-2, bits=before)
    _steps(first, ours, 3)
    second = AdamW(ours, lr=1e-2, bits=after)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    p = ours[0]
    assert second.state[p]["exp_avg"].dtype == (torch.uint8 if after == 8 else torch.float32)
    third = AdamW(ours, lr=1e-2, bits=32)
    third.load_state_dict(second.state_dict())
    whole = AdamW(ours, lr=1e-2, bits=32)
    whole.load_state_dict(first.state_dict())
    torch.testing.assert_close(third.state[p]["exp_avg"], whole.state[p]["exp_avg"], rtol=0.1, atol=0.01)


def test_goes_with_schedulers_closures_and_groups():
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = AdamW([{"params": [p]}, {"params": [q], "lr": 1e-3}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = (p.sum() + q.sum()) ** 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == 64
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-4]
    assert (1 - p).mean().item() == pytest.approx(1e-2, rel=1e-3)
    assert (1 - q).mean().item() == pytest.approx(1e-3, rel=1e-3)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    optimizer.step(closure)


@pytest.mark.parametrize("is_signed", [True, False])
def test_new_moments_of_8_bits_are_quantised_zeros(is_signed):
    from fastpt.ops.adamw_8bit import quantize
    from fastpt.optim.states import MOMENTS, new_moments

    name = next(name for name, _, has_sign in MOMENTS if has_sign == is_signed)
    made, parameter = new_moments(torch.ones(70, 60), 8), torch.zeros(70, 60)
    codes, absmax = quantize(parameter, is_signed)
    assert torch.equal(made[name], codes)
    assert torch.equal(made[f"{name}_absmax"], absmax)
