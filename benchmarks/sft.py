"""GSM8K learned by fastpt and by TRL's SFTTrainer: evaluation loss after the same rows, or after the same minutes.

    python -m benchmarks.sft --model .cache/smollm2 --side fastpt --rows 800 --json results.jsonl
    python -m benchmarks.sft --model .cache/smollm2 --side trl --minutes 10 --json results.jsonl

Both sides see the same questions and answers in the same order, 8 a step, learn from the answers alone, train LoRA of the same
rank on all linear layers at the same constant learning rate, so that a run may end at any minute. TRL runs with
its defaults (float32 weights under bf16 autocast) without its checkpointing, or with bf16 weights (trl-bf16). The loss, over the
tokens of all held-out answers, is that of a fresh float32 model of transformers which the trained adapter was copied into. Data
from $FASTPT_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows as benchmark_rows
from benchmarks.harness import command, machine
from benchmarks.peers import PEERS, Job, load_model, save_adapter
from benchmarks.train_step import versions
from fastpt.fusion.fuse import handle_of

ROWS_A_STEP, LENGTH, LR, HELD_OUT, ALL_ROWS = 8, 512, 2e-4, 200, 7400


class TimeIsUp(Exception):
    """Ends a side's training from within, after its last step."""


def held_out_loss(model: Any, rows: list[benchmark_rows.Row]) -> float:
    """Mean cross-entropy of the answers' tokens, row by row, by the model's own forward."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
            logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float().cpu()
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            count += int((labels[1:] != benchmark_rows.IGNORED).sum())
    return total / count


def trained(side: str, job: Job, minutes: float | None) -> dict[str, Any]:
    """Train one of the peers of benchmarks.train_step; the weights that it trained, and what it took."""
    peer, steps = PEERS[side](job), 0
    peer.build()
    started = time.perf_counter()

    def after_step(loss: float, tokens: int) -> None:
        nonlocal steps
        steps += 1
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            raise TimeIsUp

    with suppress(TimeIsUp):
        peer.train(after_step)
    seconds = time.perf_counter() - started
    if (handle := handle_of(peer.model)) is not None:
        handle.remove()
    weights = {name: weight.detach() for name, weight in peer.model.named_parameters() if weight.requires_grad}
    return {"weights": weights, "steps": steps, "train_s": seconds}


def plain_model(job: Job, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The trained weights in a float32 model of its own: accelerate leaves a trainer's model in autocast."""
    model = load_model(job, torch.float32, torch.float32)
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name in own.keys() | weights.keys():  # a name that only one side has is a KeyError
        own[name].data.copy_(weights[name])
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="folder or hub id of a causal language model with a chat template"
    )
    parser.add_argument("--side", choices=["fastpt", "trl", "trl-bf16"], required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--rows", type=int, help="train on so many")
    budget.add_argument("--minutes", type=float, help="train for so long, the model in memory and the rows tokenised")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="rows of the test file")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args(argv)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    file = benchmark_rows.default_data("gsm8k")
    train_rows = options.rows or ALL_ROWS
    rows = benchmark_rows.load("gsm8k", tokenizer, file, count=train_rows, length=LENGTH)
    test = file.with_name(file.name.replace("train", "test"))
    held_out = benchmark_rows.load("gsm8k", tokenizer, test, count=options.held_out, length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        adapter = save_adapter(options.model, folder)
        job = Job(options.model, adapter, rows, ROWS_A_STEP, LR, LENGTH)
        found = trained(options.side, job, options.minutes)
        model = plain_model(job, found.pop("weights"))
    found |= {"eval_loss": held_out_loss(model, held_out), "rows": min(train_rows, found["steps"] * ROWS_A_STEP)}
    about = {"side": options.side, "minutes": options.minutes, "held_out": len(held_out), "lr": LR}
    how = {"model": options.model, "versions": versions(), "machine": machine(), "command": command()}
    line = json.dumps({**about, **found, "threads": torch.get_num_threads(), **how})
    print(line)
    if options.json is not None:
        with options.json.open("a") as out:
            out.write(line + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
