"""A small online RL run for tests: prompts, rewards, a trainer that is ready, and its rollouts."""

from __future__ import annotations

from fastpt.trainer import Trainer
from tests.runs import WORDS, run_settings

ROWS = [{"prompt": f"say {word}", "answer": word} for word in WORDS]
KINDS = ("grpo", "rloo", "ppo")


def letters(completions):
    """The share of an answer that is the letter a: easy to raise."""
    return [sum(c == "a" for c in one) / 12 for one in completions]


def varied(completions):
    """Different for almost any two answers."""
    return [len(set(one)) + len(one) / 12 for one in completions]


def short(prompts, completions, answer):
    return [-0.01 * len(one) * (word != "") for one, word in zip(completions, answer, strict=True)]


def settings(tmp_path, kind="grpo", objective=(), **changes):
    chosen = {"name": kind, "rewards": varied, "max_new_tokens": 12, **dict(objective)}
    return run_settings(tmp_path, **{"data": ROWS, "objective": chosen} | changes)


def prepared(tmp_path, kind="grpo", objective=(), **changes):
    trainer = Trainer(**settings(tmp_path, kind, objective, **changes))
    trainer.prepare()
    return trainer


def rolled_out(trainer, step=0):
    """The examples of one rollout over the first prompts, by optimizer steps."""
    prompts = [trainer.feed.prompts.data.example(i) for i in range(4)]
    return trainer.objective.collect(trainer.scorer, prompts, step)
