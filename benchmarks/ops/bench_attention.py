"""attention at the heads of SmolLM2-135M (9 query, 9 or 3 key, 64 wide) and of MiniLM-L6 (12, 32 wide, bidirectional).

A batch of 512 and one long row, which torch's SDPA takes as they are; packed rows, one SDPA call each; short sentences,
which SDPA gets padded to the longest, with a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import attention
from fastpt.ops._library import OPS
from fastpt.ops.attention import _backward, _forward


class Shape(NamedTuple):
    lengths: list[int]
    heads: int
    heads_kv: int
    dim: int
    is_causal: bool = True


ROWS = [226, 50, 300, 130, 201, 97, 211, 180, 141, 64, 290, 158]
SENTENCES = [8 + 7 * i % 33 for i in range(32)]
SHAPES = {
    "4x512, 9 heads": Shape([512] * 4, 9, 9, 64),
    "4x512, 9/3 heads": Shape([512] * 4, 9, 3, 64),
    "1x4096, 9 heads": Shape([4096], 9, 9, 64),
    "1x4096, 9/3 heads": Shape([4096], 9, 3, 64),
    "12 rows of 50-300, 9/3 heads": Shape(ROWS, 9, 3, 64),
    "32 sentences of 8-40, 12 heads": Shape(SENTENCES, 12, 12, 32, False),
}
TOY = {
    "3x20": Shape([20] * 3, 9, 3, 64),
    "2 rows": Shape([5, 30], 9, 3, 64),
    "2 sentences": Shape([5, 9], 2, 2, 32, False),
}


def sdpa(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's own attention on the same tokens."""
    lengths = shape.lengths

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, T, H, K]
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        is_gqa = shape.heads != shape.heads_kv
        out = F.scaled_dot_product_attention(*heads_first, mask, is_causal=shape.is_causal, enable_gqa=is_gqa)
        return out.transpose(1, 2)

    if len(set(lengths)) == 1:
        return lambda *qkv: dense(*(x.unflatten(0, (len(lengths), -1)) for x in qkv)).flatten(0, 1)
    if shape.is_causal:
        return lambda *qkv: torch.cat(
            [dense(*(x[None] for x in row))[0] for row in zip(*(x.split(lengths) for x in qkv), strict=True)]
        )

    is_real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, T]
    mask = is_real[:, None, None]

    def padded(*qkv: Tensor) -> Tensor:
        batches = [x.new_zeros(*is_real.shape, *x.shape[1:]).index_put((is_real,), x) for x in qkv]
        return dense(*batches, mask)[is_real]

    return padded


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for label, shape in (TOY if toy else SHAPES).items():
        tokens, peer = sum(shape.lengths), sdpa(shape)
        cu = torch.tensor([0, *shape.lengths], device=device).cumsum(0).int()
        heads = shape.heads, shape.heads_kv, shape.heads_kv
        qkv = torch.randn(tokens, sum(heads), shape.dim, device=device, dtype=dtype)  # as one projection leaves it
        q, k, v = (x.requires_grad_() for x in qkv.split(heads, dim=1))
        options = (cu, None, shape.is_causal, None, None, shape.dim**-0.5)
        plain = [x.detach() for x in (q, k, v)]
        out, lse = _forward(*plain, *options)
        forward = OPS["attention"].cost(*plain, *options)
        backward = OPS["attention_backward"].cost(out, *plain, out, lse, *options)

        def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor = cu, is_causal: bool = shape.is_causal) -> Tensor:
            return attention(q, k, v, cu_seqlens_q=cu, causal=is_causal)

        only_forward = {"fastpt": lambda p=plain, o=options: _forward(*p, *o), "sdpa": lambda p=plain, f=peer: f(*p)}
        yield Case("attention", label, name, "forward", only_forward, forward)
        only_backward = {"fastpt": lambda p=plain, o=options, s=(out, lse): _backward(s[0], *p, *s, *o)}
        yield Case("attention", label, name, "backward", only_backward, backward)
        both = {"fastpt": forward_backward(ours, q, k, v), "sdpa": forward_backward(peer, q, k, v)}
        yield Case("attention", label, name, "forward+backward", both, forward + backward)
