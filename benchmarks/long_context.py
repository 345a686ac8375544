"""A LoRA step of fastpt on ever longer rows: python -m benchmarks.long_context --model DIR --lengths 512,8192.

Each length has a process of its own, so its peak of resident memory is that length's alone; they take turns round by round as in
benchmarks.train_step. A step holds at least 2048 tokens: 4 rows of 512, one row of 8192.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import harness, rows, toy
from benchmarks.peers import Fastpt, Job, save_adapter
from benchmarks.train_step import Contestant, take_turns, versions

TOKENS = 2048  # of a step, at least


def contestants(model: str, data: Path, lengths: list[int], steps: int, rounds: int, folder: str) -> list[Contestant]:
    from transformers import AutoTokenizer

    tokenizer, adapter = AutoTokenizer.from_pretrained(model), save_adapter(model, f"{folder}/adapter")
    found = []
    for length in lengths:
        batch = -(-TOKENS // length)
        examples = rows.load("packed", tokenizer, data, count=batch * rounds * (1 + steps), length=length)
        job = Job(model, adapter, examples, batch, lr=2e-4)
        found.append(Contestant("fastpt", Fastpt, job, 1 + steps, Path(folder) / f"{length}.log"))
    return found


def measure(options: argparse.Namespace, model: str, data: Path, folder: str, console: Console) -> list[dict[str, Any]]:
    """One record per length, the first of them the one that the others' time per token is compared with."""
    lengths, rounds = options.lengths, options.rounds
    told = take_turns(contestants(model, data, lengths, options.steps, rounds, folder), rounds, console)
    records: list[dict[str, Any]] = [
        {**record, "seq": length, "batch": -(-TOKENS // length)} for record, length in zip(told, lengths, strict=True)
    ]
    for record in records:
        if "tokens_per_s" in record and "tokens_per_s" in records[0]:
            record["ms_per_token"] = 1e3 / record["tokens_per_s"]
            record["times_of_first"] = records[0]["tokens_per_s"] / record["tokens_per_s"]
    return records


def show(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="LoRA step of fastpt by length of the rows")
    for column in ("rows", "step", "ms per token", f"of that at {records[0]['seq']}", "peak of resident memory"):
        table.add_column(column, justify="right")
    for r in records:
        if "ms_per_token" in r:
            table.add_row(
                f"{r['batch']} × {r['seq']}", f"{r['step_s']:.2f} s", f"{r['ms_per_token']:.2f}",
                f"{r['times_of_first']:.2f} ×", f"{r['peak_bytes'] / 2**30:.2f} GiB",
            )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument(
        "--lengths", default="512,8192", help="tokens a row; the first is what others are compared with"
    )
    parser.add_argument("--steps", type=int, default=1, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="jsonl file (default: GSM8K's training questions)")
    parser.add_argument("--json", type=Path, help="write one JSON line per length")
    parser.add_argument("--toy", action="store_true", help="a random model, made-up rows: checks that it runs")
    options = parser.parse_args(argv)
    if not options.model and not options.toy:
        parser.error("--model names the model to train (or --toy for a made-up one)")
    options.lengths = [int(length) for length in options.lengths.split(",")]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        model, data = options.model, options.data or rows.default_data("packed")
        if options.toy:
            model, data = str(toy.write_model(Path(folder))), toy.write_data(Path(folder) / "toy.jsonl")
            options.lengths, options.rounds = [16, 128], 1
        records = measure(options, model, data, folder, console)
    about = {
        "work": "packed", "mode": "lora", "model": "toy" if options.toy else options.model, "rounds": options.rounds,
        "versions": versions(), "machine": harness.machine(),
    }  # fmt: skip
    records = [{**record, **about} for record in records]
    if options.json:
        harness.write_json_lines(options.json, records)
    for record in records:
        if "failed" in record:
            console.print(f"{record['seq']} failed: {record['failed']}", markup=False, highlight=False)
    show(records, console)
    return 1 if any("failed" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
