"""lora_linear in Triton: the launches of a group of linear layers, three forward and five backward with adapters.

Forward: the adapters' a one under the other, all low-rank hiddens from one read of x, all outputs. Backward: dy b and dyᵀ xa
from one read of each dy, their sums, dxaᵀ x from one read of x, its sums, and dx of the whole group in one accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .dropout import rule, words
from .launch import Launch, choose, on_device, processors
from .lora_gemm import lora_input_grad, lora_output, lora_swiglu
from .lora_low_rank import lora_a_grad, lora_hidden, lora_hidden_grad, lora_sum

RANKS_AT_ONCE = 64  # more are done in blocks, each of which reads the large tensor again


class Adapters(NamedTuple):
    """The layers of a group that have adapters, and their dropout."""

    at: tuple[int, ...]
    ranks: tuple[int, ...]
    places: tuple[int, ...]  # adapter i's columns of the packed hiddens are places[i] to places[i + 1]
    threshold: int
    keep: float
    words: tuple[int, ...]

    @classmethod
    def of(cls, lora_a: Sequence[Tensor | None], dropout_p: float, seeds: Sequence[int]) -> Adapters:
        at = tuple(i for i, a in enumerate(lora_a) if a is not None)
        ranks = tuple(len(lora_a[i]) for i in at)  # type: ignore[arg-type]
        drawn = words([seeds[i] for i in at]) if dropout_p > 0 else ()
        return cls(at, ranks, tuple(accumulate(ranks, initial=0)), *rule(dropout_p, 0)[2:], drawn)

    def launch(self, kernel: str, size: int, device: torch.device) -> Launch:
        """Drawing masks takes registers: smaller tiles."""
        return choose(f"{kernel}_dropout" if self.threshold != 0 else kernel, size, device)


class Sum(NamedTuple):
    """out = scale * the first `size` values of `count` arrays `stride` apart; rows of `width` go `out_stride` apart."""

    source: Tensor
    out: Tensor
    count: int
    stride: int
    size: int
    width: int
    out_stride: int
    scale: float = 1.0


def forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds) -> tuple[list[Tensor], list[Tensor]]:
    _check(x, weights, lora_a, lora_b)
    flat = _rows(x.reshape(-1, x.shape[-1]))  # [T, D]
    ys = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
    with on_device(x):
        xas = _hiddens(flat, lora_a, Adapters.of(lora_a, dropout_p, seeds))
        if len(flat) > 0:
            _outputs(flat, [weight.to(x.dtype) for weight in weights], biases, lora_b, xas, scales, ys)
    return ys, xas


def swiglu_forward(
    x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """forward for a gate and an up projection, with the activation of what it stores."""
    _check(x, weights, lora_a, lora_b)
    if len(weights) != 2 or weights[0].shape != weights[1].shape:
        raise RuntimeError(f"lora_swiglu: weights {[list(w.shape) for w in weights]}; they must be two of one shape")
    flat = _rows(x.reshape(-1, x.shape[-1]))
    h, *ys = (x.new_empty(*x.shape[:-1], len(weights[0])) for _ in range(3))
    with on_device(x):
        xas = _hiddens(flat, lora_a, Adapters.of(lora_a, dropout_p, seeds))
        if h.numel() > 0:
            _gated(flat, [weight.to(x.dtype) for weight in weights], biases, lora_b, xas, scales, ys, h)
    return h, ys, xas


def backward(grads, x, weights, lora_a, lora_b, xas, scales, dropout_p, seeds, wants_x, wants, in_float32=True):
    _check(x, weights, lora_a, lora_b)
    flat = _rows(x.reshape(-1, x.shape[-1]))
    grads = [_rows(grad.reshape(len(flat), len(weight))) for grad, weight in zip(grads, weights, strict=True)]
    dx, *arrays = found = _new_gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32)
    if len(flat) == 0:
        for gradient in (gradient for array in arrays for gradient in array):
            gradient.zero_()
        return found
    with on_device(x):
        _full_gradients(grads, flat, *arrays[:2])
        group = Adapters.of(lora_a, dropout_p, seeds)
        dxa = _hidden_grads(grads, lora_b, xas, scales, group, wants_x, *arrays[2:])
        _a_grads(flat, dxa, group, arrays[2])
        if wants_x:
            _input_grad(grads, [weight.to(x.dtype) for weight in weights], lora_a, dxa, group, dx)
    return found


def _hiddens(x: Tensor, lora_a: Sequence[Tensor | None], group: Adapters) -> list[Tensor]:
    """xa_i = dropout_i(x) a_iᵀ; [T, 0] without an adapter."""
    found = [_new_hidden(x, a) for a in lora_a]
    if not group.at or len(x) == 0:
        return found
    own = [lora_a[i] for i in group.at]
    packed = own[0].contiguous() if len(own) == 1 else torch.cat(own)  # type: ignore[union-attr, arg-type]
    (tokens, width), total = x.shape, len(packed)
    block = _rank_block(total)
    launch = group.launch("lora_hidden", block * _weight(x, [packed]), x.device)
    lora_hidden[(triton.cdiv(tokens, launch.rows), triton.cdiv(total, block))](
        x, packed, tuple(found[i] for i in group.at), tokens, width, total, group.places, group.ranks, x.stride(0), group.words,
        group.keep, N=len(own), THRESHOLD=group.threshold, BM=launch.rows, BK=launch.depth, BR=block, **_warps(launch),
    )  # fmt: skip
    return found


def _outputs(x: Tensor, weights, biases, lora_b, xas, scales, ys: Sequence[Tensor]) -> None:
    """y_i = x w_iᵀ + bias_i + scale_i xa_i b_iᵀ; x and the weights may be views of any strides."""
    tokens, width = x.shape
    launch = choose("lora_output", x.element_size(), x.device)
    outs = tuple(len(weight) for weight in weights)
    firsts = tuple(accumulate((triton.cdiv(n, launch.columns) for n in outs), initial=0))
    given, ranks, scales = _layers(weights, biases, lora_b, xas, ys, scales)
    lora_output[(triton.cdiv(tokens, launch.rows) * firsts[-1],)](
        x, *given, tokens, width, outs, ranks, scales, firsts, *x.stride(), *_strides(weights), N=len(outs),
        IS_EVEN=width % launch.depth == 0, **_tile(launch, ranks),
    )  # fmt: skip


def _gated(x: Tensor, weights, biases, lora_b, xas, scales, ys: Sequence[Tensor], h: Tensor) -> None:
    (tokens, width), out = x.shape, len(weights[0])
    launch = choose("lora_swiglu", x.element_size(), x.device)
    given, ranks, scales = _layers(weights, biases, lora_b, xas, ys, scales)
    lora_swiglu[(triton.cdiv(tokens, launch.rows) * triton.cdiv(out, launch.columns),)](
        x, *given, h, tokens, width, out, ranks, scales, x.stride(0), *_strides(weights),
        IS_EVEN=width % launch.depth == 0, **_tile(launch, ranks),
    )  # fmt: skip


def _layers(weights, biases, lora_b, xas, ys, scales) -> tuple[tuple, tuple[int, ...], tuple[float, ...]]:
    """What the kernels of forward take of all layers: tensors, ranks and scales."""
    tensors = weights, biases, [b if b is None else b.contiguous() for b in lora_b], xas, ys
    ranks = tuple(0 if b is None else b.shape[1] for b in lora_b)
    return tuple(map(tuple, tensors)), ranks, tuple(map(float, scales))


def _input_grad(grads, weights, lora_a, dxa: Tensor | None, group: Adapters, dx: Tensor) -> None:
    """dx = the sum over the layers of dropout_i(dxa_i a_i) + dy_i w_i."""
    tokens, width = len(grads[0]), weights[0].shape[1]
    launch = group.launch("lora_input_grad", dx.element_size(), dx.device)
    outs = tuple(len(weight) for weight in weights)
    lora_input_grad[(triton.cdiv(tokens, launch.rows) * triton.cdiv(width, launch.columns),)](
        tuple(grads), tuple(weights), tuple(lora_a[i].contiguous() for i in group.at), dxa, dx, tokens, width, outs, group.ranks,
        group.places, tuple(grad.stride(0) for grad in grads), *_strides(weights), group.places[-1], group.words, group.keep,
        N=len(outs), ADAPTERS=len(group.at), THRESHOLD=group.threshold, IS_EVEN=all(n % launch.depth == 0 for n in outs),
        **_tile(launch, group.ranks),
    )  # fmt: skip


def _hidden_grads(grads, lora_b, xas, scales, group: Adapters, wants_x: bool, das, dbs) -> Tensor | None:
    """Fill the db_i that are wanted; dxa_i = scale_i dy_i b_i side by side [T, sum of R_i] where dx or a da_i needs them."""
    needs = wants_x or any(das[i].numel() > 0 for i in group.at)
    if not group.at or not (needs or any(dbs[i].numel() > 0 for i in group.at)):
        return None
    scales = [float(scales[i]) for i in group.at]
    grads, lora_b, xas, dbs = ([some[i] for i in group.at] for some in (grads, lora_b, xas, dbs))
    dxa_parts, db_parts = _hidden_grad_parts(grads, lora_b, xas, group, needs, [db.numel() > 0 for db in dbs])
    tokens, total = len(grads[0]), group.places[-1]
    dxa = torch.empty(tokens, total, dtype=max((xa.dtype for xa in xas), key=_size), device=grads[0].device)
    sums = []
    for i, (rank, scale) in enumerate(zip(group.ranks, scales, strict=True)):
        for part, out, stride in ((dxa_parts[i], dxa[:, group.places[i] :], total), (db_parts[i], dbs[i], rank)):
            if part is not None:
                sums.append(Sum(part, out, len(part), part.stride(0), part.stride(0), rank, stride, scale))
    _add_up(sums)
    return dxa if needs else None


def _hidden_grad_parts(
    grads, lora_b, xas, group: Adapters, wants_dxa: bool, wants_db: Sequence[bool]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Partial sums of each dy_i b_i [tiles of O_i, T, R_i] and dy_iᵀ xa_i [chunks of T, O_i, R_i], None where not wanted."""
    device, tokens, outs = grads[0].device, len(grads[0]), tuple(len(b) for b in lora_b)
    block = _rank_block(max(group.ranks))
    launch = choose("lora_hidden_grad", block * _weight(grads[0], xas), device)
    block = min(block, launch.depth)  # the operands of all its products stay in registers
    firsts = tuple(accumulate((triton.cdiv(n, launch.columns) for n in outs), initial=0))
    chunk, chunks = _chunks(tokens, firsts[-1], launch, device)

    def parts(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if wanted else None

    layers = list(zip(outs, group.ranks, wants_db, strict=True))
    dxas = tuple(parts(wants_dxa, triton.cdiv(n, launch.columns), tokens, rank) for n, rank, _ in layers)
    dbs = tuple(parts(wanted, chunks, n, rank) for n, rank, wanted in layers)
    lora_hidden_grad[(firsts[-1], chunks, triton.cdiv(max(group.ranks), block))](
        tuple(grads), tuple(b.contiguous() for b in lora_b), tuple(xas), dxas, dbs, tokens, chunk, outs, group.ranks,
        firsts, tuple(grad.stride(0) for grad in grads), N=len(outs), BM=launch.rows, BN=launch.columns, BR=block,
        **_warps(launch),
    )  # fmt: skip
    return dxas, dbs


def _a_grads(x: Tensor, dxa: Tensor | None, group: Adapters, das) -> None:
    """Fill the da_i = dxa_iᵀ dropout_i(x) that are wanted."""
    wanted = [(n, i) for n, i in enumerate(group.at) if das[i].numel() > 0]
    if dxa is None or not wanted:
        return
    (tokens, width), total = x.shape, dxa.shape[1]
    block = _rank_block(total)
    launch = group.launch("lora_a_grad", block * _weight(x, [dxa]), x.device)
    chunk, chunks = _chunks(tokens, triton.cdiv(width, launch.columns), launch, x.device)
    parts = torch.empty(chunks, total, width, dtype=torch.float32, device=x.device)
    lora_a_grad[(triton.cdiv(width, launch.columns), chunks, triton.cdiv(total, block))](
        x, dxa, parts, tokens, width, total, chunk, group.places, x.stride(0), group.words, group.keep, N=len(group.at),
        THRESHOLD=group.threshold, BM=launch.rows, BN=launch.columns, BR=block, **_warps(launch),
    )  # fmt: skip
    _add_up(
        [
            Sum(parts[0, group.places[n]], das[i], chunks, total * width, group.ranks[n] * width, width, width)
            for n, i in wanted
        ]
    )


def _full_gradients(grads: Sequence[Tensor], x: Tensor, dweights: Sequence[Tensor], dbiases: Sequence[Tensor]) -> None:
    """Fill the gradients of base weights and biases that are wanted."""
    for grad, dweight, dbias in zip(grads, dweights, dbiases, strict=True):
        if dweight.numel() > 0:
            _outputs(grad.t(), [x.t()], [None], [None], [None], [1.0], [dweight])
        if dbias.numel() > 0:
            torch.sum(grad, 0, dtype=torch.float32, out=dbias)


def _add_up(sums: Sequence[Sum]) -> None:
    launch = choose("lora_sum", 1, sums[0].source.device)
    firsts = tuple(accumulate((triton.cdiv(one.size, launch.columns) for one in sums), initial=0))
    lora_sum[(firsts[-1],)](
        *zip(*sums, strict=True), firsts, N=len(sums), COUNT=launch.rows, BLOCK=launch.columns, **_warps(launch)
    )


def _new_hidden(x: Tensor, lora_a: Tensor | None) -> Tensor:
    """Of x [T, D]: [T, R] in the wider of the two dtypes, without an adapter [T, 0] in float32."""
    if lora_a is None:
        return x.new_empty(len(x), 0, dtype=torch.float32)
    return x.new_empty(len(x), len(lora_a), dtype=x.dtype if lora_a.dtype == x.dtype else torch.float32)


def _new_gradients(x, weights, lora_a, lora_b, wants_x, wants, in_float32):
    """dx, then lists of dweight, dbias, da and db in float32, or in their tensors' dtypes (not dbias); empty if not wanted."""

    def new(kind: int, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        found = []
        for i, tensor in enumerate(tensors):
            shape = (0,) if tensor is None or not wants[4 * i + kind] else tensor.shape[: 1 if kind == 1 else 2]
            is_wide = in_float32 or kind == 1 or tensor is None
            found.append(x.new_empty(shape, dtype=torch.float32 if is_wide else tensor.dtype))
        return found

    dx = x.new_empty(x.shape if wants_x else (0,))
    return dx, *(new(kind, tensors) for kind, tensors in enumerate((weights, weights, lora_a, lora_b)))


def _rows(x: Tensor) -> Tensor:
    """x [T, D] with the values of a row side by side; the rows may be any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _strides(weights: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(weight.stride(0) for weight in weights), tuple(weight.stride(1) for weight in weights)


def _rank_block(rank: int, most: int = RANKS_AT_ONCE) -> int:
    return min(max(triton.next_power_of_2(rank), 16), most)


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _weight(x: Tensor, lows: Sequence[Tensor]) -> int:
    """What a rank of the low-rank side costs next to one of 16-bit operands, for the launch table."""
    if x.dtype == torch.float32:
        return 16
    return 3 if any(low.dtype == torch.float32 for low in lows) else 1


def _chunks(tokens: int, tiles: int, launch: Launch, device: torch.device) -> tuple[int, int]:
    """How many tokens each program of a tile takes so that the device is full, and how many programs that makes."""
    wanted = max(1, processors(device) * launch.per_processor // tiles)
    chunk = triton.cdiv(triton.cdiv(tokens, wanted), launch.rows) * launch.rows
    return chunk, triton.cdiv(tokens, chunk)


def _tile(launch: Launch, ranks: Sequence[int]) -> dict[str, int]:
    """Of a kernel of lora_gemm.py."""
    block = _rank_block(max(ranks, default=0), 32)
    return {"BM": launch.rows, "BN": launch.columns, "BK": launch.depth, "BR": block, **_warps(launch)}


def _warps(launch: Launch) -> dict[str, int]:
    return {"num_warps": launch.warps, "num_stages": launch.stages}


def _check(x: Tensor, weights, lora_a, lora_b) -> None:
    for i, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        fits = weight.dim() == 2 and weight.shape[1:] == x.shape[-1:] and (a is None) == (b is None)
        if a is not None and fits:
            fits = a.shape[1:] == x.shape[-1:] and b.shape == (len(weight), len(a))
        if not fits:
            shapes = ", ".join(
                f"{name} {None if t is None else list(t.shape)}"
                for name, t in (("x", x), ("weight", weight), ("lora_a", a), ("lora_b", b))
            )
            raise RuntimeError(f"lora_linear: layer {i} has {shapes}; they must be [..., D], [O, D], [R, D] and [O, R]")
