"""Where a training step of fastpt spends its time, next to each op's floor: python -m benchmarks.profile_step --model DIR.

One process trains as in benchmarks.train_step and goes through three phases: steps that are timed, steps under torch.profiler,
and one that counts what every op is asked to do (its own cost(), or FLOPs and bytes of a plain torch op). Time is self time;
what a fastpt op calls counts as its own. The floor of a call is its FLOPs at the rate of one brgemm tile on all threads, or its
bytes at the rate of a copy, whichever takes longer; both rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import harness, rows, toy
from benchmarks.model_flops import Ceiling, gemm_ceiling, nbytes_of, training_flops
from benchmarks.peers import Fastpt, Job, save_adapter
from benchmarks.train_step import versions

WARM_UP = 2
OUTSIDE = "Python and autograd, outside ops"


@dataclass
class Family:
    """One op of the profile, summed over its calls; per step."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    floor_s: float = 0.0


@dataclass
class Counter(TorchDispatchMode):
    """Adds up what each op is asked to do."""

    ceiling: Ceiling
    found: dict[str, Family] = field(default_factory=lambda: defaultdict(Family))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        from fastpt.ops._library import OPS

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        op = OPS.get(name.removeprefix("fastpt::"))
        if op is not None and name.startswith("fastpt::"):
            cost = op.cost(*args, **kwargs)
            flops, moved = cost.flops, cost.bytes
        elif func.is_view or name == "aten::detach":
            return result
        else:
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            moved = nbytes_of(args, list(kwargs.values()), result)
            if name.startswith(("aten::empty", "aten::new_empty")):
                moved = 0
        family = self.found[name]
        family.calls += 1
        family.flops += flops
        family.bytes += moved
        family.floor_s += self.ceiling.floor_s(flops, moved)
        return result


def self_times(profile: Any) -> dict[str, tuple[int, float]]:
    """op -> calls and seconds: what runs inside a fastpt op counts as that op, Python functions of autograd not at all."""
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        owner, up = event, event
        while up is not None:
            if up.name.startswith("fastpt::"):
                owner = up
            up = up.cpu_parent
        if not owner.name.startswith(("aten::", "fastpt::")):
            continue
        calls, seconds = found.get(owner.name, (0, 0.0))
        found[owner.name] = calls + (owner is event), seconds + 1e-6 * event.self_cpu_time_total
    return found


class Finished(BaseException):
    """Ends the training from within."""


class Phases:
    """Called after each step: some to warm up, then timed ones, then profiled ones, then one that is counted.

    The ceiling is measured between the timed steps, so that a machine that slows down or is shared does so to both.
    """

    def __init__(self, steps: int, ceiling: Ceiling, flops_of_step: Callable[[], int]):
        self.steps, self.ceiling, self.flops_of_step = steps, ceiling, flops_of_step
        self.number = 0
        self.step_s: list[float] = []
        self.ceilings: list[float] = []  # bf16 GFLOP/s
        self.profiled_s = 0.0
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)
        self._began = time.perf_counter()

    def after_step(self, loss: float, tokens: int) -> None:
        now, self.number = time.perf_counter(), self.number + 1
        timed, profiled = WARM_UP + self.steps, WARM_UP + 2 * self.steps
        if WARM_UP < self.number <= timed:
            self.step_s.append(now - self._began)
            self.ceilings.append(gemm_ceiling(is_bf16=True))
        if self.number == timed:
            self.ceiling = replace(self.ceiling, bf16_gflop_per_s=statistics.median(self.ceilings))
            self.profile.start()
        if self.number == profiled:
            self.profile.stop()
            self.profiled_s = (now - self._began_profile) / self.steps
            self.counter = Counter(self.ceiling)
            self.counter.__enter__()
        if self.number == profiled + 1:
            self.counter.__exit__(None, None, None)
            self.model_flops = self.flops_of_step()
            raise Finished
        self._began = time.perf_counter()
        if self.number == timed:
            self._began_profile = self._began

    def families(self) -> dict[str, Family]:
        """Per step, the longest first; what the profiler slowed down is scaled to the time of an unprofiled step."""
        found = {name: Family(**vars(family)) for name, family in self.counter.found.items()}
        for name, (_, seconds) in self_times(self.profile).items():
            found.setdefault(name, Family()).seconds = seconds / self.steps
        inside = sum(family.seconds for family in found.values())
        found[OUTSIDE] = Family(seconds=max(0.0, self.profiled_s - inside))
        scale = statistics.median(self.step_s) / max(self.profiled_s, inside)
        for family in found.values():
            family.seconds *= scale
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def run(model: str, mode: str, examples: list[rows.Row], batch_rows: int, steps: int, folder: str) -> dict[str, Any]:
    """Train through the phases; the record of one mode."""
    adapter = save_adapter(model, f"{folder}/adapter") if mode == "lora" else None
    job = Job(model, adapter, examples, batch_rows, lr=2e-4 if adapter else 2e-5)
    peer = Fastpt(job)
    peer.build()
    batch = job.batches[-1]
    lengths, kept = [len(row.input_ids) for row in batch], sum(sum(row.completion_mask[1:]) for row in batch)
    phases = Phases(steps, Ceiling.measure(), lambda: training_flops(peer.model, lengths, kept))
    with suppress(Finished):
        peer.train(phases.after_step)
    step_s, flops, ceiling = statistics.median(phases.step_s), phases.model_flops, phases.ceiling
    families = phases.families()
    return {
        "mode": mode, "tokens": sum(lengths), "step_s": step_s, "model_flops": flops, "ceiling": ceiling.record(),
        "share_of_ceiling": flops / step_s / (1e9 * ceiling.bf16_gflop_per_s),
        "floor_s": sum(family.floor_s for family in families.values()),
        "ops": [{"op": name, **vars(family)} for name, family in families.items()],
    }  # fmt: skip


