"""Greedy generation against model.generate: python -m benchmarks.generate --model DIR [--batch 1,8] [--json FILE].

All peers take turns in one process, on the same prompts, each with a model of its own in the same dtype. Before they are
timed, each token that fastpt chose is judged by the unfused model's logits on the same prefix: `worst_gap_ulps` is by how
much the best logit exceeds the chosen one, in units of the last bit of bfloat16 at the best.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness, toy
from benchmarks.peers import save_adapter
from benchmarks.train_step import versions

Generate = Callable[[list[list[int]], int], list[list[int]]]


class Source(NamedTuple):
    """What every peer loads."""

    model: str
    dtype: torch.dtype
    adapter: str | None = None

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype)
        if self.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, self.adapter)
        return model.eval()


def by_fastpt(source: Source, *, is_merged: bool = False) -> Generate:
    import fastpt
    from fastpt.generate import generate_tokens

    model = source.load()
    if is_merged:
        model = model.merge_and_unload()
    fastpt.fuse(model)
    return lambda prompts, count: generate_tokens(model, prompts, stop=[], max_new_tokens=count)


def by_transformers(source: Source, **options: Any) -> Generate:
    model = source.load()

    def run(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        return made[:, ids.shape[1] :].tolist()

    return run


PEERS: dict[str, Callable[[Source], Generate]] = {
    "fastpt": by_fastpt,
    "hf": by_transformers,
    "hf-static": lambda source: by_transformers(source, cache_implementation="static", disable_compile=True),
    "fastpt-merged": lambda source: by_fastpt(source, is_merged=True),  # what unmerged adapters cost
}


@torch.no_grad()
def worst_gap_ulps(source: Source, prompts: list[list[int]], made: list[list[int]]) -> float:
    """Over all chosen tokens: best logit minus chosen logit of the unfused model, in bfloat16 ulps of the best."""
    model, worst = source.load(), 0.0
    for prompt, tokens in zip(prompts, made, strict=True):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.amax(-1)
        gap = best - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        ulp = torch.finfo(torch.bfloat16).eps * 2 ** best.abs().log2().floor()
        worst = max(worst, (gap / ulp).max().item())
    return worst


def compare(options: argparse.Namespace, source: Source, batch: int, console: Console) -> list[dict[str, Any]]:
    """Time the peers in turns; one record each."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = source.load().config.vocab_size
    prompts = torch.randint(vocabulary // 10, vocabulary, (batch, options.prompt_tokens), generator=generator).tolist()
    peers = {name: PEERS[name](source) for name in options.names}
    made = {name: run(prompts, options.new_tokens) for name, run in peers.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.rounds):
        for name, run in peers.items():
            start = time.perf_counter()
            run(prompts, options.new_tokens)
            seconds[name].append(time.perf_counter() - start)
    tokens = batch * options.new_tokens
    records = []
    for name, times in seconds.items():
        median = statistics.median(times)
        record = {
            "peer": name, "batch": batch, "dtype": options.dtype, "lora": options.lora, "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens, "tokens_per_s": tokens / median, "step_ms": 1e3 * median / options.new_tokens,
            "rounds_tokens_per_s": [tokens / s for s in times],
            "worst_gap_ulps": worst_gap_ulps(source, prompts, made[name]),
        }  # fmt: skip
        if "fastpt" in seconds:
            pairs = zip(times, seconds["fastpt"], strict=True)
            record["speedup_of_fastpt"] = statistics.median(theirs / ours for theirs, ours in pairs)
        records.append(record)
        console.print(f"batch {batch}  {name:10} {record['tokens_per_s']:.1f} tokens/s", highlight=False)
    return records


def show(records: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("batch", "peer", "tokens/s", "step", "fastpt is", "worst gap"):
        table.add_column(column, justify="left" if column == "peer" else "right")
    for r in records:
        speedup = f"{r['speedup_of_fastpt']:.2f} ×" if "speedup_of_fastpt" in r else ""
        table.add_row(
            str(r["batch"]), r["peer"], f"{r['tokens_per_s']:.1f}", f"{r['step_ms']:.1f} ms", speedup,
            f"{r['worst_gap_ulps']:.1f} ulp",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--lora", action="store_true", help="with an adapter on every linear layer, r = 16")
    parser.add_argument("--peers", default="fastpt,hf,hf-static", help=f"of {','.join(PEERS)}")
    parser.add_argument("--batch", default="1,8", help="sequences at a time, one run for each")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="write one JSON line per peer and batch")
    parser.add_argument("--toy", action="store_true", help="a random model, few tokens: checks that it runs")
    options = parser.parse_args(argv)
    options.names = list(dict.fromkeys(options.peers.split(",")))
    if unknown := [name for name in options.names if name not in PEERS]:
        parser.error(f"unknown peer {', '.join(unknown)}: there are {', '.join(PEERS)}")
    if "fastpt-merged" in options.names and not options.lora:
        parser.error("the peer fastpt-merged needs --lora: without an adapter there is nothing to merge")
    if not options.model and not options.toy:
        parser.error("--model names the model (or --toy for a made-up one)")
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as made_up:
        if options.toy:
            options.model = str(toy.write_model(Path(made_up)))
            options.prompt_tokens, options.new_tokens, options.rounds = 12, 6, 2
        adapter = save_adapter(options.model, f"{made_up}/adapter") if options.lora else None
        source = Source(options.model, getattr(torch, options.dtype), adapter)
        records = [r for batch in options.batch.split(",") for r in compare(options, source, int(batch), console)]
    about = {"model": "toy" if options.toy else options.model, "versions": versions(), "machine": harness.machine()}
    if options.json:
        harness.write_json_lines(options.json, [{**record, **about} for record in records])
    show(records, f"greedy generation, {about['model']}, {options.dtype}", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
