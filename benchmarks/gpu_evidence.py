"""Evidence for the GPU kernels from a machine without a GPU: python -m benchmarks.gpu_evidence [--check] [--quick].

Numbers (the Triton interpreter against float64), compilation (to cubin, for six architectures), traffic (bytes moved over
the floor, next to Liger), and the roofline table (computed, not measured). docs/gpu.md says what this proves and what not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.evidence import calls, pool, roofline, verdict
from benchmarks.evidence.show import show

PARTS = ("numbers", "compilation", "traffic", "roofline")
ALL = (80, 86, 89, 90, 100, 120)
QUICK = (80, 90, 100, 120)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    start = time.perf_counter()
    found = {module: calls.cases_of(module) for module in options.cases or calls.all_modules()}
    cases = [case for of_module in found.values() for case in of_module if options.op in (None, case.op)]
    names = {(module, case.name) for module, some in found.items() for case in some if case in cases}
    records = _records(options, sorted(names))
    missed = verdict.faults(records, cases)
    if options.cases is None and options.op is None and not options.quick and "compilation" in options.part:
        from benchmarks.evidence.compiled import table_entries

        missed += verdict.of_table(records, table_entries())
    console = Console(width=200)
    show(records, console)
    roofline.show([r for r in records if r.get("part") == "roofline" and "failed" not in r], console)
    if options.json:
        about = harness.machine()
        harness.write_json_lines(options.json, [{**record, "machine": about} for record in records])
    for line in missed:
        console.print(f"missed: {line}", markup=False, highlight=False, soft_wrap=True)
    print(_summary(records, len(cases), missed, time.perf_counter() - start))
    return 1 if options.check and missed else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--quick", action="store_true", help="fewer inputs, dtypes and architectures: what CI runs")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--op", help="one op's cases only")
    parser.add_argument(
        "--arch", type=int, choices=ALL, action="append", help="default: all, four of them with --quick"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--cases", action="append", metavar="MODULE", help="cases of another project: a module with CASES"
    )
    parser.add_argument("--json", type=Path, help="write one JSON line per record")
    options = parser.parse_args(argv)
    options.part = options.part or list(PARTS)
    options.arch = options.arch or list(QUICK if options.quick else ALL)
    return options


def _records(options: argparse.Namespace, names: list[tuple[str, str]]) -> list[dict[str, Any]]:
    interpreted, compiled = [], []
    for module, case in names:
        task = {"module": module, "case": case, "quick": options.quick}
        interpreted += [{**task, "part": part} for part in ("traffic", "numbers") if part in options.part]
        if "compilation" in options.part:
            compiled += [{**task, "part": "compilation", "arch": arch} for arch in options.arch]
    if "roofline" in options.part and options.op is None and options.cases is None:
        compiled += roofline.tasks(options.quick)
    records = pool.run(compiled, jobs=options.jobs, interpreted=False, told=_tell)
    return records + pool.run(interpreted, jobs=options.jobs, interpreted=True, told=_tell)


def _tell(record: dict[str, Any]) -> None:
    """Progress, to stderr."""
    where = " ".join(
        str(record[key]) for key in ("part", "case", "arch", "provider", "inputs", "dtype") if key in record
    )
    print(f"{where}{': failed' if 'failed' in record else ''}", file=sys.stderr, flush=True)


def _summary(records: list[dict[str, Any]], cases: int, missed: list[str], seconds: float) -> str:
    of_part = {part: [r for r in records if r.get("part") == part] for part in PARTS}
    kernels = {(r["name"], r["arch"]) for r in of_part["compilation"] if "name" in r}
    archs = {arch for _, arch in kernels}
    verdict_told = f"{len(missed)} MISSED" if missed else "all bars met"
    return (
        f"gpu_evidence: {cases} cases, {len(of_part['numbers'])} comparisons with float64, "
        f"{len({name for name, _ in kernels})} kernels compiled for {len(archs)} architectures, "
        f"{len(of_part['traffic'])} traffic counts, {seconds:.0f} s: {verdict_told}"
    )


if __name__ == "__main__":
    sys.exit(main())
