"""What gpu_evidence is told about an op: benchmarks/evidence/cases/<op>.py holds `CASES: list[Case]` of these.

A case says how the public op is called; the tool runs it with the Triton kernels in place of the CPU ones. It is run forward
and backward (from random incoming gradients, in each floating output's dtype), so one case covers the kernels of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Make(Protocol):
    """How a case gets a floating tensor: random where numbers count, empty (never touched) where only shapes do.

    In the dtype under test unless `dtype` pins one. `grad` asks for its gradient. `scale` multiplies the standard normal.
    Integer tensors (labels, positions, cu_seqlens) the case builds itself, with real values.
    """

    def __call__(
        self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0
    ) -> Tensor: ...


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and what to call it in the report: "7x129, eps 1e-3"."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    not_streaming: str = ""  # of `real`: why its kernels are held to spills and fit, and not to 16-byte loads in flight


@dataclass(frozen=True)
class Bars:
    """What the kernels of a case must reach. Not listed here because it holds for all: the 2x rule, no spills, shared memory
    within the architecture's, 90 % of loaded bytes by 16-byte accesses, no host sync, no hazard, no lane out of bounds."""

    forward: float | None = None  # bytes moved over the floor: kernels and torch ops in between, no cache
    backward: float | None = None
    together: float | None = None  # both passes over both floors, where an op is free to move work between them
    launches: tuple[int, int] | None = None  # of Triton and torch, forward and backward
    flops: float | None = None  # multiply-adds of dots and GEMMs, both passes, over those of `Case.flops`
    new_saved_bytes: int | None = None  # kept for backward beyond the inputs and outputs
    gradient_error: float | None = None  # relative L2, bf16, worst gradient of the traffic inputs

    # By the name of the @triton.jit function. A kernel that is not named here streams: 16-byte loads, 32 KiB in flight for
    # each processor on sm_90, 64 on sm_100.
    in_flight_kib: Mapping[str, int] = field(
        default_factory=dict
    )  # least on sm_90 and sm_100 where it is more than that
    tensor_cores: tuple[str, ...] = ()  # bound by dots: tensor cores on every architecture, HGMMA on sm_90
    gemms: tuple[
        str, ...
    ] = ()  # of `tensor_cores`, plain products of large matrices: operands count once a launch, as do
    # those of the torch GEMMs that peers call. Attention is none: the published figures count its tiles' reads.
    small_dots: tuple[str, ...] = ()  # dots too small for HGMMA (m64): tensor cores of any kind, and it streams
    not_streaming: Mapping[str, str] = field(default_factory=dict)  # too little work to be held to bytes in flight: why

    def __post_init__(self) -> None:
        if not set(self.gemms) <= set(self.tensor_cores):
            raise ValueError(f"gemms {self.gemms} must be held to tensor cores, which are {self.tensor_cores}")


@dataclass(frozen=True)
class Case:
    """One way to call one op. The inputs that tell most come first: --quick takes the first two `numbers` and one `real`."""

    op: str  # stem of fastpt/ops/<op>.py
    name: str  # unique, in the report: "rms_norm", "rms_norm frozen weight"
    function: Callable[..., Any]  # the public op: a tensor, or a tuple of tensors and None
    reference: Callable[..., Any]  # the same in plain PyTorch, differentiable by autograd: the definition
    numbers: Callable[
        [Make], Iterable[Inputs]
    ]  # odd shapes and option combinations, small (seconds in the interpreter)
    real: Callable[[Make], Iterable[Inputs]]  # real sizes, to compile every kernel and every entry of the launch table
    traffic: Callable[[Make], Inputs]  # the shape of the peers' published figures
    floor: Callable[
        ..., tuple[int, int]
    ]  # args of a call -> least bytes of forward and of backward, from OPS[...].cost
    bars: Bars
    flops: Callable[..., int] | None = None  # args of a call -> FLOPs of one forward product
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # {"Liger": same arguments, imports inside}
