"""`make demo`: LoRA-fine-tune a small model to turn support messages into JSON tickets; score it before and after.

python examples/support_tickets/demo.py [--model DIR_OR_HUB_ID] [--rows N] [--require 0.85]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from score import HELD_OUT, MAX_NEW_TOKENS, Messages, load, questions_and_tickets, score, table

import fastpt
from fastpt import models
from fastpt.generate import generate_batch

TRAIN = HELD_OUT.with_name("train.jsonl")

SETTINGS: dict[str, Any] = {  # as in support_tickets.toml; a test compares them
    "objective": "sft",
    "method": {"name": "lora", "rank": 16},
    "epochs": 2.5,
    "batch_rows": 8,
    "optim": {"lr": 1e-3},
    "seed": 0,
}


def answers_before(model: str, questions: list[Messages]) -> list[str]:
    """What the model answers as it is."""
    device = models.choose_device("auto")
    dtype, _ = models.choose_precision("auto", device)
    base = models.load(model, dtype=dtype, device=device)
    return generate_batch(base.model, base.tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS)


def samples(questions: list[Messages], before: list[str], after: list[str]) -> Table:
    """The first two messages with the answers of the two models."""
    grid = Table.grid(padding=(0, 1, 1, 0))
    for question, old, new in list(zip(questions, before, after, strict=True))[:2]:
        for name, text in (("message", question[-1]["content"]), ("before", old), ("after", new)):
            grid.add_row(Text(name, style="bold"), Text(text.strip()))
    return grid


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/support_tickets"), help="folder of the run")
    parser.add_argument("--rows", type=int, help="only the first rows of both files, for a toy run")
    parser.add_argument("--require", type=float, metavar="SHARE", help="fail when fewer fields are right afterwards")
    return parser.parse_args()


def main() -> None:
    options, console = parse_arguments(), Console()
    held_out = load(HELD_OUT, options.rows)
    questions, tickets = questions_and_tickets(held_out)

    console.print(f"{options.model} as it is answers {len(questions)} held-out messages ...")
    before = answers_before(options.model, questions)
    run = fastpt.train(
        model=options.model,
        data=str(TRAIN) if options.rows is None else load(TRAIN, options.rows),
        eval_data=str(HELD_OUT) if options.rows is None else held_out,
        output=options.output,
        **SETTINGS,
    )
    console.print("the trained model answers them ...")
    after = run.generate(questions, max_new_tokens=MAX_NEW_TOKENS)

    scores = {"before": score(before, tickets), "after": score(after, tickets)}
    console.print(samples(questions, before, after))
    console.print(table(scores))
    seconds, tokens_per_s, peak = (run.metrics[name] for name in ("seconds", "tokens_per_s", "peak_bytes"))
    console.print(f"training: {seconds:.0f} s, {tokens_per_s:,.0f} tokens/s, peak memory {peak / 2**30:.2f} GiB")
    console.print(f"run: {run.path} (talk to it: fastpt chat {run.path})", soft_wrap=True)
    if options.require is not None and scores["after"].fields_right < options.require:
        sys.exit(f"only {scores['after'].fields_right:.3f} of the fields are right, {options.require} are required")


if __name__ == "__main__":
    main()
