"""What it saves to compute a prompt once for all of its answers: python -m benchmarks.shared_prompts --model DIR [--json FILE].

The same step (loss and gradients, no optimizer) with the prompt there once and before each answer, in turns: DPO on pairs of
LLMBar, and policy gradients on groups of 8 answers of 64 tokens to GSM8K's questions. LoRA of rank 16, fused, bfloat16 where the
processor has units for it. Data from $FASTPT_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, toy
from benchmarks.train_step import versions

ROUNDS, EXAMPLES, GROUP, ANSWER = 7, 4, 8, 64


def pairs(tokenizer: Any) -> list[Any]:
    from fastpt.data.pairs import pair_example, pair_format

    lines = (_folder() / "llmbar_pairs.jsonl").read_text().splitlines()
    rows, row_format = map(json.loads, lines), pair_format(None)
    made = (pair_example(tokenizer, row, f"llmbar:{n}", row_format) for n, row in enumerate(rows, 1))
    return [one for one in made if one.longest <= 1024][:EXAMPLES]


def groups(tokenizer: Any) -> list[Any]:
    from fastpt.data.example import Example
    from fastpt.objectives._rollouts import joined

    draw, found = np.random.default_rng(0), []
    for line in (_folder() / "gsm8k_train.jsonl").read_text().splitlines()[:EXAMPLES]:
        ids = np.array(tokenizer(json.loads(line)["question"])["input_ids"], np.int32)
        answers = draw.integers(10, len(tokenizer) - 10, (GROUP, ANSWER)).tolist()
        found.append(joined(Example(ids, np.zeros(len(ids), bool), None, ""), answers))
    return found


def _folder() -> Path:
    return Path(os.environ.get("FASTPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def step(scorer: Any, batch: Any) -> float:
    """Seconds of a forward and a backward of summed log-probabilities."""
    started = time.perf_counter()
    batch.per_document(scorer.stats(scorer.hidden(batch), batch).logprob[batch.kept]).sum().backward()
    seconds = time.perf_counter() - started
    scorer.model.zero_grad(set_to_none=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--toy", action="store_true", help="a random model: checks that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import fastpt
    from fastpt import models
    from fastpt.adapters import apply_method
    from fastpt.config import MethodConfig
    from fastpt.data.batches import collate
    from fastpt.scorer import ModelScorer

    with tempfile.TemporaryDirectory() as folder:
        model = str(toy.write_model(Path(folder))) if options.toy else options.model
        device = models.choose_device("auto")
        loaded = models.load(model, dtype=models.choose_precision("auto", device)[0], device=device)
    net = apply_method(loaded.model, MethodConfig(name="lora")).train()
    fastpt.fuse(net)
    scorer, records = ModelScorer(net), []
    for work, make in (("dpo", pairs), ("groups of 8", groups)):
        examples = make(loaded.tokenizer)
        batches = {shares: collate(examples, shares).to(device) for shares in (True, False)}
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(1 if options.toy else ROUNDS + 1):
            for shares, batch in batches.items():
                seconds = step(scorer, batch)
                if number or options.toy:  # the first warms up
                    times[shares].append(seconds)
        tokens = {shares: batch.input_ids.numel() for shares, batch in batches.items()}
        once, each = (statistics.median(times[shares]) for shares in (True, False))
        records.append({
            "work": work, "tokens_once": tokens[True], "tokens_each": tokens[False], "step_s_once": once, "step_s_each": each,
            "faster": each / once, "fewer_tokens": tokens[False] / tokens[True],
        })  # fmt: skip
        print(
            f"{work}: {tokens[False]} tokens to {tokens[True]} ({tokens[False] / tokens[True]:.2f}), "
            f"{each:.3f} s to {once:.3f} s ({each / once:.2f} times as fast)"
        )
    if options.json:
        about = {"model": model, "versions": versions(), "machine": harness.machine()}
        harness.write_json_lines(options.json, [{**record, **about} for record in records])


if __name__ == "__main__":
    main()
