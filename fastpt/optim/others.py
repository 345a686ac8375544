"""Optimizers of well-kept packages under names of the configuration: Muon, Adafactor, schedule-free AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fastpt.config import OptimConfig
from fastpt.errors import ConfigError

Groups = list[dict[str, Any]]


class Several(torch.optim.Optimizer):
    """Optimizers of disjoint parameters as one: their groups in a row, one state."""

    state: defaultdict[torch.Tensor, Any]

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """All work on the same groups and the same state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if not isinstance(self.state, defaultdict):
            self.state = defaultdict(dict, self.state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def muon(groups: Groups, lr: float, optim: OptimConfig) -> torch.optim.Optimizer:
    """torch.optim.Muon for the matrices between embedding and head, torch.optim.AdamW for all else."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f'optim.name "muon" needs a torch with torch.optim.Muon; this is {torch.__version__}')
    chosen: dict[bool, Groups] = {True: [], False: []}
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for is_hidden in (True, False):
            part = [(n, p) for n, p in pairs if (p.ndim == 2 and not _is_vocabulary(n)) == is_hidden]
            if part:
                chosen[is_hidden].append({**group, "names": [n for n, _ in part], "params": [p for _, p in part]})
    parts: list[torch.optim.Optimizer] = []
    if chosen[True]:  # match_rms_adamw: steps as large as AdamW's, so that its learning rates hold
        parts.append(torch.optim.Muon(chosen[True], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    if chosen[False]:
        parts.append(torch.optim.AdamW(chosen[False], lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0))
    return Several(parts)


def _is_vocabulary(name: str) -> bool:
    return any(part in ("embed_tokens", "lm_head", "wte", "wpe", "embeddings") for part in name.split("."))


def adafactor(groups: Groups, lr: float, optim: OptimConfig) -> torch.optim.Optimizer:
    """transformers' Adafactor at the configured learning rate, without a first moment."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)


def schedule_free(groups: Groups, lr: float, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamWScheduleFree of the package schedulefree (Defazio et al. 2024, https://arxiv.org/abs/2405.15682)."""
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise ConfigError(
            'optim.name "schedule_free" needs the package schedulefree: pip install schedulefree'
        ) from None
    return AdamWScheduleFree(groups, lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=0.0)


OTHERS: dict[str, Callable[[Groups, float, OptimConfig], torch.optim.Optimizer]] = {
    "muon": muon,
    "adafactor": adafactor,
    "schedule_free": schedule_free,
}
