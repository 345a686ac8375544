"""From settings to tokenised data: the folder of the run, max_length, rows, examples. Each choice is said aloud."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpt.checkpoint import newest
from fastpt.config import Config, DataConfig
from fastpt.data.batches import StreamPlanner
from fastpt.data.feed import PlannedFeed, RolloutFeed, StreamFeed
from fastpt.data.render import ensure_chat_template, tokenizer_fingerprint
from fastpt.data.sources import StreamedRows, load_rows
from fastpt.data.tokenised import Tokenised, tokenise
from fastpt.errors import ConfigError
from fastpt.fusion.head import first_position
from fastpt.memory import forget_peak, gib, peak_bytes, release_memory, resident_bytes
from fastpt.memory_plan import DEFAULT_MAX_LENGTH, Plan, Planner
from fastpt.objectives.base import Objective, Prepare, Scorer


def settle_output(config: Config, say: Callable[[str], None]) -> Path:
    """The folder to write to: never over another run, unless that run is being resumed."""
    output = config.output
    if config.resume or not ((output / "run.json").exists() or (output / "config.json").exists()):
        return output
    number = 2
    while (other := output.with_name(f"{output.name}-{number}")).exists():
        number += 1
    unfinished = not (output / "run.json").exists() and newest(output / "checkpoints") is not None
    hint = " (resume=true would go on with the unfinished run there)" if unfinished else ""
    say(f"{output} already holds a run{hint}; writing to {other}")
    return other


def settle_max_length(config: Config, model: Any, say: Callable[[str], None]) -> int:
    """max_length as given, or the model's limit, at most 2048."""
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(text_config, "max_position_embeddings", None)
    limit = None if limit is None else limit - first_position(model)
    if config.max_length is None:
        chosen = min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        say(f"max_length: {chosen} (the model's limit is {limit}; set max_length for more)")
        return chosen
    if limit is not None and config.max_length > limit:
        say(f"max_length: {config.max_length} is more than the {limit} positions that the model was trained with")
    return config.max_length


def settle_memory(
    config: Config, model: Any, max_length: int, device: torch.device, say: Callable[[str], None]
) -> tuple[Config, MemoryWatch]:
    """With a memory_limit: the settings that fit it, and what tells afterwards how well that was foreseen."""
    if config.memory_limit is None:
        return config, MemoryWatch(None, device)
    plan = Planner(config, model, max_length).fitting(config.memory_limit)
    say(f"memory plan\n{plan}")
    optim = config.optim.model_copy(update={"rounding": plan.rounding, "name": plan.optimizer_name})
    chosen = {"micro_batch_tokens": plan.tokens, "activations": plan.policy, "optim": optim}
    return config.model_copy(update=chosen), MemoryWatch(plan, device)


class MemoryWatch:
    """The peak of a run's steps, against what its plan said."""

    def __init__(self, plan: Plan | None, device: torch.device):
        self.plan, self.device, self.peak = plan, device, 0

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        if self.plan is not None:
            release_memory()  # what loading let go and malloc keeps would count as taken before, and be used by the steps
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        self.is_new, self.begun_at = forget_peak(self.device), resident_bytes() - sum(t.nbytes for t in states)

    def after_step(self) -> int:
        if self.peak == 0 and self.device.type == "cpu":
            release_memory()  # the first step leaves compiled kernels among its activations, and holes that do not fit again
        self.peak = peak_bytes(self.device)
        return self.peak

    def tell(self, metrics: dict[str, Any], say: Callable[[str], None]) -> None:
        """Predicted and measured, both without what the process took before the model; nothing where the system cannot say."""
        metrics["peak_bytes"] = peak_bytes(self.device)
        if self.plan is None or not self.is_new or not self.peak:
            return
        before = 0 if self.device.type == "cuda" else self.begun_at - self.plan.weights - self.plan.adapters
        metrics |= {"predicted_peak_bytes": self.plan.peak, "measured_peak_bytes": self.peak - before}
        say(f"peak memory: predicted {gib(self.plan.peak)}, measured {gib(self.peak - before)}")


