"""Do 8-bit moments and stochastic rounding train as float32 AdamW does? python -m benchmarks.optimizers --model DIR.

One plain loop trains all weights of a bfloat16 model on the same GSM8K rows once per optimizer. Compared is the loss on rows
that none was trained on, in percent of what float32 moments with float32 masters reach. `--bytes` prints what a step of each
optimizer moves and keeps per parameter, next to bitsandbytes', torch's and llm.c's, and trains nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastpt
from benchmarks import harness, rows, toy
from benchmarks.loss_curves import batch_of
from benchmarks.peers import Job, load_model
from fastpt.ops._library import OPS, nbytes
from fastpt.optim import AdamW

EXACT, PLAIN = "float32 moments, masters", "plain bfloat16"
RUNS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    EXACT: lambda params, lr: AdamW(params, lr=lr),
    "8-bit moments, masters": lambda params, lr: AdamW(params, lr=lr, bits=8),
    "float32 moments, stochastic": lambda params, lr: AdamW(params, lr=lr, rounding_seed=0),
    "8-bit moments, stochastic": lambda params, lr: AdamW(params, lr=lr, rounding_seed=0, bits=8),
    PLAIN: lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
}
MOST_PERCENT = 1.0
WARMUP = 10  # steps


def train(name: str, job: Job, held_out: list[rows.Row]) -> dict[str, Any]:
    """The losses of one run, step by step, and on the held-out rows at its end."""
    torch.manual_seed(0)
    model = load_model(job, torch.bfloat16, torch.bfloat16)
    fastpt.fuse(model)
    trained = list(model.parameters())
    if name != PLAIN:
        for parameter in trained:
            parameter.grad_dtype = torch.float32
    optimizer = RUNS[name](trained, job.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    losses, started = [], time.perf_counter()
    for some in job.batches:
        loss = model(**batch_of(some), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    held = held_out_loss(model, held_out)
    moments = sum(
        t.nbytes for state in optimizer.state.values() for key, t in state.items() if key not in ("master", "step")
    )
    per_value = moments / sum(p.numel() for p in trained)
    last = sum(losses[-50:]) / len(losses[-50:])
    print(f"{name}: held out {held:.4f}, last 50 steps {last:.4f}, moments {per_value:.3f} bytes per parameter, "
          f"{seconds:.0f} s", flush=True)  # fmt: skip
    return {"run": name, "held_out": held, "last_50": last, "moment_bytes": per_value, "losses": losses}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, some: list[rows.Row]) -> float:
    """Per trained token."""
    total, count = 0.0, 0
    for row in some:
        n = sum(row.completion_mask)
        total += model(**batch_of([row]), use_cache=False).loss.item() * n
        count += n
    return total / count


def verdict(found: list[dict[str, Any]]) -> dict[str, float]:
    """By how many percent each run's held-out loss is off the exact one's."""
    by_name = {one["run"]: one["held_out"] for one in found}
    exact = by_name[EXACT]
    return {name: 100 * (loss / exact - 1) for name, loss in by_name.items()}


@dataclass(frozen=True)
class Layout:
    """What a peer reads, writes and keeps per parameter and step, in bytes, and where that is written down."""

    name: str
    parameter: int  # read, and written
    gradient: int
    moments: float  # both, read, and written
    master: int  # read, and written
    source: str
    reads_parameter: bool = True

    @property
    def moved(self) -> float:
        both_ways = 2 * (self.moments + self.master)
        return both_ways + self.gradient + self.parameter * (2 if self.reads_parameter else 1)

    @property
    def kept(self) -> float:
        return self.moments + self.master


SCALES = 2 * 4 / 256  # two float32 for each 256 values
PEERS = [
    Layout("bitsandbytes AdamW8bit", 2, 2, 2 + SCALES, 0, "bitsandbytes csrc/kernels.cu, kOptimizerStatic8bit2StateBlockwise"),
    Layout("bitsandbytes AdamW32bit", 2, 2, 8, 0, "bitsandbytes csrc/kernels.cu, kOptimizer32bit2State"),
    Layout("torch fused, bfloat16", 2, 2, 4, 0, "pytorch aten/src/ATen/native/cuda/fused_adam_utils.cuh: moments as the weight"),
    Layout("torch fused, float32", 4, 4, 8, 0, "the same; the bfloat16 copies of autocast not counted"),
    Layout("llm.c, masters", 2, 2, 8, 4, "llm.c llmc/adamw.cuh, adamw_update", reads_parameter=False),
    Layout("llm.c, stochastic", 2, 2, 8, 0, "llm.c llmc/adamw.cuh, adamw_update without master weights"),
]  # fmt: skip


def bytes_table() -> list[tuple[str, float, float, str]]:
    """Name, bytes moved and bytes kept per parameter, source: of bfloat16 weights and gradients unless said otherwise."""
    n = 1 << 20
    found = []
    for name, bits, has_master in (
        ("fastpt adamw, masters", 32, True),
        ("fastpt adamw, stochastic", 32, False),
        ("fastpt adamw_8bit, masters", 8, True),
        ("fastpt adamw_8bit, stochastic", 8, False),
    ):
        param, grad = (torch.empty(n, dtype=torch.bfloat16, device="meta") for _ in range(2))
        moments = [torch.empty(n, dtype=torch.uint8 if bits == 8 else torch.float32, device="meta") for _ in range(2)]
        scales = [torch.empty(n // 256, device="meta") for _ in range(2)] if bits == 8 else []
        masters = [torch.empty(n, device="meta")] if has_master else []
        lists = [[param], [grad], *([moment] for moment in moments), *([scale] for scale in scales), [], masters]
        cost = OPS["adamw_8bit_step" if bits == 8 else "adamw_step"].cost(*lists)
        found.append((name, cost.bytes / n, nbytes(*moments, *scales, *masters) / n, "cost()"))
    return found + [(peer.name, peer.moved, peer.kept, peer.source) for peer in PEERS]


def print_bytes() -> None:
    print(f"{'optimizer':32}{'moved':>8}{'kept':>8}   bytes per parameter and step; from")
    for name, moved, kept, source in bytes_table():
        print(f"{name:32}{moved:8.2f}{kept:8.2f}   {source}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument("--data", type=Path, default=rows.default_data("gsm8k"), help="jsonl file of GSM8K")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--length", type=int, default=128, help="longer rows are left out")
    parser.add_argument("--held-out", type=int, default=64, help="rows after those trained on")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--runs", help="some of the runs, with semicolons between; default: all")
    parser.add_argument("--bytes", action="store_true", help="only the table of bytes per parameter and step")
    parser.add_argument("--json", type=Path, help="write one JSON line per run")
    parser.add_argument("--toy", action="store_true", help="a random model, made-up rows, 5 steps: checks that it runs")
    options = parser.parse_args(argv)
    if options.bytes:
        print_bytes()
        return 0
    if not options.model and not options.toy:
        parser.error("--model names the model to train (or --toy for a made-up one)")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            options.model, options.steps, options.held_out = str(toy.write_model(Path(folder) / "model")), 5, 2
            options.data, options.length = toy.write_data(Path(folder) / "toy.jsonl"), 512
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        count = options.steps * options.batch
        chosen = rows.load(
            "gsm8k", tokenizer, options.data, count=count + options.held_out, length=options.length
        )  # fmt: skip
        job = Job(options.model, None, chosen[:count], options.batch, lr=options.lr)
        names = options.runs.split(";") if options.runs else list(RUNS)
        found = [train(name, job, chosen[count:]) for name in names]
    off = verdict(found)
    if options.json:
        about = {"steps": options.steps, "batch": options.batch, "length": options.length, "lr": options.lr}
        about |= {"model": Path(options.model).name, "machine": harness.machine()}
        harness.write_json_lines(options.json, [{**one, **about, "off_percent": off[one["run"]]} for one in found])
    for name, percent in off.items():
        print(f"{name}: {percent:+.2f} % of the loss of {EXACT}")
    is_met = all(abs(percent) <= MOST_PERCENT for name, percent in off.items() if name != PLAIN)
    return 0 if is_met or options.toy else 1


if __name__ == "__main__":
    sys.exit(main())
