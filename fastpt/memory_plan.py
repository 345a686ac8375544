"""What a training run will take at most, before anything is loaded: its own step, traced at full size without computing.

The model is built from its config alone (skeleton.py), adapted, fused and given its optimizer as a run does it; the trace
(tracing.py) follows every storage, and the kernels declare what they need for a moment (ops/_workspace.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastpt import models
from fastpt.activations import Offload, set_policy
from fastpt.adapters import is_adapter_model
from fastpt.config import Config, MethodConfig, build
from fastpt.data.batches import Batch, collate
from fastpt.data.example import Example
from fastpt.errors import ConfigError
from fastpt.memory import gib
from fastpt.nf4 import is_quantised, layers_of
from fastpt.nf4_loading import is_bitsandbytes
from fastpt.objectives import make_objective
from fastpt.optim import StepInBackward, make_optimizer
from fastpt.scorer import ModelScorer
from fastpt.settings import read_file
from fastpt.skeleton import skeleton
from fastpt.tracing import MemoryTrace, NothingComputed

DEFAULT_MAX_LENGTH = 2048
HEAD_OPS = ("linear_cross_entropy", "token_stats", "token_stats_backward")


@dataclass(frozen=True)
class Plan:
    """Bytes of a run at its worst moment, by what they are for, and the choices that they follow from."""

    weights: int
    adapters: int
    optimizer: int
    gradients: int  # alive at the worst moment
    activations: int  # saved and in passing, at the worst moment
    workspace: int  # of the op that runs then
    peak_op: str
    saved_activations: int  # alive when the loss begins
    loss_workspace: int
    packing_buffers: int
    tokens: int  # of a micro-batch
    policy: str
    rounding: str
    optimizer_name: Any
    limit: int | None = None
    reason: str = "as set"
    longest: int | None = None  # tokens of the longest row that fits the limit

    @property
    def peak(self) -> int:
        return sum(
            (
                self.weights,
                self.adapters,
                self.optimizer,
                self.gradients,
                self.activations,
                self.workspace,
            )
        )

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= self.limit

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights), ("adapters", self.adapters), ("optimizer state", self.optimizer),
            ("gradients", self.gradients), (f"activations ({self.policy})", self.activations),
            (f"workspace of {self.peak_op}", self.workspace),
        ]  # fmt: skip
        lines = [f"{name:<44}{gib(value):>12}" for name, value in rows if value]
        lines += [f"{'peak':<44}{gib(self.peak):>12}", ""]
        lines.append(f"saved for backward when the loss begins: {gib(self.saved_activations)}")
        lines.append(f"for a moment: loss {gib(self.loss_workspace)}, packed operands {gib(self.packing_buffers)}")
        lines.append(
            f"micro-batches of {self.tokens} tokens, activations {self.policy}, optimizer {self.optimizer_name}, "
            f"rounding {self.rounding}: {self.reason}"
        )
        if self.limit is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines.append(
                f"limit {gib(self.limit)}: {verdict}" + (f"; longest row {self.longest} tokens" if self.longest else "")
            )
        return "\n".join(lines)


def plan(model: Any = None, **settings: Any) -> Plan:
    """What a run of these settings (those of `train`) will take, for its memory_limit or as set; nothing is loaded.

    With a `memory_limit`, micro_batch_tokens, activations, optim.rounding and optim.name are chosen to fit unless given.
    Units: bytes beyond what the process takes before the model.
    Raises: ConfigError when nothing fits, with what comes nearest.
    """
    if isinstance(model, (str, Path)) and Path(model).suffix in (".toml", ".yaml", ".yml", ".json"):
        settings, model = {**read_file(model), **settings}, None
    if model is not None:
        settings["model"] = model
    settings.setdefault("data", [])
    config = build(settings)
    planner = Planner(config)
    if config.memory_limit is None:
        return planner.at(planner.wanted)
    found = planner.fitting(config.memory_limit)
    return replace(found, longest=planner.longest(found))


@dataclass(frozen=True)
class Choice:
    """What a plan may choose."""

    tokens: int
    policy: str
    rounding: str
    optimizer: Any  # its name, or a function that makes it
    length: int  # of the longest row


class Planner:
    """Traces of one configuration under different choices."""

    def __init__(self, config: Config, model: Any = None, max_length: int | None = None):
        self.config = config
        self.device = models.choose_device(config.device)
        self.dtype, _ = models.choose_precision(config.precision, self.device)
        live, self.method = model if model is not None else config.model, config.method
        self.is_quantised = config.method.name == "qlora"
        if isinstance(live, nn.Module):
            self.is_quantised |= is_quantised(live)
            if is_adapter_model(live):  # it keeps the adapter that it has
                self.method = _method_of(live)
                live = live.get_base_model()  # type: ignore[operator]
            self.cls: Any = type(live)
            self.model_config = live.config
            self.dtype = next(p.dtype for p in live.parameters() if p.is_floating_point())
        else:
            self.model_config, self.cls = models.load_config(live, config.trust_remote_code), None
            self.is_quantised |= is_bitsandbytes(self.model_config)
        self.positions = getattr(self.model_config.get_text_config(), "max_position_embeddings", None) or 1 << 17
        self.max_length = max_length or config.max_length or min(self.positions, DEFAULT_MAX_LENGTH)
        self.tokens = config.micro_batch_tokens or max(2048, self.max_length)
        self._found: dict[Choice, Plan] = {}

    @property
    def wanted(self) -> Choice:
        optim = self.config.optim
        return self.choice(self.tokens, self.config.activations, optim.rounding, optim.name)

    def choice(self, tokens: int, policy: str, rounding: str, optimizer: Any) -> Choice:
        return Choice(tokens, policy, rounding, optimizer, min(tokens, self.max_length))

    @cached_property
    def model(self) -> Any:
        """The skeleton that all traces run on."""
        made = skeleton(self.model_config, self.method, self.dtype, cls=self.cls, is_quantised=self.is_quantised)
        for p in made.parameters():
            if p.requires_grad and p.dtype != torch.float32:
                p.grad_dtype = torch.float32
        return made

    def at(self, choice: Choice) -> Plan:
        if choice not in self._found:
            self._found[choice] = _trace(self, choice)
        return self._found[choice]

    def fitting(self, limit: int) -> Plan:
        """The first of the choices that fits, dearest last: fewer tokens at once cost little time, recomputation a third more
        products, offloading the disk's or the bus's time, stochastic rounding and 8-bit moments some exactness."""
        given, config = self.config.model_fields_set, self.config
        policies = [config.activations] if "activations" in given else ["keep", "recompute", "offload"]
        least, sizes = min(self.max_length, self.tokens), [self.tokens]
        while config.micro_batch_tokens is None and sizes[-1] > least:
            sizes.append(max(least, sizes[-1] // 2))
        tried = []
        for (optimizer, rounding), policy, tokens in itertools.product(self._states(), policies, sizes):
            found = replace(self.at(self.choice(tokens, policy, rounding, optimizer)), limit=limit)
            tried.append(found)
            if found.fits:
                return replace(found, reason=_reason(found, tried))
        nearest = min(tried, key=lambda one: one.peak)
        raise ConfigError(
            f"memory_limit {gib(limit)}: nothing fits; the least is {gib(nearest.peak)} with {nearest.tokens} tokens at once, "
            f"activations={nearest.policy!r}, of which weights take {gib(nearest.weights)} and optimizer and gradients "
            f"{gib(nearest.optimizer + nearest.gradients)}; lower max_length, or train adapters"
        )

    def _states(self) -> list[tuple[Any, str]]:
        """Optimizers and roundings to try, from 12 bytes a parameter to 2; of adapters the state is small."""
        optim, given = self.config.optim, self.config.optim.model_fields_set
        is_full = self.config.method.name in ("full", "freeze")
        roundings = ["master", "stochastic"] if is_full and "rounding" not in given else [optim.rounding]
        names = ["adamw", "adamw_8bit"] if is_full and "name" not in given else [optim.name]
        return list(itertools.product(names, roundings))

    def longest(self, found: Plan) -> int:
        """Tokens of the longest row that fits, at most what the model has positions for: by lines through two lengths."""

        def row(tokens: int) -> int:
            return self.at(Choice(tokens, found.policy, found.rounding, found.optimizer_name, tokens)).peak

        limit, tokens = found.limit or found.peak, found.tokens
        short = max(1, tokens // 2)
        for _ in range(3):
            slope = (row(tokens) - row(short)) / (tokens - short) if tokens != short else 0.0
            if slope <= 0:
                break
            meeting = tokens + int((limit - row(tokens)) / slope)
            short, tokens = tokens, min(max(1, meeting), self.positions)
        return tokens


def _reason(found: Plan, tried: list[Plan]) -> str:
    if len(tried) == 1:
        return "all that was wished for fits"
    over = tried[-2]
    return (
        f"the first choice that fits; {over.tokens} tokens with {over.policy}, "
        f"{over.optimizer_name}, {over.rounding} would take {gib(over.peak)}"
    )


def _method_of(model: Any) -> MethodConfig:
    """The method whose adapter is as large as that of a model."""
    held = model.peft_config[model.active_adapter]
    targets = held.target_modules if isinstance(held.target_modules, str) else sorted(held.target_modules)
    return MethodConfig(
        name="dora" if held.use_dora else "lora", rank=held.r, rank_pattern=held.rank_pattern, targets=targets,
        dropout=held.lora_dropout, modules_to_save=held.modules_to_save,
    )  # fmt: skip


def batch_of(tokens: int, longest: int, vocabulary: int) -> Batch:
    """A micro-batch of so many tokens in documents as long as they may be, all trained."""
    ids = (np.arange(tokens) % vocabulary).astype(np.int32)
    documents = np.split(ids, range(longest, tokens, longest))
    return collate([Example(document, np.ones(len(document), bool), None, "") for document in documents])


def _trace(planner: Planner, choice: Choice) -> Plan:
    config, model = planner.config, planner.model
    changed = {"rounding": choice.rounding, "name": choice.optimizer}
    config = config.model_copy(update={"optim": config.optim.model_copy(update=changed)})
    set_policy(model, choice.policy, offload=Nowhere())  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective, scorer = make_objective(config.objective), ModelScorer(model)
    batch = batch_of(choice.tokens, choice.length, model.get_input_embeddings().weight.shape[0])  # type: ignore
    accumulates = config.batch_rows is not None or config.batch_tokens > choice.tokens
    trace = MemoryTrace()
    with NothingComputed(), trace:
        optimizer = make_optimizer(model, config)
        for p in parameters:  # another's optimizer makes its state in its first step
            p.grad = torch.empty_like(p, dtype=torch.float32)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state = trace.live
        stepper = StepInBackward(optimizer) if config.optim.in_backward else None  # type: ignore[arg-type]
        hooks = [] if stepper else _count_gradients(parameters, trace)  # that one's gradients come and go
        trace.new_step()
        for _ in range(1 if stepper or not accumulates else 2):
            if stepper:
                stepper.begin()
            objective.loss(scorer, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in [*hooks, *([stepper] if stepper else [])]:
        hook.remove()
    begun = min((trace.before[name] for name in HEAD_OPS if name in trace.before), default=state)
    peak = trace.peak
    weights, adapters = _weights(model)
    largest = trace.largest
    return Plan(
        weights=weights, adapters=adapters, optimizer=state, gradients=peak.gradients, workspace=peak.workspace,
        activations=peak.total - state - peak.gradients - peak.workspace, peak_op=peak.op,
        saved_activations=begun - state,
        loss_workspace=max((largest[name] for name in HEAD_OPS if name in largest), default=0),
        packing_buffers=max((n for name, n in largest.items() if name not in HEAD_OPS), default=0),
        tokens=choice.tokens, policy=choice.policy, rounding=choice.rounding,
        optimizer_name=choice.optimizer,
    )  # fmt: skip


class Nowhere(Offload):
    """Forgets what it is given, and gives back as much: what offloading leaves in memory."""

    def _store(self, device: torch.device) -> Any:
        return self

    def group(self) -> Nowhere:
        return self

    def put(self, tensor: torch.Tensor) -> Any:
        return _Gone(tensor.shape, tensor.dtype)


@dataclass
class _Gone:
    shape: torch.Size
    dtype: torch.dtype

    def get(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


def _count_gradients(parameters: list[nn.Parameter], trace: MemoryTrace) -> list[Any]:
    counted: set[tuple[int, int]] = set()

    def count(parameter: torch.Tensor) -> None:
        if parameter.grad is not None and (trace.steps, id(parameter)) not in counted:
            counted.add((trace.steps, id(parameter)))
            trace.gradients += parameter.grad.nbytes

    return [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters]


def _weights(model: nn.Module) -> tuple[int, int]:
    """Bytes of the base model's weights and of adapters; layers that share memory here will not share it."""
    named = dict(model.named_parameters())  # each parameter once: tied weights are one
    adapters = sum(p.nbytes for name, p in named.items() if "lora_" in name or "modules_to_save" in name)
    scales = sum(t.nbytes for _, layer in layers_of(model) for t in (layer.absmax, layer.nested) if t is not None)
    return sum(p.nbytes for p in named.values()) + scales - adapters, adapters
