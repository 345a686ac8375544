"""Losses of preferences: functions of summed log-probabilities (or rewards), float32 [N], a loss for each row.

Notation: w the preferred answer, l the other; ratio = log p(y | x) - log p_ref(y | x); delta = ratio_w - ratio_l.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Pairs(NamedTuple):
    """Log-probabilities of both answers, summed over their tokens, under the policy and the reference; all [N]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def ratio_w(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def ratio_l(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> Tensor:
        return self.ratio_w - self.ratio_l

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability a token of either answer."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class Options(NamedTuple):
    """Strength of the pull to the reference, share of labels taken to be wrong, SimPO's margin, DiscoPOP's temperature."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    tau: float = 0.05


def _smoothed(logits: Tensor, o: Options) -> Tensor:
    return -(1 - o.label_smoothing) * logsigmoid(logits) - o.label_smoothing * logsigmoid(-logits)


def sigmoid(p: Pairs, o: Options) -> Tensor:
    """DPO (Rafailov et al. 2023, 2305.18290); with label smoothing cDPO (Mitchell 2023)."""
    return _smoothed(o.beta * p.delta, o)


def hinge(p: Pairs, o: Options) -> Tensor:
    """SLiC on log-ratios (Zhao et al. 2023, 2305.10425)."""
    return torch.relu(1 - o.beta * p.delta)


def ipo(p: Pairs, o: Options) -> Tensor:
    """IPO (Azar et al. 2023, 2310.12036), on log-ratios a token, as its authors train it."""
    return (p.ratio_w / p.chosen_tokens - p.ratio_l / p.rejected_tokens - 1 / (2 * o.beta)) ** 2


def robust(p: Pairs, o: Options) -> Tensor:
    """Unbiased where a share of label_smoothing of the labels is wrong (Chowdhury et al. 2024, 2403.00409)."""
    logits, e = o.beta * p.delta, o.label_smoothing
    return (-(1 - e) * logsigmoid(logits) + e * logsigmoid(-logits)) / (1 - 2 * e)


def exo_pair(p: Pairs, o: Options) -> Tensor:
    """Reverse KL to the smoothed preference (Ji et al. 2024, 2402.00856); needs label_smoothing > 0."""
    logits = o.beta * p.delta
    win, lose = logsigmoid(logits), logsigmoid(-logits)
    return win.exp() * (win - math.log1p(-o.label_smoothing)) + lose.exp() * (lose - math.log(o.label_smoothing))


def nca_pair(p: Pairs, o: Options) -> Tensor:
    """NCA (Chen et al. 2024, 2402.05369): pulls both answers' likelihoods, not only their difference."""
    w, l = o.beta * p.ratio_w, o.beta * p.ratio_l  # noqa: E741
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def bco_pair(p: Pairs, o: Options) -> Tensor:
    """BCO without its shift (Jung et al. 2024, 2404.04656)."""
    return -logsigmoid(o.beta * p.ratio_w) - logsigmoid(-o.beta * p.ratio_l)


def sppo_hard(p: Pairs, o: Options) -> Tensor:
    """SPPO with certain preferences (Wu et al. 2024, 2405.00675)."""
    return (p.ratio_w - 0.5 / o.beta) ** 2 + (p.ratio_l + 0.5 / o.beta) ** 2


def aot(p: Pairs, o: Options) -> Tensor:
    """AOT on pairs (Melnyk et al. 2024, 2406.05882): quantiles of margins; they are those of a micro-batch."""
    return _smoothed(
        o.beta * ((p.chosen - p.rejected).sort().values - (p.ref_chosen - p.ref_rejected).sort().values), o
    )


def aot_unpaired(p: Pairs, o: Options) -> Tensor:
    """AOT of all preferred answers against all others; quantiles are those of a micro-batch."""
    return _smoothed(o.beta * (p.ratio_w.sort().values - p.ratio_l.sort().values), o)


def apo_zero(p: Pairs, o: Options) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, 2408.06266), where preferred answers are better than the model's own."""
    return 1 - torch.sigmoid(o.beta * p.ratio_w) + torch.sigmoid(o.beta * p.ratio_l)


def apo_down(p: Pairs, o: Options) -> Tensor:
    """APO-down, where the model's own answers are better than both."""
    return torch.sigmoid(o.beta * p.ratio_w) + 1 - torch.sigmoid(o.beta * p.delta)


def discopop(p: Pairs, o: Options) -> Tensor:
    """DiscoPOP (Lu et al. 2024, 2406.08414)."""
    logits = o.beta * p.delta
    mixed = torch.sigmoid(logits / o.tau)
    return -logsigmoid(logits) * (1 - mixed) + torch.exp(-logits) * mixed


def sft(p: Pairs, o: Options) -> Tensor:
    """Negative log-likelihood a token of the preferred answer (as in RPO, Pang et al. 2024, 2404.19733)."""
    return -p.means[0]


def simpo(p: Pairs, o: Options) -> Tensor:
    """SimPO (Meng et al. 2024, 2405.14734): log-probability a token against a margin gamma; no reference."""
    w, l = p.means  # noqa: E741
    return _smoothed(o.beta * (w - l) - o.gamma, o)


def cpo(p: Pairs, o: Options) -> Tensor:
    """CPO's preference term (Xu et al. 2024, 2401.08417); mix it with "sft". No reference."""
    return _smoothed(o.beta * (p.chosen - p.rejected), o)


def orpo(p: Pairs, o: Options) -> Tensor:
    """ORPO (Hong et al. 2024, 2403.07691): likelihood of the preferred answer, and beta times the odds ratio. No reference."""
    w, l = p.means  # noqa: E741
    log_odds = w - l - (torch.log1p(-w.exp()) - torch.log1p(-l.exp()))
    return sft(p, o) - o.beta * logsigmoid(log_odds)


REFERENCE_FREE = {"sft": sft, "simpo": simpo, "cpo": cpo, "orpo": orpo}
LOSSES = {
    one.__name__: one
    for one in (
        sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop
    )
} | REFERENCE_FREE  # fmt: skip


def unpaired(ratio: Tensor, desirable: Tensor, baseline: Tensor, beta: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024, 2402.01306) of single answers: log-ratios [N], desirable bool [N], baseline [N] or [].

    The baseline is the divergence from the reference, estimated on answers to other prompts; with 0 this is APO-zero.
    """
    return 1 - torch.sigmoid(beta * torch.where(desirable, 1.0, -1.0) * (ratio - baseline))


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, centering: float = 0.0) -> Tensor:
    """Rewards [N] of pairs: how unlikely the preference is under them, given a margin [N] that it should have.

    Margins are Llama 2's (2307.09288); `centering` pulls the sum of both rewards to 0 (Eisenstein et al. 2023, 2312.09244).
    """
    return -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
