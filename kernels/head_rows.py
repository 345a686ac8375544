"""Softmax statistics, loss and gradient of rows of logits in Triton, for every op of the head: a program takes a row.

A row that fits one tile is read once and stays in registers until its gradient is written; a longer one is read twice, the
second time from its end, whose part is still in the L2 cache. Definitions: fastpt/ops/token_stats.py: row_statistics,
fastpt/ops/linear_cross_entropy.py: reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # a first maximum that no finite logit is below
NEGLIGIBLE: tl.constexpr = tl.constexpr(-104.0)  # e^-104 is 0 in float32


@triton.jit
def capped(x, scale, softcap, CAPPED: tl.constexpr):
    """The logit that x stands for, and its derivative by x."""
    z = x * scale
    slope = scale
    if CAPPED:
        z = z / softcap
        square = z * z
        decay = tl.exp(-2.0 * tl.abs(z))
        # tanh within 2 ulp: a polynomial (through Chebyshev nodes of z² in [0, 0.5]) where 1 - e^-2|z| would cancel.
        poly = 0.021679992 + square * (-0.00808921 + square * 0.0020389156)
        poly = -0.33333333 + square * (0.13333242 + square * (-0.053946702 + square * poly))
        near = z + z * (square * poly)
        far = 1.0 - 2.0 * decay / (1.0 + decay)
        is_near = square < 0.49
        slope = scale * tl.where(is_near, 1.0 - near * near, 4.0 * decay / ((1.0 + decay) * (1.0 + decay)))
        z = softcap * tl.where(is_near, near, tl.where(z < 0.0, -far, far))
    return z, slope


@triton.jit
def load_row(row_ptr, cols, bound):
    """What the logits of a tile are made of; `bound` may be past the last class, to keep accesses 16 bytes wide."""
    return tl.load(row_ptr + cols, mask=cols < bound, other=0.0).to(tl.float32)


@triton.jit
def logits_of(x, cols, classes, scale, softcap, CAPPED: tl.constexpr):
    """-inf past the last class."""
    z, _ = capped(x, scale, softcap, CAPPED)
    return tl.where(cols < classes, z, float("-inf"))


@triton.jit
def load_weights(class_weight_ptr, cols, classes):
    return tl.load(class_weight_ptr + cols, mask=cols < classes, other=0.0).to(tl.float32)


@triton.jit
def held_sums(z, cols, classes, class_weight_ptr, ENTROPY: tl.constexpr, MEAN: tl.constexpr):
    """e^d for d = z - max of a row in one tile; max, sum of e^d and of d e^d, class-weighted sum of z, sum of weights."""
    top = tl.max(z, axis=0)
    d = z - top
    if ENTROPY:
        d = tl.where(d < NEGLIGIBLE, NEGLIGIBLE, d)  # -inf times 0 would be NaN
    e = tl.exp(d)
    moment = 0.0
    if ENTROPY:
        moment = tl.sum(d * e, axis=0)
    total_z = 0.0
    total_weight = 0.0
    if MEAN:
        inside = tl.where(cols < classes, z, 0.0)
        if class_weight_ptr is None:
            total_z = tl.sum(inside, axis=0)
        else:
            weight = load_weights(class_weight_ptr, cols, classes)
            total_z = tl.sum(tl.where(weight == 0.0, 0.0, inside * weight), axis=0)
            total_weight = tl.sum(weight, axis=0)
    return e, top, tl.sum(e, axis=0), moment, total_z, total_weight


@triton.jit
def streamed_sums(
    row_ptr, bound, classes, scale, softcap, class_weight_ptr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same sums over many tiles: every lane keeps its own running maximum, so that nothing waits for other lanes."""
    tops = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    sums_z = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, bound, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        z = logits_of(load_row(row_ptr, cols, bound), cols, classes, scale, softcap, CAPPED)
        d = z - tops
        d = tl.where(d < NEGLIGIBLE, NEGLIGIBLE, tl.where(d > -NEGLIGIBLE, -NEGLIGIBLE, d))  # NaN stays NaN
        e = tl.exp(-tl.abs(d))
        rises = z > tops
        if ENTROPY:
            moments = tl.where(rises, (moments - totals * d) * e, moments + d * e)
        totals = tl.where(rises, totals * e + 1.0, totals + e)
        tops = tl.where(rises, z, tops)
        if MEAN:
            inside = tl.where(cols < classes, z, 0.0)
            if class_weight_ptr is None:
                sums_z += inside
            else:
                weight = load_weights(class_weight_ptr, cols, classes)
                sums_z += tl.where(weight == 0.0, 0.0, inside * weight)
                weights += weight
    top = tl.max(tops, axis=0)
    d = tops - top
    d = tl.where(d < NEGLIGIBLE, NEGLIGIBLE, d)
    e = tl.exp(d)
    moment = tl.sum((moments + totals * d) * e, axis=0)
    return top, tl.sum(totals * e, axis=0), moment, tl.sum(sums_z, axis=0), tl.sum(weights, axis=0)


