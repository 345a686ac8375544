"""Steps inside backward: what a step after it gives, without all gradients; what is refused; what is not finite."""

import copy

import pytest
import torch

import fastpt
from fastpt.errors import ConfigError
from fastpt.optim import AdamW, StepInBackward
from tests.runs import run_settings
from tests.tiny import tiny_model

INSIDE = {"lr": 1e-2, "warmup": 0, "in_backward": True, "clip_norm": float("inf")}


def _weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def _losses(run):
    return [record["loss"] for record in run.history if "loss" in record]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_equals_the_step_after_backward(tmp_path, method, name):
    runs = [
        fastpt.train(
            **run_settings(tmp_path / str(inside), method=method, optim={**INSIDE, "name": name, "in_backward": inside})
        )
        for inside in (True, False)
    ]
    assert _losses(runs[0]) == _losses(runs[1])
    for a, b in zip(_weights(runs[0]).values(), _weights(runs[1]).values(), strict=True):
        assert torch.equal(a, b)
    norms = [[record["grad_norm"] for record in run.history if "loss" in record] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_gradients_never_exist_all_at_once():
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)])
    optimizer = AdamW(model.parameters(), lr=1e-3)
    inside, alive = StepInBackward(optimizer), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    before = [p.detach().clone() for p in model.parameters()]
    inside.begin()
    model(torch.randn(4, 8)).square().sum().backward()
    assert alive == [0] * 12  # the hook before this one has dropped it
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_stochastic_rounding_differs_from_parameter_to_parameter():
    params = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW(params, lr=1e-3, rounding_seed=0)
    inside = StepInBackward(optimizer)
    inside.begin()
    (params[0].sum() + params[1].sum()).backward()
    assert not torch.equal(*params)


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_resumes_to_the_bit(tmp_path, rounding):
    def train(folder, **changes):
        optim = {**INSIDE, "name": "adamw_8bit", "rounding": rounding}
        model = tiny_model("llama").bfloat16()
        return fastpt.train(**run_settings(folder, model=model, method="full", optim=optim, **changes))

    straight = train(tmp_path / "straight")
    train(tmp_path / "cut", save_steps=3, keep_checkpoints=9)
    half = tmp_path / "cut/run/checkpoints/step-00000003"
    resumed = train(tmp_path / "cut", save_steps=3, keep_checkpoints=9, resume=half)
    assert straight.model.lm_head.weight.dtype == torch.bfloat16
    assert _losses(straight) == _losses(resumed)
    for a, b in zip(_weights(straight).values(), _weights(resumed).values(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_changes_its_tensor_alone():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([{"params": [first, second], "names": ["first", "second"]}], lr=1e-2)
    inside = StepInBackward(optimizer)
    inside.begin()
    (first.sum() * torch.inf + second.sum()).backward()
    assert torch.equal(first, torch.ones(3))
    assert (second < 1).all()
    assert inside.skipped() == {"skipped": True, "skipped_parameters": ["first"]}
    assert not inside.norm().isfinite()
    assert first not in optimizer.state
    inside.begin()
    (first.sum() + second.sum()).backward()
    assert inside.skipped() == {}
    assert (first < 1).all()
    inside.remove()
    kept = copy.deepcopy(first)
    first.sum().backward()
    assert torch.equal(first, kept)


def test_a_poisoned_step_is_recorded_and_training_goes_on(tmp_path, capsys):
    model = tiny_model("llama")
    calls = []

    def poison(grad):
        calls.append(grad)
        return grad * torch.nan if len(calls) == 2 else grad

    model.model.layers[1].mlp.up_proj.weight.register_hook(poison)
    run = fastpt.train(**run_settings(tmp_path, model=model, method="full", optim=INSIDE, max_steps=4, quiet=False))
    skipped = [record.get("skipped_parameters") for record in run.history if "loss" in record]
    assert skipped == [None, ["model.layers.1.mlp.up_proj.weight"], None, None]
    assert run.metrics["skipped_steps"] == 1
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert "step 2 SKIPPED model.layers.1.mlp.up_proj.weight" in " ".join(capsys.readouterr().out.split())


def test_what_needs_all_gradients_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot clip by the norm of all gradients.*set optim.clip_norm=inf"):
        fastpt.train(**run_settings(tmp_path, optim={"in_backward": True}))
    with pytest.raises(ConfigError, match=r'"adamw" or "adamw_8bit"'):
        fastpt.train(**run_settings(tmp_path, optim={**INSIDE, "name": "adafactor"}))
    with pytest.raises(ConfigError, match=r"cannot add up the 4 micro-batches.*raise micro_batch_tokens"):
        fastpt.train(**run_settings(tmp_path, optim=INSIDE, micro_batch_tokens=1))
    with pytest.raises(ConfigError, match="not SGD"):
        fastpt.train(**run_settings(tmp_path / "own", optim={**INSIDE, "name": lambda g: torch.optim.SGD(g, lr=1.0)}))
