"""Online RL's numbers: loss and gradient equal to TRL 1.16's on the same tensors; what TRL has not, by hand on two tokens."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fastpt.data.batches import Batch
from fastpt.objectives import _policy_losses as losses
from fastpt.objectives.grpo import GRPO
from fastpt.objectives.rloo import RLOO
from fastpt.ops import TokenStats

LENGTHS = [5, 1, 7, 3, 4, 4]  # of completions; TRL pads them
PADDED = max(LENGTHS)
MOST_TOKENS = 9


def reward(completions):
    return [0.0] * len(completions)


def _numbers(seed=0):
    """Log-probabilities now, at the rollout and under the reference, entropies and advantages; ratios on both sides of a clip."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(LENGTHS)
    now = -torch.rand(count, generator=draw) * 4
    old = now + 0.3 * torch.randn(count, generator=draw)
    reference = now + 0.5 * torch.randn(count, generator=draw)
    return now, old, reference, torch.rand(count, generator=draw), torch.randn(len(LENGTHS), generator=draw)


def _padded(values):
    return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)


class _Accelerator:
    num_processes, sync_gradients = 1, True

    def gather(self, value):
        return value

    def reduce(self, value, reduction):
        return value


def _trl_loss(kind, now, old, reference, entropy, advantages, **settings):
    """The loss of TRL's own method, on a trainer that is nothing but its settings."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer_class = RLOOTrainer if kind == "rloo" else GRPOTrainer
    leaf = now.clone().requires_grad_()
    mask = _padded(torch.ones_like(now))
    given = {
        "loss_type": kind, "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False, "use_vllm": False,
        "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1, "entropy_coef": 0.0,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "max_completion_length": MOST_TOKENS,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    }  # fmt: skip
    trainer = SimpleNamespace(
        **(given | settings), accelerator=_Accelerator(), model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (_padded(leaf), _padded(entropy), None)
    inputs = {
        "prompt_ids": torch.ones(len(LENGTHS), 2), "prompt_mask": torch.ones(len(LENGTHS), 2),
        "completion_ids": torch.ones(len(LENGTHS), PADDED), "completion_mask": mask, "advantages": advantages,
        "old_per_token_logps": _padded(old), "ref_per_token_logps": _padded(reference),
        "old_logps": _padded(old).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trainer_class._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), leaf.grad, trainer._metrics["train"]


class _Fixed:
    """A scorer whose log-probabilities are given."""

    def __init__(self, logprobs, entropy):
        self.given = TokenStats(logprobs, entropy, None, None)

    def hidden(self, batch):
        return None

    def stats(self, hidden, batch, temperature):
        return self.given


def _our_loss(objective, now, old, reference, entropy, advantages, count):
    leaf = now.clone().requires_grad_()
    fields = {"old_logprobs": old, "ref_logprobs": reference, "advantages": advantages}
    batch = Batch(
        input_ids=None, position_ids=None, cu_seqlens=None, max_seqlen=0, targets=None, kept=torch.arange(len(now)),
        kept_lengths=torch.tensor(LENGTHS), stops=None, weights=None, count=count, places=[], tokens=0,
        fields=fields | {"rollout": torch.zeros(1, 2 * len(objective._names()))},
    )  # fmt: skip
    loss, metrics = objective.loss(_Fixed(leaf, entropy), batch)
    loss = loss / count
    loss.backward()
    return loss.detach(), leaf.grad, metrics


VARIANTS = {
    "grpo": ({"variant": "grpo"}, {"loss_type": "grpo"}),
    "grpo, kl": ({"variant": "grpo", "kl": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "grpo, clip-higher": (
        {"variant": "grpo", "clip": 0.1, "clip_high": 0.4},
        {"epsilon_low": 0.1, "epsilon_high": 0.4},
    ),
    "dr_grpo": ({"variant": "dr_grpo", "max_new_tokens": MOST_TOKENS}, {"loss_type": "dr_grpo"}),
    "dapo": ({"variant": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, kl": ({"variant": "dapo", "kl": 0.1}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}),
    "dapo, entropy": (
        {"variant": "dapo", "entropy": 0.02},
        {"loss_type": "dapo", "epsilon_high": 0.28, "_entropy_bonus_enabled": True, "entropy_coef": 0.02},
    ),
    "gspo": (
        {"variant": "gspo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide, kl": (
        {"variant": "gspo", "clip": 0.1, "clip_high": 0.1, "kl": 0.2},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.2},
    ),
}


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_and_its_variants_are_trls(case, seed):
    ours, theirs = VARIANTS[case]
    numbers = _numbers(seed)
    objective = GRPO(rewards=reward, **ours)
    count = float(sum(LENGTHS) if objective.variant == "dapo" else len(LENGTHS))
    wanted, wanted_grad, trl_metrics = _trl_loss(theirs.get("loss_type", "grpo"), *numbers, **theirs)
    found, grad, metrics = _our_loss(objective, *numbers, count)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-9)
    fraction = (metrics["clip_fraction"][0] / metrics["clip_fraction"][1]).item()
    if objective.variant != "gspo":  # TRL counts sequences there, we their tokens
        assert fraction == pytest.approx(trl_metrics["clip_ratio/region_mean"][0])
        assert fraction > 0
    if objective.kl:
        assert (metrics["kl"][0] / metrics["kl"][1]).item() == pytest.approx(trl_metrics["kl"][0], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo_is_trls(seed):
    now, old, *rest = _numbers(seed)
    old = now + 0.3 * (old - now)  # so that not every answer is clipped
    wanted, wanted_grad, _ = _trl_loss("rloo", now, old, *rest)
    found, grad, _ = _our_loss(RLOO(rewards=reward), now, old, *rest, float(len(LENGTHS)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-9)


def test_group_advantages_are_trls():
    from trl.trainer.utils import nanstd

    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    centred = rewards - rewards.mean(1, keepdim=True)
    torch.testing.assert_close(losses.group_advantages(rewards), centred / (nanstd(rewards, dim=1)[:, None] + 1e-4))
    torch.testing.assert_close(losses.group_advantages(rewards, scale=False), centred)
    assert losses.group_advantages(torch.full((1, 4), 0.3)).abs().max() == 0


def test_leave_one_out_by_hand():
    found = losses.leave_one_out(torch.tensor([[1.0, 0.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.75, -0.75, 0.0]]))


def test_gae_by_hand():
    """Two answers, of two tokens and of one: delta = r + gamma V' - V, A_t = delta_t + gamma lambda A_t+1."""
    rewards, values = torch.tensor([0.1, 1.0, 2.0]), torch.tensor([0.5, 0.25, 1.5])
    advantages, returns = losses.gae(rewards, values, torch.tensor([2, 1]), gamma=0.9, lam=0.5)
    last = 1.0 - 0.25
    first = (0.1 + 0.9 * 0.25 - 0.5) + 0.9 * 0.5 * last
    torch.testing.assert_close(advantages, torch.tensor([first, last, 0.5]))
    torch.testing.assert_close(returns, advantages + values)


