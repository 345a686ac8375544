"""divergence_rows in Triton: a program takes a row of a student's and a teacher's logits and leaves the gradient.

A row is read twice, or three times where its gradient needs the whole row's divergence first.
Definition: fastpt/ops/linear_divergence.py: rows_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head_rows import load_row, logits_of, streamed_sums
from .launch import choose, on_device

FORWARD, MIXTURE, REVERSE = 0, 1, 2  # beta 0, between, 1
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def compared(z, t, z_top, z_sum, t_top, t_sum, inside, beta, KIND: tl.constexpr):
    """Of logits: p, the log of p over what it is compared with, q's part of the divergence and p's; KIND 0 has p - q for p."""
    p = tl.exp(z - z_top) * (1.0 / z_sum)
    q = tl.exp(t - t_top) * (1.0 / t_sum)
    if KIND == 1:
        of_m = 1.0 / tl.maximum(beta * q + (1.0 - beta) * p, TINY)
        ratio = tl.log(tl.maximum(p * of_m, TINY))
        of_q = q * tl.log(tl.maximum(q * of_m, TINY))
    else:
        ratio = ((z - z_top) - tl.log(z_sum)) - ((t - t_top) - tl.log(t_sum))
        of_q = -q * ratio
    of_p = tl.where(inside, p * ratio, 0.0)
    if KIND == 0:
        p = p - q
    return p, ratio, tl.where(inside, of_q, 0.0), of_p


@triton.jit
def divergence_of_rows(
    z_ptr, t_ptr, weight_ptr, gradient_ptr, found_ptr, z_stride, t_stride, gradient_stride, classes, beta, factor,
    KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.cast(tl.program_id(0), tl.int64)
    z_row, t_row, out = z_ptr + row * z_stride, t_ptr + row * t_stride, gradient_ptr + row * gradient_stride
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
    share = weight * factor
    rest = 1.0
    if KIND == 1:
        rest = 1.0 - beta
    z_top, z_sum, _, _, _ = streamed_sums(
        z_row, classes, classes, factor, 0.0, None, False, False, False, BLOCK, STAGES
    )
    t_top, t_sum, _, _, _ = streamed_sums(
        t_row, classes, classes, factor, 0.0, None, False, False, False, BLOCK, STAGES
    )
    teachers = tl.zeros((BLOCK,), tl.float32)
    students = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < classes
        z = logits_of(load_row(z_row, cols, classes), cols, classes, factor, 0.0, False)
        t = logits_of(load_row(t_row, cols, classes), cols, classes, factor, 0.0, False)
        p, _unused, of_q, of_p = compared(z, t, z_top, z_sum, t_top, t_sum, inside, beta, KIND)
        teachers += of_q
        students += of_p
        if KIND == 0:
            tl.store(out + cols, share * p, mask=inside)
    teacher, student = tl.sum(teachers, axis=0), tl.sum(students, axis=0)
    if KIND != 0:
        for start in tl.range(0, classes, BLOCK, num_stages=STAGES):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < classes
            z = logits_of(load_row(z_row, cols, classes), cols, classes, factor, 0.0, False)
            t = logits_of(load_row(t_row, cols, classes), cols, classes, factor, 0.0, False)
            p, ratio, _of_q, _of_p = compared(z, t, z_top, z_sum, t_top, t_sum, inside, beta, KIND)
            tl.store(out + cols, share * rest * p * (ratio - student), mask=inside)
    if KIND == 0:
        found = teacher
    elif KIND == 1:
        found = beta * teacher + rest * student
    else:
        found = student
    tl.store(found_ptr + row, weight * found)


def divergence_rows(
    z: Tensor, teacher: Tensor, row_weight: Tensor | None, beta: float, temperature: float, gradient: Tensor
) -> Tensor:
    if z.dim() != 2 or z.shape != teacher.shape or gradient.shape != z.shape or gradient.stride(1) != 1:
        raise RuntimeError(
            f"divergence_rows: z is {list(z.shape)}, teacher {list(teacher.shape)}, gradient {list(gradient.shape)} of strides "
            f"{gradient.stride()}; all must be [N, V], the gradient's columns neighbours"
        )
    found = z.new_empty(len(z), dtype=torch.float32)
    if z.numel() == 0:
        return found.zero_()
    z, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (z, teacher))
    row_weight = None if row_weight is None else row_weight.float().contiguous()
    kind = FORWARD if beta == 0 else REVERSE if beta == 1 else MIXTURE
    table = "divergence_of_rows_mixture" if kind == MIXTURE else "divergence_of_rows"
    launch = choose(table, z.shape[1], z.device)
    with on_device(z):
        divergence_of_rows[(len(z),)](
            z, teacher, row_weight, gradient, found, z.stride(0), teacher.stride(0), gradient.stride(0), z.shape[1],
            beta, 1 / temperature, KIND=kind, BLOCK=launch.columns,
            STAGES=launch.stages, num_warps=launch.warps,
        )  # fmt: skip
    return found
