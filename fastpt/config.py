"""The whole configuration: one typed tree, the same names in Python, in a TOML or YAML file and on the command line."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer, field_validator, model_validator

from fastpt.errors import ConfigError
from fastpt.settings import nested


class Node(BaseModel):
    """A node of the tree: unknown keys are errors; a plain string sets the field named by `_string_sets`."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    _string_sets: str = "name"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        field = cls.__private_attributes__["_string_sets"].default
        return {field: value} if isinstance(value, str) else value


class DataConfig(Node):
    """Where rows come from and what happens to those that do not fit."""

    _string_sets: str = "path"

    path: Any = Field(
        None, description="file, directory, hub id, datasets.Dataset, list of dicts, or a weighted list of these"
    )
    split: str | None = Field(None, description="split of a hub data set")
    columns: dict[str, str] | None = Field(
        None, description='what to read where, e.g. {prompt = "question", completion = "answer"}'
    )
    too_long: Literal["error", "truncate", "drop"] = Field(
        "error", description="what to do with rows longer than max_length"
    )
    shuffle: bool = Field(True, description="new seeded order every epoch; false keeps the order of the file")
    streaming: bool = Field(
        False, description="read the set as it comes (needs max_steps); packing then works in windows"
    )
    window_rows: int = Field(1000, ge=1, description="rows that a streaming set packs at a time")

    @model_validator(mode="before")
    @classmethod
    def _from_object(cls, value: Any) -> Any:
        is_tree = isinstance(value, dict) and set(value) <= set(cls.model_fields)
        return value if value is None or isinstance(value, cls) or is_tree else {"path": value}

    @field_serializer("path")
    def _rows_as_count(self, value: Any) -> Any:
        """Rows given as objects stand as their number: records and trackers of a run are no place for its data."""
        if isinstance(value, dict):  # a part of a mixture
            return {key: self._rows_as_count(item) for key, item in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        named = (
            {"path", "rows"} & part.keys() if isinstance(part, dict) else isinstance(part, (str, Path))
            for part in value
        )
        return [self._rows_as_count(part) for part in value] if all(named) else f"<{len(value)} rows>"


class MethodConfig(Node):
    """Which parameters are trained, and how. The adapter fields are PEFT's own, under shorter names."""

    name: Literal["lora", "dora", "qlora", "full", "freeze"] = "lora"
    rank: int = Field(16, ge=1, description="LoRA rank r")
    alpha: float | None = Field(
        None, gt=0, description="LoRA alpha; the update is scaled by alpha / rank (default: 2 * rank)"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapters")
    targets: str | list[str] = Field("all-linear", description="modules to adapt, as PEFT's target_modules")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="rank by module name or regex")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="alpha by module name or regex")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (rank-stabilised LoRA)")
    init: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal"] = Field(
        "default", description="initialisation of the adapters, as PEFT's init_lora_weights"
    )
    lora_plus: float | None = Field(None, gt=0, description="learning rate of B over that of A (LoRA+, e.g. 16)")
    modules_to_save: list[str] | None = Field(None, description="modules trained in full and saved with the adapter")
    peft: dict[str, Any] = Field(default_factory=dict, description="any other field of peft.LoraConfig")
    frozen: list[str] = Field(
        default_factory=list, description='full: regexes of the parameters that stay as they are, e.g. ["embed"]'
    )
    train: list[str] = Field(
        default_factory=list, description='freeze: regexes of the parameters to train, e.g. ["layers\\\\.29\\\\."]'
    )

    @model_validator(mode="after")
    def _fits_a_frozen_base(self) -> MethodConfig:
        if self.name == "qlora" and self.init not in ("default", "gaussian", "orthogonal"):
            raise ValueError(f"init {self.init!r} takes a part out of the base's weights, which qlora keeps in 4 bits")
        return self


OPTIMIZERS = ("adamw", "adamw_8bit", "muon", "adafactor", "schedule_free")


