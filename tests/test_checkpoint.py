"""Checkpoints: whole or not there, resumed bit for bit, refused when the run has changed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastpt
from fastpt import checkpoint
from fastpt.errors import CheckpointError
from tests.runs import chat_rows, run_settings

ROOT = Path(__file__).parents[1]


def _weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ({"name": "lora", "rank": 4, "dropout": 0.1}, "fp32"),
        ("dora", "bf16"),
        ("full", "bf16"),
        ({"name": "lora", "init": "pissa"}, "fp32"),
    ],
)
def test_resume_is_bit_exact(tmp_path, method, precision):
    changes = {"method": method, "precision": precision, "save_steps": 1, "keep_checkpoints": 10}
    straight = fastpt.train(**run_settings(tmp_path / "a", **changes))
    middle = straight.path / "checkpoints/step-00000003"
    resumed = fastpt.train(**run_settings(tmp_path / "b", **changes, resume=middle))
    assert resumed.history == [] or resumed.history[0]["step"] == 4
    for name, value in _weights(straight).items():
        assert torch.equal(value, _weights(resumed)[name]), name
    losses = {r["step"]: r["loss"] for r in straight.history}
    assert {r["step"]: r["loss"] for r in resumed.history} == {step: losses[step] for step in (4, 5, 6)}


def test_resume_true_takes_the_newest_whole_one_and_cuts_the_history(tmp_path):
    changes = {"save_steps": 2, "keep_checkpoints": 10}
    straight = fastpt.train(**run_settings(tmp_path, **changes))
    folder = straight.path / "checkpoints"
    (folder / "step-00000006/optimizer.safetensors").write_bytes(b"half")
    assert checkpoint.newest(folder) == folder / "step-00000004"
    resumed = fastpt.train(**run_settings(tmp_path, **changes, resume=True))
    assert [r["step"] for r in resumed.history] == [1, 2, 3, 4, 5, 6]
    assert resumed.history[:4] == straight.history[:4]
    for name, value in _weights(straight).items():
        assert torch.equal(value, _weights(resumed)[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"data": chat_rows(11)}, "data was"),
        ({"batch_rows": 2}, "batch_rows was 4"),
        ({"optim": {"lr": 0.5}}, "optim was"),
    ],
)
def test_resume_refuses_a_changed_run(tmp_path, change, named):
    fastpt.train(**run_settings(tmp_path, save_steps=3))
    with pytest.raises(CheckpointError, match=named):
        fastpt.train(**run_settings(tmp_path, **change, resume=True))
    allowed = fastpt.train(**run_settings(tmp_path, **change, resume=True, allow_drift=True))
    assert allowed.status == "finished"
    assert allowed.history[-1]["lr"] > 0


def test_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, monkeypatch, capsys):
    def full(tensors, path, *rest):
        raise OSError(28, "No space left on device")

    class Fill:
        def on_save(self, trainer, path):
            monkeypatch.setattr(checkpoint, "save_file", full)

    run = fastpt.train(**run_settings(tmp_path, save_steps=2, callbacks=[Fill()], quiet=False))
    assert run.status == "finished"
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step-00000002"]
    said = " ".join(capsys.readouterr().out.split())
    assert "No space left" in said
    assert "GiB are free" in said


def test_full_disk_at_the_end_raises_with_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(CheckpointError, match="make room") as caught:
        fastpt.train(**run_settings(tmp_path))
    assert caught.value.run.generate("red", max_new_tokens=2) is not None


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    import fastpt
    from fastpt import checkpoint, trainer  # imported once; each boundary is a fork of this process
    from tests.runs import run_settings

    def arm(boundary):
        calls = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == boundary:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapper

        for name in ("save_file", "_sha256", "_fsync"):
            setattr(checkpoint, name, counted(getattr(checkpoint, name)))
        for name in ("rename", "write_text", "mkdir"):
            setattr(Path, name, counted(getattr(Path, name)))

    class Arm:  # from the second save on, die at the given file operation
        def __init__(self, boundary):
            self.boundary = boundary

        def on_save(self, trainer, path):
            if trainer.step == 2:
                arm(self.boundary)

    for boundary in map(int, sys.argv[2:]):
        child = os.fork()
        if child == 0:
            folder = Path(sys.argv[1]) / str(boundary)
            fastpt.train(**run_settings(folder, save_steps=2, max_steps=4, callbacks=[Arm(boundary)]))
            os._exit(0)
        print(boundary, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

BOUNDARIES = (*range(1, 36, 4), 500)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with one run per boundary, and how each ended."""
    folder = tmp_path_factory.mktemp("killed")
    script = folder / "killed.py"
    script.write_text(textwrap.dedent(KILLED).format(root=str(ROOT)))
    command = [sys.executable, str(script), str(folder), *map(str, BOUNDARIES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork may not inherit OpenMP's threads
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return folder, dict(map(int, line.split()) for line in done.stdout.splitlines() if line[:1].isdigit())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return fastpt.train(**run_settings(tmp_path_factory.mktemp("straight"), save_steps=2, max_steps=4))


def test_kill_9_at_any_moment_of_a_save_leaves_a_resumable_run(killed, straight):
    folder, endings = killed
    assert set(endings) == set(BOUNDARIES)
    assert endings[1] == -9
    assert endings[max(BOUNDARIES)] == 0, "the last boundary lies behind the save: add some"
    for boundary in BOUNDARIES:
        found = checkpoint.newest(folder / str(boundary) / "run/checkpoints")
        assert found is not None, boundary
        assert found.name in ("step-00000002", "step-00000004")
        resumed = fastpt.train(**run_settings(folder / str(boundary), save_steps=2, max_steps=4, resume=True))
        for name, value in _weights(straight).items():
            torch.testing.assert_close(value, _weights(resumed)[name], rtol=1e-5, atol=1e-6)  # other thread count
        assert [r["step"] for r in resumed.history] == [1, 2, 3, 4]


def test_no_pickle_is_written(tmp_path):
    run = fastpt.train(**run_settings(tmp_path, save_steps=3))
    kinds = {p.suffix for p in run.path.rglob("*") if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors", ".md", ".jinja", ".html"}
    assert json.loads((run.path / "run.json").read_text())["status"] == "finished"
