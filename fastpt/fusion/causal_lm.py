"""A causal language model's forward: the training loss and TRL's per-token statistics, both without logits.

TRL 1.16 wraps `model.forward` and asks it with `fused_lm_head=True`. Above that wrapper we answer ourselves; when the
wrapper came later, a translator above it turns the flag into a keyword that the wrapper hands down to us.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from fastpt.fusion.head import IGNORED, LanguageHead
from fastpt.fusion.patch import Patch, patch_of
from fastpt.fusion.projection import NotFusable
from fastpt.fusion.recognise import evaluating

FLAG = "fused_lm_head"  # TRL's
HANDED_DOWN = "fastpt_statistics"  # ours
SERVED_OUTPUTS = {"log_probs", "entropy", "is_top1"}


@dataclass
class TokenOutput(ModelOutput):
    """What TRL's trainers read: per-token tensors [B, S - 1], zero where the label is -100 (`label_mask` False)."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@torch.no_grad()
def verified_head(model: Any) -> LanguageHead:
    """The model's head, once it reproduces the model's own logits and loss; raises NotFusable or ModelError."""
    head = LanguageHead.of(model)
    embedding = model.get_input_embeddings().weight
    if embedding.is_meta:
        raise NotFusable("weights are not loaded")
    if model.config.is_encoder_decoder:
        raise NotFusable("an encoder-decoder makes decoder inputs of its labels")
    ids = torch.arange(1, 5, device=embedding.device)[None] % embedding.shape[0]
    with evaluating(model):
        theirs = type(model).forward(model, input_ids=ids, labels=ids, use_cache=False)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, -2)
        logits = head.logits(hidden).view_as(theirs.logits).float()
        loss = head.cross_entropy(hidden, _shifted(ids, None).flatten())
    error = (theirs.logits.float() - logits).norm() / logits.norm().clamp(min=1e-20)
    loss_error = (theirs.loss.float() - loss).abs() / loss.abs()
    if not max(error, loss_error) <= (1e-4 if embedding.dtype.itemsize >= 4 else 3e-2):
        raise NotFusable(f"its logits or its loss are others (relative differences {error:.1e} and {loss_error:.1e})")
    return head


def fused_forward(patch: Patch) -> Any:
    """forward(self, *args, **kwargs) of a causal language model."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.is_active:
            return patch.below(self, *args, **kwargs)
        options = kwargs.pop(HANDED_DOWN, None)
        if options is None and kwargs.get(FLAG):
            options = trl_options(patch.previous)
            if options is None and patch.previous is None:
                options = {"temperature": 1.0}
            if options is not None:
                del kwargs[FLAG]
        kwargs |= zip(list(inspect.signature(type(self).forward).parameters)[1:], args, strict=False)
        if options is not None:
            return _token_output(self, kwargs, options["temperature"])
        if kwargs.get("labels") is None or not self.training:
            return patch.below(self, **kwargs)  # logits are what is asked for
        patch.fallback = _why_logits(self, kwargs)
        return patch.below(self, **kwargs) if patch.fallback else _loss_output(self, kwargs)

    return forward


def _why_logits(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a training call has to make logits all the same, or None when it does not."""
    if model.loss_function is not ForCausalLMLoss or kwargs.get("ignore_index", IGNORED) != IGNORED:
        return "the model has a loss of its own"
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor) or keep:
        return "logits_to_keep is given"
    if kwargs.get("return_dict", model.config.return_dict) is False:
        return "a tuple is asked for"
    return "router logits are asked for" if _wants_router_logits(model, kwargs) else None


def _wants_router_logits(model: Any, kwargs: dict[str, Any]) -> bool:
    default = getattr(model.config.get_text_config(), "output_router_logits", False)
    return bool(kwargs.get("output_router_logits", default))


def _shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Targets [B, S]: the next token of each position, -100 after the last."""
    return shift_labels if shift_labels is not None else F.pad(labels[..., 1:], (0, 1), value=IGNORED)  # type: ignore[index]


def _loss_output(model: Any, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
    labels, shift_labels, items = (kwargs.pop(n, None) for n in ("labels", "shift_labels", "num_items_in_batch"))
    kwargs.pop("logits_to_keep", None)
    outputs = model.base_model(**kwargs)
    hidden = outputs.last_hidden_state
    targets = _shifted(labels, shift_labels).reshape(-1).to(hidden.device)
    loss = LanguageHead.of(model).cross_entropy(
        hidden.flatten(0, -2), targets, reduction="mean" if items is None else "sum"
    )
    if items is not None:
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    return CausalLMOutputWithPast(
        loss=loss, past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions"),
    )  # fmt: skip


def _token_output(model: Any, kwargs: dict[str, Any], temperature: float) -> TokenOutput:
    labels, shift_labels, items = (kwargs.pop(n, None) for n in ("labels", "shift_labels", "num_items_in_batch"))
    hidden = model.base_model(**{**kwargs, "use_cache": False}).last_hidden_state  # [B, S, D]
    targets = _shifted(labels, shift_labels).to(hidden.device)
    found = LanguageHead.of(model).stats(hidden.flatten(0, -2), targets.reshape(-1), temperature=temperature)
    columns = slice(None) if shift_labels is not None else slice(-1)
    log_probs, entropy, is_top1 = (
        x.view(targets.shape)[:, columns] for x in (found.logprob, found.entropy, found.is_top1)
    )
    mask = targets[:, columns] != IGNORED
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items)
    return TokenOutput(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)


def trl_options(forward: Any) -> dict[str, Any] | None:
    """The options of TRL's fused head among the wrappers of a forward; None without one, or one that asks for more."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        names = getattr(getattr(function, "__code__", None), "co_freevars", ())
        if {"temperature", "cast_lm_head_to_fp32", "outputs"} <= set(names):
            held = {name: cell.cell_contents for name, cell in zip(names, function.__closure__, strict=True)}
            is_served = set(held["outputs"]) <= SERVED_OUTPUTS and not held["cast_lm_head_to_fp32"]
            has_router = getattr(held.get("text_config"), "output_router_logits", False)
            return {"temperature": held["temperature"]} if is_served and not has_router else None
        forward = getattr(function, "__wrapped__", None)
    return None


def _translator(patch: Patch) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = trl_options(patch.previous) if patch.is_active and kwargs.get(FLAG) else None
        if options is not None and not kwargs.get("output_router_logits"):
            kwargs = {**kwargs, HANDED_DOWN: options, FLAG: False}
        return patch.below(self, *args, **kwargs)

    return forward


def watching_train(patches: list[Patch]) -> Any:
    """train(self, mode), which every trainer calls before a step: the time to get above a wrapper of TRL's that came later."""

    def make(patch: Patch) -> Any:
        def train(self: nn.Module, mode: bool = True) -> nn.Module:
            top = self.__dict__.get("forward")
            if patch.is_active and self is patch.module and patch_of(top) is None and trl_options(top) is not None:
                patches.append(Patch(self, _translator))
            return patch.below(self, mode)

        return train

    return make
