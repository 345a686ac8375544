"""Half of a model's layers learn from the whole model, beside the same half that learns from the rows alone.

python examples/distill.py --model .cache/smollm2 --data gsm8k_train.jsonl --rows 1000
(https://github.com/openai/grade-school-math, MIT: rows with question and answer)
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fastpt


def every_other_layer(teacher: torch.nn.Module) -> torch.nn.Module:
    """A copy with half of the layers, the first among them."""
    student = copy.deepcopy(teacher)
    layers = student.model.layers[::2]
    student.model.layers = torch.nn.ModuleList(layers)
    student.config.num_hidden_layers = len(layers)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = student.config.layer_types[::2]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/smollm2", help="the teacher")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--on-policy", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/distill")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    held = max(1, min(200, len(rows) // 20))
    columns = {"prompt": "question", "completion": "answer"}
    held_out, rows = ({"path": part, "columns": columns} for part in (rows[:held], rows[held:][: options.rows]))
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    common = {"tokenizer": options.model, "max_length": 1024, "quiet": True}
    judge = {"name": "distill", "teacher": options.model}

    def tell(name: str, model: torch.nn.Module) -> None:
        found = fastpt.evaluate(model, held_out, judge, **common)
        shown = ", ".join(f"{k} {found[k]:.3f}" for k in ("loss", "token_accuracy", "divergence"))
        print(f"{name}: {shown} on {held} held-out rows", flush=True)

    tell("before", every_other_layer(teacher))
    distill = judge | {"beta": options.beta, "on_policy": options.on_policy, "max_new_tokens": 128}
    for objective in ({"name": "sft"}, distill):
        run = fastpt.train(
            model=every_other_layer(teacher), data=rows, objective=objective, method="full", batch_rows=16,
            optim={"lr": options.lr}, seed=options.seed, output=f"{options.output}/{objective['name']}", **common,
        )  # fmt: skip
        tell(f"{objective['name']}, {run.metrics['seconds']:.0f} s", run.model)


if __name__ == "__main__":
    main()
