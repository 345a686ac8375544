"""The language head and its losses on hidden states: the logits of a training step are never held.

The head is resolved through its module on every call (plain, LoRA, fully trained copy, tied), never by `.weight` blindly:
the weight of a PEFT layer is the base weight, and a loss that reads it trains no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpt.errors import ModelError
from fastpt.fusion.layout import KEYS
from fastpt.fusion.projection import NotFusable, Projection
from fastpt.ops import TeacherHead, TokenStats, linear_cross_entropy, linear_divergence, token_stats

IGNORED = -100


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> Any:
    """What turns tokens into hidden states after the final norm; raises ModelError when `model` has no such part."""
    inner = causal_lm(model)
    backbone = getattr(inner, "base_model", inner)
    if backbone is inner:
        raise ModelError(
            f"{type(inner).__name__} has no backbone under its head; give a model such as AutoModelForCausalLM"
        )
    return backbone


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    *,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    keys: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Hidden states of packed documents after the final norm, fused or not.

    Shapes: input_ids, position_ids and token_type_ids [T] or [B, S], positions restarting with each document at
    `first_position`; cu_seqlens int32 [N + 1] over the flattened tokens -> [T, D].
    A prompt before several documents need not be repeated: it is a sequence of its own then, and `keys` int64 [Tk] are the
    tokens that the queries of each of the N sequences see, cu_seqlens_k int32 [N + 1] over them; the last query stands at the
    last key (`fastpt.data.prefix.shared_keys` makes them).
    Raises: ModelError for a model without a backbone, for a prompt-learning adapter, and, given keys, for a model that cannot
    share prompts.
    """
    backbone = backbone_of(model)
    if keys is not None:
        from fastpt.fusion.shared_prefix import check_shares_prefix  # which asks here

        check_shares_prefix(model)
        if input_ids.numel() != input_ids.shape[-1] or attention_mask is not None:
            raise ModelError(
                f"keys are given for input_ids {list(input_ids.shape)}{'' if attention_mask is None else ' with a mask'}: "
                "give one row of packed tokens without a mask"
            )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            "a prompt-learning adapter adds tokens of its own, which packed training cannot place; use LoRA"
        )
    if position_ids is not None:
        position_ids = position_ids.view(-1, input_ids.shape[-1])
    columns = {"input_ids": input_ids.view(-1, input_ids.shape[-1]), "position_ids": position_ids}
    if token_type_ids is not None:
        columns["token_type_ids"] = token_type_ids.view(-1, input_ids.shape[-1])
    lengths = {}
    if cu_seqlens is not None:
        if len(cu_seqlens) > 2 and keys is None and not _keeps_apart(backbone):
            return _padded(backbone, columns, cu_seqlens, int(max_seqlen or 0))
        if keys is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
        lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens_k}
        lengths |= {"max_length_q": max_seqlen, "max_length_k": max_seqlen_k}
        lengths |= {} if keys is None else {KEYS: keys}
    outputs = backbone(**columns, attention_mask=attention_mask, use_cache=False, **lengths)
    return outputs.last_hidden_state.flatten(0, -2)


def _keeps_apart(backbone: Any) -> bool:
    """Whether packed documents do not see each other: attention reads their lengths, or their positions where it is causal."""
    attention = getattr(backbone.config, "_attn_implementation", None) or ""
    return attention == "fastpt" or "flash" in attention or is_causal(backbone)


