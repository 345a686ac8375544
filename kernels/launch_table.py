"""Launches by kernel, architecture and size, smallest limit first; written by benchmarks.tune_kernels on a GPU.

{kernel: {arch: [(limit, fields of Launch), ...]}}; the last entry serves every larger size. An architecture without an
entry takes the newest one below it: 80 also serves 86 and 89, 100 also 120, unless they need less shared memory.
"""

from __future__ import annotations

Entries = list[tuple[int, dict[str, int]]]


def _norm_forward(stages: int) -> Entries:
    return [
        (2048, {"columns": 2048, "warps": 4, "stages": stages, "per_processor": 4}),  # 8 warps load a weight by 8 bytes
        (16384, {"columns": 4096, "warps": 8, "stages": stages, "per_processor": 2}),
        (32768, {"columns": 4096, "warps": 16, "stages": 3}),
        (65536, {"columns": 4096, "warps": 32, "stages": 2}),
        (1 << 62, {"columns": 4096, "warps": 32}),
    ]


def _norm_backward(stages: int, wide: int) -> Entries:
    """`wide` are the stages of 16384 columns with a residual, whose registers only shared memory relieves."""
    return [
        (24576, {"columns": 4096, "warps": 8, "stages": stages, "per_processor": 2}),
        (49152, {"columns": 4096, "warps": 16, "stages": min(3, stages)}),
        (98304, {"columns": 4096, "warps": 16}),
        (131072, {"columns": 4096, "warps": 16, "stages": wide}),
        (1 << 62, {"columns": 4096, "warps": 16}),
    ]


