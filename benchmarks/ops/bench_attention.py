"""attention at the heads of SmolLM2-135M (9 query, 3 key, 64 wide): a batch of 512, one long row, a pack of short rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, forward_backward
from fastpt.ops import attention
from fastpt.ops._library import OPS
from fastpt.ops.attention import _backward, _forward

PACKS = {"4x512": [512] * 4, "1x4096": [4096], "9 rows of 50-512": [226, 50, 512, 130, 301, 97, 411, 180, 141]}
TOY = {"3x20": [20] * 3, "2 rows": [5, 30]}


def sdpa(lengths: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's own causal attention on packed rows: one batch where all rows are equally long, else one call a row."""

    def dense(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        heads_first = [x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    if len(set(lengths)) == 1:
        return lambda q, k, v: dense(q, k, v, len(lengths))
    return lambda *qkv: torch.cat([dense(*row, 1) for row in zip(*(x.split(lengths) for x in qkv), strict=True)])


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    name = str(dtype).removeprefix("torch.")
    for shape, lengths in (TOY if toy else PACKS).items():
        tokens, peer = sum(lengths), sdpa(lengths)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        qkv = torch.randn(tokens, 9 + 3 + 3, 64, device=device, dtype=dtype)  # as one projection leaves it
        q, k, v = (x.requires_grad_() for x in qkv.split((9, 3, 3), dim=1))
        options = (cu, None, True, None, None, 64**-0.5)
        plain = [x.detach() for x in (q, k, v)]
        out, lse = _forward(*plain, *options)
        forward = OPS["attention"].cost(*plain, *options)
        backward = OPS["attention_backward"].cost(out, *plain, out, lse, *options)

        def ours(q: Tensor, k: Tensor, v: Tensor, cu: Tensor = cu) -> Tensor:
            return attention(q, k, v, cu_seqlens_q=cu)

        only_forward = {"fastpt": lambda p=plain, o=options: _forward(*p, *o), "sdpa": lambda p=plain, f=peer: f(*p)}
        yield Case("attention", shape, name, "forward", only_forward, forward)
        only_backward = {"fastpt": lambda p=plain, o=options, s=(out, lse): _backward(s[0], *p, *s, *o)}
        yield Case("attention", shape, name, "backward", only_backward, backward)
        both = {"fastpt": forward_backward(ours, q, k, v), "sdpa": forward_backward(peer, q, k, v)}
        yield Case("attention", shape, name, "forward+backward", both, forward + backward)