def _padded(backbone: Any, columns: dict[str, Tensor | None], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Hidden states [T, D] of packed documents by a backbone that takes them only as padded rows, as unfused encoders do."""
    is_real = torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]  # [N, max_seqlen]
    rows = {
        name: values.new_zeros(is_real.shape).masked_scatter(is_real, values.flatten())
        for name, values in columns.items()
        if values is not None
    }
    return backbone(**rows, attention_mask=is_real.long(), use_cache=False).last_hidden_state[is_real]


def is_causal(model: nn.Module) -> bool:
    """Whether tokens of a model see only those before them."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def first_position(model: nn.Module) -> int:
    """What a model calls the position of the first token: 0, but behind the padding's own in RoBERTa and its kin."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1


@dataclass(frozen=True)
class LanguageHead:
    """The output embeddings of a causal language model, with what its config does to the logits."""

    model: Any
    softcap: float | None = None
    logit_scale: float = 1.0
    extra_bias: Tensor | None = None  # [V], of a model that adds one of its own (BART's final_logits_bias)

    @classmethod
    def of(cls, model: nn.Module) -> LanguageHead:
        """The head of a bare or PEFT-wrapped model.

        Raises: ModelError with the reason when there is none.
        """
        inner = causal_lm(model)
        get = getattr(inner, "get_output_embeddings", None)
        module = get() if get is not None else None
        if module is None:
            raise ModelError(f"{type(inner).__name__} has no language head; load it with AutoModelForCausalLM")
        if not inner.config.is_encoder_decoder:  # whose parts are asked for by name
            backbone_of(model)
        config = inner.config.get_text_config(decoder=True)
        softcap = getattr(config, "final_logit_softcapping", None)
        extra = getattr(inner, "final_logits_bias", None)
        return cls(inner, softcap, _logit_scale(config), extra.flatten() if extra is not None and extra.any() else None)

    @property
    def module(self) -> nn.Module:
        """The head's module as it is now: PEFT may have replaced it since."""
        return self.model.get_output_embeddings()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, D] -> logits [T, V], as the model's own forward makes them."""
        logits = self.module(hidden) * self.logit_scale
        logits = logits if self.extra_bias is None else logits + self.extra_bias
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        kept: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Cross-entropy of targets already shifted, without the logits.

        Shapes: hidden [T, D], targets int64 [T] with -100 ignored, kept int64 [N] (rows with a target) -> [] or [T].
        """
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": z_loss}
        read = self._read()
        if read is None:
            return _cross_entropy(self.logits(hidden).float(), targets, **options)
        head, hidden = read, hidden.to(self._dtype(read, hidden))
        return linear_cross_entropy(
            hidden, head.weight, targets, bias=head.bias, kept=kept, ignore_index=IGNORED, softcap=self.softcap,
            logit_scale=self.logit_scale, lora_a=head.lora_a, lora_b=head.lora_b, lora_scale=head.scale, **options,
        )  # fmt: skip

    def stats(
        self, hidden: Tensor, targets: Tensor, *, kept: Tensor | None = None, temperature: float = 1.0
    ) -> TokenStats:
        """Log-probability, entropy, logsumexp and top-1 of targets already shifted, each float32 [T]."""
        read = self._read()
        if read is None or (self.softcap is not None and temperature != 1):
            return _token_stats(self.logits(hidden).float() / temperature, targets)
        head, hidden = read, hidden.to(self._dtype(read, hidden))
        return token_stats(
            hidden, head.weight, targets, bias=head.bias, kept=kept, ignore_index=IGNORED, softcap=self.softcap,
            logit_scale=self.logit_scale / temperature, lora_a=head.lora_a, lora_b=head.lora_b, lora_scale=head.scale,
        )  # fmt: skip

    def divergence(
        self, hidden: Tensor, kept: Tensor, teacher: LanguageHead, teacher_hidden: Tensor, **options: Any
    ) -> Tensor:
        """The sum over the kept rows of how far these next-token distributions are from a teacher's (linear_divergence).

        Shapes: hidden [T, D], teacher_hidden [T, E], kept int64 [N] -> []. Raises: ModelError for a head that is no plain weight
        with an adapter, or for a teacher's with one.
        """
        head, other = self._read(), teacher._read()
        if head is None or other is None or other.lora_a is not None:
            raise ModelError(
                "distillation reads both heads as weights: leave the head out of method.targets where it has DoRA or dropout, "
                "and merge a teacher's adapter"
            )
        shared = min(len(head.weight), len(other.weight))  # rows beyond the vocabulary are padding, more or less of it
        cut = lambda x: None if x is None else x[:shared]  # noqa: E731
        theirs = teacher_hidden.to(self._dtype(other, teacher_hidden))
        given = TeacherHead(theirs, other.weight[:shared], cut(other.bias), teacher.softcap, teacher.logit_scale)
        return linear_divergence(
            hidden.to(self._dtype(head, hidden)), head.weight[:shared], given, kept, bias=cut(head.bias), softcap=self.softcap,
            logit_scale=self.logit_scale, lora_a=head.lora_a, lora_b=cut(head.lora_b), lora_scale=head.scale, **options,
        )  # fmt: skip

    def _read(self) -> Projection | None:
        """Weight, bias and adapter as they are now, or None when only calling the module is right."""
        try:
            head = Projection.read(self.module, "the language head")
        except NotFusable:
            return None
        is_served = head.magnitude is None and head.dropout_p == 0 and isinstance(head.weight, Tensor)
        if is_served and self.extra_bias is not None:
            head = replace(head, bias=self.extra_bias if head.bias is None else head.bias + self.extra_bias)
        return head if is_served else None

    @staticmethod
    def _dtype(head: Projection, hidden: Tensor) -> torch.dtype:
        """A head kept in another dtype than the stream (a float32 copy that is trained) takes the hidden states in its own."""
        is_cast = torch.is_autocast_enabled(hidden.device.type)
        return hidden.dtype if is_cast else head.weight.dtype


def _logit_scale(config: Any) -> float:
    """What the config multiplies the logits by: the names are those of the models in transformers."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "scale_decoder_outputs", False):  # T5 with tied embeddings
        return config.d_model**-0.5
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides by it
        return float(config.logits_scaling) if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return 1.0


def _cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str, label_smoothing: float, z_loss: float) -> Tensor:
    """Over logits, for heads that only their module can compute."""
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED)
    is_kept = targets != IGNORED
    if z_loss:
        losses = losses + z_loss * (logits.logsumexp(-1) ** 2).masked_fill(~is_kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / is_kept.sum().clamp(min=1)


def _token_stats(logits: Tensor, targets: Tensor) -> TokenStats:
    is_kept = targets != IGNORED
    logsumexp = logits.logsumexp(-1)
    at_target = logits.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    entropy = logsumexp - ((logits - logsumexp[:, None]).exp() * logits).sum(-1)
    top = at_target >= logits.amax(-1)
    zero = logits.new_zeros(())
    return TokenStats(
        torch.where(is_kept, at_target - logsumexp, zero),
        torch.where(is_kept, entropy, zero),
        torch.where(is_kept, logsumexp, zero),
        top & is_kept,
    )
