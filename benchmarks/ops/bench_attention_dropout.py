"""attention with dropout of its weights as encoders train with it: 12 heads of 32, rows of 8 to 16 tokens, and of 128."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, forward_backward
from fastpt.ops import attention
from fastpt.ops._library import OPS

P = 0.1


def cases(device: str, dtype: torch.dtype, toy: bool) -> Iterator[Case]:
    heads, dim = (2, 8) if toy else (12, 32)
    packs = {"4 rows of 3 to 6": [3, 4, 5, 6]} if toy else {"32 rows of 8 to 16": list(range(8, 16)) * 4}
    packs |= {} if toy else {"8 rows of 128": [128] * 8}
    for shape, lengths in packs.items():
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        q, k, v = (torch.randn(sum(lengths), heads, dim, device=device, dtype=dtype).requires_grad_() for _ in range(3))
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]

        def padded(*qkv: Tensor, mask: Tensor = mask) -> Tensor:
            """What transformers runs: padded rows through scaled_dot_product_attention."""
            spread = [x.new_zeros(*mask.shape, *x.shape[1:]).masked_scatter(mask[..., None, None], x) for x in qkv]
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in spread), attn_mask=mask[:, None, None], dropout_p=P
            )
            return out.transpose(1, 2)[mask]

        functions: dict[str, Callable] = {
            "fastpt": lambda *x, c=cu_seqlens: attention(*x, cu_seqlens_q=c, causal=False, dropout_p=P, seed=1),
            "sdpa": padded,
        }
        options = cu_seqlens, None, False, None, None, dim**-0.5, P, 1
        forward = OPS["attention_dropout"].cost(q, k, v, *options)
        lse = torch.empty(sum(lengths), heads, device=device)
        backward = OPS["attention_dropout_backward"].cost(q, q, k, v, q, lse, *options)
        name, plain = str(dtype).removeprefix("torch."), [x.detach() for x in (q, k, v)]
        one = {n: lambda f=f, plain=plain: f(*plain) for n, f in functions.items()}
        yield Case("attention_dropout", shape, name, "forward", one, forward)
        both = {n: forward_backward(f, q, k, v) for n, f in functions.items()}
        yield Case("attention_dropout", shape, name, "forward+backward", both, forward + backward)
