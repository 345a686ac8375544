"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

Entries = list[tuple[int, dict[str, int]]]


def _norm_forward(*, stages: int, per_processor: int) -> Entries:
    small = {"warps": 8, "stages": stages, "per_processor": 4}
    return [
        *((8192 // rows, {"rows": rows, **small}) for rows in (64, 32, 16, 8, 4, 2, 1)),
        (16384, {"warps": 8, "stages": stages, "per_processor": per_processor}),
        (32768, {"warps": 16, "stages": stages}),
        (65536, {"warps": 32, "stages": 2}),
        (1 << 62, {"warps": 32}),
    ]


def _norm_backward(*, stages: int) -> Entries:
    small = {"warps": 8, "stages": stages, "per_processor": 2}
    return [
        *((24576 // rows, {"rows": rows, **small}) for rows in (64, 32, 16, 8, 4, 2, 1)),
        (49152, {"warps": 16, "stages": stages}),
        (1 << 62, {"warps": 32}),
    ]


TABLE: dict[str, dict[int, Entries]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    # norm_rows.py: the size is the bytes of one row of everything that is loaded, of which `stages - 1` are in shared memory.
    "norm_forward": {
        80: _norm_forward(stages=3, per_processor=2),
        90: _norm_forward(stages=3, per_processor=3),
        120: _norm_forward(stages=3, per_processor=2),
    },
    "norm_backward": {80: _norm_backward(stages=3), 90: _norm_backward(stages=5), 120: _norm_backward(stages=3)},
    "column_sums": {80: [(1 << 62, {"rows": 32, "columns": 64, "warps": 4})]},
}
