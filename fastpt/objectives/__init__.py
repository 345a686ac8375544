"""Objectives by name; each lives in a small file of its own."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import ValidationError

from fastpt.errors import ConfigError

OBJECTIVES = {
    "sft": "fastpt.objectives.sft:SFT",
    "pretrain": "fastpt.objectives.pretrain:Pretrain",
    "classify": "fastpt.objectives.classify:Classify",
    "tag": "fastpt.objectives.tag:Tag",
    "distill": "fastpt.objectives.distill:Distill",
    "seq2seq": "fastpt.objectives.seq2seq:Seq2Seq",
    "reward": "fastpt.objectives.reward:RewardModel",
    "dpo": "fastpt.objectives.dpo:DPO",
    "kto": "fastpt.objectives.kto:KTO",
    "grpo": "fastpt.objectives.grpo:GRPO",
    "rloo": "fastpt.objectives.rloo:RLOO",
    "ppo": "fastpt.objectives.ppo:PPO",
}


def make_objective(spec: Any) -> Any:
    """An objective from its name, from its table of settings, or the user's own object as it is.

    Raises: ConfigError for an unknown name or setting.
    """
    if not isinstance(spec, (str, dict)):
        missing = [method for method in ("bind", "loss", "evaluate") if not callable(getattr(spec, method, None))]
        if missing:
            raise ConfigError(
                f"objective {type(spec).__name__} lacks {', '.join(missing)}; subclass fastpt.objectives.base.Objective"
            )
        return spec
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.get("name", "sft")
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is not known; there are {', '.join(OBJECTIVES)}")
    module, kind = OBJECTIVES[name].split(":")
    try:
        return getattr(import_module(module), kind)(**settings)
    except ValidationError as error:
        wrong = "; ".join(f"objective.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(wrong) from None
