"""Records of a run for TensorBoard, W&B, MLflow and trackio, each imported only when a config asks for it.

What leaves the machine is what the chosen tracker is for, as its docstring says; their own usage statistics are off.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fastpt.errors import ConfigError

PROJECT = "fastpt"


class Tracker:
    """A callback that sends numbers to a tracker: `train/...` per step, `eval/...` per evaluation.

    A run that resumes goes on under the id kept in `output`/trackers.json. A tracker that fails while the run is under way
    is switched off with a warning: a server that is gone should not end hours of training.
    """

    name: str
    package: str  # what to pip install
    module: str  # what to import

    def __init__(self, output: Path, config: dict[str, Any]):
        self.output, self.config = Path(output), config
        self._is_on, self._step = False, 0
        try:
            self.library = import_module(self.module)
        except ImportError as error:
            raise ConfigError(
                f"tracker {self.name!r} needs the package {self.package} ({error}): pip install {self.package}, "
                "or leave it out of trackers"
            ) from error

    def start(self, run_id: str | None, step: int) -> str | None:
        """Begin a run, or go on with `run_id` at `step`; return the id to go on with."""
        raise NotImplementedError

    def send(self, values: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def finish(self, status: str) -> None:
        raise NotImplementedError

    def on_start(self, trainer: Any) -> None:
        ids_path = self.output / "trackers.json"
        ids = json.loads(ids_path.read_text()) if ids_path.is_file() else {}
        try:
            run_id = self.start(ids.get(self.name) if trainer.start_step else None, trainer.start_step)
        except Exception as error:
            raise ConfigError(
                f"tracker {self.name!r} could not start: {error}; mend that or leave it out of trackers"
            ) from error
        self._is_on, self._step = True, trainer.start_step
        self.output.mkdir(parents=True, exist_ok=True)
        ids_path.write_text(json.dumps(ids | {self.name: run_id}))

    def on_step(self, trainer: Any, record: dict[str, Any]) -> None:
        self._step = record["step"]
        self._guarded(self.send, {f"train/{key}": value for key, value in _numbers(record)}, self._step)

    def on_evaluate(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self._guarded(
            self.send, {f"eval/{key.removeprefix('eval_')}": value for key, value in _numbers(metrics)}, self._step
        )

    def on_end(self, trainer: Any, run: Any) -> None:
        self._guarded(self.finish, getattr(run, "status", "finished"))

    def _guarded(self, call: Any, *arguments: Any) -> None:
        if not self._is_on:
            return
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001  these libraries raise anything, and the run matters more
            self._is_on = False
            warnings.warn(f"tracker {self.name!r} failed and is off for the rest of the run: {error}", stacklevel=2)


class TensorBoard(Tracker):
    """Writes event files to `output`/tensorboard and sends nothing. Look with `tensorboard --logdir`."""

    name, package, module = "tensorboard", "tensorboard", "torch.utils.tensorboard"

    def start(self, run_id: str | None, step: int) -> None:
        # purge_step hides what an interrupted run wrote after the checkpoint that this one resumes from
        self._writer = self.library.SummaryWriter(
            str(self.output / "tensorboard"), purge_step=step + 1 if step else None
        )
        self._writer.add_text("config", f"```json\n{json.dumps(self.config, indent=2)}\n```", step)

    def send(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, status: str) -> None:
        self._writer.close()


class WandB(Tracker):
    """Sends metrics, the config and what W&B itself records (hardware and its load, versions, git state) to the W&B server.

    The server is the one `wandb login` chose; WANDB_MODE=offline keeps all under `output`/wandb. Console output is not
    captured, and W&B's reports about its own errors are off (WANDB_ERROR_REPORTING=false, unless it is set already).
    """

    name, package, module = "wandb", "wandb", "wandb"

    def __init__(self, output: Path, config: dict[str, Any]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(output, config)

    def start(self, run_id: str | None, step: int) -> str:
        self.output.mkdir(parents=True, exist_ok=True)  # wandb falls back to a temporary folder where it is missing
        self._run = self.library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self.output.name,
            dir=str(self.output),
            config=self.config,
            id=run_id,
            resume="allow" if run_id else None,
            settings=self.library.Settings(console="off"),
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own counter may only grow; a resumed run steps back
        return self._run.id

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish()


class MLflow(Tracker):
    """Sends metrics and the config to where MLFLOW_TRACKING_URI points (by default a file in the working directory).

    MLflow's usage statistics are off (MLFLOW_DISABLE_TELEMETRY=true, unless it is set already).
    """

    name, package, module = "mlflow", "mlflow", "mlflow"

    def __init__(self, output: Path, config: dict[str, Any]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        super().__init__(output, config)

    def start(self, run_id: str | None, step: int) -> str:
        if run_id is None:
            self.library.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = self.library.start_run(run_id=run_id, run_name=self.output.name)
        if run_id is None:
            self.library.log_params({name: str(value)[:500] for name, value in _flat(self.config)})
        return run.info.run_id

    def send(self, values: dict[str, float], step: int) -> None:
        self.library.log_metrics(values, step=step)

    def finish(self, status: str) -> None:
        self.library.end_run("FINISHED" if status == "finished" else "KILLED")


class Trackio(Tracker):
    """Writes to trackio's local database (TRACKIO_DIR); sends to a Hugging Face Space only if TRACKIO_SPACE_ID names one."""

    name, package, module = "trackio", "trackio", "trackio"

    def start(self, run_id: str | None, step: int) -> str:
        name = run_id or f"{self.output.name}-{os.urandom(3).hex()}"
        self._run = self.library.init(project=PROJECT, name=name, config=self.config, resume="allow", embed=False)
        return name

    def send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self, status: str) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, MLflow, Trackio)}


def make_trackers(names: Iterable[str], output: Path, config: dict[str, Any]) -> list[Tracker]:
    """Callbacks for the trackers of these names; `config` is the resolved config as plain data.

    Raises: ConfigError for an unknown name, and for a package that is not installed, with the command that installs it.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ConfigError(f"tracker {unknown[0]!r} is not known; there are {', '.join(TRACKERS)}")
    return [TRACKERS[name](output, config) for name in names]


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a record; trackers differ in what they do with NaN, and a skipped step is counted as such."""
    for key, value in record.items():
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
            yield key, float(value)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
