"""Optimizers by name: each learns, resumes to the bit, and says what it cannot do."""

import sys
import types

import pytest
import torch

import fastpt
from fastpt.errors import ConfigError
from fastpt.optim.others import Several
from tests.runs import run_settings
from tests.tiny import tiny_model


class _ScheduleFree(torch.optim.SGD):
    """Stands for the package: trains at one point, is evaluated at another."""

    def __init__(self, groups, lr, betas, eps, weight_decay):
        super().__init__(groups, lr=0.1)
        self.modes = []

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")


def settings_of(name):
    extra = {"schedule": "constant"} if name == "schedule_free" else {}
    return {"method": "full", "optim": {"name": name, "lr": 3e-3, "warmup": 0, **extra}}


@pytest.fixture
def schedulefree(monkeypatch):
    module = types.ModuleType("schedulefree")
    module.AdamWScheduleFree = _ScheduleFree
    monkeypatch.setitem(sys.modules, "schedulefree", module)


@pytest.mark.parametrize("name", ["adamw_8bit", "muon", "adafactor"])
def test_learns_and_resumes_to_the_bit(tmp_path, name):
    straight = fastpt.train(**run_settings(tmp_path / "straight", **settings_of(name), max_steps=8))
    cut = run_settings(tmp_path / "cut", **settings_of(name), max_steps=8, save_steps=4, keep_checkpoints=9)
    fastpt.train(**cut)
    cut = run_settings(tmp_path / "cut", **settings_of(name), max_steps=8, save_steps=4, keep_checkpoints=9)
    resumed = fastpt.train(**cut, resume=tmp_path / "cut/run/checkpoints/step-00000004")
    losses = [[record["loss"] for record in run.history if "loss" in record] for run in (straight, resumed)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_hidden_matrices(tmp_path):
    trainer = fastpt.trainer.Trainer(**run_settings(tmp_path, **settings_of("muon")))
    trainer.prepare()
    assert isinstance(trainer.optimizer, Several)
    kinds = {
        name: type(part).__name__ for part in trainer.optimizer.parts for g in part.param_groups for name in g["names"]
    }
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "Muon"
    assert kinds["model.embed_tokens.weight"] == kinds["model.norm.weight"] == "AdamW"
    assert set(kinds) == {name for name, _ in trainer.model.named_parameters()}


def test_schedule_free_knows_when_it_is_evaluated(tmp_path, schedulefree):
    trainer = fastpt.trainer.Trainer(
        **run_settings(tmp_path, **settings_of("schedule_free"), max_steps=2, save_steps=2)
    )
    trainer.run()
    assert trainer.optimizer.modes == ["train", "eval", "train", "eval"]  # steps, the checkpoint, what is kept


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match="pip install schedulefree"):
        fastpt.train(**run_settings(tmp_path, **settings_of("schedule_free")))
    with pytest.raises(ConfigError, match=r'set optim\.schedule="constant"'):
        fastpt.train(**run_settings(tmp_path, optim="schedule_free"))
    for name in ("muon", "adafactor"):
        with pytest.raises(ConfigError, match=r"keeps no float32 masters.*precision=\"fp32\""):
            fastpt.train(**run_settings(tmp_path / name, **settings_of(name), model=tiny_model("llama").bfloat16()))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"a torch with torch\.optim\.Muon"):
        fastpt.train(**run_settings(tmp_path / "old", **settings_of("muon")))
