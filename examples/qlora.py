"""QLoRA: adapters on a base whose linear layers are quantised to 4 bits as they are read; then merged, and checked.

python examples/qlora.py --model .cache/smollm2 [--steps 20]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastpt
from fastpt.nf4 import layers_of

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/qlora")
    options = parser.parse_args()
    run = fastpt.train(
        model=options.model,
        data=ROOT / "examples/support_tickets/train.jsonl",
        method={"name": "qlora", "rank": 16},
        batch_rows=8,
        max_steps=options.steps,
        output=options.output,
        optim={"lr": 2e-4},
    )
    layers = [layer for _, layer in layers_of(run.model)]
    kept, values = sum(layer.nf4.nbytes for layer in layers), sum(x.in_features * x.out_features for x in layers)
    print(f"linear layers: {kept / 1e6:.1f} MB, {kept / (2 * values):.3f} of what they take in bfloat16")
    run.merge(Path(options.output) / "merged")


if __name__ == "__main__":
    main()
