"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "attention_forward": {80: [(64, {"rows": 128, "columns": 64, "warps": 4, "stages": 2}), (256, {"rows": 64, "columns": 32, "warps": 4, "stages": 2})]},
    "attention_forward_grouped": {80: [(64, {"rows": 256, "columns": 64, "warps": 8, "stages": 2}), (256, {"rows": 64, "columns": 32, "warps": 4, "stages": 2})]},
    "attention_forward_float32": {80: [(256, {"rows": 32, "columns": 32, "warps": 4, "stages": 1})]},
    "attention_dq": {80: [(64, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}), (256, {"rows": 64, "columns": 32, "warps": 4, "stages": 2})]},
    "attention_dkdv": {80: [(64, {"rows": 64, "columns": 128, "warps": 8, "stages": 2}), (256, {"rows": 32, "columns": 64, "warps": 4, "stages": 1})]},
    "attention_dq_float32": {80: [(256, {"rows": 32, "columns": 32, "warps": 4, "stages": 1})]},
    "attention_dkdv_float32": {80: [(256, {"rows": 32, "columns": 32, "warps": 4, "stages": 1})]},
}
