"""PPO: a value head says what each token could expect, and advantages are estimated from it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastpt.adapters import VALUE_HEAD
from fastpt.data.batches import Batch
from fastpt.objectives import _policy_losses as losses
from fastpt.objectives._online import Group, Online
from fastpt.objectives.base import Scorer


class PPO(Online):
    """The reward falls on an answer's last token, the divergence (k1) on each; the value head shares the hidden states."""

    learns_from_equals: ClassVar[bool] = True

    name: Literal["ppo"] = "ppo"  # type: ignore[assignment]
    group_size: int = Field(1, ge=1, description="answers to each prompt")
    minibatches: int = Field(4, ge=1, description="optimizer steps of each time")
    clip: float = Field(0.2, gt=0, lt=1, description="ratios outside 1 - clip to 1 + clip are clipped")
    value_clip: float = Field(0.2, gt=0, description="values are clipped this far from what they were at the rollout")
    value_weight: float = Field(0.5, ge=0, description="weight of the value loss")
    gamma: float = Field(1.0, gt=0, le=1, description="discount of a token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")

    def attach(self, model: Any, device: Any, dtype: Any) -> None:
        super().attach(model, device, dtype)
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=device, dtype=torch.float32)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)  # nothing is expected until something was seen
        model.add_module(VALUE_HEAD, head)

    @property
    def needs_old(self) -> bool:
        return False  # read together with the values

    def _values(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[K]: what is expected before each trained token."""
        return getattr(self._model, VALUE_HEAD)(hidden[batch.kept].float()).squeeze(-1)

    def _judge(self, model: Scorer, groups: list[Group]) -> None:
        examples = [example for group in groups for example in group.examples]

        def read(model: Scorer, batch: Batch) -> Tensor:
            hidden = model.hidden(batch)
            return torch.stack([self.scored(hidden, model, batch).logprobs, self._values(hidden, batch)], 1)

        for group in groups:
            group.give("rewards", group.rewards)
        advantages = []
        for example, seen in zip(examples, self._scores(model, examples, read), strict=True):
            old, values = torch.from_numpy(seen).unbind(1)
            lengths = torch.tensor(example.trained_tokens)
            rewards = torch.zeros_like(old)
            rewards[lengths.cumsum(0) - 1] = torch.from_numpy(example.fields.pop("rewards"))
            if self.kl:
                rewards -= self.kl * (old - torch.from_numpy(example.fields["ref_logprobs"]))
            found, returns = losses.gae(rewards, values, lengths, self.gamma, self.lam)
            advantages.append(found)
            given = {"old_logprobs": old, "old_values": values, "returns": returns}
            example.fields.update({name: value.numpy().copy() for name, value in given.items()})
        whitened = losses.normalised(torch.cat(advantages)).split([len(one) for one in advantages])
        for example, one in zip(examples, whitened, strict=True):
            example.fields["advantages"] = one.numpy().copy()

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, fields = model.hidden(batch), batch.fields
        scored = self.scored(hidden, model, batch)
        policy, is_clipped = losses.clipped_loss(
            scored.logprobs - scored.old, fields["advantages"], self.clip, self.clip
        )
        value, is_value_clipped = losses.value_loss(
            self._values(hidden, batch), fields["old_values"], fields["returns"], self.value_clip
        )
        total = (policy + self.value_weight * value - self.entropy * scored.entropy).sum()
        tokens = value.new_full((), len(value))
        own = {"value_loss": value.detach().sum(), "value_clip_fraction": is_value_clipped.sum()}
        measures = {name: torch.stack([one, tokens]) for name, one in own.items()}
        return total, self.measures(batch, scored, is_clipped) | measures
