"""Online RL in numbers: advantages, ratios, clipping, divergences; float32 torch on vectors, torch alone.

K counts the trained tokens of a batch, D its completions, `lengths` [D] the trained tokens of each; N x G are the rewards of
N prompts with G completions each. Losses come per token, and one of the three `over_*` sums them up: which of them it is,
what the ratio is of and where it is clipped is all that sets GRPO, Dr. GRPO, DAPO and GSPO apart.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4  # beside a standard deviation, as in TRL

KL = Literal["k1", "k2", "k3"]


def sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[K] -> [D], in one order, so deterministic."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def spread(values: Tensor, lengths: Tensor, count: int) -> Tensor:
    """[D] -> [K]: each completion's value at each of its tokens."""
    return values.repeat_interleave(lengths, output_size=count)


# What a completion was worth


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """[N, G]: the reward less its group's mean, over the group's standard deviation (GRPO, https://arxiv.org/abs/2402.03300).

    Without `scale` it is not divided (Dr. GRPO, https://arxiv.org/abs/2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + EPSILON) if scale else centred


def leave_one_out(rewards: Tensor) -> Tensor:
    """[N, G]: the reward less the mean of the others in its group (RLOO, https://arxiv.org/abs/2402.14740)."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def normalised(values: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1 over all values; a single one is 0."""
    deviation = values.std() if values.numel() > 1 else values.new_zeros(())
    return (values - values.mean()) / (deviation + EPSILON)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns [K] by generalised advantage estimation (https://arxiv.org/abs/1506.02438).

    rewards and values are [K]: what the token earned, and what was expected before it; after the last token comes nothing.
    """
    count, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
    starts = lengths.cumsum(0) - lengths
    at = torch.arange(longest, device=lengths.device)
    inside = at < lengths[:, None]  # [D, longest]
    index = (starts[:, None] + at)[inside]
    padded = torch.zeros(2, count, longest + 1, dtype=values.dtype, device=values.device)
    padded[0, :, :-1][inside], padded[1, :, :-1][inside] = rewards[index], values[index]
    deltas = padded[0, :, :-1] + gamma * padded[1, :, 1:] - padded[1, :, :-1]
    found, running = torch.zeros_like(deltas), deltas.new_zeros(count)
    for step in reversed(range(longest)):  # past the end of a completion all deltas are 0
        running = deltas[:, step] + gamma * lam * running
        found[:, step] = running
    advantages = torch.empty_like(values)
    advantages[index] = found[inside]
    return advantages, advantages + values


def overlong_punishment(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """[D]: 0 up to limit - buffer tokens, then falling to -1 at the limit (DAPO, https://arxiv.org/abs/2503.14476, eq. 13)."""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0).float()


# The loss of each token


def log_ratios(logprobs: Tensor, old: Tensor, lengths: Tensor, by_sequence: bool) -> Tensor:
    """[K] log of policy over old policy: of the token, or the mean over its completion (GSPO, https://arxiv.org/abs/2507.18071)."""
    ratio = logprobs - old
    if not by_sequence:
        return ratio
    return spread(sums(ratio, lengths) / lengths.clamp(min=1), lengths, len(ratio))


def clipped_loss(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The loss of PPO (https://arxiv.org/abs/1707.06347) and whether it was clipped (float, no gradient); both as the inputs.

    With high > low tokens that were unlikely may grow further (clip-higher, DAPO).
    """
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    is_clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return loss, is_clipped.float()


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: KL = "k3") -> Tensor:
    """Estimates of KL(policy || reference) at sampled tokens (http://joschu.net/blog/kl-approx.html), as the inputs.

    k1 is unbiased and may be negative, k2 is half its square, k3 is unbiased and never negative.
    """
    difference = reference - logprobs
    if kind == "k1":
        return -difference
    return 0.5 * difference**2 if kind == "k2" else difference.expm1() - difference


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """[K] half the squared error of the value, or of the one kept within `clip` of the old if that is worse; and whether."""
    plain = (values - returns) ** 2
    near = (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.max(plain, near), (near > plain).float().detach()


# From tokens to a sum


def over_sequences(losses: Tensor, lengths: Tensor) -> Tensor:
    """The sum over completions of the mean over their tokens (GRPO, GSPO); divided by completions."""
    return (sums(losses, lengths) / lengths.clamp(min=1)).sum()


def over_constant(losses: Tensor, limit: int) -> Tensor:
    """The sum over tokens by the most a completion may have, so that long ones count in full (Dr. GRPO); by completions."""
    return losses.sum() / limit


def over_tokens(losses: Tensor) -> Tensor:
    """The sum over tokens (DAPO, PPO); divided by tokens."""
    return losses.sum()
