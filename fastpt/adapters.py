"""Which parameters are trained: LoRA, DoRA and QLoRA through PEFT's own config, full, freeze; merging adapters, checked."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastpt.config import MethodConfig
from fastpt.errors import ConfigError, ModelError
from fastpt.nf4 import dequantise_model, is_quantised, layers_of
from fastpt.vocabulary import check_trained, trained_rows

NOTE = "base_quantization.json"  # beside an adapter that was trained on a base which loading made 4-bit
VALUE_HEAD = "value_head"  # what PPO adds to the model: trained with it, but no part of it
ADAPTERS = ("lora", "dora", "qlora")
NEW_ROWS = "trainable_tokens"  # in PEFT's names of the rows of added tokens


def is_adapter_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def is_fresh(model: Any) -> bool:
    """Whether the model without its adapter is the model as it is: an adapter whose update is still zero."""
    if not is_adapter_model(model):
        return False
    updates = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(updates) and not any(bool(p.detach().any()) for p in updates)


TASK_TYPES = {
    "causal": "CAUSAL_LM",
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}  # PEFT's names


def apply_method(
    model: nn.Module, method: MethodConfig, task: str = "causal", new_rows: Sequence[int] = ()
) -> nn.Module:
    """The model with exactly the parameters of `method` trainable; adapters come in float32.

    `new_rows` of the embeddings, of added tokens, are trained and saved with an adapter.
    A model that carries an adapter already (continued training) keeps it.
    Raises: ConfigError where targets, patterns or regexes match nothing.
    """
    if is_adapter_model(model):
        if method.name not in ADAPTERS:
            raise ConfigError(
                f"the model carries an adapter, so method must be one of {', '.join(ADAPTERS)}, not {method.name!r}; "
                "merge it first"
            )
        return model
    if is_quantised(model) and method.name == "dora":
        raise ConfigError('the model has 4-bit weights, whose norms DoRA would need; use "qlora"')
    if method.name in ADAPTERS:
        return _with_adapter(model, method, task, list(new_rows))
    if is_quantised(model):
        raise ConfigError(f'the model has 4-bit weights, which method {method.name!r} cannot train; use "qlora"')
    is_full = method.name == "full"
    named = _matcher(model, "frozen", method.frozen) if is_full else _matcher(model, "train", method.train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(named(name) != is_full)
    check_trained(model, list(new_rows))
    return model


def _matcher(model: nn.Module, setting: str, patterns: list[str]) -> Callable[[str], bool]:
    """Whether one of the regexes is found in a parameter's name. Raises: ConfigError for one that is found in none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"method.{setting}: {pattern!r} matches no parameter; there are, for example, {', '.join(names[:3])}"
            )
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _with_adapter(model: nn.Module, method: MethodConfig, task: str, new_rows: list[int]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    alpha = method.alpha if method.alpha is not None else 2 * method.rank
    initial: bool | str = True if method.init == "default" else method.init
    settings: dict[str, Any] = {
        "task_type": TASK_TYPES[task],
        "r": method.rank,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "target_modules": method.targets,
        "rank_pattern": method.rank_pattern,
        "alpha_pattern": method.alpha_pattern,
        "use_rslora": method.rslora,
        "use_dora": method.name == "dora",
        "init_lora_weights": initial,
        "modules_to_save": method.modules_to_save,
    }
    if task in ("sequence", "token"):  # their heads are new: trained in full, and saved with the adapter
        heads = head_modules(model)
        settings["modules_to_save"] = [*heads, *(method.modules_to_save or [])]
    if new_rows:
        settings["trainable_token_indices"] = trained_rows(model, new_rows)
    settings |= method.peft
    try:
        with quiet_peft():
            adapted = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the adapter cannot be made: {error}") from error
    for name, parameter in adapted.named_parameters():
        if NEW_ROWS in name:  # which PEFT leaves in the base's dtype
            parameter.data = parameter.data.float()
    return adapted


def head_modules(model: nn.Module) -> list[str]:
    """What a classifier has beside its backbone, by name."""
    backbone = getattr(model, "base_model", model)
    parts = model.named_children()
    return [name for name, part in parts if part is not backbone and next(part.parameters(), None) is not None]


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the FutureWarning that peft 0.21 draws from transformers 5.23, which a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(layer.in_features * layer.out_features - layer.weight.numel() for _, layer in layers_of(model))
    return trained, packed + sum(p.numel() for p in model.parameters())


def save(model: nn.Module, folder: Path) -> None:
    """model.save_pretrained; beside an adapter on a 4-bit base a note, by which loading makes the base so again.

    A value head gets a file of its own, so that the model can be loaded without it.
    """
    head = getattr(model, VALUE_HEAD, None)
    options: dict[str, Any] = {}
    if head is not None and not is_adapter_model(model):
        own = {name: t for name, t in model.state_dict().items() if not name.startswith(f"{VALUE_HEAD}.")}
        options = {"state_dict": own}
    if is_adapter_model(model) and getattr(model.active_peft_config, "trainable_token_indices", None):  # type: ignore[union-attr]
        options["save_embedding_layers"] = False  # PEFT would write a table that grew, whole, beside its trained rows
    model.save_pretrained(str(folder), **options)  # type: ignore[operator]
    if head is not None:
        save_file(head.state_dict(), folder / f"{VALUE_HEAD}.safetensors")
    if is_adapter_model(model) and is_quantised(model):
        (folder / NOTE).write_text(json.dumps({"quant_type": "nf4"}))


@dataclass(frozen=True)
class MergeReport:
    """How well a merged model agrees with the adapter model on probe tokens.

    Units: kl in nats per token (adapter model to merged), top1 as a share.
    """

    probe_tokens: int
    max_logit_difference: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return (
            f"merged and adapter model agree on {100 * self.top1:.1f} % of the most likely tokens; "
            f"KL {self.kl:.1e} nats a token, largest logit difference "
            f"{self.max_logit_difference:.1e}, over {self.probe_tokens} tokens"
        )


def merge(model: nn.Module, tokenizer: Any, folder: str | Path, probe: torch.Tensor) -> MergeReport:
    """Write the plain Hugging Face model to `folder`, and report how its logits agree with the adapter model's.

    The adapter is added in float32 to a copy of the weights and rounded once to their dtype; the live model stays as it is.
    `probe` [1, T] are token ids to compare on. Raises: ModelError when the merged weights are not finite.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    expected = _logits(model, probe)
    plain = _without_quantisation(copy.deepcopy(model))
    if is_adapter_model(plain):
        plain.float()
        try:
            plain = plain.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter cannot be merged: {error}") from error
        base_dtype = next(d for name, d in dtypes.items() if "lora_" not in name and NEW_ROWS not in name)
        plain.to(base_dtype)
    report = _compare(expected, _logits(plain, probe))
    plain.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return report


def _without_quantisation(model: Any) -> Any:
    """A model whose 4-bit weights are plain ones again, in float32, and whose config says nothing of them."""
    if not is_quantised(model):
        return model
    base = model.get_base_model() if is_adapter_model(model) else model
    for name in ("hf_quantizer", "quantization_method"):
        vars(base).pop(name, None)
    base.is_quantized = False  # transformers then lets it be cast
    del base.config.quantization_config
    return dequantise_model(model, torch.float32)


@torch.no_grad()
def _logits(model: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=probe.to(next(model.parameters()).device)).logits
        return logits.flatten(0, -2).float().cpu()  # of a classifier [1, C]
    finally:
        model.train(was_training)


def _compare(expected: torch.Tensor, merged: torch.Tensor) -> MergeReport:
    log_p, log_q = expected.double().log_softmax(-1), merged.double().log_softmax(-1)
    return MergeReport(
        probe_tokens=expected.shape[0],
        max_logit_difference=(expected - merged).abs().max().item(),
        kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        top1=(expected.argmax(-1) == merged.argmax(-1)).float().mean().item(),
    )
