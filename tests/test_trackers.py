"""Tracker adapters against stubs of the libraries (none of them is installed): what is sent, resumed, refused."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from fastpt.errors import ConfigError
from fastpt.trackers import TRACKERS, make_trackers

CONFIG = {"model": "m", "optim": {"lr": 1e-4, "betas": [0.9, 0.99]}, "method": {"rank_pattern": {}}}
RUN = SimpleNamespace(status="finished")


class Calls(list):
    """Records every call made on it, whatever its name; calls return `answer`."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*args, **kwargs):
            self.append((name, args, kwargs))
            return self.answer

        return called

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self if called == name]


@pytest.fixture
def install(monkeypatch):
    def stub(name, **members):
        module = ModuleType(name)
        for key, value in members.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the adapters set is taken back after the test
        monkeypatch.delenv(name)
    return stub


def play(tracker, start=0):
    """A short run: one step, one skipped step, one evaluation."""
    trainer = SimpleNamespace(start_step=start)
    tracker.on_start(trainer)
    tracker.on_step(trainer, {"step": start + 1, "loss": 2.0, "lr": 1e-4, "tokens": 5})
    tracker.on_step(trainer, {"step": start + 2, "loss": float("nan"), "skipped": True, "rows": ["a:1"]})
    tracker.on_evaluate(trainer, {"eval_loss": 1.5})
    tracker.on_end(trainer, RUN)


def test_tensorboard_writes_scalars_beside_the_run(install, tmp_path):
    made = []

    def summary_writer(*args, **kwargs):
        made.append((args, kwargs, Calls()))
        return made[-1][2]

    install("torch.utils.tensorboard", SummaryWriter=summary_writer)
    (tracker,) = make_trackers(["tensorboard"], tmp_path, CONFIG)
    assert not made, "nothing is opened before the run starts"
    play(tracker)
    args, kwargs, writer = made[0]
    assert args == (str(tmp_path / "tensorboard"),)
    assert kwargs == {"purge_step": None}
    scalars = [args for args, _ in writer.named("add_scalar")]
    assert ("train/loss", 2.0, 1) in scalars
    assert ("train/skipped", 1.0, 2) in scalars
    assert ("eval/loss", 1.5, 2) in scalars
    assert not any(name == "train/loss" and step == 2 for name, _, step in scalars), "NaN is not sent"
    assert writer.named("close")
    play(make_trackers(["tensorboard"], tmp_path, CONFIG)[0], start=7)
    assert made[1][1] == {"purge_step": 8}


def test_wandb_sends_steps_and_resumes_the_same_run(install, tmp_path):
    started = []

    def init(**kwargs):
        assert os.environ["WANDB_ERROR_REPORTING"] == "false"
        run = Calls()
        run.__dict__ |= {"id": kwargs["id"] or "abc", "summary": {}}
        started.append((kwargs, run))
        return run

    install("wandb", init=init, Settings=lambda **kwargs: kwargs)
    play(make_trackers(["wandb"], tmp_path, CONFIG)[0])
    kwargs, run = started[0]
    assert (kwargs["id"], kwargs["resume"], kwargs["project"]) == (None, None, "fastpt")
    assert kwargs["config"] == CONFIG
    assert kwargs["settings"] == {"console": "off"}
    assert run.named("log")[0] == (({"train/loss": 2.0, "train/lr": 1e-4, "train/tokens": 5.0, "step": 1},), {})
    assert run.summary == {"status": "finished"}
    play(make_trackers(["wandb"], tmp_path, CONFIG)[0], start=10)
    assert (started[1][0]["id"], started[1][0]["resume"]) == ("abc", "allow")
    play(make_trackers(["wandb"], tmp_path, CONFIG)[0])
    assert started[2][0]["id"] is None, "a run from the beginning is a new one"


def test_mlflow_logs_flat_parameters_once(install, tmp_path):
    calls = Calls(SimpleNamespace(info=SimpleNamespace(run_id="r1")))
    names = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    install("mlflow", **{name: getattr(calls, name) for name in names})
    play(make_trackers(["mlflow"], tmp_path, CONFIG)[0])
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    ((parameters,), _) = calls.named("log_params")[0]
    assert parameters == {"model": "m", "optim.lr": "0.0001", "optim.betas": "[0.9, 0.99]", "method.rank_pattern": "{}"}
    assert calls.named("log_metrics")[-1] == (({"eval/loss": 1.5},), {"step": 2})
    assert calls.named("end_run") == [(("FINISHED",), {})]
    play(make_trackers(["mlflow"], tmp_path, CONFIG)[0], start=10)
    assert calls.named("start_run")[1][1]["run_id"] == "r1"
    assert len(calls.named("log_params")) == 1


def test_trackio_stays_local_and_resumes_by_name(install, tmp_path):
    calls, run = Calls(), Calls()
    calls.answer = run
    install("trackio", init=calls.init)
    play(make_trackers(["trackio"], tmp_path, CONFIG)[0])
    play(make_trackers(["trackio"], tmp_path, CONFIG)[0], start=5)
    (_, first), (_, second) = calls.named("init")
    assert first["name"] == second["name"] == json.loads((tmp_path / "trackers.json").read_text())["trackio"]
    assert "space_id" not in first
    assert run.named("log")[0][1] == {"step": 1}


def test_two_trackers_share_one_file_of_ids(install, tmp_path):
    calls = Calls(Calls())
    install("trackio", init=calls.init)
    install("torch.utils.tensorboard", SummaryWriter=lambda *args, **kwargs: Calls())
    for tracker in make_trackers(["trackio", "tensorboard", "trackio"], tmp_path, CONFIG):
        play(tracker)
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"trackio", "tensorboard"}
    assert len(calls.named("init")) == 1, "a name given twice counts once"


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_missing_package_is_refused_with_its_remedy(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)  # as if it were not installed
    for variable in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "true")  # a user's own wish stays
    with pytest.raises(ConfigError, match=f"pip install {TRACKERS[name].package}"):
        make_trackers([name], tmp_path, CONFIG)
    assert os.environ["WANDB_ERROR_REPORTING"] == "true"


def test_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match="'comet' is not known; there are tensorboard"):
        make_trackers(["comet"], tmp_path, CONFIG)


def test_a_tracker_that_cannot_start_stops_the_run_before_it_begins(install, tmp_path):
    def init(**kwargs):
        raise RuntimeError("api key not configured")

    install("trackio", init=init)
    (tracker,) = make_trackers(["trackio"], tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="api key not configured"):
        tracker.on_start(SimpleNamespace(start_step=0))


def test_a_tracker_that_fails_under_way_is_switched_off(install, tmp_path):
    class Gone(Calls):
        def log(self, *args, **kwargs):
            self.append(("tried", args, kwargs))
            raise ConnectionError("server is gone")

    run = Gone()
    install("trackio", init=lambda **kwargs: run)
    (tracker,) = make_trackers(["trackio"], tmp_path, CONFIG)
    with pytest.warns(UserWarning, match="server is gone"):
        play(tracker)
    assert len(run) == 1, "neither tried again nor finished"
