"""Averages of the weights, the pull to the start, rates by layer, frozen parameters, early stopping; and each resumed exactly."""

import copy
import json

import numpy as np
import pytest
import torch

import fastpt
from fastpt.adapters import apply_method
from fastpt.config import MethodConfig, build
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.errors import ConfigError
from fastpt.evaluation import evaluate_set
from fastpt.optim import PullToStart
from fastpt.optim.groups import layers_above, parameter_groups
from fastpt.records import Best
from fastpt.scorer import ModelScorer
from fastpt.trainer import Trainer
from tests.runs import chat_rows, run_settings
from tests.tiny import tiny_model

OPTIM = {"lr": 1e-2, "warmup": 0}


def weights_of(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "extra",
    [{"ema": 0.9}, {"neftune": 5.0}, {"l2_start": 0.1}, {"layer_decay": 0.5}, {"ema": 0.9, "rounding": "stochastic"}],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, extra, precision):
    model = tiny_model("llama").to(torch.bfloat16 if precision == "bf16" else torch.float32)
    extra = dict(extra)
    changes = {
        "neftune": extra.pop("neftune", None),
        "optim": {**OPTIM, **extra},
        "method": "full",
        "save_steps": 3,
        "keep_checkpoints": 9,
        "precision": precision,
        "eval_data": chat_rows(4, seed=1),
        "eval_steps": 2,
    }
    straight = fastpt.train(**run_settings(tmp_path / "a", model=copy.deepcopy(model), **changes))
    middle = tmp_path / "a" / "run" / "checkpoints" / "step-00000003"
    resumed = fastpt.train(**run_settings(tmp_path / "b", model=copy.deepcopy(model), **changes, resume=middle))
    for name, value in weights_of(straight).items():
        assert torch.equal(value, weights_of(resumed)[name]), name
    assert straight.metrics["eval_loss"] == resumed.metrics["eval_loss"]


def test_the_average_is_what_is_evaluated_and_delivered(tmp_path):
    decay, seen, averages = 0.9, [], []

    class Watch:
        def on_step(self, trainer, record):
            seen.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})

    settings = run_settings(
        tmp_path, optim={**OPTIM, "ema": decay}, eval_data=chat_rows(4, seed=1), callbacks=[Watch()], eval_steps=10
    )
    trainer = Trainer(**settings)
    run = trainer.run()
    for step, weights in enumerate(seen, start=1):
        keep = min(decay, (1 + step) / (10 + step))
        before = averages[-1] if averages else weights
        averages.append({name: keep * before[name] + (1 - keep) * weights[name] for name in weights})
    for name, value in weights_of(run).items():
        torch.testing.assert_close(value, averages[-1][name])
        assert not torch.equal(value, seen[-1][name])
    arguments = trainer.objective, trainer.scorer, run.model, trainer.eval_data, trainer.micro_tokens
    assert evaluate_set(*arguments)["eval_loss"] == run.metrics["eval_loss"]


def test_the_pull_is_the_gradient_of_the_squared_distance():
    layer = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pull = PullToStart(optimizer, strength=0.5)
    with torch.no_grad():
        layer.weight += torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 4.0]])
    layer.weight.grad = torch.full((2, 3), 6.0)  # a sum over 3 tokens
    pull.add_to_gradients(count=3.0)
    torch.testing.assert_close(layer.weight.grad / 3, torch.tensor([[2.5, 1.0, 2.0], [2.25, 2.0, 4.0]]))


def test_a_pull_keeps_the_weights_near_the_start(tmp_path):
    model, far = tiny_model("llama"), {}
    for strength in (0.0, 100.0):
        optim = {**OPTIM, "l2_start": strength}
        run = fastpt.train(
            **run_settings(tmp_path / str(strength), model=copy.deepcopy(model), method="full", optim=optim)
        )
        start = dict(model.named_parameters())
        far[strength] = sum((p - start[name]).square().sum().item() for name, p in run.model.named_parameters())
    assert far[100.0] < 0.5 * far[0.0]