def markdown(record: dict[str, Any], shown: float = 0.003) -> str:
    """The profile as a table; ops below a share of `shown` are summed up in one row."""
    ceiling, step_s = record["ceiling"], record["step_s"]
    lines = [
        f"A step of {record['tokens']} tokens, {record['mode']}: {step_s:.3f} s, "
        f"{record['tokens'] / step_s:.0f} tokens/s. Its {record['model_flops'] / 1e12:.2f} TFLOP of model products are "
        f"{100 * record['share_of_ceiling']:.0f} % of the ceiling ({ceiling['bf16_gflop_per_s']:.0f} GFLOP/s of bf16 brgemm; "
        f"copies reach {ceiling['cache_gb_per_s']:.0f} GB/s in cache, {ceiling['memory_gb_per_s']:.0f} GB/s in memory).",
        "",
        "| op | calls | ms | share | floor, ms | GFLOP/s |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    small = Family()
    for op in record["ops"]:
        family = Family(**{key: value for key, value in op.items() if key != "op"})
        if family.seconds < shown * step_s and op["op"] != OUTSIDE:
            small = Family(*(a + b for a, b in zip(vars(small).values(), vars(family).values(), strict=True)))
            continue
        lines.append(_row(op["op"].replace("fastpt::", "").replace("aten::", "torch "), family, step_s))
    lines += [_row("all others", small, step_s)]
    lines += [f"| **sum** | | **{1e3 * step_s:.0f}** | 100 % | **{1e3 * record['floor_s']:.0f}** | |"]
    return "\n".join(lines)


def _row(name: str, family: Family, step_s: float) -> str:
    rate = f"{family.flops / family.seconds / 1e9:.0f}" if family.flops and family.seconds else ""
    floor = f"{1e3 * family.floor_s:.1f}" if family.floor_s else ""
    share = f"{100 * family.seconds / step_s:.1f} %"
    return f"| {name} | {family.calls or ''} | {1e3 * family.seconds:.1f} | {share} | {floor} | {rate} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument("--mode", choices=["lora", "full", "both"], default="both")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--seq", type=int, default=512, help="tokens a row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, and as many profiled ones")
    parser.add_argument("--data", type=Path, help="jsonl file (default: GSM8K's training questions)")
    parser.add_argument("--json", type=Path, help="write one JSON line per mode")
    parser.add_argument("--toy", action="store_true", help="a random model, made-up rows: checks that it runs")
    options = parser.parse_args(argv)
    if not options.model and not options.toy:
        parser.error("--model names the model to train (or --toy for a made-up one)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        model, data = options.model, options.data or rows.default_data("packed")
        if options.toy:
            model, data = str(toy.write_model(Path(folder))), toy.write_data(Path(folder) / "toy.jsonl")
            options.seq, options.steps = 64, 2
        count = options.batch * (WARM_UP + 2 * options.steps + 1)
        examples = rows.load("packed", AutoTokenizer.from_pretrained(model), data, count=count, length=options.seq)
        about = {
            "work": "packed", "model": "toy" if options.toy else options.model, "batch": options.batch,
            "seq": options.seq, "steps": options.steps, "versions": versions(), "machine": harness.machine(),
        }  # fmt: skip
        for mode in ("lora", "full") if options.mode == "both" else (options.mode,):
            records.append({**run(model, mode, examples, options.batch, options.steps, folder), **about})
            print(markdown(records[-1]), end="\n\n", flush=True)
    if options.json:
        harness.write_json_lines(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
