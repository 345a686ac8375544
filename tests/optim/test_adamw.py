"""AdamW as an optimizer: torch's own trajectory, bfloat16 masters, exact state round trip."""

import copy

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