@triton.jit
def probabilities(x, top, log_sum, scale, softcap, CAPPED: tl.constexpr):
    """p, log p = z - max - log_sum (against a rounded logsumexp every p of the row would share its rounding), dz / dx."""
    z, slope = capped(x, scale, softcap, CAPPED)
    log_p = (z - top) - log_sum
    return tl.exp(log_p), log_p, slope


@triton.jit
def logit_gradient(p, slope, cols, target, of_p, of_all, of_target, class_weight_ptr, classes, ALL: tl.constexpr):
    """slope (p of_p + of_all class_weight + of_target 1[v = target]): formed in float32, the target's too."""
    dz = p * of_p
    if ALL:
        if class_weight_ptr is None:
            dz += of_all
        else:
            dz += of_all * load_weights(class_weight_ptr, cols, classes)
    return slope * tl.where(cols == target, dz + of_target, dz)


@triton.jit
def load_target(row_ptr, targets_ptr, t, classes, scale, softcap, class_weight_ptr, CAPPED: tl.constexpr):
    """Target, its logit and its class weight; a target that is no class has the weight NaN, which loss and gradient show."""
    y = tl.load(targets_ptr + t)
    is_class = (y >= 0) & (y < classes)
    column = tl.where(is_class, y, 0).to(tl.int32)
    z, _ = capped(tl.load(row_ptr + column).to(tl.float32), scale, softcap, CAPPED)
    weight = 1.0
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + column).to(tl.float32)
    return column, z, tl.where(is_class, weight, float("nan"))


