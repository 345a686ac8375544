"""decode_block at SmolLM2-135M's block with 256 cached tokens, and decode_logits at its head; 1 and 8 rows.

Blocks take turns, as in a model, so that weights come from memory and not from a cache that one block fits in.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch

from benchmarks.harness import Case
from fastpt.ops import decode_block, decode_logits
from fastpt.ops._library import OPS
from fastpt.ops.decode import BlockWeights, empty_cache, logits_reference, reference

BLOCKS = 16  # 113 MB in bfloat16


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    width, heads, kv_heads, head_dim, inner, context = (64, 4, 2, 16, 96, 32) if toy else (576, 9, 3, 64, 1536, 256)
    vocabulary, blocks = (256, 2) if toy else (49152, BLOCKS)
    name = str(dtype).removeprefix("torch.")
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = [(q, width), (kv, width), (kv, width), (width, q), (inner, width), (inner, width), (width, inner)]

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype) * scale

    def block() -> BlockWeights:
        norms = [torch.ones(width, device=device) if i in (0, 4) else None for i in range(6)]
        return BlockWeights(
            [randn(*shape, scale=shape[1] ** -0.5) for shape in shapes], [None] * 7, [None] * 7, [None] * 7, [1.0] * 7,
            norms, [1e-5] * 6, True, "silu", None, None, head_dim**-0.5,
        )  # fmt: skip

    for rows in (1, 8):
        caches = [
            [t.normal_() for t in empty_cache(rows, kv_heads, context, head_dim, randn(1))] for _ in range(blocks)
        ]
        angles = torch.rand(context, head_dim, device=device)
        head = randn(rows, width), angles.cos(), angles.sin(), torch.arange(rows), torch.full((rows,), context - 1)
        weights = [block() for _ in range(blocks)]
        fast, slow = (cycle(zip(caches, weights, strict=True)) for _ in range(2))

        def ours(head=head, turns=fast):
            cache, weights = next(turns)
            return decode_block(*head, *cache, weights)

        def eager(head=head, turns=slow):
            cache, weights = next(turns)
            return reference(*head, *cache, *weights)

        cost = OPS["decode_block"].cost(*head, *caches[0], *weights[0])
        shape = f"{rows}x{width}, {context} cached"
        yield Case("decode_block", shape, name, "forward", {"fastpt": ours, "eager": eager}, cost)

        hidden, table = randn(rows, width), randn(vocabulary, width)
        providers = {
            "fastpt": lambda hidden=hidden, table=table: decode_logits(hidden, table),
            "torch": lambda hidden=hidden, table=table: torch.nn.functional.linear(hidden, table).float(),
            "eager": lambda hidden=hidden, table=table: logits_reference(hidden, table, None),
        }
        cost = OPS["decode_logits"].cost(hidden, table, None)
        yield Case("decode_logits", f"{rows}x{width}x{vocabulary}", name, "forward", providers, cost)