def test_ppo_by_hand():
    """One token within the clip and one past it, a value past its clip: loss and gradient."""
    logprobs = torch.tensor([math.log(1.1), math.log(1.5)], requires_grad=True)
    policy, clipped = losses.clipped_loss(logprobs, torch.tensor([-1.0, 2.0]), 0.2, 0.2)
    torch.testing.assert_close(policy.detach(), torch.tensor([1.1, -2.4]))
    policy.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.1, 0.0]))
    assert clipped.tolist() == [0.0, 1.0]
    values = torch.tensor([1.0, 0.1], requires_grad=True)
    loss, clipped = losses.value_loss(values, torch.tensor([0.0, 0.0]), torch.tensor([2.0, 1.0]), 0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.5 * 1.8**2, 0.5 * 0.9**2]))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -0.9]))
    assert clipped.tolist() == [1.0, 0.0]


def test_divergences_by_hand():
    now, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(losses.kl_estimate(now, reference, "k1"), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(losses.kl_estimate(now, reference, "k2"), torch.tensor([0.125, 0.5]))
    torch.testing.assert_close(
        losses.kl_estimate(now, reference, "k3"), torch.tensor([math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1])
    )


def test_overlong_answers_are_punished_over_the_last_tokens():
    found = losses.overlong_punishment(torch.tensor([3, 6, 8, 10, 12]), limit=10, buffer=4)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))
