"""Count a training step of a real model without computing it: every op's bytes and FLOPs, and the memory alive at most.

The model's own code runs, plain or fused, on memory that is never touched (NothingComputed). An op of
fastpt counts what its registered cost says, a torch op its inputs and outputs once. Layers are alike, so one and two of them
are counted and the rest follows; memory grows with the tokens in a line, so two lengths are.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.traffic.torch_ops import TorchOps
from fastpt.config import MethodConfig
from fastpt.ops._library import OPS
from fastpt.skeleton import skeleton
from fastpt.tracing import LiveMemory, NothingComputed

NF4_BYTES = 0.5 + 4 / 64  # a weight: half a byte, and one float32 scale for 64 of them
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("Llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }),
    "Qwen3-4B": ("Qwen3", {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "SmolLM2-135M": ("Llama", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    }),
}  # fmt: skip


@dataclass
class Counted:
    """One forward and backward pass: (bytes, FLOPs) of each op in order, and bytes alive at most beyond what was before."""

    ops: list[tuple[str, int, int]] = field(default_factory=list)
    peak_extra: int = 0


class StepCounter(TorchOps):
    """Counts a step op by op; stands in for the meter that TorchOps reports to."""

    is_inside_kernel = False

    def __init__(self) -> None:
        super().__init__(self)
        self.memory = LiveMemory()
        self.counted = Counted()

    def _count(self, func, args, kwargs, inputs, outputs, result) -> None:
        op = OPS.get(func._opname) if func.namespace == "fastpt" else None
        if op is not None:
            cost = op.cost(*args, **kwargs)
            self.counted.ops.append((op.name, cost.bytes, cost.flops))
            return
        before = collections.Counter(self.counts)
        super()._count(func, args, kwargs, inputs, outputs, result)
        moved = self.counts["read"] + self.counts["written"] - before["read"] - before["written"]
        flops = self.counts["flops"] - before["flops"]
        if "scaled_dot_product" in func._opname:
            flops = _attention_flops(func._opname, inputs)
        if moved:
            self.counted.ops.append((func._opname, moved, flops))


def _attention_flops(name: str, inputs: list[torch.Tensor]) -> int:
    """Causal, the masked half left out: two products forward, five backward."""
    batch, heads, tokens, width = inputs[1 if "backward" in name else 0].shape
    return (5 if "backward" in name else 2) * batch * heads * tokens * tokens * width


def config_of(name: str, layers: int) -> Any:
    import transformers

    family, sizes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**sizes, "num_hidden_layers": layers})
    config._attn_implementation = "sdpa"
    return config


def build(name: str, layers: int, *, is_lora: bool, is_fused: bool) -> nn.Module:
    """The model with `layers` layers in bf16, its weights nothing that was ever drawn."""
    method = MethodConfig(name="lora" if is_lora else "full")
    model = skeleton(config_of(name, layers), method, torch.bfloat16, is_fused=is_fused)
    for parameter in model.parameters():
        if is_lora and parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def count(model: nn.Module, tokens: int) -> Counted:
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    with NothingComputed(), StepCounter() as counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    counter.counted.peak_extra = counter.memory.peak
    model.zero_grad()
    return counter.counted


@dataclass(frozen=True)
class Step:
    """A step of the whole model on one row of `tokens`."""

    tokens: int
    layer: list[tuple[str, int, int]]  # ops of one layer, with its part of backward
    rest: list[tuple[str, int, int]]  # embedding, head, loss
    layers: int
    weights: int  # bytes
    trained: int  # parameters
    linear_weights: int  # parameters of the layers' matrices, what QLoRA quantises
    extra: tuple[int, int]  # bytes alive at most beyond weights and optimizer at `tokens`, and for each token more

    @property
    def update_bytes(self) -> int:
        """AdamW: gradient, both moments and a float32 master read, moments, master and weight written."""
        return (2 + 12 + 12 + 2) * self.trained

    def floor_s(self, device, *, is_quantised: bool = False) -> float:
        """The sum of every op's own floor: max of its FLOPs and its bytes, nothing overlapped."""
        time = lambda ops: sum(device.floor_s(flops, moved) for _, moved, flops in ops)  # noqa: E731
        total = time(self.rest) + self.layers * time(self.layer) + device.floor_s(0, self.update_bytes)
        if is_quantised:  # every matrix made bf16 before its product, forward and backward
            total += 2 * device.floor_s(0, (NF4_BYTES + 2) * self.linear_weights)
        return total

    def peak_bytes(self, tokens: int, *, is_quantised: bool = False) -> float:
        """Weights, moments and master of what is trained, activations and gradients of one row."""
        weights = self.weights - ((2 - NF4_BYTES) * self.linear_weights if is_quantised else 0)
        at, slope = self.extra
        return weights + 12 * self.trained + at + slope * (tokens - self.tokens)

    def longest(self, memory: float, *, is_quantised: bool = False) -> int:
        """Tokens of the longest row that fits, 0 if none does."""
        free = memory - self.peak_bytes(self.tokens, is_quantised=is_quantised)
        tokens = self.tokens + int(free / self.extra[1])
        return max(0, tokens)


def step(name: str, tokens: int, *, is_lora: bool, is_fused: bool) -> Step:
    layers = MODELS[name][1]["num_hidden_layers"]
    counted, extra, parameters = {}, {}, {}
    for depth in (1, 2):
        model = build(name, depth, is_lora=is_lora, is_fused=is_fused)
        counted[depth], longer = count(model, tokens), count(model, 2 * tokens)
        extra[depth] = counted[depth].peak_extra, longer.peak_extra
        parameters[depth] = [sum(p.numel() for p in model.parameters() if p.requires_grad in kinds) for kinds in (
            (True, False), (True,),
        )]  # fmt: skip
        matrices = sum(m.weight.numel() for path, m in model.named_modules() if _is_quantised(path, m)) // depth
        del model
    at, longer_at = (_at_depth(layers, extra[1][i], extra[2][i]) for i in (0, 1))
    total, trained = (_at_depth(layers, parameters[1][i], parameters[2][i]) for i in (0, 1))
    layer = collections.Counter(counted[2].ops) - collections.Counter(counted[1].ops)
    rest = collections.Counter(counted[1].ops) - layer
    return Step(
        tokens=tokens,
        layer=list(layer.elements()),
        rest=list(rest.elements()),
        layers=layers,
        weights=2 * total,
        trained=trained,
        linear_weights=layers * matrices,
        extra=(at, (longer_at - at) // tokens),
    )


def _at_depth(layers: int, one: int, two: int) -> int:
    return one + (layers - 1) * (two - one)


def _is_quantised(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "layers." in path and "lora_" not in path
