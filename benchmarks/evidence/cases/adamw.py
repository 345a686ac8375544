"""adamw and grad_norm: all dtypes, masters and stochastic rounding; layers of Llama-3.1-8B. In place: a case steps copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.evidence.case import Bars, Case, Inputs, Make
from fastpt.ops import adamw, grad_norm
from fastpt.ops._library import OPS, nbytes
from fastpt.ops.adamw import grad_norm_reference
from fastpt.ops.adamw import reference as step_reference

Tensors = Sequence[Tensor]
SETTINGS = {"lr": 0.05, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
ODD = [(), (37,), (5, 129), (3, 8192)]
LLAMA = [(1024, 4096), (4096, 4096), (14336, 4096), (4096,)]  # of one layer
ADAPTERS = [(8, 4096), (4096, 8), (8, 4096), (1024, 8)] * 32  # rank 8 on q and v
TOY = [(64, 1024), (1024,), (32, 1024)]
BITS = 5  # a seed


def copied(call: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """The op out of place: it steps copies of params, moments and masters, and gives them back."""

    def stepped(params: Tensors, grads: Tensors, first: Tensors, second: Tensors, masters: Tensors, **settings):
        params, first, second, masters = ([t.clone() for t in column] for column in (params, first, second, masters))
        steps = [torch.full((), 6.0) for _ in params]
        call(params, grads, first, second, steps, masters, **settings)
        return (*params, *first, *second, *masters)

    return stepped


@copied
def ours(params, grads, first, second, steps, masters, **settings):
    adamw(params, grads, first, second, steps, masters=masters or None, **SETTINGS, **settings)


@copied
def definition(params, grads, first, second, steps, masters, grad_scale=None, seed=None):
    step_reference(params, grads, first, second, steps, masters, grad_scale, seed=seed, **SETTINGS)


def inputs_of(
    make: Make, name: str, shapes: Sequence[tuple[int, ...]], *, masters: bool = False, seed: int | None = None,
    grads: torch.dtype | None = None, scale: Tensor | None = None,
) -> Inputs:  # fmt: skip
    params, gradients = [make(*s) for s in shapes], [make(*s, dtype=grads) for s in shapes]
    first = [make(*s, dtype=torch.float32) for s in shapes]
    second = [make(*s, dtype=torch.float32).abs() for s in shapes]
    copies = [make(*s, dtype=torch.float32) for s in shapes] if masters else []
    return Inputs(name, (params, gradients, first, second, copies), {"grad_scale": scale, "seed": seed})


def numbers(make: Make) -> Iterator[Inputs]:
    yield inputs_of(make, "plain, float32 gradients, scaled", ODD, grads=torch.float32, scale=torch.tensor(0.25))
    yield inputs_of(make, "stochastic where bfloat16", ODD, seed=BITS)
    yield inputs_of(make, "masters", ODD, masters=True)
    unaligned = [make(40)[1:] for _ in range(2)]
    states = [make(39, dtype=torch.float32).abs() for _ in range(2)]
    yield Inputs("unaligned", (unaligned[:1], unaligned[1:], states[:1], states[1:], []))


def real(make: Make) -> Iterator[Inputs]:
    yield inputs_of(make, "a layer, stochastic", LLAMA, seed=BITS)
    yield inputs_of(make, "a layer, masters", LLAMA, masters=True)
    yield inputs_of(make, "a layer, float32 gradients, scaled", LLAMA, grads=torch.float32, scale=torch.ones(()))
    yield inputs_of(make, "adapters, stochastic", ADAPTERS, seed=BITS)


def traffic(make: Make) -> Inputs:
    return inputs_of(make, "97k values, stochastic", TOY, seed=BITS)


def floor(params: Tensors, grads: Tensors, first: Tensors, second: Tensors, masters: Tensors, **_) -> tuple[int, int]:
    """With the copies that a step in place would not make."""
    step = OPS["adamw_step"].cost(params, grads, first, second, [], masters).bytes
    return step + 2 * nbytes(*params, *first, *second, *masters), 0


def lists_of(shapes: Sequence[tuple[int, ...]], name: str) -> Callable[[Make], Inputs]:
    return lambda make: Inputs(name, ([make(*s) for s in shapes],))


def norm_numbers(make: Make) -> Iterator[Inputs]:
    yield lists_of(ODD, "odd shapes")(make)
    yield Inputs("small and large", ([make(300, dtype=torch.float32, scale=s) for s in (1e-20, 1e-3, 1e20)],))
    yield Inputs("small", ([make(40, dtype=torch.float32, scale=1e-20)],))


CASES = [
    Case(
        op="adamw",
        name="adamw",
        function=ours,
        reference=definition,
        numbers=numbers,
        real=real,
        traffic=traffic,
        floor=floor,
        bars=Bars(forward=1.01),
    ),
    Case(
        op="adamw",
        name="grad_norm",
        function=grad_norm,
        reference=grad_norm_reference,
        numbers=norm_numbers,
        real=lambda make: iter([lists_of(LLAMA, "a layer")(make)]),
        traffic=lists_of(TOY, "97k values"),
        floor=lambda grads: (OPS["grad_norm"].cost(grads).bytes, 0),
        bars=Bars(forward=1.01, not_streaming={"grad_norm_join": "one program adds a number for each 16384 values"}),
    ),
]