def read_rows(data: DataConfig) -> Any:
    """The rows, not yet tokenised; every problem with the file is raised here."""
    return load_rows(data.path, split=data.split, streaming=data.streaming)


def examples_of(
    rows: Any, data: DataConfig, objective: Objective, tokenizer: Any, max_length: int, say: Callable[[str], None]
) -> Tokenised:
    """Tokenise rows by the objective's own preparation, through the cache."""
    if isinstance(rows, StreamedRows):
        raise ConfigError("eval_data cannot be streaming, because every evaluation must see the same rows")
    prepare = _preparer(rows, data, objective, tokenizer, say)
    is_ours = type(objective).__module__.startswith("fastpt.")  # of another's code no key can tell when it changes
    key = f"{tokenizer_fingerprint(tokenizer)} {objective!r} {data.columns!r}" if is_ours else None
    found = tokenise(
        rows,
        prepare,
        max_length=_room(max_length, objective),
        too_long=_policy(data, objective),
        cache_key=key,
        cache_dir=Path("~/.cache/fastpt/tokenised").expanduser(),
    )
    say(f"{rows.name or 'data'}: {found.report}" + (" (from the cache)" if found.from_cache else ""))
    return found


def make_feed(
    rows: Any,
    config: Config,
    micro_tokens: int,
    objective: Objective,
    tokenizer: Any,
    max_length: int,
    say: Callable[[str], None],
    scorer: Scorer,
) -> PlannedFeed | StreamFeed | RolloutFeed:
    """The steps of a run over its training rows, or over what the model makes of them."""
    feed = _feed_of_rows(rows, config, micro_tokens, objective, tokenizer, max_length, say)
    if isinstance(feed, PlannedFeed):
        objective.enrich(scorer, feed.data, micro_tokens, say)
    if not objective.online:
        return feed
    collect = partial(objective.collect, scorer)
    return RolloutFeed(feed, collect, scorer.size, micro_tokens, objective.steps_per_rollout)


def _feed_of_rows(
    rows: Any,
    config: Config,
    micro_tokens: int,
    objective: Objective,
    tokenizer: Any,
    max_length: int,
    say: Callable[[str], None],
) -> PlannedFeed | StreamFeed:
    data = config.data
    batch: dict[str, Any] = {
        "batch_rows": config.batch_rows,
        "batch_tokens": config.batch_tokens,
        "micro_tokens": micro_tokens,
    }
    if not isinstance(rows, StreamedRows):
        examples = examples_of(rows, data, objective, tokenizer, max_length, say)
        return PlannedFeed(examples, rows.fingerprint, **batch, seed=config.seed, shuffle=data.shuffle)
    prepare = _preparer(rows, data, objective, tokenizer, say)
    planner = StreamPlanner(
        rows,
        prepare,
        max_length=_room(max_length, objective),
        too_long=_policy(data, objective),
        window_rows=data.window_rows,
        seed=config.seed,
        **batch,
    )
    return StreamFeed(planner, rows.fingerprint, **batch, seed=config.seed, window_rows=data.window_rows)


def _preparer(rows: Any, data: DataConfig, objective: Objective, tokenizer: Any, say: Callable[[str], None]) -> Prepare:
    if objective.needs_chat_template and (template := ensure_chat_template(tokenizer)):
        say(template)
    return objective.bind(tokenizer, rows, data.columns)


def _room(max_length: int, objective: Objective) -> int:
    """What max_length leaves for a row of the data."""
    room = max_length - objective.added_tokens
    if room < 2:
        raise ConfigError(
            f"max_length={max_length} leaves no room for a prompt beside objective.max_new_tokens={objective.added_tokens}: "
            "raise the one or lower the other"
        )
    return room


def _policy(data: DataConfig, objective: Objective) -> str:
    return "split" if objective.splits_long_rows else data.too_long
