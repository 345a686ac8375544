"""Bytes that autograd keeps from forward to backward, per token and layer: python -m benchmarks.saved_activations --model DIR.

Counted by torch's hooks for saved tensors and in what autograd.Functions hold besides, each storage once, for two depths and two
lengths of one model: the difference of the differences is what one token costs in one layer. Whatever does not grow with both
(weights, copies of them, rotary tables) cancels; what grows with the tokens alone is the embedding and the head.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness, toy
from benchmarks.peers import Job, load_model, save_adapter
from benchmarks.train_step import versions

LENGTHS, DEPTHS = (128, 384), (1, 3)
MODES = {  # name -> has an adapter, its dtype
    "lora, float32 adapters": (True, torch.float32),
    "lora, bfloat16 adapters": (True, torch.bfloat16),
    "full, bfloat16": (False, torch.bfloat16),
}


class Saved:
    """What one saved tensor is packed as: alive as long as the graph is."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def held_bytes(loss_of: Any) -> int:
    """Bytes that the graph of loss_of() keeps alive until its backward, each storage once."""
    packed: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        packed.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = loss_of()
    tensors = [saved.tensor for ref in packed if (saved := ref()) is not None]
    tensors += [tensor for node in _nodes(loss.grad_fn) for tensor in _tensors(getattr(node, "__dict__", None))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _nodes(root: Any) -> Iterator[Any]:
    seen, pending = set(), [root]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [following for following, _ in node.next_functions]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a Function put on its context by itself, in plain containers or objects with fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


@dataclass
class Measured:
    per_layer_bytes: float  # per token
    rest_bytes: float  # per token, outside the layers: embedding and head


def measure(folder: str, adapter: str | None, adapter_dtype: torch.dtype, *, is_fused: bool) -> Measured:
    """Bytes per token of a training step's forward, by layer and outside of the layers."""
    import fastpt

    found = {}
    for depth in DEPTHS:
        job = Job(folder, adapter, [], batch_rows=1, lr=0.0)
        model = _cut(load_model(job, torch.bfloat16, adapter_dtype), depth)
        if is_fused:
            fastpt.fuse(model)
        for length in LENGTHS:
            ids = torch.arange(length)[None] % model.config.vocab_size
            found[depth, length] = held_bytes(lambda m=model, x=ids: m(input_ids=x, labels=x, use_cache=False).loss)
    (shallow, deep), (short, long) = DEPTHS, LENGTHS
    per_token = {depth: (found[depth, long] - found[depth, short]) / (long - short) for depth in DEPTHS}
    per_layer = (per_token[deep] - per_token[shallow]) / (deep - shallow)
    return Measured(per_layer, per_token[shallow] - shallow * per_layer)


def _cut(model: nn.Module, depth: int) -> Any:
    """The same model with its first `depth` layers only."""
    backbone: Any = model.get_decoder() if not hasattr(model, "peft_config") else model.get_base_model().get_decoder()
    backbone.layers = backbone.layers[:depth]
    backbone.config.num_hidden_layers = depth
    return model


def run(model: str, console: Console) -> list[dict[str, Any]]:
    from transformers import AutoConfig

    width = AutoConfig.from_pretrained(model).hidden_size
    records = []
    with tempfile.TemporaryDirectory() as adapter:
        save_adapter(model, adapter)
        for mode, (has_adapter, dtype) in MODES.items():
            for is_fused in (False, True):
                measured = measure(model, adapter if has_adapter else None, dtype, is_fused=is_fused)
                name = "fastpt" if is_fused else "hf"
                record = {
                    "peer": name, "mode": mode, "bytes_per_token_and_layer": measured.per_layer_bytes,
                    "times_2d": measured.per_layer_bytes / (2 * width), "rest_bytes_per_token": measured.rest_bytes,
                }  # fmt: skip
                records.append(record)
                console.print(f"{name} {mode}: {record['times_2d']:.2f} × 2D")
    return records


def show(records: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="saved for backward, bytes per token")
    for column in ("training", "model", "in each layer", "× 2D", "outside the layers"):
        table.add_column(column, justify="left" if column in ("training", "model") else "right")
    for r in records:
        table.add_row(
            r["mode"], {"hf": "transformers + PEFT", "fastpt": "fused"}[r["peer"]],
            f"{r['bytes_per_token_and_layer']:,.0f}", f"{r['times_2d']:.2f}", f"{r['rest_bytes_per_token']:,.0f}",
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument("--json", type=Path, help="write one JSON line per model and way of training")
    parser.add_argument("--toy", action="store_true", help="a random model: checks that it runs")
    options = parser.parse_args(argv)
    if not options.model and not options.toy:
        parser.error("--model names the model to measure (or --toy for a made-up one)")
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        model = str(toy.write_model(Path(folder), layers=max(DEPTHS))) if options.toy else options.model
        records = run(model, console)
    about = {"model": "toy" if options.toy else options.model, "versions": versions(), "machine": harness.machine()}
    if options.json:
        harness.write_json_lines(options.json, [{**record, **about} for record in records])
    show(records, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
