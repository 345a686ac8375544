"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    # The head (head_rows.py): size is the length of a row of logits; a tile that holds the row is read once. "capped" also
    # serves class weights: both take registers for every logit.
    "row_losses": {
        80: [
            (1024, {"columns": 1024, "warps": 2}),
            (4096, {"columns": 4096, "warps": 4}),
            (8192, {"columns": 8192, "warps": 8}),
            (16384, {"columns": 16384, "warps": 16}),
            (32768, {"columns": 32768, "warps": 32}),
            (1 << 62, {"columns": 4096, "warps": 16, "stages": 4}),
        ]
    },
    "row_losses_capped": {
        80: [
            (1024, {"columns": 1024, "warps": 2}),
            (4096, {"columns": 4096, "warps": 8}),
            (8192, {"columns": 8192, "warps": 16}),
            (1 << 62, {"columns": 4096, "warps": 16, "stages": 4}),
        ]
    },
    "row_statistics": {
        80: [
            (1024, {"columns": 1024, "warps": 2}),
            (4096, {"columns": 4096, "warps": 4}),
            (8192, {"columns": 8192, "warps": 8}),
            (16384, {"columns": 16384, "warps": 16}),
            (32768, {"columns": 32768, "warps": 32}),
            (1 << 62, {"columns": 8192, "warps": 32, "stages": 3}),
        ]
    },
    "row_statistics_backward": {80: [(1 << 62, {"columns": 4096, "warps": 8, "stages": 2})]},
    "row_losses_backward": {80: [(1 << 62, {"columns": 4096, "warps": 8, "stages": 2})]},
    "sum_losses": {80: [(1 << 62, {"columns": 1024, "warps": 8})]},
    "scale_in_place": {80: [(1 << 62, {"columns": 4096, "warps": 8})]},
}
