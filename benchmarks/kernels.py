"""Time the kernels of one op, or of all: python -m benchmarks.kernels --op swiglu [--dtype bfloat16] [--toy] [--json FILE]."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_cases, harness


def available() -> list[str]:
    timed = (path.stem.removeprefix("bench_") for path in (Path(__file__).parent / "ops").glob("bench_*.py"))
    return sorted({*timed, *(gpu_cases.stems() if torch.cuda.is_available() else ())})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", choices=[*available(), "all"], default="all")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--peers", help="names of those to time beside fastpt, with commas between; default: all there are"
    )
    parser.add_argument("--toy", action="store_true", help="tiny shapes and few rounds: checks that it runs")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds per provider and case")
    parser.add_argument("--json", type=Path, help="write one JSON line per provider and case")
    options = parser.parse_args(argv)

    dtypes = [getattr(torch, name) for name in options.dtype or ["float32", "bfloat16"]]
    records: list[dict[str, Any]] = []
    about = harness.machine()
    for op in available() if options.op == "all" else [options.op]:
        for dtype in dtypes:
            for case in cases(op, options.device, dtype, options.peers, options.toy):
                timings = harness.compare(case, budget_s=0.02 if options.toy else options.budget_s)
                records += [{**row, "machine": about} for row in harness.rows(case, timings)]
                told = ", ".join(f"{timing.provider} {timing.median_ms:.3g} ms" for timing in timings)
                print(f"{case.op} {case.shape} {case.dtype} {case.direction}: {told}", flush=True)
                if options.json:  # after every case: a run that is cut short keeps what it has measured
                    harness.write_json_lines(options.json, records)
    show(records)


def cases(op: str, device: str, dtype: torch.dtype, peers: str | None, toy: bool) -> Iterator[harness.Case]:
    """On a GPU the cases of gpu_evidence, where the op has some; else those of benchmarks/ops."""
    if device != "cpu" and op in gpu_cases.stems():
        yield from gpu_cases.cases(op, device, dtype, peers, toy=toy)
        return
    for case in import_module(f"benchmarks.ops.bench_{op}").cases(device, dtype, toy):
        case.providers = harness.wanted(case.providers, peers)
        yield case


def show(records: list[dict[str, Any]]) -> None:
    table = Table(
        title="median of interleaved rounds; MiB: held beyond inputs and outputs; × is how many times faster fastpt is"
    )
    for column in ("op", "shape", "dtype", "direction", "provider", "ms", "GB/s", "GFLOP/s", "MiB", "×"):
        table.add_column(
            column, justify="left" if column in ("op", "shape", "dtype", "direction", "provider") else "right"
        )
    for r in records:
        table.add_row(
            r["op"], r["shape"], r["dtype"], r["direction"], r["provider"], f"{r['median_ms']:.3f}",
            f"{r['gb_per_s']:.1f}", f"{r['gflop_per_s']:.1f}", f"{r['peak_extra_bytes'] / 2**20:.0f}",
            f"{r['speedup_of_fastpt']:.2f}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
