"""Which kernels serve a call of attention on a CUDA device, and why: FlashAttention where it is installed and right for the
call, else fastpt's Triton kernels, else PyTorch's SDPA, else the reference. `choose` is a pure function of the call and of
what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

TRITON, SDPA, REFERENCE = "Triton", "SDPA", "reference"
MAX_HEAD_SIZE = 256  # of FlashAttention and Triton


@dataclass(frozen=True)
class Call:
    """What of a call decides who serves it."""

    arch: int  # 90 for sm_90
    dtype: torch.dtype
    head_size: int
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    sinks: bool = False


class Choice(NamedTuple):
    """Who serves a call, and why none of those does that come before it."""

    kernel: str
    reason: str


class Limits(NamedTuple):
    """What a generation of FlashAttention was made for, backward included."""

    oldest: int
    newest: int
    head_size: int
    options: frozenset[str]


# Newest first. All are asked for their deterministic backward; FlashAttention 4's takes no softcap everywhere.
FLASH_ATTENTION = {
    "FlashAttention 4": Limits(100, 109, 128, frozenset({"window"})),
    "FlashAttention 3": Limits(90, 90, MAX_HEAD_SIZE, frozenset({"window", "softcap"})),
    "FlashAttention 2": Limits(80, 90, MAX_HEAD_SIZE, frozenset({"window", "softcap"})),
}


def choose(call: Call, missing: Mapping[str, str]) -> Choice:
    """The first of FlashAttention 4, 3, 2, Triton, SDPA and the reference that is right for the call and not `missing`.

    `missing`: why a kernel is not there, by its name; one that is not named is there.
    """
    against: list[str] = []
    unfit: dict[str, Callable[[Call], str | None]] = {
        name: partial(_unfit, limits) for name, limits in FLASH_ATTENTION.items()
    }
    for name, why in {**unfit, TRITON: _unfit_triton, SDPA: _unfit_sdpa}.items():
        why_not = missing.get(name) or why(call)
        if why_not is None:
            return Choice(name, "; ".join(against))
        against.append(f"{name}: {why_not}")
    return Choice(REFERENCE, "; ".join(against))


def _unfit_triton(call: Call) -> str | None:
    if call.arch < 80:
        return f"sm_{call.arch}, older than sm_80"
    return f"head size {call.head_size} > {MAX_HEAD_SIZE}" if call.head_size > MAX_HEAD_SIZE else None


def _unfit_sdpa(call: Call) -> str | None:
    """Its memory-efficient kernels; a window would be a mask that grows with the square of the length."""
    if call.arch < 80:
        return f"sm_{call.arch}, older than sm_80"
    if call.head_size % 8 != 0:
        return f"head size {call.head_size} is no multiple of 8"
    wanted = {"window": call.window, "softcap": call.softcap, "dropout by seed": call.dropout, "sinks": call.sinks}
    lacking = [option for option, is_wanted in wanted.items() if is_wanted]
    return f"no {' and '.join(lacking)}" if lacking else None


def _unfit(limits: Limits, call: Call) -> str | None:
    """Why a generation of FlashAttention cannot serve the call, or None."""
    if not limits.oldest <= call.arch <= limits.newest:
        return f"not for sm_{call.arch}"
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"no {str(call.dtype).removeprefix('torch.')}"
    if call.head_size > limits.head_size or call.head_size % 8 != 0:
        return f"head size {call.head_size} is no multiple of 8 up to {limits.head_size}"
    if call.dropout:
        return "drops by a rule of its own, not by the seed"
    wanted = {"window": call.window, "softcap": call.softcap, "sinks": call.sinks}
    lacking = [option for option, is_wanted in wanted.items() if is_wanted and option not in limits.options]
    return f"no {' and '.join(lacking)}" if lacking else None
