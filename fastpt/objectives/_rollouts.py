"""Answers to prompts, sampled from the policy as it is now: by fastpt's own decode path, or by vLLM where that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastpt import adapters
from fastpt.errors import ConfigError
from fastpt.objectives.base import Scorer

SLOTS = 32  # sequences decoded at a time by the own path; more prompts take the slots of those that end


class Engine(Protocol):
    """What makes rollouts: the tokens that follow each prompt, up to and including the first of `stop`."""

    def generate(
        self, model: Scorer, prompts: list[list[int]], stop: Sequence[int], max_new_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]: ...


class OwnEngine:
    """The model that is trained decodes itself: continuous batching on a static KV cache, no copy of the weights."""

    def generate(self, model, prompts, stop, max_new_tokens, temperature, top_p):
        return model.generate(
            prompts, stop=stop, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, batch_size=SLOTS
        )


class VLLMEngine:
    """vLLM on the same device, which reads the adapter anew before each rollout; the base model never changes."""

    def __init__(self, model: nn.Module):
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise ConfigError(
                'objective.engine is "vllm", which is not installed: pip install vllm, or leave engine at "fastpt"'
            ) from None
        if not adapters.is_adapter_model(model):
            raise ConfigError('objective.engine "vllm" needs an adapter (method "lora"): vLLM holds the base model only')
        config = next(iter(model.peft_config.values()))  # type: ignore[union-attr, operator]
        self._model, self._request, self._rollouts = model, LoRARequest, 0
        self._llm = LLM(
            config.base_model_name_or_path, enable_lora=True, max_lora_rank=config.r,
            gpu_memory_utilization=0.4,  # the rest is for training
        )  # fmt: skip

    def generate(self, model, prompts, stop, max_new_tokens, temperature, top_p):
        from vllm import SamplingParams

        self._rollouts += 1
        sampling = SamplingParams(
            max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop_token_ids=list(stop), detokenize=False
        )
        asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        with tempfile.TemporaryDirectory() as folder:
            adapters.save(self._model, Path(folder))
            policy = self._request(f"rollout-{self._rollouts}", self._rollouts, folder)
            found = self._llm.generate(asked, sampling, lora_request=policy, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]