TABLE: dict[str, dict[int, Entries]] = {
    # What a program holds for the next blocks is `columns` values of each input, `stages - 1` times, in shared memory.
    "swiglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4, "stages": 3, "per_processor": 5})]},
    "swiglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4, "stages": 3, "per_processor": 3})]},
    "geglu_forward": {80: [(1 << 62, {"columns": 2048, "warps": 4, "stages": 3, "per_processor": 5})]},
    "geglu_backward": {80: [(1 << 62, {"columns": 2048, "warps": 4, "stages": 3, "per_processor": 3})]},
    "bias_gelu_forward": {80: [(1 << 62, {"rows": 2, "columns": 1024, "warps": 4, "stages": 4, "per_processor": 6})]},
    "bias_gelu_backward": {80: [(1 << 62, {"rows": 2, "columns": 1024, "warps": 4, "stages": 4, "per_processor": 3})]},
    # norm_rows.py: the size is the bytes of one row of everything that is loaded, of which `stages - 1` are in shared memory;
    # `columns` are the values of a tile, as many short rows as that takes.
    "norm_forward": {80: _norm_forward(stages=3), 90: _norm_forward(stages=5), 120: _norm_forward(stages=3)},
    "norm_backward": {
        80: _norm_backward(stages=3, wide=1),
        86: _norm_backward(stages=2, wide=1),
        90: _norm_backward(stages=3, wide=2),
        100: _norm_backward(stages=4, wide=2),
        120: _norm_backward(stages=2, wide=1),
    },
    "norm_parameter_sums": {80: [(1 << 62, {"rows": 2, "columns": 1024, "warps": 4, "stages": 4, "per_processor": 3})]},
    "column_sums": {80: [(1 << 62, {"rows": 32, "columns": 64, "warps": 4})]},
    # dora_norm, by the bytes of the padded rank of one column of A: depth is the most of the rank that is not cut.
    "dora_norm": {
        80: [
            (32, {"rows": 256, "columns": 64, "depth": 16, "warps": 16, "stages": 3}),
            (64, {"rows": 256, "columns": 32, "depth": 32, "warps": 8, "stages": 4}),
            (128, {"rows": 128, "columns": 64, "depth": 64, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "per_processor": 4}),
        ]
    },
    "dora_norm_join": {80: [(1 << 62, {"rows": 8, "columns": 128, "warps": 4})]},
    # rows x columns: query rows x keys of a tile; the limit is the padded head size. See kernels/attention_tiles.py.
    "attention_forward": {
        80: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 3}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 3}),
            (256, {"rows": 64, "columns": 32, "warps": 8, "stages": 2}),
        ],
        90: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 3}),
            (128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 128, "columns": 32, "warps": 8, "stages": 1}),
        ],
        120: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 3}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 3}),
            (256, {"rows": 64, "columns": 32, "warps": 8, "stages": 2}),
        ],
    },
    "attention_forward_grouped": {  # two rows to a token at least: twice the rows mask no more of the diagonal
        80: [
            (64, {"rows": 256, "columns": 32, "warps": 8, "stages": 2}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 3}),
            (256, {"rows": 64, "columns": 32, "warps": 8, "stages": 2}),
        ],
        90: [
            (64, {"rows": 256, "columns": 64, "warps": 8, "stages": 2}),
            (128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 128, "columns": 32, "warps": 8, "stages": 1}),
        ],
        100: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 3}),
            (128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 128, "columns": 32, "warps": 8, "stages": 2}),
        ],
        120: [
            (64, {"rows": 256, "columns": 32, "warps": 8, "stages": 2}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 3}),
            (256, {"rows": 64, "columns": 32, "warps": 8, "stages": 2}),
        ],
    },
    # float32 is multiplied without tensor cores: a tile that is loaded two steps ahead waits in shared memory, not in registers.
    "attention_forward_float32": {
        80: [
            (64, {"rows": 32, "columns": 32, "warps": 8, "stages": 2}),
            (128, {"rows": 32, "columns": 16, "warps": 8, "stages": 2}),
            (256, {"rows": 16, "columns": 16, "warps": 8, "stages": 2}),
        ]
    },
    "attention_dq": {
        80: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 4, "stages": 1}),
        ],
        90: [
            (128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 128, "columns": 32, "warps": 8, "stages": 1}),
        ],
        100: [
            (128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 128, "columns": 32, "warps": 8, "stages": 2}),
        ],
        120: [
            (64, {"rows": 128, "columns": 64, "warps": 8, "stages": 2}),
            (128, {"rows": 128, "columns": 32, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 4, "stages": 1}),
        ],
    },
    "attention_dq_float32": {
        80: [
            (64, {"rows": 32, "columns": 32, "warps": 8, "stages": 1}),
            (256, {"rows": 16, "columns": 16, "warps": 8, "stages": 2}),
        ]
    },
    "attention_dkdv": {
        80: [
            (64, {"rows": 32, "columns": 128, "warps": 8, "stages": 2}),
            (128, {"rows": 32, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 8, "stages": 2}),
        ],
        90: [
            (64, {"rows": 64, "columns": 128, "warps": 8, "stages": 2}),
            (128, {"rows": 32, "columns": 128, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 8, "stages": 2}),
        ],
        100: [
            (128, {"rows": 64, "columns": 128, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 8, "stages": 2}),
        ],
        120: [
            (64, {"rows": 32, "columns": 128, "warps": 8, "stages": 2}),
            (128, {"rows": 32, "columns": 64, "warps": 8, "stages": 2}),
            (256, {"rows": 32, "columns": 32, "warps": 8, "stages": 2}),
        ],
    },
    "attention_dkdv_float32": {
        80: [
            (64, {"rows": 32, "columns": 32, "warps": 8, "stages": 1}),
            (256, {"rows": 16, "columns": 16, "warps": 8, "stages": 1}),
        ]
    },
    # bfloat16 at a head size of 128 with window and softcap: the entries above spill.
    "attention_sinks": {  # rows: tokens of one head
        80: [(64, {"rows": 64, "warps": 4}), (128, {"rows": 32, "warps": 4}), (1 << 62, {"rows": 32, "warps": 4})]
    },
    "attention_forward_window_softcap": {
        80: [(128, {"rows": 128, "columns": 32, "warps": 8, "stages": 2})],
        90: [(128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2})],
        120: [(128, {"rows": 128, "columns": 32, "warps": 8, "stages": 1})],
    },
    "attention_dq_window_softcap": {
        80: [(128, {"rows": 128, "columns": 32, "warps": 8, "stages": 1})],
        90: [(128, {"rows": 128, "columns": 64, "warps": 8, "stages": 2})],
        120: [(128, {"rows": 128, "columns": 32, "warps": 8, "stages": 1})],
    },
    "attention_dkdv_window_softcap": {80: [(128, {"rows": 32, "columns": 64, "warps": 8, "stages": 1})]},
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
    # The head (head_rows.py): size is the length of a row of logits; a tile that holds the row is read once. "capped" also
    # serves class weights: both take registers for every logit.
    "row_losses": {
        80: [
            (1024, {"columns": 1024, "warps": 1}),
            (4096, {"columns": 4096, "warps": 4}),
            (8192, {"columns": 8192, "warps": 8}),
            (16384, {"columns": 16384, "warps": 16}),
            (32768, {"columns": 32768, "warps": 32}),
            (1 << 62, {"columns": 4096, "warps": 16, "stages": 5}),
        ]
    },
    "row_losses_capped": {
        80: [(1 << 62, {"columns": 4096, "warps": 16, "stages": 4})],
        100: [(1 << 62, {"columns": 4096, "warps": 16, "stages": 5})],
    },
    "row_statistics": {
        80: [
            (1024, {"columns": 1024, "warps": 1}),
            (4096, {"columns": 4096, "warps": 4}),
            (8192, {"columns": 8192, "warps": 8}),
            (16384, {"columns": 16384, "warps": 16}),
            (32768, {"columns": 32768, "warps": 32}),
            (1 << 62, {"columns": 8192, "warps": 32, "stages": 3}),
        ]
    },
    "row_statistics_backward": {80: [(1 << 62, {"columns": 4096, "warps": 8, "stages": 3})]},
    "row_losses_backward": {80: [(1 << 62, {"columns": 4096, "warps": 8, "stages": 3})]},
    "divergence_of_rows": {80: [(1 << 62, {"columns": 4096, "warps": 16, "stages": 4})]},
    "divergence_of_rows_mixture": {
        80: [(1 << 62, {"columns": 2048, "warps": 8, "stages": 4})],
        100: [(1 << 62, {"columns": 2048, "warps": 8, "stages": 7})],
        120: [(1 << 62, {"columns": 2048, "warps": 8, "stages": 4})],
    },
    "sum_losses": {80: [(1 << 62, {"columns": 1024, "warps": 8})]},
    "scale_in_place": {80: [(1 << 62, {"columns": 4096, "warps": 8})]},
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
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        90: [
            (2, {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        120: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "lora_input_grad_dropout": {
        80: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
        90: [
            (2, {"rows": 128, "columns": 64, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
        120: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 8, "stages": 3}),
        ],
    },
    # 32 rows, so that 4096 tokens give every processor a program.
    "lora_hidden": {
        80: [
            (32, {"rows": 32, "depth": 256, "warps": 8, "stages": 4}),
            (64, {"rows": 32, "depth": 128, "warps": 4, "stages": 5}),
            (96, {"rows": 32, "depth": 128, "warps": 8, "stages": 4}),
            (192, {"rows": 32, "depth": 64, "warps": 8, "stages": 5}),
            (1 << 62, {"rows": 32, "depth": 32, "warps": 4, "stages": 7}),
        ],
        120: [
            (32, {"rows": 32, "depth": 256, "warps": 8, "stages": 4}),
            (64, {"rows": 32, "depth": 64, "warps": 4, "stages": 6}),
            (96, {"rows": 32, "depth": 128, "warps": 8, "stages": 4}),
            (192, {"rows": 32, "depth": 64, "warps": 8, "stages": 5}),
            (1 << 62, {"rows": 32, "depth": 32, "warps": 4, "stages": 7}),
        ],
    },
    "lora_hidden_dropout": {
        80: [
            (192, {"rows": 32, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 32, "depth": 32, "warps": 8, "stages": 4}),
        ],
        100: [
            (192, {"rows": 32, "depth": 64, "warps": 8, "stages": 7}),
            (1 << 62, {"rows": 32, "depth": 32, "warps": 8, "stages": 4}),
        ],
        120: [
            (192, {"rows": 32, "depth": 64, "warps": 8, "stages": 4}),
            (1 << 62, {"rows": 32, "depth": 32, "warps": 8, "stages": 4}),
        ],
    },
    "lora_hidden_grad": {
        80: [
            (32, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
            (64, {"rows": 64, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
            (192, {"rows": 64, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
        90: [
            (64, {"rows": 64, "columns": 256, "depth": 64, "warps": 8, "stages": 3}),
            (192, {"rows": 64, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
        120: [
            (32, {"rows": 128, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
            (64, {"rows": 64, "columns": 128, "depth": 64, "warps": 8, "stages": 3}),
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
    "lora_a_grad_dropout": {
        80: [
            (192, {"rows": 32, "columns": 128, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 8, "stages": 2}),
        ],
        90: [
            (192, {"rows": 32, "columns": 128, "warps": 8, "stages": 6}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 8, "stages": 2}),
        ],
        120: [
            (192, {"rows": 32, "columns": 128, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 32, "columns": 64, "warps": 8, "stages": 2}),
        ],
    },
    "lora_sum": {80: [(1 << 62, {"rows": 8, "columns": 512, "warps": 4})]},
    # grouped_linear; the size is the bytes of an element. Narrow: at most 64 columns, those of a rank. 64 rows, because with 128
    # experts few have more tokens than that.
    "grouped_product": {
        80: [
            (2, {"rows": 64, "columns": 128, "depth": 64, "warps": 4, "stages": 3}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        90: [
            (2, {"rows": 64, "columns": 128, "depth": 64, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
        120: [
            (2, {"rows": 64, "columns": 128, "depth": 64, "warps": 4, "stages": 3}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "grouped_product_narrow": {
        80: [
            (2, {"rows": 64, "columns": 16, "depth": 64, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 16, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
    "grouped_token_sum": {
        80: [
            (2, {"rows": 128, "columns": 128, "depth": 32, "warps": 8, "stages": 3}),
            (1 << 62, {"rows": 64, "columns": 64, "depth": 32, "warps": 4, "stages": 2}),
        ],
    },
    "grouped_token_sum_narrow": {
        80: [
            (2, {"rows": 128, "columns": 16, "depth": 64, "warps": 4, "stages": 4}),
            (1 << 62, {"rows": 64, "columns": 16, "depth": 32, "warps": 4, "stages": 3}),
        ],
    },
}
