"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    # Rows of a matrix: the size is the bytes of one row of everything that is loaded.
    "norm_forward": {
        80: [
            *((8192 // rows, {"rows": rows, "warps": 8, "stages": 3, "per_processor": 4}) for rows in (64, 32, 16, 8, 4, 2)),
            (16384, {"warps": 8, "stages": 3, "per_processor": 3}),
            (32768, {"warps": 16, "stages": 3, "per_processor": 1}),
            (1 << 62, {"warps": 32, "stages": 1, "per_processor": 1}),
        ]
    },
    "norm_backward": {
        80: [
            *((16384 // rows, {"rows": rows, "warps": 8, "stages": 3, "per_processor": 2}) for rows in (64, 32, 16, 8, 4, 2)),
            (16384, {"warps": 8, "stages": 3, "per_processor": 2}),
            (32768, {"warps": 16, "stages": 3, "per_processor": 1}),
            (65536, {"warps": 16, "stages": 2, "per_processor": 1}),
            (1 << 62, {"warps": 32, "stages": 1, "per_processor": 1}),
        ]
    },
    "column_sums": {80: [(1 << 62, {"rows": 32, "columns": 64, "warps": 4})]},
}
