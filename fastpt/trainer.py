"""The training loop, readable from top to bottom: prepare, step, evaluate, save. It knows no objective and no model family.

A step accumulates loss *sums* over packed micro-batches and divides the gradients once by the number of trained tokens, so
accumulation, packing and batch order do not change the result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastpt import checkpoint, models, ops
from fastpt.activations import Offload, set_policy
from fastpt.adapters import apply_method, count_parameters, is_fresh
from fastpt.config import Config, build, to_json
from fastpt.console import Console
from fastpt.data.feed import Step
from fastpt.data.render import show_example
from fastpt.errors import CheckpointError, TrainingError
from fastpt.evaluation import evaluate_set
from fastpt.forensics import non_finite_rows
from fastpt.fusion import fuse
from fastpt.interrupt import stop_on_signals
from fastpt.memory import is_out_of_memory, peak_bytes
from fastpt.objectives import make_objective
from fastpt.objectives.base import ratio
from fastpt.optim import PullToStart, StepInBackward, clipped_step, make_optimizer, weights_for
from fastpt.optim.schedule import lr_scale
from fastpt.preparation import examples_of, make_feed, read_rows, settle_max_length, settle_memory, settle_output
from fastpt.records import Best, History
from fastpt.run import Run, environment
from fastpt.scorer import ModelScorer
from fastpt.trackers import make_trackers


def train(
    model: Any,
    data: Any,
    objective: Any = "sft",
    method: Any = "lora",
    eval_data: Any = None,
    output: str | Path = "runs/last",
    seed: int = 0,
    max_steps: int | None = None,
    epochs: float = 1.0,
    resume: bool | str | Path = False,
    **config: Any,
) -> Run:
    """Post-train a model and return the finished run.

    `model` is a hub id, a local path, a GGUF file or an nn.Module; `data` a file, a hub id,
    a datasets.Dataset or a list of dicts.
    Any other field of fastpt.config.Config is a keyword too, nested (`optim={"lr": 1e-4}`) or dotted (`**{"optim.lr": 1e-4}`).
    Ctrl-C and SIGTERM save a checkpoint and return the run so far (`run.status == "interrupted"`).
    Raises: ConfigError, DataError, ModelError before any work is done; TrainingError, CheckpointError later.
    """
    named = {
        "model": model,
        "data": data,
        "objective": objective,
        "method": method,
        "eval_data": eval_data,
        "output": output,
    }
    settings = {**named, "seed": seed, "max_steps": max_steps, "epochs": epochs, "resume": resume, **config}
    return Trainer(**settings).run()


class Trainer:
    """One run: `run()` does all of it; `prepare()` and then `steps()` give the steps one by one."""

    def __init__(self, **settings: Any):
        self.config: Config = build(settings)
        self.objective = make_objective(self.config.objective)
        self.trackers = make_trackers(self.config.trackers, self.config.output, json.loads(to_json(self.config)))
        self.console = Console(quiet=self.config.quiet)
        self.metrics: dict[str, Any] = {}
        self.step = self.start_step = 0
        self.best = Best(self.config.best_metric, self.config.patience, self.config.min_delta)
        self.totals = {"tokens": 0, "trained_tokens": 0, "seconds": 0.0, "skipped_steps": 0}
        self.status, self.started = "finished", time.time()

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load everything, say what was decided and why, and resume where that was asked for."""
        config = self.config
        torch.manual_seed(config.seed)
        self.output = settle_output(config, self.console.say)
        self.history = History(self.output / "history.jsonl")
        self.device = models.choose_device(config.device)
        self.dtype, reason = models.choose_precision(config.precision, self.device)
        rows = read_rows(config.data)  # before the model: a missing file should not cost a model load
        eval_rows = read_rows(config.eval_data) if config.eval_data is not None else None
        self.asked = asked = self.objective.survey(rows, eval_rows, config.data.columns)
        loaded = models.load(
            config.model,
            tokenizer=config.tokenizer,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=config.trust_remote_code,
            is_quantised=config.method.name == "qlora",
            task=self.objective.task,
            settings=asked,
            added_tokens=config.added_tokens,
        )
        self.tokenizer, self.source = loaded.tokenizer, loaded.source
        self.max_length = settle_max_length(config, loaded.model, self.console.say)
        config, self.watch = settle_memory(config, loaded.model, self.max_length, self.device, self.console.say)
        self.config = config
        torch.manual_seed(config.seed)  # the adapter's initial values do not depend on what loading drew
        self.model = apply_method(loaded.model, config.method, self.objective.task, loaded.new_rows)
        self.objective.attach(self.model, self.device, self.dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32  # gradients add up over micro-batches in float32
        self.handle = fuse(self.model)
        set_policy(self.model, config.activations, offload=Offload(self.output))
        self.scorer = ModelScorer(self.model, is_fresh(self.model), config.neftune)
        self.optimizer = make_optimizer(self.model, config)
        self.in_backward = StepInBackward(self.optimizer) if config.optim.in_backward else None
        self.pull = PullToStart(self.optimizer, config.optim.l2_start) if config.optim.l2_start else None
        self._prepare_data(rows, eval_rows)
        trained, total = count_parameters(self.model)
        self.console.say(
            f"{config.method.name}: {trained:,} of {total:,} parameters trained, on {self.device} in {self.dtype} ({reason})"
        )
        self.output.mkdir(parents=True, exist_ok=True)
        if config.resume:
            self._resume()
        (self.output / "config.json").write_text(to_json(config))

    def _prepare_data(self, rows: Any, eval_rows: Any) -> None:
        config, common = self.config, (self.objective, self.tokenizer, self.max_length, self.console.say)
        self.micro_tokens = config.micro_batch_tokens or max(2048, self.max_length)
        self.eval_data = None
        if config.eval_data is not None:
            self.eval_data = examples_of(eval_rows, config.eval_data, *common)
        self.feed = make_feed(rows, config, self.micro_tokens, *common, self.scorer)
        if self.eval_data is not None:
            self.objective.enrich(self.scorer, self.eval_data, self.micro_tokens, self.console.say)
        self._steps = iter(self.feed)
        self.console.show_sample(
            show_example(self.feed.sample(), self.tokenizer), "first example, trained tokens marked"
        )
        self.total_steps = config.max_steps or max(1, math.ceil(self.feed.steps_per_epoch * config.epochs))

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        """Train to the end (or to a signal), evaluate, save, and return the run."""
        self.prepare()
        try:
            for _ in self.steps():
                pass
            if self.eval_data is not None and self.status == "finished" and not self._evaluated_now:
                self._evaluate()
            run = self._finish()
        except BaseException:
            self.console.close()
            raise
        for listener in self._listeners("on_end"):
            listener(self, run)
        return run

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train, yielding one record per optimizer step; logging, evaluation and checkpoints happen on the way."""
        for listener in self._listeners("on_start"):
            listener(self)
        self.model.train()
        weights_for(self.optimizer, "train")
        self.watch.begin(self.optimizer)
        with stop_on_signals() as stop:
            while self.step < self.total_steps and not stop and not self.best.is_over:
                micro = next(self._steps)
                record = self._guarded_step(micro)
                self._record(record)
                yield record
                self._evaluate_and_save_when_due()
            if stop:
                self.status = "interrupted"
                self.console.say(f"{stop.signal}: saving and stopping after step {self.step}")
                self._save()
        if self.best.patience is not None and not stop:
            self._take_best()

    def _guarded_step(self, micro: Step) -> dict[str, Any]:
        try:
            return self._train_step(micro)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory at step {self.step + 1} with micro-batches of up to {self.micro_tokens} tokens "
                f"(peak {peak_bytes(self.device) / 2**30:.1f} GiB): lower micro_batch_tokens (the result stays the same), set "
                'activations="recompute", or lower max_length; checkpoints so far are kept'
            ) from error

    def _train_step(self, micro: Step) -> dict[str, Any]:
        started = time.perf_counter()
        lr = self._set_lr()
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        sums: dict[str, torch.Tensor] = {}
        count, tokens = 0.0, 0
        for examples in micro:
            batch = self.scorer.batch(examples)
            loss, metrics = self.objective.loss(self.scorer, batch)
            if self.in_backward is not None:
                self.in_backward.begin(micro_batches=len(micro), count=batch.count)
            loss.backward()
            loss_sum += loss.detach()
            count, tokens = count + batch.count, tokens + batch.tokens
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.detach()
        count = max(count, 1e-12)
        if self.pull is not None:
            self.pull.add_to_gradients(count)
        if self.in_backward is not None:
            norm = self.in_backward.norm() / count
        else:
            norm = ops.grad_norm([p.grad for p in self.parameters if p.grad is not None]) / count
        # the one host sync of the step
        loss, grad_norm, *totals = torch.stack(
            [loss_sum / count, norm, *(ratio(value, count) for value in sums.values())]
        ).tolist()
        record = {
            "step": self.step + 1,
            "epoch": round(self.feed.progress, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if self.in_backward is not None:
            record |= self.in_backward.skipped()
            self.totals["skipped_steps"] += "skipped" in record
        elif math.isfinite(loss) and math.isfinite(grad_norm):
            clipped_step(self.optimizer, 1.0 / count, grad_norm, self.config.optim.clip_norm)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            examples = [example for one in micro for example in one]
            record |= {"skipped": True, "rows": non_finite_rows(self.objective, self.scorer, examples, self.parameters)}
            self.totals["skipped_steps"] += 1
        seconds = time.perf_counter() - started
        self.totals["tokens"] += tokens
        self.totals["trained_tokens"] += round(count)
        self.totals["seconds"] += seconds
        record |= dict(zip(sums, totals, strict=True))
        rate = {"tokens": tokens, "trained_tokens": round(count), "tokens_per_s": tokens / seconds, "step_s": seconds}
        return record | rate | {"peak_bytes": self.watch.after_step()}

    def _set_lr(self) -> float:
        scale = lr_scale(self.config.optim, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
        return self.optimizer.param_groups[0]["lr"]

    # ---- records, evaluation, checkpoints -----------------------------------------------------------------------------

    def _listeners(self, event: str) -> list[Any]:
        everyone = [self.console, *self.trackers, *self.config.callbacks]
        return [getattr(one, event) for one in everyone if hasattr(one, event)]

    def _record(self, record: dict[str, Any]) -> None:
        self.step += 1
        self._evaluated_now = False
        if self.step % self.config.logging_steps == 0 or record.get("skipped") or self.step == self.total_steps:
            self.history.add(record)
        for listener in self._listeners("on_step"):
            listener(self, record)

    def _evaluate_and_save_when_due(self) -> None:
        config, at_end_of_epoch = self.config, self.feed.at_end_of_epoch
        last = self.step == self.total_steps
        due = self.step % config.eval_steps == 0 if config.eval_steps else at_end_of_epoch
        improved = self.eval_data is not None and (due or last) and self._evaluate()
        due = self.step % config.save_steps == 0 if config.save_steps else at_end_of_epoch
        if due or improved:
            self._save(best=improved)

    def _evaluate(self) -> bool:
        """Evaluate on the held-out rows; true when the best metric improved."""
        assert self.eval_data is not None
        weights_for(self.optimizer, "eval")
        found = evaluate_set(self.objective, self.scorer, self.model, self.eval_data, self.micro_tokens)
        weights_for(self.optimizer, "train")
        self.metrics.update(found)
        self._evaluated_now = True
        self.history.add({"step": self.step, **found})
        for listener in self._listeners("on_evaluate"):
            listener(self, found)
        return self.best.update(self.step, found)

    def _take_best(self) -> None:
        """Of a run with patience: the weights and the metrics of its best evaluation."""
        best, why = self.best, f"{self.best.metric} was not better in the last {self.best.since} evaluations"
        if best.is_over:
            self.console.say(f"stopping after step {self.step}: {why}")
        if best.found is None or best.found["step"] == self.step:
            return
        path = self.output / "checkpoints" / f"step-{best.found['step']:08d}"
        checkpoint.load(path, model=self.model, optimizer=self.optimizer)
        self.metrics.update(next(r for r in self.history if r["step"] == best.found["step"] and best.metric in r))
        self.metrics.pop("step", None)
        self._evaluated_now = True
        self.console.say(f"the model is that of step {best.found['step']}, {best.metric} {best.found['value']:.4g}")

    def _save(self, *, best: bool = False) -> None:
        """Write a checkpoint. A failed one is said aloud and does not end the run: the earlier ones are still there."""
        folder = self.output / "checkpoints"
        state = {
            "step": self.step, "position": self.feed.position(), "drift": self._drift_keys(),
            "best": self.best.state(), "totals": self.totals, "metrics": self.metrics,
        }  # fmt: skip
        weights_for(self.optimizer, "eval")
        try:
            path = checkpoint.save(
                folder / f"step-{self.step:08d}", model=self.model, optimizer=self.optimizer, state=state
            )
        except CheckpointError as error:
            self.console.warn(str(error))
            return
        finally:
            weights_for(self.optimizer, "train")
        checkpoint.prune(folder, self.config.keep_checkpoints, self.best.found)
        for listener in self._listeners("on_save"):
            listener(self, path)

    def _drift_keys(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        tree = json.loads(to_json(self.config))
        chosen = {
            "model": self.source,
            "method": tree["method"],
            "optim": tree["optim"],
            "objective": repr(self.objective),
        }
        rows = {"data": self.feed.fingerprint, "max_length": self.max_length, "too_long": self.config.data.too_long}
        return {**chosen, **rows, "total_steps": self.total_steps, **self.feed.settings}

    def _resume(self) -> None:
        wanted = self.config.resume
        found = Path(wanted) if not isinstance(wanted, bool) else checkpoint.newest(self.output / "checkpoints")
        if found is None:
            self.console.say(f"resume: {self.output} has no whole checkpoint, starting from the beginning")
            return
        saved = checkpoint.read_state(found)["run"]
        changed = {
            key: (old, self._drift_keys().get(key))
            for key, old in saved["drift"].items()
            if self._drift_keys().get(key) != old
        }
        if changed and not self.config.allow_drift:
            listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items())
            raise CheckpointError(f"{found} was made by another run: {listed}; undo that, or set allow_drift=true")
        checkpoint.load(found, model=self.model, optimizer=self.optimizer)
        self.feed.seek(saved["position"])
        self._steps = iter(self.feed)
        self.step = self.start_step = saved["step"]
        self.best.load(saved["best"])
        self.totals, self.metrics = saved["totals"], saved["metrics"]
        self.history.keep_until(self.step)
        self.console.say(f"resumed from {found} at step {self.step}")

    def _finish(self) -> Run:
        """Write the trained model and the run's records; a full disk raises, with the run on the error (`error.run`)."""
        weights_for(self.optimizer, "eval")
        seconds = max(self.totals["seconds"], 1e-9)
        self.metrics |= {**self.totals, "steps": self.step, "tokens_per_s": self.totals["tokens"] / seconds}
        self.watch.tell(self.metrics, self.console.say)
        run = Run(
            path=self.output, model=self.model, tokenizer=self.tokenizer, metrics=self.metrics, history=self.history,
            status=self.status, handle=self.handle, best=self.best.found,
        )  # fmt: skip
        try:
            run.save(self._about())
        except CheckpointError as error:
            error.run = run  # type: ignore[attr-defined]
            raise
        return run

    def _about(self) -> dict[str, Any]:
        """run.json: what the run was, for whoever reads it or goes on from it."""
        trained, total = count_parameters(self.model)
        model = {
            "source": self.source, "task": self.objective.task, "settings": self.asked, "parameters": total,
            "trained_parameters": trained, "precision": str(self.dtype), "device": str(self.device),
        }  # fmt: skip
        return {
            "config": json.loads(to_json(self.config)), "status": self.status, "metrics": self.metrics,
            "best": self.best.found, "model": model, "data": self.feed.summary(), "environment": environment(),
            "started": self.started, "seconds": time.time() - self.started,
        }  # fmt: skip
