"""Time training steps of fastpt and its peers on the same rows: python -m benchmarks.train_step --model DIR --work packed.

`--objective` takes the rows and the peers of another objective: classify (transformers' Trainer, an encoder), dpo and grpo (TRL's
trainers), seq2seq (Seq2SeqTrainer, a random encoder-decoder without --model).
Each peer has a process of its own; they take turns round by round, so that drift of the machine hits all alike. The first step of
a round warms memory and caches and is not timed (the very first one also compiles and packs); medians are reported.
`fastpt_is` compares rows a second round by round, which all spend on the same rows: median, lowest and highest ratio.
`peak_above_weights_bytes` is the peak from then on, minus what is resident after imports and with all weights touched:
gradients, optimizer state, activations and copies of weights in another layout.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import harness, rows, toy, translators, worker
from benchmarks.peers import Job, Peer, save_adapter
from benchmarks.tasks import TASKS, WORKS
from fastpt.errors import FastptError

ROUNDS = 3


class Contestant:
    """The parent's end of one peer: what it measured so far, or why it is out."""

    def __init__(self, name: str, entry: type[Peer], job: Job, steps_per_round: int, log: Path):
        self.name, self.log = name, log
        self.built: dict[str, int] = {}
        self.rounds: list[list[worker.Step]] = []
        self.peak_bytes = 0
        self.failure: str | None = None
        self.batch_rows = job.batch_rows
        self.absence = entry.missing()
        if self.absence is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            arguments = (theirs, entry, job, steps_per_round, str(log))
            self._process = context.Process(target=worker.main, args=arguments, daemon=True)
            self._process.start()
            theirs.close()

    @property
    def is_running(self) -> bool:
        return self.absence is None and self.failure is None

    def wait_until_built(self) -> None:
        self.built = self._receive() or {}

    def run_round(self) -> None:
        answer = self._receive("go")
        if answer:
            self.rounds.append(answer["steps"])
            self.peak_bytes = answer["peak_bytes"]

    def stop(self) -> None:
        if self.absence is not None:
            return
        with suppress(ConnectionError):
            self._connection.send("stop")
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()

    def _receive(self, order: str | None = None) -> dict[str, Any] | None:
        try:
            if order is not None:
                self._connection.send(order)
            kind, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            kind, answer = "failed", f"its process ended with code {self._process.exitcode} (-9: out of memory?)"
        if kind == "failed":
            self.failure = f"{answer}\n{_tail(self.log)}"
            return None
        return answer

    def record(self) -> dict[str, Any]:
        """The figures of its JSON line; rounds that were finished count even if a later one failed."""
        found: dict[str, Any] = {"peer": self.name, "skipped": self.absence, "failed": self.failure}
        found = {key: value for key, value in found.items() if value is not None}
        if not self.rounds:
            return found if len(found) > 1 else {**found, "skipped": "stopped before its first round"}
        timed = [steps[1:] for steps in self.rounds]
        seconds = [sum(step.seconds for step in steps) for steps in timed]
        rates = [sum(step.tokens for step in steps) / took for steps, took in zip(timed, seconds, strict=True)]
        row_rates = [len(steps) * self.batch_rows / took for steps, took in zip(timed, seconds, strict=True)]
        rollout_s = sum(step.rollout_s for steps in timed for step in steps)
        if rollout_s:
            found["rollout_tokens_per_s"] = sum(step.tokens for steps in timed for step in steps) / rollout_s
        return {
            **found,
            "tokens_per_s": statistics.median(rates),
            "rows_per_s": statistics.median(row_rates),
            "step_s": statistics.median(step.seconds for steps in timed for step in steps),
            "peak_bytes": self.peak_bytes,
            **self.built,
            "peak_above_weights_bytes": self.peak_bytes - self.built["resident_bytes"],
            "tokens": sum(step.tokens for steps in timed for step in steps),
            "rounds_tokens_per_s": rates,
            "rounds_rows_per_s": row_rates,
            "losses": [step.loss for steps in self.rounds for step in steps],
        }


