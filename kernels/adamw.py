"""adamw and grad_norm in Triton: all tensors in one launch, found through a table of their addresses.

Arithmetic and random bits are those of csrc/common/adamw.h and csrc/common/stochastic_rounding.h. A table has a row per
run of values: the first program that works on it, where it begins in its tensor, its length, the tensor's number, and the
addresses of its first values. Runs of a multiple of 16 values at addresses of 16 bytes go by 16-byte accesses; the few
values that are left, and tensors that are not aligned, go by a second launch, which most models do not need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, choose, on_device

ALIGNED_VALUES = 16
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def row_of_program(table_ptr, rows, highest_bit, COLUMNS: tl.constexpr):
    """The last row whose first program is not after this one, and which of the row's programs this is."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.zeros([], tl.int64)
    row_first = tl.zeros([], tl.int64)
    bit = tl.zeros([], tl.int64) + highest_bit
    while bit > 0:
        other = row + bit
        first = tl.load(table_ptr + other * COLUMNS, mask=other < rows, other=1 << 62)
        row = tl.where(first <= program, other, row)
        row_first = tl.where(first <= program, first, row_first)
        bit = bit >> 1
    return table_ptr + row * COLUMNS, program - row_first


@triton.jit
def values_at(row_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table, as a pointer."""
    address = tl.load(row_ptr + column).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def run_length(row_ptr, ALIGNED: tl.constexpr):
    length = tl.load(row_ptr + 2)
    return tl.multiple_of(length, 16) if ALIGNED else length


@triton.jit
def mix64(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def random_bits(key, index):
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    x = (index.to(tl.uint32) ^ key0) + (index >> 32).to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15) ^ key1) * 0x735A2D97
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    return x ^ (x >> 15)


@triton.jit
def round_stochastically(value, random):
    bits = value.to(tl.uint32, bitcast=True)
    quiet_nan = tl.where((bits & 0x7FFFFF) != 0, bits | 0x400000, bits)
    bits = tl.where((bits & 0x7F800000) != 0x7F800000, bits + (random & 0xFFFF), quiet_nan)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def adamw_step(
    table_ptr, constant_ptr, grad_scale_ptr, rows, highest_bit, one_minus_beta1, beta2, one_minus_beta2, decay, eps,
    mixed_seed, PARAM: tl.constexpr, GRAD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASTER: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: TILES x BLOCK values of one run."""
    row_ptr, part = row_of_program(table_ptr, rows, highest_bit, 9 if HAS_MASTER else 8)
    start = part * (TILES * BLOCK)
    length = run_length(row_ptr, ALIGNED)
    number = tl.load(row_ptr + 3)
    param_ptr = values_at(row_ptr, 4, PARAM, ALIGNED)
    grad_ptr = values_at(row_ptr, 5, GRAD, ALIGNED)
    first_ptr = values_at(row_ptr, 6, tl.float32, ALIGNED)
    second_ptr = values_at(row_ptr, 7, tl.float32, ALIGNED)
    value_ptr = param_ptr
    if HAS_MASTER:
        value_ptr = values_at(row_ptr, 8, tl.float32, ALIGNED)
    step_size = tl.load(constant_ptr + 3 * number)
    inverse_correction = tl.load(constant_ptr + 3 * number + 1)
    scale = tl.load(grad_scale_ptr) if HAS_SCALE else 1.0
    if IS_STOCHASTIC:
        begin = 0 if ALIGNED else tl.load(row_ptr + 1)
        step = tl.load(constant_ptr + 3 * number + 2).to(tl.int64).to(tl.uint64)
        key = mix64(mix64(tl.cast(mixed_seed, tl.uint64) ^ step) ^ number.to(tl.uint64))
    for tile in tl.static_range(TILES):
        at = start + tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        value = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
        exp_avg = tl.load(first_ptr + at, mask=inside, other=0.0)
        exp_avg_sq = tl.load(second_ptr + at, mask=inside, other=0.0)
        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
        update = step_size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_correction + eps)
        value = value - (decay * value + update)
        tl.store(first_ptr + at, exp_avg, mask=inside)
        tl.store(second_ptr + at, exp_avg_sq, mask=inside)
        if HAS_MASTER:
            tl.store(value_ptr + at, value, mask=inside)
        if IS_STOCHASTIC:
            tl.store(param_ptr + at, round_stochastically(value, random_bits(key, begin + at)), mask=inside)
        else:
            tl.store(param_ptr + at, value, mask=inside)