@triton.jit
def row_statistics(
    logits_ptr, targets_ptr, rows_ptr, class_weight_ptr,
    logprob_ptr, entropy_ptr, top_ptr, log_sum_ptr, mean_ptr, is_top1_ptr,
    logits_stride, bound, classes, scale, softcap,
    CAPPED: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    t = i
    if rows_ptr is not None:
        t = tl.load(rows_ptr + i)
    row_ptr = logits_ptr + i * logits_stride
    _, z_target, weight = load_target(row_ptr, targets_ptr, t, classes, scale, softcap, None, CAPPED)
    if HELD:
        cols = tl.arange(0, BLOCK)
        z = logits_of(load_row(row_ptr, cols, bound), cols, classes, scale, softcap, CAPPED)
        _, top, total, moment, total_z, _ = held_sums(z, cols, classes, class_weight_ptr, True, True)
    else:
        top, total, moment, total_z, _ = streamed_sums(
            row_ptr, bound, classes, scale, softcap, class_weight_ptr, CAPPED, True, True, BLOCK, STAGES
        )
    log_sum = tl.log(total)
    tl.store(logprob_ptr + t, (z_target - top - log_sum) * weight)
    tl.store(entropy_ptr + t, log_sum - moment / total)
    tl.store(top_ptr + t, top)
    tl.store(log_sum_ptr + t, log_sum)
    tl.store(mean_ptr + t, total_z / classes)
    tl.store(is_top1_ptr + t, z_target >= top)


@triton.jit
def row_statistics_backward(
    logits_ptr, dlogits_ptr, targets_ptr, rows_ptr, class_weight_ptr,
    dlogprob_ptr, dentropy_ptr, dlogsumexp_ptr, dmean_ptr, entropy_ptr, top_ptr, log_sum_ptr,
    logits_stride, dlogits_stride, bound, classes, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    t = i
    if rows_ptr is not None:
        t = tl.load(rows_ptr + i)
    row_ptr = logits_ptr + i * logits_stride
    target = tl.load(targets_ptr + t).to(tl.int32)
    dlogprob = tl.load(dlogprob_ptr + t)
    dentropy = tl.load(dentropy_ptr + t)
    of_p = tl.load(dlogsumexp_ptr + t) - dlogprob - dentropy * tl.load(entropy_ptr + t)
    of_all = tl.load(dmean_ptr + t) / classes
    top = tl.load(top_ptr + t)
    log_sum = tl.load(log_sum_ptr + t)
    for start in tl.range(0, bound, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        x = load_row(row_ptr, cols, bound)
        p, log_p, slope = probabilities(x, top, log_sum, scale, softcap, CAPPED)
        log_p = tl.where(log_p < NEGLIGIBLE, NEGLIGIBLE, log_p)
        dz = logit_gradient(
            p, slope, cols, target, of_p - dentropy * log_p, of_all, dlogprob, class_weight_ptr, classes, True
        )
        tl.store(dlogits_ptr + i * dlogits_stride + cols, dz, mask=cols < bound)


@triton.jit
def loss_of(
    z_target, top, log_sum, total_z, total_weight, weight, classes, smoothing, class_weight_ptr, SMOOTHED: tl.constexpr
):
    """A row's loss without z-loss, and its derivative by the logsumexp; max is subtracted before anything is rounded."""
    of_lse = (1.0 - smoothing) * weight
    rest = of_lse * (top - z_target)
    if SMOOTHED:
        mean_weight = 1.0
        if class_weight_ptr is not None:
            mean_weight = total_weight / classes
        of_lse += smoothing * mean_weight
        rest += smoothing * (mean_weight * top - total_z / classes)
    return of_lse * log_sum + rest, of_lse


@triton.jit
def write_zeros(row_ptr, bound, BLOCK: tl.constexpr):
    for start in tl.range(0, bound, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + cols, tl.zeros((BLOCK,), tl.float32), mask=cols < bound)


@triton.jit
def write_gradient(
    row_ptr, drow_ptr, bound, classes, top, log_sum, target, of_p, of_all, of_target, scale, softcap, class_weight_ptr,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a row that is read again, from its end."""
    tiles = tl.cdiv(bound, BLOCK)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        cols = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        x = load_row(row_ptr, cols, bound)
        p, _log_p, slope = probabilities(x, top, log_sum, scale, softcap, CAPPED)
        dz = logit_gradient(p, slope, cols, target, of_p, of_all, of_target, class_weight_ptr, classes, SMOOTHED)
        tl.store(drow_ptr + cols, dz, mask=cols < bound)


@triton.jit
def row_losses(
    logits_ptr, dlogits_ptr, targets_ptr, rows_ptr, class_weight_ptr, factor_ptr, loss_ptr, top_ptr, log_sum_ptr,
    logits_stride, dlogits_stride, factor_stride, bound, classes, ignore_index, scale, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Loss of every row; with dlogits its gradient times `factor`, with top and log_sum what row_losses_backward needs.

    dlogits may be the logits: a program writes nothing before it has read it for the last time.
    """
    i = tl.program_id(0).to(tl.int64)
    t = i
    if rows_ptr is not None:
        t = tl.load(rows_ptr + i)
    row_ptr = logits_ptr + i * logits_stride
    lanes = tl.arange(0, BLOCK)
    if tl.load(targets_ptr + t) == ignore_index:
        tl.store(loss_ptr + i, 0.0)
        if top_ptr is not None:
            tl.store(top_ptr + i, 0.0)
            tl.store(log_sum_ptr + i, 0.0)
        if dlogits_ptr is not None:
            write_zeros(dlogits_ptr + i * dlogits_stride, bound, BLOCK)
    else:
        target, z_target, weight = load_target(
            row_ptr, targets_ptr, t, classes, scale, softcap, class_weight_ptr, CAPPED
        )
        if HELD:
            x = load_row(row_ptr, lanes, bound)
            z = logits_of(x, lanes, classes, scale, softcap, CAPPED)
            e, top, total, _, total_z, total_weight = held_sums(z, lanes, classes, class_weight_ptr, False, SMOOTHED)
        else:
            top, total, _, total_z, total_weight = streamed_sums(
                row_ptr, bound, classes, scale, softcap, class_weight_ptr, CAPPED, False, SMOOTHED, BLOCK, STAGES
            )
        log_sum = tl.log(total)
        lse = top + log_sum
        loss, of_lse = loss_of(
            z_target, top, log_sum, total_z, total_weight, weight, classes, smoothing, class_weight_ptr, SMOOTHED
        )
        tl.store(loss_ptr + i, loss + z_loss * lse * lse)
        if top_ptr is not None:
            tl.store(top_ptr + i, top)
            tl.store(log_sum_ptr + i, log_sum)
        if dlogits_ptr is not None:
            factor = 1.0
            if factor_ptr is not None:
                factor = tl.load(factor_ptr + i * factor_stride)
            of_p = factor * (of_lse + 2.0 * z_loss * lse)
            of_all = -factor * smoothing / classes
            of_target = factor * (smoothing - 1.0) * weight
            if HELD:
                slope = scale
                if CAPPED:
                    _, slope = capped(x, scale, softcap, CAPPED)
                dz = logit_gradient(
                    e, slope, lanes, target, of_p / total, of_all, of_target, class_weight_ptr, classes, SMOOTHED
                )
                tl.store(dlogits_ptr + i * dlogits_stride + lanes, dz, mask=lanes < bound)
            else:
                write_gradient(
                    row_ptr, dlogits_ptr + i * dlogits_stride, bound, classes, top, log_sum, target, of_p, of_all,
                    of_target, scale, softcap, class_weight_ptr, CAPPED, SMOOTHED, BLOCK, STAGES,
                )  # fmt: skip


@triton.jit
def row_losses_backward(
    logits_ptr, dlogits_ptr, targets_ptr, class_weight_ptr, grad_ptr, share_ptr, top_ptr, log_sum_ptr, mean_weight_ptr,
    logits_stride, dlogits_stride, grad_stride, bound, classes, ignore_index, scale, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i * logits_stride
    y = tl.load(targets_ptr + i)
    target = y.to(tl.int32)
    factor = tl.load(grad_ptr + i * grad_stride)
    if share_ptr is not None:
        factor *= tl.load(share_ptr)
    top = tl.load(top_ptr + i)
    log_sum = tl.load(log_sum_ptr + i)
    is_class = (y >= 0) & (y < classes)
    weight = 1.0
    if class_weight_ptr is not None:
        weight = tl.load(class_weight_ptr + y, mask=is_class, other=0.0).to(tl.float32)
    weight = tl.where(is_class, weight, float("nan"))
    mean_weight = 1.0
    if mean_weight_ptr is not None:
        mean_weight = tl.load(mean_weight_ptr)
    of_p = factor * ((1.0 - smoothing) * weight + smoothing * mean_weight + 2.0 * z_loss * (top + log_sum))
    of_all = -factor * smoothing / classes
    of_target = factor * (smoothing - 1.0) * weight
    if y == ignore_index:
        write_zeros(dlogits_ptr + i * dlogits_stride, bound, BLOCK)
    else:
        write_gradient(
            row_ptr, dlogits_ptr + i * dlogits_stride, bound, classes, top, log_sum, target, of_p, of_all,
            of_target, scale, softcap, class_weight_ptr, CAPPED, SMOOTHED, BLOCK, STAGES,
        )  # fmt: skip