def test_rates_fall_with_each_layer_below_the_head():
    model = tiny_model("llama", num_hidden_layers=3)
    config = build({"model": model, "data": [], "method": "full", "optim": {"lr": 1.0, "layer_decay": 0.5}})
    rates = {name: g["lr"] for g in parameter_groups(model, config) for name in g["names"]}
    assert rates["model.embed_tokens.weight"] == 0.5**4
    assert [rates[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["model.norm.weight"] == 1.0


@pytest.mark.parametrize(("family", "first"), [("gpt2", "transformer.wte"), ("bert", "embeddings.word_embeddings")])
def test_layers_of_other_families_have_their_place(family, first):
    model = tiny_model(family)
    above = layers_above(model)
    layers = model.config.num_hidden_layers
    assert set(range(1, layers + 2)) <= set(above.values())
    assert {above[name] for name in above if first in name} == {layers + 1}


def test_frozen_parameters_stay_as_they_are(tmp_path):
    model = tiny_model("llama")
    before = copy.deepcopy(dict(model.named_parameters()))
    method = {"name": "full", "frozen": ["embed", r"layers\.0\."]}
    run = fastpt.train(**run_settings(tmp_path, model=model, method=method))
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embed" in name or "layers.0." in name for name in changed)
    with pytest.raises(ConfigError, match=r"method.frozen: 'head_of' matches no parameter; there are, for example,"):
        apply_method(tiny_model("llama"), MethodConfig(name="full", frozen=["head_of"]))


def test_a_run_with_patience_ends_and_delivers_its_best(tmp_path):
    changes = {"optim": {"lr": 0.3, "warmup": 0, "schedule": "constant"}, "eval_data": chat_rows(6, seed=1)}
    trainer = Trainer(**run_settings(tmp_path, **changes, eval_steps=1, save_steps=100, patience=3, max_steps=60))
    run = trainer.run()
    evaluations = [r for r in run.history if "eval_loss" in r]
    best = min(evaluations, key=lambda r: r["eval_loss"])
    assert run.metrics["steps"] == best["step"] + 3 < 60
    assert run.best == {"step": best["step"], "metric": "eval_loss", "value": best["eval_loss"]}
    assert run.metrics["eval_loss"] == best["eval_loss"]
    arguments = trainer.objective, trainer.scorer, run.model, trainer.eval_data, trainer.micro_tokens
    assert evaluate_set(*arguments)["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert json.loads((run.path / "run.json").read_text())["best"] == run.best


@pytest.mark.parametrize("is_fused", [True, False])
def test_noise_on_the_embeddings_is_as_large_as_each_document_asks(is_fused):
    model = tiny_model("llama").train()
    if is_fused:
        fastpt.fuse(model)
    width, alpha, seen = model.config.hidden_size, 5.0, []
    scorer = ModelScorer(model, neftune=alpha)
    model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[2].detach()))
    sizes = (3, 40)
    examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, bool), None, "") for n in sizes]
    batch = collate(examples)
    torch.manual_seed(0)
    scorer.hidden(batch)
    noise = (seen[-1] - model.get_input_embeddings().weight[batch.input_ids]).view(-1, width).split(sizes)
    for part, tokens in zip(noise, sizes, strict=True):
        bound = alpha / (tokens * width) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * 1.0001
        assert part.mean().abs() < 0.2 * bound
    with torch.no_grad():
        scorer.hidden(batch)
    model.eval()
    scorer.hidden(batch)
    for later in seen[1:]:
        assert torch.equal(later, model.get_input_embeddings().weight[batch.input_ids])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_noise_reaches_what_an_encoder_reads(family):
    model = tiny_model(family).train()
    fastpt.fuse(model)
    scorer = ModelScorer(model, neftune=5.0)
    target, source = np.arange(3, dtype=np.int32), np.arange(6, dtype=np.int32)
    batch = collate([Example(target, np.ones(3, bool), None, "", source=source)] * 2)
    assert not torch.equal(scorer.hidden(batch), scorer.hidden(batch))
    assert scorer._noise.lengths.tolist() == [6, 6]
    model.eval()
    assert torch.equal(scorer.hidden(batch), scorer.hidden(batch))


def test_a_small_gain_is_no_gain():
    best = Best("+eval_f1", patience=2, min_delta=0.1)
    told = [best.update(step, {"eval_f1": value}) for step, value in enumerate([0.5, 0.55, 0.65, 0.7, 0.74], start=1)]
    assert told == [True] * 5  # each is the best so far and kept as that
    assert best.since == 2  # since 0.65
    assert best.is_over


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"optim": {"in_backward": True, "clip_norm": None, "ema": 0.9}},
            "in_backward has no moment after all gradients",
        ),
        ({"optim": {"name": "schedule_free", "schedule": "constant", "ema": 0.9}}, "averages the weights itself"),
        ({"method": {"name": "lora", "frozen": ["embed"]}}, 'method.frozen is for method "full"'),
        ({"patience": 2}, "patience counts evaluations: it needs eval_data"),
    ],
)
def test_what_does_not_go_together_is_told(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build({"model": "m", "data": [], **settings})
