"""What bfloat16 keeps of a young adapter: python -m benchmarks.adapter_rounding --model DIR [--steps 1] [--json FILE].

A LoRA is trained for a few steps on GSM8K in float32; then the loss of rows that it has not seen is read without the adapter,
and with it in float32, in bfloat16 by PEFT, and in bfloat16 fused. PEFT adds the adapter's product to a base output that is
rounded already, where an update below half its last bit is lost; `lora_linear` rounds their sum.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch

import fastpt
from benchmarks import rows
from benchmarks.harness import machine
from benchmarks.peers import HandWritten, Job, save_adapter

BATCH, LENGTH, LR, UNSEEN = 4, 256, 2e-4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = rows.load("gsm8k", tokenizer, count=BATCH * options.steps + UNSEEN, length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        adapter = save_adapter(options.model, folder)
        job = Job(options.model, adapter, examples[UNSEEN:], BATCH, LR, LENGTH, is_fp32=True)
        peer = HandWritten(job)
        peer.build()
        peer.train(lambda *_: None)
        unseen = HandWritten(Job(options.model, adapter, examples[:UNSEEN], BATCH, LR, LENGTH))
        batches = [inputs for inputs, _ in unseen._batches()]
    model = peer.model.eval()

    @torch.no_grad()
    def loss(read: torch.nn.Module) -> float:
        return sum(float(read(**batch, use_cache=False).loss) for batch in batches) / len(batches)

    found = {"float32": loss(model)}
    with model.disable_adapter():
        found = {"without the adapter": loss(model)} | found
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    found["bfloat16, PEFT"] = loss(narrow)
    with fastpt.fuse(narrow):
        found["bfloat16, fused"] = loss(narrow)
    for name, value in found.items():
        print(f"{name:20} {value:.4f}")
    if options.json is not None:
        line = {
            "losses": found,
            "steps": options.steps,
            "lr": LR,
            "rows": UNSEEN,
            "model": options.model,
            "machine": machine(),
        }
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
