"""attention: softmax(q kᵀ) v over packed sequences, computed in tiles so that no [T, T] tensor ever exists.

Idea and notation: FlashAttention-2 (Dao 2023); forward keeps only the row-wise logsumexp, backward recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpt.ops import _workspace
from fastpt.ops._dropout import drawn_seed, factors
from fastpt.ops._library import Cost, nbytes, register

# The raw ops' tail of arguments, in this order everywhere below; sinks come by name, to forward alone: backward finds them
# in lse.
_OPTIONS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int? window, float? softcap, float scale"


def _bounds(cu_seqlens: Tensor | None, tokens: int, name: str) -> list[int]:
    """Where each sequence starts, and the end of the last one."""
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise RuntimeError(f"attention: {name} is {bounds}; it must rise from 0 to the {tokens} tokens of its tensor")
    return bounds


def _sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Iterator[tuple]:
    """(query slice, key slice) of each sequence; cu_seqlens_k None: the same as cu_seqlens_q."""
    starts_q = _bounds(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    starts_k = _bounds(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    if len(starts_q) != len(starts_k):
        raise RuntimeError(
            f"attention: cu_seqlens_q has {len(starts_q) - 1} sequences, cu_seqlens_k {len(starts_k) - 1}; give one each"
        )
    for i in range(len(starts_q) - 1):
        yield slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])


def _visible(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor:  # [Tq, Tk]
    """Which key each query of one sequence sees; the last query stands at the last key."""
    key = torch.arange(k.shape[0], device=q.device)
    query = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    if causal:
        seen &= key <= query
    if window is not None:
        seen &= (key > query - window) & (key < query + window)
    return seen


def _grouped(x: Tensor, heads_kv: int) -> Tensor:
    """[T, Hq, ...] as [T, Hkv, G, ...]: the G query heads that share one key head; in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (heads_kv, -1))


