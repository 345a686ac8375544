"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

TABLE: dict[str, dict[int, list[tuple[int, dict[str, int]]]]] = {
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4})]},
    # lora_linear. The size of the large products is the bytes of an element; that of the low-rank kernels is the ranks of a
    # block x 3 with float32 adapters, x 16 with float32 activations.
    "lora_output": {
        80: [
            (2, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        90: [
            (2, {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        120: [
            (2, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "lora_swiglu": {
        80: [
            (2, {"rows": 128, "columns": 64, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 32, "depth": 32, "warps": 4, "stages": 3}),
        ],
        90: [
            (2, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 32, "depth": 32, "warps": 4, "stages": 3}),
        ],
        120: [
            (2, {"rows": 128, "columns": 64, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 32, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "lora_input_grad": {
        80: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        90: [
            (2, {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        120: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "lora_hidden": {
        80: [
            (64, {"rows": 64, "depth": 64, "warps": 4, "stages": 4}),
            (192, {"rows": 64, "depth": 32, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
        90: [
            (192, {"rows": 64, "depth": 64, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
        120: [
            (64, {"rows": 64, "depth": 64, "warps": 8, "stages": 4}),
            (192, {"rows": 64, "depth": 64, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
    },
    "lora_hidden_grad": {
        80: [
            (64, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
            (192, {"rows": 64, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
        90: [
            (64, {"rows": 64, "columns": 256, "depth": 64, "warps": 8, "stages": 3}),
            (192, {"rows": 64, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
        120: [
            (64, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
            (192, {"rows": 64, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
    },
    "lora_a_grad": {
        80: [
            (64, {"rows": 64, "columns": 128, "warps": 4, "stages": 3}),
            (192, {"rows": 32, "columns": 128, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 4, "stages": 2}),
        ],
        90: [
            (192, {"rows": 64, "columns": 128, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 4, "stages": 2}),
        ],
        120: [
            (64, {"rows": 64, "columns": 128, "warps": 4, "stages": 3}),
            (192, {"rows": 32, "columns": 128, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 4, "stages": 2}),
        ],
    },
    "lora_sum": {80: [(1 << 62, {"rows": 8, "columns": 512, "warps": 4})]},
}
