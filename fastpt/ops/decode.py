"""decode_block, decode_logits: one new token for each of a few sequences through a decoder block, on a static KV cache.

A step's time is that of reading every weight once, so a block is one op: products of a few rows straight from the row-major
weights, and between them norms, rotation, attention over the cache and activation on rows that never leave the L1 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpt.ops._library import Cost, nbytes, register

BLOCK_KEYS = 32  # keys lie in blocks [K, 32]: the C++ kernel computes the scores of a block at once
LAYERS = ("query", "key", "value", "output", "gate", "up", "down")
NORMS = ("input", "query", "key", "after_attention", "mlp_input", "after_mlp")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


class BlockWeights(NamedTuple):
    """A decoder block as decode_block takes it: the tail of the op's arguments, made once for many steps."""

    weights: list[Tensor]  # one for each of LAYERS, [O, I] with contiguous rows
    biases: list[Tensor | None]
    lora_a: list[Tensor | None]  # float32 [R, I]
    lora_b: list[Tensor | None]  # float32 [O, R]
    scales: list[float]
    norms: list[Tensor | None]  # float32, offset + weight, one for each of NORMS
    norm_eps: list[float]
    casts_first: bool
    activation: str
    window: int | None
    softcap: float | None
    scale: float


def empty_cache(slots: int, kv_heads: int, capacity: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the keys and values of one block; pages that no token has reached take no memory."""
    blocks = -(-capacity // BLOCK_KEYS)
    keys = like.new_empty(slots, kv_heads, blocks, head_dim, BLOCK_KEYS)
    return keys, like.new_empty(slots, kv_heads, blocks * BLOCK_KEYS, head_dim)


def fill_cache(keys: Tensor, values: Tensor, slot: int, new_keys: Tensor, new_values: Tensor) -> None:
    """Put the first tokens of a sequence, [T, Hkv, K] each, into its slot."""
    tokens = len(new_keys)
    values[slot, :, :tokens] = new_values.transpose(0, 1)
    padded = F.pad(new_keys.permute(1, 2, 0), (0, -tokens % BLOCK_KEYS))  # [Hkv, K, blocks * 32]
    blocks = padded.unflatten(-1, (-1, BLOCK_KEYS)).transpose(1, 2)
    keys[slot, :, : blocks.shape[1]] = blocks


def copy_cache(keys: Tensor, values: Tensor, source: int, slot: int, tokens: int) -> None:
    """Put the first tokens of one slot's sequence into another slot."""
    blocks = -(-tokens // BLOCK_KEYS)
    values[slot, :, :tokens] = values[source, :, :tokens]
    keys[slot, :, :blocks] = keys[source, :, :blocks]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reference(
    x, cos, sin, slots, positions, keys, values, weights, biases, lora_a, lora_b, scales, norms, norm_eps, casts_first,
    activation, window, softcap, scale,
) -> Tensor:  # fmt: skip
    """The definition, rounded to x's dtype where a block that is trained rounds; writes the new keys and values."""

    def linear(y: Tensor, i: int) -> Tensor:
        out = _wide(y) @ _wide(weights[i]).t()
        if lora_a[i] is not None:
            out = out + scales[i] * (_wide(y) @ lora_a[i].to(out.dtype).t()) @ lora_b[i].to(out.dtype).t()
        return (out if biases[i] is None else out + biases[i]).to(x.dtype)

    def norm(y: Tensor, i: int) -> Tensor:
        if norms[i] is None:
            return y
        normed = _wide(y) * torch.rsqrt(_wide(y).pow(2).mean(-1, keepdim=True) + norm_eps[i])
        return (_wide(normed.to(x.dtype) if casts_first else normed) * norms[i]).to(x.dtype)

    def turn(y: Tensor) -> Tensor:  # [M, heads, K]
        c, s = cos[positions][:, None], sin[positions][:, None]  # [M, 1, R]
        part, rest = y.split([c.shape[-1], y.shape[-1] - c.shape[-1]], -1)
        first, second = _wide(part).chunk(2, -1)
        return torch.cat(((_wide(part) * c + torch.cat((-second, first), -1) * s).to(x.dtype), rest), -1)

    y = norm(x, 0)
    q, k, v = (linear(y, i).unflatten(-1, (-1, values.shape[-1])) for i in range(3))
    q, k = turn(norm(q, 1)), turn(norm(k, 2))
    attended = torch.stack(
        [
            _attend(q[m], k[m], v[m], keys[slots[m]], values[slots[m]], int(positions[m]), window, softcap, scale)
            for m in range(len(x))
        ]
    )
    s = x + norm(linear(attended.flatten(1), 3), 3)
    y = norm(s, 4)
    gated = (ACTIVATIONS[activation](_wide(linear(y, 4))) * linear(y, 5)).to(x.dtype)
    return s + norm(linear(gated, 6), 5)


def _attend(q, k, v, keys, values, position, window, softcap, scale) -> Tensor:  # q [H, K] -> [H, K]
    """One row: its key and value go into the cache [Hkv, ...], its queries see everything up to there."""
    keys[:, position // BLOCK_KEYS, :, position % BLOCK_KEYS] = k
    values[:, position] = v
    first = 0 if window is None else max(0, position + 1 - window)
    seen = slice(first, position + 1)
    query = _wide(q).unflatten(0, (len(k), -1))  # [Hkv, G, K]
    scores = query @ _wide(keys.transpose(1, 2).flatten(2)[:, :, seen]) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1) @ _wide(values[:, seen])).flatten(0, 1).to(q.dtype)


def _cost(x, cos, sin, slots, positions, keys, values, weights, biases, lora_a, lora_b, *_) -> Cost:
    """Of the longest context that the cache has room for."""
    parameters = sum(t.numel() for t in (*weights, *lora_a, *lora_b) if t is not None)
    cached = nbytes(keys, values) // len(keys) * len(x)
    heads = weights[0].shape[0] * values.shape[2]
    return Cost(
        nbytes(x, *weights, *biases, *lora_a, *lora_b) + cached, nbytes(x), 2 * len(x) * (parameters + 2 * heads)
    )


_decode_block = register(
    "decode_block(Tensor x, Tensor cos, Tensor sin, Tensor slots, Tensor positions, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor[] weights, Tensor?[] biases, Tensor?[] lora_a, Tensor?[] lora_b, float[] scales, Tensor?[] norms, "
    "float[] norm_eps, bool casts_first, str activation, int? window, float? softcap, float scale) -> Tensor",
    reference=reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    cost=_cost,
)


def decode_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    block: BlockWeights,
) -> Tensor:
    """One new token of each of M sequences through a decoder block; their keys and values join the cache.

    Row m is token positions[m] of the sequence in slot slots[m], and sees that slot's tokens up to itself.

    Shapes: x [M, D]; cos, sin [P, R], row p for position p, halves rotated; slots, positions int64 [M], slots distinct;
    keys [S, Hkv, C / 32, K, 32] and values [S, Hkv, C, K], written in place -> [M, D].
    Numerics: float32 inside, rounded to x's dtype where a block that is trained rounds; a row's result does not depend on
    the other rows.
    Raises: RuntimeError when shapes or dtypes do not fit, IndexError for a slot or position out of range.
    """
    return _decode_block(x, cos, sin, slots, positions, keys, values, *block)


def logits_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = _wide(hidden) @ _wide(weight).t()
    return logits if bias is None else logits + bias


_decode_logits = register(
    "decode_logits(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor",
    reference=logits_reference,
    fake=lambda hidden, weight, bias: _wide(hidden.new_empty(len(hidden), len(weight))),
    cost=lambda hidden, weight, bias: Cost(
        nbytes(hidden, weight, bias), 4 * len(hidden) * len(weight), 2 * len(hidden) * weight.numel()
    ),
)


def decode_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias in float32, unrounded: greedy choices see differences that bfloat16 logits have lost.

    Shapes: hidden [M, D], weight [V, D] of the same dtype, bias [V] -> [M, V] float32.
    Raises: RuntimeError when shapes or dtypes do not fit.
    """
    return _decode_logits(hidden, weight, bias)
