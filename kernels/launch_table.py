"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    # rope, by tokens: columns are the values in a tile (tokens x heads x rotated columns), depth the most heads in it.
    "rope": {
        80: [(1 << 62, {"columns": 1024, "depth": 4, "warps": 2, "stages": 3})],
        86: [(1 << 62, {"columns": 1024, "depth": 4, "warps": 2, "stages": 2})],  # 3 spill
        90: [(1 << 62, {"columns": 1024, "depth": 4, "warps": 2, "stages": 3})],
    },
    # embedding_backward, by tokens: depth is where a sum over sorted tokens is cut.
    "embedding_backward": {80: [(1 << 62, {"rows": 8, "columns": 512, "depth": 128, "warps": 2})]},
    # adamw_step and grad_norm_parts, by values: rows are the tiles of a program; grad_norm_join, by parts.
    "adamw_step": {80: [(1 << 62, {"rows": 4, "columns": 2048, "warps": 4})]},
    "grad_norm_parts": {80: [(1 << 62, {"rows": 16, "columns": 1024, "warps": 4})]},
    "grad_norm_join": {80: [(1 << 62, {"columns": 4096, "warps": 16})]},
}