@triton.jit
def grad_norm_parts(
    table_ptr, part_ptr, part_stride, rows, highest_bit,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of small and of large values, both scaled to where float32 neither over- nor underflows."""
    row_ptr, part = row_of_program(table_ptr, rows, highest_bit, 5)
    start = part * (TILES * BLOCK)
    length = run_length(row_ptr, ALIGNED)
    grad_ptr = values_at(row_ptr, 4, GRAD, ALIGNED)
    small_sum = tl.zeros([BLOCK], tl.float32)
    large_sum = tl.zeros([BLOCK], tl.float32)
    for tile in tl.static_range(TILES):
        at = start + tile * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < length, other=0.0).to(tl.float32)
        is_small = tl.abs(grad) < 4294967296.0  # 2^32; NaN counts as large
        small = tl.where(is_small, grad, 0.0) * 65536.0  # 2^16
        large = tl.where(is_small, 0.0, grad) * 8.271806125530277e-25  # 2^-80
        small_sum += small * small
        large_sum += large * large
    tl.store(part_ptr + tl.program_id(0), tl.sum(small_sum, 0))
    tl.store(part_ptr + part_stride + tl.program_id(0), tl.sum(large_sum, 0))


@triton.jit
def grad_norm_join(part_ptr, part_stride, out_ptr, parts, BLOCK: tl.constexpr):
    """One program adds the parts in a fixed order."""
    small_sum = tl.zeros([BLOCK], tl.float32)
    large_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        small_sum += tl.load(part_ptr + at, mask=at < parts, other=0.0)
        large_sum += tl.load(part_ptr + part_stride + at, mask=at < parts, other=0.0)
    small, large = tl.sum(small_sum, 0), tl.sum(large_sum, 0)
    # Small squares carry 2^32, large ones 2^-160: 192 binary orders apart.
    both = large + small * 1.262177448353619e-29 * 1.262177448353619e-29  # 2^-96
    norm = tl.where(large == 0.0, tl.sqrt_rn(small) * 1.52587890625e-05, tl.sqrt_rn(both) * 1.2089258196146292e24)
    tl.store(out_ptr, norm)


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
    grad_scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    check(params, grads, exp_avgs, exp_avg_sqs, steps, masters)
    if not params:
        return
    device = params[0].device
    torch._foreach_add_(list(steps), 1)
    counts = torch.stack([s.reshape(()) for s in steps]).double()  # float64: 1 - beta2^t cancels
    constants = torch.stack((lr / (1 - beta1**counts), (1 - beta2**counts).rsqrt(), counts), 1)
    constants = to_device(constants.float(), device)
    mixed_seed = 0 if seed is None else _mix64(seed % 2**64)
    scale = None if grad_scale is None else to_device(grad_scale, device)
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([masters] if masters else [])]
    dense = [[t if t.is_contiguous() else t.contiguous() for t in column] for column in columns]
    for param_type, grad_type in dict.fromkeys((p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)):
        numbers = [i for i, p in enumerate(params) if (p.dtype, grads[i].dtype) == (param_type, grad_type)]
        launch = choose("adamw_step", sum(params[i].numel() for i in numbers), device)
        for table, rows, programs, is_aligned in tables(numbers, dense, launch):
            with on_device(params[0]):
                adamw_step[(programs,)](
                    table, constants, scale, rows, highest_bit(rows), 1 - beta1, beta2, 1 - beta2, lr * weight_decay,
                    eps, mixed_seed, TYPES[param_type], TYPES[grad_type], scale is not None, bool(masters),
                    seed is not None and param_type == torch.bfloat16, is_aligned, launch.rows, launch.columns,
                    num_warps=launch.warps,
                )  # fmt: skip
    for column, copies in zip(columns[:1] + columns[2:], dense[:1] + dense[2:], strict=True):
        for tensor, copy in zip(column, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    device, dense, groups = grads[0].device, [g.contiguous() for g in grads], []
    for grad_type in dict.fromkeys(g.dtype for g in grads):
        numbers = [i for i, g in enumerate(grads) if g.dtype == grad_type]
        launch = choose("grad_norm_parts", sum(grads[i].numel() for i in numbers), device)
        groups += [(grad_type, launch, *group) for group in tables(numbers, [dense], launch)]
    total = sum(programs for *_, programs, _ in groups)
    stride = triton.cdiv(total, ALIGNED_VALUES) * ALIGNED_VALUES
    parts = torch.zeros(2, stride, dtype=torch.float32, device=device)
    norm, done = torch.empty((), dtype=torch.float32, device=device), 0
    with on_device(grads[0]):
        for grad_type, launch, table, rows, programs, is_aligned in groups:
            grad_norm_parts[(programs,)](
                table, parts[0, done:], stride, rows, highest_bit(rows), TYPES[grad_type], is_aligned, launch.rows,
                launch.columns, num_warps=launch.warps,
            )  # fmt: skip
            done += programs
        last = choose("grad_norm_join", total, device)
        grad_norm_join[(1,)](parts, stride, norm, stride, last.columns, num_warps=last.warps)
    return norm


def tables(
    numbers: Sequence[int], columns: Sequence[Sequence[Tensor]], launch: Launch
) -> Iterator[tuple[Tensor, int, int, bool]]:
    """Table, rows, programs and whether all is aligned, of each launch over these tensors of all columns."""
    runs: dict[bool, list[list[int]]] = {True: [], False: []}
    programs = {True: 0, False: 0}
    for i in numbers:
        tensors = [column[i] for column in columns]
        addresses, sizes = [t.data_ptr() for t in tensors], [t.element_size() for t in tensors]
        values = tensors[0].numel()
        wide = values - values % ALIGNED_VALUES if all(a % 16 == 0 for a in addresses) else 0
        for is_aligned, begin, length in ((True, 0, wide), (False, wide, values - wide)):
            if length > 0:
                at = [a + begin * size for a, size in zip(addresses, sizes, strict=True)]
                runs[is_aligned].append([programs[is_aligned], begin, length, i, *at])
                programs[is_aligned] += triton.cdiv(length, launch.rows * launch.columns)
    for is_aligned, rows in runs.items():
        if rows:
            table = to_device(torch.tensor(rows, dtype=torch.int64), columns[0][numbers[0]].device)
            # What the addresses are of, for whoever checks that a kernel stays inside.
            table.points_to = [column[i] for column in columns for i in numbers]  # type: ignore[attr-defined]
            yield table, len(rows), programs[is_aligned], is_aligned


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without a wait: from pinned memory, which PyTorch keeps until the copy is done."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def highest_bit(n: int) -> int:
    return 1 << (n - 1).bit_length() >> 1


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor],
) -> None:
    """Raise unless lists, shapes and dtypes fit: the kernel reads addresses and would take them for what they are not."""
    lengths = [len(params), len(grads), len(exp_avgs), len(exp_avg_sqs), len(steps), len(masters) or len(params)]
    if len(set(lengths)) > 1:
        raise RuntimeError(
            f"adamw: {lengths[0]} params, {lengths[1]} grads, {lengths[2]} exp_avgs, {lengths[3]} exp_avg_sqs, "
            f"{lengths[4]} steps, {len(masters)} masters; the lists must be equally long"
        )
    for i, param in enumerate(params):
        shapes = [list(t.shape) for t in (param, grads[i], exp_avgs[i], exp_avg_sqs[i], (masters or params)[i])]
        if any(shape != shapes[0] for shape in shapes):
            raise RuntimeError(
                f"adamw: params[{i}] is {shapes[0]}, its gradient {shapes[1]}, its exp_avg {shapes[2]}, its exp_avg_sq "
                f"{shapes[3]}; they must be equal"
            )
        states = [exp_avgs[i], exp_avg_sqs[i], *masters[i : i + 1], steps[i]]
        if any(t.dtype != torch.float32 for t in states) or steps[i].numel() != 1:
            raise RuntimeError(
                f"adamw: states of params[{i}] are {[str(t.dtype) for t in states]}, its step is {list(steps[i].shape)}; "
                "they must be float32, the step one value"
            )
        if any(t.device != param.device for t in (grads[i], *states[:-1])):
            raise RuntimeError(f"adamw: params[{i}] is on {param.device}, its gradient or a state is not")
