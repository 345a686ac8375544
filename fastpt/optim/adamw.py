"""AdamW over the fused multi-tensor ops: float32 or 8-bit moments, bfloat16 weights with a master or stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastpt import ops
from fastpt.optim.states import as_bits, from_bitsandbytes, has_8_bits, new_moments, to_bitsandbytes


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), all tensors of a group in one call.

    With `bits=8` moments take a byte each, in blocks of 256 with a scale of their own (Dettmers et al. 2022,
    https://arxiv.org/abs/2110.02861); those of tensors below 4096 values stay float32. States of bitsandbytes' optimizers
    load into it, whatever its bits, and `bitsandbytes_state_dict()` loads into theirs.

    Numerics: decay and update in float32. A bfloat16 parameter is the rounded view of a float32 master weight kept in
    the state, so that updates below bfloat16's resolution add up; with a `rounding_seed` there is no master, and the parameter
    is rounded stochastically, which adds them up on average.
    """

    takes_grad_scale = True  # step(grad_scale=) saves the trainer a pass over the gradients

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding_seed: int | None = None,
        bits: Literal[8, 32] = 32,
    ):
        self.rounding_seed = rounding_seed
        self.bits = bits
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def allocate(self) -> None:
        """Make the whole state now: what is made during the first step lies among its activations, in a heap full of holes."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with its own dtypes (the base class would cast the moments to the parameter's).

        Moments of other bits than this optimizer's are converted, and bitsandbytes' states read.
        """
        saved = {index: from_bitsandbytes(values) for index, values in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in saved.items():
            parameter = parameters[index]
            state = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in values.items()
            }
            if "master" not in state and self._needs_master(parameter):
                state["master"] = parameter.detach().to(torch.float32, copy=True)
            self.state[parameter] = as_bits(state, self.bits)

    def bitsandbytes_state_dict(self) -> dict[str, Any]:
        """The state as bitsandbytes' AdamW8bit (or AdamW, with 32 bits) loads it. It has no masters; they are left out."""
        return to_bitsandbytes(self.state_dict())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None) -> float | None:
        """One update; `grad_scale` (float32, []) multiplies every gradient first (clipping, division by the token count)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            for with_masters in (True, False):
                chosen = [p for p in params if ("master" in self._state_of(p)) == with_masters]
                if chosen:
                    self._update(group, chosen, grad_scale, seed=group_index)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: Tensor, *, grad_scale: Tensor | None = None) -> None:
        """The update of one parameter alone, as soon as its gradient is there."""
        for group_index, group in enumerate(self.param_groups):
            for place, other in enumerate(group["params"]):
                if (
                    other is parameter
                ):  # its place seeds it: as the only one of its call it would round as all others do
                    self._update(group, [parameter], grad_scale, seed=group_index + ((place + 1) << 32))
                    return
        raise ValueError("step_one: the parameter is in no group of this optimizer")

    def _update(self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, seed: int) -> None:
        """Of parameters that all have masters or all have none."""
        states = [self._state_of(p) for p in params]
        masters = [s["master"] for s in states] if "master" in states[0] else None
        lists: list[list[Tensor]] = [[s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
        update: Callable[..., None] = ops.adamw
        if any(has_8_bits(s) for s in states):
            update = ops.adamw_8bit
            empty = torch.zeros(0, device=params[0].device)
            lists += [[s.get(name, empty) for s in states] for name in ("exp_avg_absmax", "exp_avg_sq_absmax")]
        update(
            params,
            [p.grad for p in params if p.grad is not None],
            *lists,
            [s["step"] for s in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            masters=masters,
            seed=None if self.rounding_seed is None or masters else self.rounding_seed + seed,
        )

    @torch.no_grad()
    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= new_moments(parameter, self.bits)
            if self._needs_master(parameter):
                state["master"] = parameter.detach().to(torch.float32, copy=True)
        return state

    def _needs_master(self, parameter: Tensor) -> bool:
        rounds_stochastically = self.rounding_seed is not None and parameter.dtype == torch.bfloat16
        return parameter.dtype != torch.float32 and not rounds_stochastically
