"""Part 2: every kernel launch of a case at real sizes, compiled for an architecture; and which table entries it chose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from benchmarks.evidence import calls
from benchmarks.evidence.case import Case
from benchmarks.evidence.interpreter import TritonServes
from benchmarks.evidence.machine_code.architectures import ARCHITECTURES
from benchmarks.evidence.machine_code.capture import Capture
from fastpt.kernels import launch, launch_table


def records(case: Case, arch: int, quick: bool) -> list[dict[str, Any]]:
    found = []
    for inputs in islice(case.real(calls.empty(torch.bfloat16)), 1 if quick else None):
        about = {"case": case.name, "arch": arch, "inputs": inputs.name, "not_streaming": inputs.not_streaming}
        with _as_on(arch) as chosen:
            leaves = calls.as_leaves(inputs)
            with Capture(arch) as capture, TritonServes():
                outputs = calls.forward(case.function, leaves)
                incoming = [torch.empty_like(o) if o.requires_grad else None for o in outputs]
                calls.backward(outputs, leaves, incoming)
        found += [{**about, **kernel.record()} for kernel in capture.kernels()]
        found.append({**about, "chosen": sorted(chosen)})
    return found


@contextmanager
def _as_on(arch: int) -> Iterator[set[tuple[str, int, int]]]:
    """The launch table answers as on that architecture; collects (kernel, architecture, limit) of the entries it gave."""
    chosen: set[tuple[str, int, int]] = set()
    choose_for, stand_ins = launch.choose_for, (launch.STAND_IN_ARCH, launch.STAND_IN_PROCESSORS)

    def noted(kernel: str, size: int, arch: int) -> launch.Launch:
        chosen.add((kernel, *entry_of(kernel, size, arch)))
        return choose_for(kernel, size, arch)

    launch.choose_for = noted
    launch.STAND_IN_ARCH, launch.STAND_IN_PROCESSORS = arch, ARCHITECTURES[arch].processors
    try:
        yield chosen
    finally:
        launch.choose_for = choose_for
        launch.STAND_IN_ARCH, launch.STAND_IN_PROCESSORS = stand_ins


def entry_of(kernel: str, size: int, arch: int) -> tuple[int, int]:
    """The architecture and the limit of the entry that serves."""
    by_arch = launch_table.TABLE[kernel]
    known = max((a for a in by_arch if a <= arch), default=min(by_arch))
    limits = [limit for limit, _ in by_arch[known]]
    return known, next((limit for limit in limits if size <= limit), limits[-1])


def table_entries() -> set[tuple[str, int, int]]:
    table = launch_table.TABLE
    return {(kernel, arch, limit) for kernel in table for arch in table[kernel] for limit, _ in table[kernel][arch]}
