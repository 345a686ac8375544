"""RLOO: REINFORCE on whole answers, each judged against the mean of the others to the same prompt."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.data.example import Example
from fastpt.objectives import _policy_losses as losses
from fastpt.objectives._online import Group, Online
from fastpt.objectives.base import Scorer


class RLOO(Online):
    """Ratio and clipping are those of the whole answer; the divergence (k1, summed over it) is taken off its reward."""

    name: Literal["rloo"] = "rloo"  # type: ignore[assignment]
    group_size: int = Field(8, ge=2, description="answers to each prompt")
    clip: float = Field(0.2, gt=0, lt=1, description="ratios outside 1 - clip to 1 + clip are clipped")

    @property
    def needs_old(self) -> bool:
        return super().needs_old or self.kl > 0

    @property
    def counts_answers(self) -> bool:
        return True

    def _judge(self, model: Scorer, groups: list[Group]) -> None:
        for group in groups:
            rewards = group.rewards.clone()
            if self.kl:
                rewards[group.trained] -= self.kl * torch.cat([_divergence(example) for example in group.examples])
            group.give("advantages", losses.leave_one_out(rewards[None])[0])

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scored = self.scored(model.hidden(batch), model, batch)
        ratio = losses.sums(scored.logprobs - scored.old, batch.kept_lengths)
        per_answer, is_clipped = losses.clipped_loss(ratio, batch.fields["advantages"], self.clip, self.clip)
        total = per_answer.sum()
        if self.entropy:
            total = total - self.entropy * losses.over_sequences(scored.entropy, batch.kept_lengths)
        return total, self.measures(batch, scored, is_clipped)


def _divergence(example: Example) -> Tensor:
    """[D]: log-probability of each answer less that under the reference."""
    tokens = torch.from_numpy(example.fields["old_logprobs"] - example.fields["ref_logprobs"])
    return losses.sums(tokens, torch.tensor(example.trained_tokens))
