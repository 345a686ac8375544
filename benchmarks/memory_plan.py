"""Predicted and measured peaks of memory, each run in a process of its own: python -m benchmarks.memory_plan --model DIR.

A configuration is a method, the length of its rows (one row is a step) and what becomes of activations. The prediction is the
plan that the run itself makes from the config; measured is the peak of resident memory over its steps, without what the process
took before the model. Of the steps, the last one's tokens per second are told too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import harness, toy
from benchmarks.train_step import versions

METHODS, LENGTHS, POLICIES = ("lora", "qlora", "full"), (512, 2048), ("keep", "recompute", "offload")
STEPS = 3  # the second finds the optimizer's state, the third what ops keep
BOUND = 0.05


def measure(model: str, method: str, length: int, policy: str, folder: str) -> dict[str, Any]:
    """One run in this process: what it told."""
    from fastpt.trainer import Trainer

    text = " ".join(f"Row {i} says that {i} and {i + 1} make {2 * i + 1}." for i in range(STEPS * length // 8))
    told: list[str] = []
    trainer = Trainer(
        model=model, data=[{"text": text}], objective="pretrain", method=method, max_length=length,
        micro_batch_tokens=length, batch_tokens=length, activations=policy, max_steps=STEPS, memory_limit="1TiB",
        optim={"rounding": "master"}, output=folder, quiet=True, device="cpu", precision="bf16",
    )  # fmt: skip
    trainer.console.say = told.append  # type: ignore[method-assign]
    trainer.prepare()
    records = list(trainer.steps())
    metrics: dict[str, Any] = {}
    trainer.watch.tell(metrics, told.append)
    plan = trainer.watch.plan
    assert plan is not None
    assert metrics, "the peak of resident memory cannot be reset here"
    predicted, measured = metrics["predicted_peak_bytes"], metrics["measured_peak_bytes"]
    loaded = plan.weights + plan.adapters
    return {
        "method": method, "length": length, "policy": policy, **metrics, "weights_bytes": loaded,
        "error": predicted / measured - 1, "error_above_weights": (predicted - loaded) / (measured - loaded) - 1,
        "losses": [record["loss"] for record in records], "tokens_per_s": records[-1]["tokens_per_s"],
    }  # fmt: skip


def in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": done.stderr.strip().splitlines()[-1:]}


def show(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="peak memory of a step, MiB")
    for column in (
        "method",
        "row",
        "activations",
        "predicted",
        "measured",
        "error",
        "above the weights",
        "error",
        "tokens/s",
    ):
        table.add_column(column, justify="right")
    for r in records:
        if "failed" in r:
            continue
        predicted, measured = (r[f"{kind}_peak_bytes"] / 2**20 for kind in ("predicted", "measured"))
        table.add_row(
            r["method"], str(r["length"]), r["policy"], f"{predicted:.0f}", f"{measured:.0f}", f"{100 * r['error']:+.1f} %",
            f"{measured - r['weights_bytes'] / 2**20:.0f}", f"{100 * r['error_above_weights']:+.1f} %",
            f"{r['tokens_per_s']:.0f}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", type=Path, help="write one JSON line per configuration")
    parser.add_argument("--toy", action="store_true", help="a random model, short rows: checks that it runs")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "LENGTH", "POLICY"), help="this one, in this process")
    options = parser.parse_args(argv)
    if not options.model and not options.toy:
        parser.error("--model names the model to train (or --toy for a made-up one)")
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        model = str(toy.write_model(Path(folder))) if options.toy else options.model
        if options.one:
            method, length, policy = options.one
            print(json.dumps(measure(model, method, int(length), policy, f"{folder}/run")))
            return 0
        lengths = ["64"] if options.toy else options.lengths.split(",")
        records = []
        for one in itertools.product(options.methods.split(","), lengths, options.policies.split(",")):
            record = in_a_process("--model", model, "--one", *one)
            records.append(record)
            console.print(" ".join(one), f"{100 * record['error']:+.1f} %" if "error" in record else record)
    about = {"model": "toy" if options.toy else model, "versions": versions(), "machine": harness.machine()}
    if options.json:
        harness.write_json_lines(options.json, [{**record, **about} for record in records])
    show(records, console)
    is_off = [r for r in records if "failed" in r or (not options.toy and abs(r["error"]) > BOUND)]
    return 1 if is_off else 0


if __name__ == "__main__":
    sys.exit(main())
