"""Answers to prompts, sampled from the policy as it is now (by fastpt's own decode path, or by vLLM), and their examples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastpt import adapters
from fastpt.data.example import Example
from fastpt.errors import ConfigError
from fastpt.objectives.base import Scorer

SLOTS = 32  # sequences decoded at a time by the own path; more prompts take the slots of those that end


class Engine(Protocol):
    """What makes rollouts: the tokens that follow each prompt, up to and including the first of `stop`."""

    def generate(
        self,
        model: Scorer,
        prompts: list[list[int]],
        stop: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
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
            raise ConfigError(
                'objective.engine "vllm" needs an adapter (method "lora"): vLLM holds the base model only'
            )
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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generators seeded for a while, and then as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass
class Group:
    """One prompt's answers: what they earned, and their examples (several where one would not fit a micro-batch)."""

    rewards: Tensor  # [G], weights and punishment included
    trained: list[int]  # the answers that are trained, by number
    examples: list[Example]

    def give(self, name: str, values: Tensor) -> None:
        """Values [G] of the answers as a field [D] of the examples."""
        chosen = values[self.trained].numpy()
        ends = np.cumsum([len(example.documents or ()) for example in self.examples])
        for example, part in zip(self.examples, np.split(chosen, ends[:-1]), strict=True):
            example.fields[name] = part


def joined(prompt: Example, answers: list[list[int]]) -> Example:
    """The prompt, and after it each of the answers, which begin with the prompt's last token."""
    last = prompt.input_ids[-1:]
    parts = [prompt.input_ids[:-1], *(np.concatenate([last, np.array(a, np.int32)]) for a in answers)]
    trained = np.concatenate([np.zeros(len(parts[0]), bool), *(np.arange(len(a) + 1) > 0 for a in answers)])
    documents = tuple(len(part) for part in parts[1:])
    return Example(
        np.concatenate(parts).astype(np.int32), trained, None, prompt.place, documents=documents, prefix=len(parts[0])
    )