def compare(
    entries: dict[str, type[Peer]], job: Job, steps_per_round: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Run all peers in turns; one record per peer, also for those that could not take part."""
    with tempfile.TemporaryDirectory() as logs:
        contestants = [
            Contestant(name, entry, job, steps_per_round, Path(logs) / f"{i}.log")
            for i, (name, entry) in enumerate(entries.items())
        ]
        return take_turns(contestants, rounds, console)


def take_turns(contestants: list[Contestant], rounds: int, console: Console) -> list[dict[str, Any]]:
    """Run the contestants round by round; one record each."""
    try:
        for one in contestants:
            if one.is_running:
                one.wait_until_built()
        for number in range(1, rounds + 1):
            for one in contestants:
                if one.is_running:
                    one.run_round()
                    console.print(f"round {number}/{rounds}  {one.name:12} {_last_round(one)}")
    except KeyboardInterrupt:
        console.print("stopped: reporting the rounds that were finished")
    finally:
        for one in contestants:
            one.stop()
    return [one.record() for one in contestants]


def _last_round(one: Contestant) -> str:
    if one.failure:
        return "failed"
    return ", ".join(f"{step.seconds:.2f} s" for step in one.rounds[-1]) + f", loss {one.rounds[-1][-1].loss:.4f}"


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def add_ratios(records: list[dict[str, Any]]) -> None:
    """`fastpt_is`: how many times as fast, in each round that both finished. By rows, which all see alike: a prompt before two
    answers is fewer tokens to whom it is one."""
    rates = {r["peer"]: r["rounds_rows_per_s"] for r in records if "rounds_rows_per_s" in r}
    ours = rates.get("fastpt") or rates.get("hf-trainer+fuse")
    for r in records:
        if ours and r["peer"] in rates:
            found = [mine / theirs for mine, theirs in zip(ours, rates[r["peer"]], strict=False)]
            r["fastpt_is"] = {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}


def _ratio(record: dict[str, Any]) -> str:
    found = record.get("fastpt_is")
    return f"{found['median']:.2f} × ({found['lowest']:.2f}–{found['highest']:.2f})" if found else ""


def show(records: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    columns = (
        "peer",
        "tokens/s",
        "rows/s",
        "fastpt is",
        "step",
        "peak",
        "weights",
        "above weights",
        "first loss",
        "last loss",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for r in records:
        if "tokens_per_s" not in r:
            continue
        table.add_row(
            r["peer"], f"{r['tokens_per_s']:.0f}", f"{r['rows_per_s']:.1f}", _ratio(r),
            f"{r['step_s']:.3f} s", *(f"{r[key] / 2**20:.0f} MiB" for key in
            ("peak_bytes", "weights_bytes", "peak_above_weights_bytes")),
            f"{r['losses'][0]:.4f}", f"{r['losses'][-1]:.4f}",
        )  # fmt: skip
    console.print(table)


def versions() -> dict[str, str | None]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: of(package) for package in ("torch", "transformers", "peft", "trl", "datasets", "fastpt")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model, for classify of an encoder")
    parser.add_argument("--objective", choices=list(TASKS), help="default: the work's own")
    parser.add_argument("--work", choices=list(WORKS), help="the rows (default: the objective's own, packed for sft)")
    parser.add_argument("--mode", choices=["lora", "qlora", "full"], help="default: lora, of encoders full")
    parser.add_argument(
        "--peers", help="by name: " + "; ".join(f"{o}: {','.join(t.entries)}" for o, t in TASKS.items())
    )
    parser.add_argument("--batch", type=int, help="rows a step (default: what the work has in benchmarks/tasks.py)")
    parser.add_argument("--seq", type=int, help="tokens a row at most, or of grpo's answers (default: 512, 64)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each peer")
    parser.add_argument(
        "--precision", choices=["own", "fp32"], default="own", help="fp32: all alike, to compare losses"
    )
    parser.add_argument("--data", type=Path, help="the rows (default: the work's file of the data folder)")
    parser.add_argument("--json", type=Path, help="write one JSON line per peer")
    parser.add_argument("--toy", action="store_true", help="a random model, made-up rows, 2 steps: checks that it runs")
    options = parser.parse_args(argv)
    options.objective = options.objective or WORKS[options.work or "packed"]
    task = TASKS[options.objective]
    options.work = options.work or next(iter(task.works))
    options.mode = options.mode or task.modes[0]
    if options.work not in task.works or options.mode not in task.modes:
        parser.error(
            f"{options.objective} has no --work {options.work} in --mode {options.mode}: it has {', '.join(task.works)} in "
            f"{', '.join(task.modes)}"
        )
    default = "fastpt,trl,trl+fuse,hf" if options.mode == "qlora" else task.peers  # bitsandbytes under PEFT
    options.names = list(dict.fromkeys((options.peers or default).split(",")))
    if unknown := [name for name in options.names if name not in task.entries]:
        parser.error(f"unknown peer {', '.join(unknown)}: for {options.work} there are {', '.join(task.entries)}")
    if options.toy and options.objective != "sft":
        parser.error(f"--toy makes up rows of sft, not of {options.objective}")
    if options.mode == "qlora" and find_spec("bitsandbytes") is None:
        parser.error("--mode qlora needs bitsandbytes: pip install bitsandbytes")
    options.seq = options.seq or task.length
    if options.toy:
        options.model, options.seq, options.steps = "toy", 64, 2
    if not options.model and options.objective != "seq2seq":
        parser.error("--model names the model to train (or --toy for a made-up one)")
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: at least one step must be timed")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.toy:  # many tiny processes at once
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        try:
            job, rounds, steps_per_round = prepare(options, Path(folder))
        except FastptError as error:
            console.print(f"error: {error}", markup=False, highlight=False)
            return 2
        entries = {name: TASKS[options.objective].entries[name] for name in options.names}
        records = compare(entries, job, steps_per_round, rounds, console)
    add_ratios(records)
    about = {
        "objective": options.objective, "work": options.work, "mode": options.mode, "precision": options.precision,
        "model": options.model or "random", "batch": job.batch_rows, "seq": options.seq, "rounds": rounds, "versions": versions(),
        "machine": harness.machine(),
    }  # fmt: skip
    records = [{**record, **about} for record in records]
    if options.json:
        harness.write_json_lines(options.json, records)
    for record in records:
        for outcome in ("skipped", "failed"):
            if outcome in record:
                console.print(f"{record['peer']} {outcome}: {record[outcome]}", markup=False, highlight=False)
    show(records, f"{about['model']}, {options.work}, {options.mode}, {job.batch_rows} rows of {options.seq}", console)
    return 1 if any("failed" in record for record in records) else 0


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Job, int, int]:
    """The job that all peers share, the number of rounds, and the steps of one (its first is not timed)."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    task, model = TASKS[options.objective], options.model
    if options.toy:
        model, options.data = str(toy.write_model(folder / "model")), toy.write_data(folder / "toy.jsonl")
    rounds = min(ROUNDS, options.steps)
    steps_per_round = 1 + -(-options.steps // rounds)
    batch_rows = options.batch or task.works[options.work]
    tokenizer = AutoTokenizer.from_pretrained(model) if model else None
    examples = rows.load(
        options.work, tokenizer, options.data, count=batch_rows * rounds * steps_per_round, length=options.seq
    )
    if model is None:
        model = translators.write_model(folder / "model", examples)
    job = Job(
        model,
        None if options.mode == "full" else save_adapter(model, str(folder / "adapter")),
        examples,
        batch_rows,
        task.lr[options.mode],
        options.seq,
        is_fp32=options.precision == "fp32",
        is_quantised=options.mode == "qlora",
    )
    return job, rounds, steps_per_round


if __name__ == "__main__":
    sys.exit(main())