class OptimConfig(Node):
    """Optimizer and schedule."""

    name: Any = Field(
        "adamw",
        description='"adamw", "adamw_8bit" (moments of a byte), "muon", "adafactor", "schedule_free", or your own function '
        "from parameter groups to a torch Optimizer",
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate (default: 2e-4 for adapters, 2e-5 otherwise)")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled; never on norms, biases and DoRA magnitudes")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(0.03, ge=0, description="below 1: share of all steps; from 1 on: number of steps")
    min_lr: float = Field(0.0, ge=0, le=1, description="what the schedule ends at, as a share of lr")
    clip_norm: float | None = Field(1.0, gt=0, description="largest global gradient norm")
    rounding: Literal["master", "stochastic"] = Field(
        "master",
        description="bfloat16 weights: the rounded copy of a float32 master, or stochastic (4 bytes each less)",
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the learning rate from each layer to the one below"
    )
    l2_start: float = Field(0.0, ge=0, description="strength of the pull to the weights at the start (L2-SP)")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an average of the weights, such as 0.999, which is evaluated and delivered",
    )
    in_backward: bool = Field(
        False, description="update each parameter as its gradient is ready; all gradients never exist at once"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_object(cls, value: Any) -> Any:
        return {"name": value} if callable(value) else value

    @model_validator(mode="after")
    def _known(self) -> OptimConfig:
        if self.name not in OPTIMIZERS and not callable(self.name):
            known = ", ".join(f'"{name}"' for name in OPTIMIZERS)
            raise ValueError(f"optimizer {self.name!r} is not known; use {known} or pass a function")
        if self.name == "schedule_free" and self.schedule != "constant":
            raise ValueError(
                f'"schedule_free" takes no schedule but the warm-up: set optim.schedule="constant", not {self.schedule!r}'
            )
        if self.in_backward and (self.l2_start or self.ema):
            raise ValueError(
                "in_backward has no moment after all gradients, which l2_start and ema need: set one of them"
            )
        if self.name == "schedule_free" and self.ema:
            raise ValueError('"schedule_free" averages the weights itself: leave ema out')
        if self.in_backward and self.name in OPTIMIZERS[2:]:
            raise ValueError('in_backward needs an optimizer that steps one parameter: "adamw" or "adamw_8bit"')
        if self.in_backward and self.clip_norm not in (None, math.inf):
            raise ValueError(
                f"in_backward cannot clip by the norm of all gradients, which never exist at once: set optim.clip_norm=inf "
                f"(it is {self.clip_norm})"
            )
        return self


class Config(Node):
    """One training run."""

    _string_sets: str = "model"

    model: Any = Field(description="hub id, local directory, GGUF file, run folder, PEFT adapter, or nn.Module")
    data: DataConfig = Field(description="training rows")
    objective: Any = Field("sft", description="name or settings of an objective, or an object of your own")
    method: MethodConfig = Field(default_factory=lambda: MethodConfig())
    eval_data: DataConfig | None = None
    output: Path = Field(Path("runs/last"), description="folder of the run")
    seed: int = 0

    tokenizer: Any = Field(None, description="path, hub id or object; default: the model's own")
    added_tokens: list[str] | Path | None = Field(
        None, description="tokens that the model is to learn beside its own, or a text file with one a line"
    )
    trust_remote_code: bool = False
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    max_length: int | None = Field(
        None, ge=2, description="longest example in tokens (default: the model's limit, at most 2048)"
    )
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_rows: int | None = Field(None, ge=1, description="examples per optimizer step")
    batch_tokens: int = Field(4096, ge=1, description="tokens per optimizer step, where batch_rows is not given")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="most tokens in the model at once (default: 2048, or max_length)"
    )

    optim: OptimConfig = Field(default_factory=lambda: OptimConfig())
    neftune: float | None = Field(None, gt=0, description="noise on the embeddings while training (NEFTune), such as 5")
    activations: Literal["keep", "recompute", "offload"] = Field(
        "keep",
        description="what blocks save for backward: kept, computed again, or moved away (GPU: pinned memory, CPU: a file)",
    )
    memory_limit: int | None = Field(
        None,
        description='such as "6GiB": micro_batch_tokens, activations, optim.rounding and name, unless given, are made to fit',
    )

    logging_steps: int = Field(1, ge=1)
    eval_steps: int | None = Field(
        None, ge=1, description="evaluate every so many steps (default: at the end of each epoch)"
    )
    save_steps: int | None = Field(
        None, ge=1, description="checkpoint every so many steps (default: at the end of each epoch)"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the latest checkpoints to keep, besides the best")
    best_metric: str = Field("eval_loss", description="metric of the best checkpoint; start with + to maximise it")
    patience: int | None = Field(
        None, ge=1, description="end after so many evaluations without a better best_metric, and deliver the best"
    )
    min_delta: float = Field(0.0, ge=0, description="how much better counts as better, for patience")
    resume: bool | Path = Field(
        False, description="true: from the newest good checkpoint of output; or a checkpoint's path"
    )
    allow_drift: bool = Field(False, description="resume although data, seed or batch settings have changed")
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    callbacks: list[Any] = Field(
        default_factory=list, description="objects with on_start, on_step, on_evaluate, on_save, on_end"
    )
    quiet: bool = Field(False, description="no progress on the console")

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settle(self) -> Config:
        if self.data.streaming and self.max_steps is None:
            raise ValueError("data.streaming needs max_steps, because the length of a stream is not known")
        if self.method.name == "freeze" and not self.method.train:
            raise ValueError('method "freeze" needs method.train, regexes of the parameters to train')
        if self.method.frozen and self.method.name != "full":
            raise ValueError(
                f'method.frozen is for method "full", which trains all else; {self.method.name!r} trains what it names'
            )
        if self.added_tokens is not None and self.memory_limit is not None:
            raise ValueError("memory_limit plans no added_tokens: set micro_batch_tokens and activations yourself")
        if self.patience is not None and self.eval_data is None:
            raise ValueError("patience counts evaluations: it needs eval_data")
        return self


def parse_bytes(text: str) -> int:
    """6442450944 of "6GiB"; the units are B, KB, MB, GB, TB and KiB, MiB, GiB, TiB."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or found[1].count(".") > 1:
        raise ValueError('give bytes, such as 6442450944 or "6GiB"')
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def build(tree: dict[str, Any]) -> Config:
    """Validate a nested dict, whose keys may also be dotted ("optim.lr").

    Raises: ConfigError naming every wrong key with its place, and the nearest right one.
    """
    try:
        return Config.model_validate(nested(tree))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(problem) for problem in error.errors())) from None


def to_json(config: Config) -> str:
    """The resolved tree as JSON; Python objects stand as their repr."""
    return json.dumps(config.model_dump(), indent=2, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _sentence(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        known = _fields_at([str(part) for part in parents])
        near = difflib.get_close_matches(str(last), known, n=1)
        return f"unknown setting {place!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"setting {place!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"setting {place!r} = {problem['input']!r}: {message[0].lower()}{message[1:]}" if place else message


def _fields_at(parents: list[str]) -> list[str]:
    node: type[Node] | None = Config
    for name in parents:
        node = _node_of(node.model_fields[name].annotation) if node is not None and name in node.model_fields else None
    return list(node.model_fields) if node is not None else []


def settings_table() -> Any:
    """A rich table of every setting: dotted name, default, meaning."""
    from rich.table import Table

    table = Table("setting", "default", "meaning")
    for name, default, meaning in _described(Config, ""):
        table.add_row(name, default, meaning)
    return table


def _described(node: type[Node], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in node.model_fields.items():
        inner = _node_of(field.annotation)
        if inner is not None:
            yield from _described(inner, f"{prefix}{name}.")
        else:
            default = "" if field.is_required() else str(field.get_default(call_default_factory=True))
            yield prefix + name, default, field.description or ""


def _node_of(annotation: Any) -> type[Node] | None:
    return next((t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, Node)), None)
