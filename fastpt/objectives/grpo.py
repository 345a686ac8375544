"""GRPO and what came of it (Dr. GRPO, DAPO, GSPO): answers are judged against the other answers to the same prompt."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from fastpt.data.batches import Batch
from fastpt.objectives import _policy_losses as losses
from fastpt.objectives._online import Group, Online
from fastpt.objectives.base import Scorer


class Variant(NamedTuple):
    """What a paper chose."""

    clip: float
    clip_high: float
    scales: bool = True  # advantages are divided by the group's standard deviation
    by_sequence: bool = False  # one ratio for a completion


VARIANTS = {
    "grpo": Variant(0.2, 0.2),
    "dr_grpo": Variant(0.2, 0.2, scales=False),
    "dapo": Variant(0.2, 0.28),
    "gspo": Variant(3e-4, 4e-4, by_sequence=True),
}


class GRPO(Online):
    """The variant sets where ratios are clipped and how token losses become one; clip and clip_high replace its bounds."""

    name: Literal["grpo"] = "grpo"  # type: ignore[assignment]
    group_size: int = Field(8, ge=2, description="answers to each prompt")
    variant: Literal["grpo", "dr_grpo", "dapo", "gspo"] = "grpo"
    clip: float | None = Field(
        None, gt=0, lt=1, description="ratios below 1 - clip are clipped (default: the variant's)"
    )
    clip_high: float | None = Field(
        None, gt=0, description="ratios above 1 + clip_high are clipped (default: the variant's)"
    )

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        chosen = VARIANTS[self.variant]
        self.clip = chosen.clip if self.clip is None else self.clip
        self.clip_high = chosen.clip_high if self.clip_high is None else self.clip_high

    @property
    def counts_answers(self) -> bool:
        return self.variant != "dapo"

    def _judge(self, model: Scorer, groups: list[Group]) -> None:
        for group in groups:
            group.give("advantages", losses.group_advantages(group.rewards[None], VARIANTS[self.variant].scales)[0])

    def loss(self, model: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scored = self.scored(model.hidden(batch), model, batch)
        lengths = batch.kept_lengths
        ratio = losses.log_ratios(scored.logprobs, scored.old, lengths, VARIANTS[self.variant].by_sequence)
        advantages = losses.spread(batch.fields["advantages"], lengths, len(ratio))
        per_token, is_clipped = losses.clipped_loss(ratio, advantages, self.clip, self.clip_high)  # type: ignore[arg-type]
        if self.kl:
            per_token = per_token + self.kl * losses.kl_estimate(scored.logprobs, batch.fields["ref_logprobs"])
        if self.entropy:
            per_token = per_token - self.entropy * scored.entropy
        return self._summed(per_token, lengths), self.measures(batch, scored, is_clipped)

    def _summed(self, per_token: Tensor, lengths: Tensor) -> Tensor:
        if self.variant == "dapo":
            return losses.over_tokens(per_token)
        if self.variant == "dr_grpo":
            return losses.over_constant(per_token, self.max_new_tokens)
        return losses.over_sequences(per_token, lengths)
