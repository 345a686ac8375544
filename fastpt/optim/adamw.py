"""AdamW over the fused multi-tensor op: float32 arithmetic, bfloat16 weights with a float32 master or stochastic rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpt import ops


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), all tensors of a group in one call.

    Numerics: moments, decay and update in float32. A bfloat16 parameter is the rounded view of a float32 master weight kept in
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
    ):
        self.rounding_seed = rounding_seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with its own dtypes (the base class would cast the moments to the parameter's)."""
        saved = {index: dict(values) for index, values in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, values in saved.items():
            parameter = parameters[index]
            self.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in values.items()
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_scale: Tensor | None = None) -> float | None:
        """One update; `grad_scale` (float32, []) multiplies every gradient first (clipping, division by the token count)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state_of(p) for p in params]
            for with_masters in (True, False):
                chosen = [i for i, state in enumerate(states) if ("master" in state) == with_masters]
                if chosen:
                    self._update(
                        group_index, [params[i] for i in chosen], [states[i] for i in chosen], grad_scale, with_masters
                    )
        return loss

    def _update(
        self,
        group_index: int,
        params: list[Tensor],
        states: list[dict[str, Any]],
        grad_scale: Tensor | None,
        with_masters: bool,
    ) -> None:
        group = self.param_groups[group_index]
        seed = None if self.rounding_seed is None or with_masters else self.rounding_seed + group_index
        ops.adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=grad_scale,
            masters=[s["master"] for s in states] if with_masters else None,
            seed=seed,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
            if parameter.dtype != torch.float32 and not self._rounds_stochastically(parameter):
                state["master"] = parameter.detach().to(torch.float32, copy=True)
        return state

    def _rounds_stochastically(self, parameter: Tensor) -> bool:
        return self.rounding_seed is not None and parameter.dtype == torch.bfloat16