def _scores(
    q: Tensor, k: Tensor, causal: bool, window: int | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Scores of one sequence, -inf where unseen, and what softcap multiplies their gradient by; [Hkv, G, Tq, Tk]."""
    scores = torch.einsum("qhgd,khd->hgqk", _grouped(q, k.shape[1]), k.to(torch.promote_types(k.dtype, torch.float32)))
    scores, slope = scores * scale, None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh * tanh
    return scores.masked_fill(~_visible(q, k, causal, window), float("-inf")), slope


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
    *,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, K] and lse [Tq, Hq], one sequence at a time.

    A query that sees no key gets out 0 and, without a sink, lse +inf: exp(score - lse) is then 0 in backward too.
    """
    out, lse = _empty_outputs(q)
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        scores, _ = _scores(q[rows], k[keys], causal, window, softcap, scale)
        total = scores.logsumexp(-1)  # [Hkv, G, Tq]
        if sinks is not None:
            total = total.logaddexp(sinks.view(k.shape[1], -1, 1))
        total = total.masked_fill(total == float("-inf"), float("inf"))
        weights = (scores - total[..., None]).exp()
        if dropout_p > 0:
            weights = weights * _kept(q, k, rows, weights, dropout_p, seed)
        out[rows] = torch.einsum("hgqk,khd->qhgd", weights, v[keys].to(weights.dtype)).flatten(1, 2).to(q.dtype)
        lse[rows] = total.permute(2, 0, 1).flatten(1)
    return out, lse


def reference_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty_gradients(q, k, v)
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        scores, slope = _scores(q[rows], k[keys], causal, window, softcap, scale)
        heads = k.shape[1]
        dout, query = _grouped(grad[rows], heads), _grouped(q[rows], heads)
        key, value = k[keys].to(dout.dtype), v[keys].to(dout.dtype)
        weights = (scores - _grouped(lse[rows], heads).permute(1, 2, 0)[..., None]).exp()
        delta = (dout * _grouped(out[rows], heads)).sum(-1).permute(1, 2, 0)[..., None]  # [Hkv, G, Tq, 1]
        dweights = torch.einsum("qhgd,khd->hgqk", dout, value)
        kept = _kept(q, k, rows, weights, dropout_p, seed) if dropout_p > 0 else 1.0
        dscores = weights * (dweights * kept - delta) * scale
        if slope is not None:
            dscores = dscores * slope
        dq[rows] = torch.einsum("hgqk,khd->qhgd", dscores, key).flatten(1, 2).to(q.dtype)
        dk[keys] = torch.einsum("hgqk,qhgd->khd", dscores, query).to(k.dtype)
        dv[keys] = torch.einsum("hgqk,qhgd->khd", weights * kept, dout).to(v.dtype)
    return dq, dk, dv


def _kept(q: Tensor, k: Tensor, rows: slice, weights: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies the weights [Hkv, G, Tq, Tk] of one sequence by: row (token, head), column the key's place."""
    heads, length = q.shape[1], weights.shape[-1]
    drawn = factors(rows.stop * heads, length, dropout_p, seed, q.device)[rows.start * heads :]
    return drawn.view(len(q[rows]), k.shape[1], heads // k.shape[1], length).permute(1, 2, 0, 3).to(weights.dtype)


def sinks_backward_reference(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [Tq, Hq]
    return -((sinks - lse).exp() * delta).sum(0)


def _empty_outputs(q: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _pairs(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal, window) -> int:
    """(query, key) pairs that see each other, over all sequences and query heads."""
    pairs = 0
    for rows, keys in _sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        length = keys.stop - keys.start
        query = torch.arange(rows.stop - rows.start) + length - (rows.stop - rows.start)
        last = query if causal else query + (length if window is None else window - 1)
        first = query - (length if window is None else window - 1) if causal or window else query * 0
        pairs += int((last.clamp(max=length - 1) - first.clamp(min=0) + 1).clamp(min=0).sum())
    return pairs * q.shape[1]


def _cost(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, sinks=None) -> Cost:
    products = 2 * 2 * q.shape[2] * _pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    return Cost(nbytes(q, k, v, sinks), nbytes(q) + 4 * q.shape[0] * q.shape[1], products)


def _cost_backward(
    grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale
) -> Cost:  # fmt: skip
    products = 5 * 2 * q.shape[2] * _pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal, window)
    return Cost(nbytes(grad, q, k, v, out, lse), nbytes(q, k, v), products)


_forward = register(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, *, Tensor? sinks=None) -> (Tensor, Tensor)",
    reference=reference,
    fake=_empty_outputs,
    cost=_cost,
    triton="fastpt.ops._attention_gpu:forward",
    workspace=_workspace.attention,
)
_backward = register(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, q, k, v, *_: _empty_gradients(q, k, v),
    cost=_cost_backward,
    triton="fastpt.ops._attention_gpu:backward",
    workspace=_workspace.attention_backward,
)

_sinks_backward = register(
    "attention_sinks_backward(Tensor grad, Tensor out, Tensor lse, Tensor sinks) -> Tensor",
    reference=sinks_backward_reference,
    fake=lambda grad, out, lse, sinks: sinks.new_empty(sinks.shape),
    cost=lambda grad, out, lse, sinks: Cost(nbytes(grad, out, lse, sinks), nbytes(sinks), 2 * out.numel()),
    triton="fastpt.kernels.attention_sinks:backward",
)

# With dropout of the weights. Ops of their own: encoders use them in training, on short sequences, and their CPU kernel is
# another.
_dropout_forward = register(
    f"attention_dropout(Tensor q, Tensor k, Tensor v, {_OPTIONS}, float dropout_p, int seed) -> (Tensor, Tensor)",
    reference=reference,
    fake=_empty_outputs,
    cost=lambda *args: _cost(*args[:-2]),
    triton="fastpt.ops._attention_gpu:forward",
)
_dropout_backward = register(
    "attention_dropout_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}, float dropout_p, int seed) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, q, k, v, *_: _empty_gradients(q, k, v),
    cost=lambda *args: _cost_backward(*args[:-2]),
    triton="fastpt.ops._attention_gpu:backward",
)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, *options):
        out, lse = _dropout_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients = _dropout_backward(grad, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, *(None for _ in ctx.options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale):
        out, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, sinks=sinks)
        ctx.save_for_backward(sinks, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.options = causal, window, softcap, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        sinks, *saved = ctx.saved_tensors
        _, _, _, out, lse, *_ = saved
        dsinks = _sinks_backward(grad, out, lse, sinks) if ctx.needs_input_grad[3] else None
        return *_backward(grad, *saved, *ctx.options), dsinks, None, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over packed sequences: softmax of the visible scores, times v.

    Shapes: q [Tq, Hq, K], k and v [Tk, Hkv, K] with Hq a multiple of Hkv, any strides (no copy while the last dim is
    contiguous) -> [Tq, Hq, K]. cu_seqlens int32 [N + 1]: sequence n is rows [cu[n], cu[n + 1]); None: one sequence,
    or for cu_seqlens_k: the same as cu_seqlens_q. Query i of a sequence stands at key i + (its Tk - its Tq).
    dropout_p of the weights are dropped, by a hash of seed (by default one from torch's generator), query and key.
    causal: keys up to there. window: keys less than `window` away. softcap c: c tanh(score / c). scale: K ** -0.5.
    sinks [Hq]: each head's sum of weights also counts exp(sink), as of a key that every query sees and whose value is 0.
    Numerics: scores, softmax and sums in float32; probabilities and their gradient enter the second product in q's
    dtype. A query that sees no key gets zeros. A token's output does not depend on its neighbours in the pack.
    Raises: RuntimeError when shapes, dtypes or cu_seqlens do not fit, and for dropout beside sinks; a GPU kernel holds wrong
    values of cu_seqlens within the tensors instead, since to look at them would be to wait for it.
    Source: Dao 2023, https://arxiv.org/abs/2307.08691.
    """
    if cu_seqlens_k is cu_seqlens_q:  # torch.compile refuses one tensor twice
        cu_seqlens_k = None
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, window, softcap, scale, sinks)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"attention: dropout_p is {dropout_p}; it must lie between 0 and 1")
    if dropout_p > 0:
        if sinks is not None:
            raise RuntimeError(f"attention: dropout_p is {dropout_p}, but no kernel drops weights beside sinks")
        seed = drawn_seed(dropout_p) if seed is None else seed
        return _DroppedAttention.apply(
            q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale, dropout_p, seed
        )
    if sinks is not None:
        sinks = sinks.to(torch.promote_types(q.dtype, torch.float32))
    return _Attention.apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale)


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, window, softcap, scale, sinks) -> None:
    shapes = f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}"
    if not (q.dim() == k.dim() == 3 and k.shape == v.shape and q.dtype == k.dtype == v.dtype):
        raise RuntimeError(f"attention: {shapes}; they must be [Tq, Hq, K], [Tk, Hkv, K], [Tk, Hkv, K] of one dtype")
    if q.shape[2] != k.shape[2] or q.shape[1] % max(k.shape[1], 1) != 0 or q.shape[2] == 0:
        raise RuntimeError(f"attention: {shapes}; K must be equal and Hq a multiple of Hkv")
    if cu_seqlens_q is None and cu_seqlens_k is not None:
        raise RuntimeError("attention: cu_seqlens_k without cu_seqlens_q; give both, or only cu_seqlens_q")
    if window is not None and window < 1:
        raise RuntimeError(f"attention: window is {window}; it counts the query's own key, so give at least 1 or None")
    if softcap is not None and softcap <= 0:
        raise RuntimeError(f"attention: softcap is {softcap}; give a positive number or None")
    if scale is not None and scale <= 0:
        raise RuntimeError(f"attention: scale is {scale}; give a positive number or None")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise RuntimeError(
            f"attention: sinks is {list(sinks.shape)}; it must be [{q.shape[1]}], one for each query head"
        )
