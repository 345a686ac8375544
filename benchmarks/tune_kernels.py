"""Search launch parameters on a GPU and write kernels/launch_table.py: python -m benchmarks.tune_kernels [--op swiglu].

For every op's real shapes (benchmarks/evidence/cases), each kernel that is launched climbs from the table's entry: of one
field after another half and double are tried, the fastest is kept, until nothing is faster. What is timed is forward and
backward of the public op, L2 flushed, median. A launch that does not compile, does not fit, or changes the results beyond
the rounding of their dtype is passed over.
"""

from __future__ import annotations

import argparse
import dataclasses
import pprint
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases
from fastpt.kernels import launch as launches
from fastpt.kernels.launch import Launch, is_valid
from fastpt.kernels.launch_table import TABLE

FILE = Path(__file__).parents[1] / "kernels" / "launch_table.py"
FIELDS = ("rows", "columns", "depth", "warps", "stages", "per_processor")
ANY_SIZE = 1 << 62
LEAST_GAIN = 0.02  # below this a difference is noise

Entries = list[tuple[int, dict[str, int]]]


@contextmanager
def recorded_choices() -> Iterator[dict[tuple[str, int], Launch]]:
    """The launches chosen inside, by kernel and size."""
    found: dict[tuple[str, int], Launch] = {}
    choose_for = launches.choose_for

    def record(kernel: str, size: int, arch: int) -> Launch:
        found[kernel, size] = choose_for(kernel, size, arch)
        return found[kernel, size]

    launches.choose_for = record
    try:
        yield found
    finally:
        launches.choose_for = choose_for


@contextmanager
def trying(kernel: str, launch: Launch) -> Iterator[None]:
    """Within it the kernel is launched so, at every size and on every architecture."""
    before = TABLE[kernel]
    TABLE[kernel] = {arch: [(ANY_SIZE, fields_of(launch))] for arch in before}
    try:
        yield
    finally:
        TABLE[kernel] = before


def fields_of(launch: Launch) -> dict[str, int]:
    """What differs from Launch's defaults, as the table writes it."""
    return {f.name: getattr(launch, f.name) for f in dataclasses.fields(Launch) if getattr(launch, f.name) != f.default}


def neighbours(launch: Launch, arch: int) -> Iterator[Launch]:
    """Launches that differ in one field; fields that the kernel leaves at 1 stay there."""
    for name in FIELDS:
        value = getattr(launch, name)
        steps = (value - 1, value + 1) if name in ("stages", "per_processor") else (value // 2, value * 2)
        for step in steps if value > 1 or name == "stages" else ():
            candidate = dataclasses.replace(launch, **{name: step})
            if step >= 1 and is_valid(candidate, arch):
                yield candidate


def climb(start: Launch, arch: int, time: Callable[[Launch], float | None]) -> tuple[Launch, float, float]:
    """The launch from which no step is faster, its time and that of `start`; `time` gives None for a launch that fails.

    Raises: RuntimeError when the start itself fails.
    """
    known = {start: time(start)}
    first = known[start]
    if first is None:
        raise RuntimeError(f"the table's own launch fails: {start}")
    best, best_time = start, first
    while True:
        for candidate in neighbours(best, arch):
            if candidate not in known:
                known[candidate] = time(candidate)
        times = {one: ms for one, ms in known.items() if ms is not None}
        fastest = min(times, key=times.__getitem__)
        if times[fastest] >= best_time * (1 - LEAST_GAIN):
            return best, best_time, first
        best, best_time = fastest, times[fastest]


def with_entry(entries: Entries, size: int, launch: Launch) -> Entries:
    """The entries with one more that serves `size` and what is smaller, down to the next; the last serves all larger."""
    changed = {limit: fields for limit, fields in entries if limit != size}
    changed[size] = fields_of(launch)
    return sorted(changed.items(), key=lambda entry: entry[0])


def write_table(table: Mapping[str, Mapping[int, Entries]], file: Path) -> None:
    """Replace the dict in the file, leaving what stands above it."""
    head = file.read_text().split("TABLE:")[0]
    body = pprint.pformat({k: dict(v) for k, v in table.items()}, width=116, sort_dicts=False)
    file.write_text(f"{head}TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {body}\n")


def agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Equal but for rounding in their dtype."""
    for a, b in zip(got, expected, strict=True):
        if a.is_floating_point():
            allowed = 8 * torch.finfo(a.dtype).eps * b.abs().max().float()
            if not bool((a.float() - b.float()).abs().max() <= allowed):
                return False
    return True


def tune(cases: list[Any], make: Any, arch: int, bench: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """Climb for every kernel of the cases' real inputs and put what is faster into TABLE; one row each for the report."""
    report = []
    for case in cases:
        for inputs in case.real(make):
            step = gpu_cases.both_passes(case.function, inputs)
            with recorded_choices() as chosen:
                expected = step()
            for (kernel, size), start in chosen.items():

                def time(launch: Launch, kernel=kernel, step=step, expected=expected) -> float | None:
                    with trying(kernel, launch):
                        try:
                            return bench(step) if agree(step(), expected) else None
                        except (RuntimeError, ValueError) as error:  # triton's errors of compilation and resources
                            print(f"  {kernel} {launch}: {str(error).splitlines()[0]}", file=sys.stderr)
                            return None

                best, ms, before = climb(start, arch, time)
                row = {
                    "op": case.op,
                    "inputs": inputs.name,
                    "kernel": kernel,
                    "size": size,
                    "ms": ms,
                    "before_ms": before,
                }
                report.append(row | {"launch": fields_of(best)})
                if best != start:
                    TABLE[kernel][arch] = with_entry(TABLE[kernel].get(arch, _nearest(kernel, arch)), size, best)
    return report


def _nearest(kernel: str, arch: int) -> Entries:
    return TABLE[kernel][max((a for a in TABLE[kernel] if a <= arch), default=min(TABLE[kernel]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="all", help="stem of an op")
    parser.add_argument("--dry-run", action="store_true", help="print, leave the table as it is")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels times kernels on a GPU and torch sees none: run it where torch.cuda.is_available()")
    from triton.testing import do_bench

    stems = [stem for stem in gpu_cases.stems() if args.op in ("all", stem)]
    if not stems:
        sys.exit(f"no cases for {args.op!r}: {', '.join(gpu_cases.stems())}")
    major, minor = torch.cuda.get_device_capability()
    cases = [case for stem in stems for case in gpu_cases.of(stem)]
    make = gpu_cases.make_on("cuda", torch.bfloat16)
    with torch.device("cuda"):
        report = tune(cases, make, 10 * major + minor, lambda f: do_bench(f, quantiles=[0.5]))
    for row in report:
        print("{op} {inputs} {kernel} at {size}: {before_ms:.4f} -> {ms:.4f} ms, {launch}".format(**row))
    if not args.dry_run:
        write_table(TABLE, FILE)


if __name__ == "__main__":
    main()
