"""Domain adaptation: continued pre-training of a model on plain text, here this project's own documentation.

python examples/pretrain_on_docs.py --model .cache/smollm2 [--steps 20]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastpt

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/pretrain_on_docs")
    options = parser.parse_args()
    pages = [{"text": path.read_text()} for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]
    held_out = pages[::5]
    run = fastpt.train(
        model=options.model,
        data=[page for page in pages if page not in held_out],
        eval_data=held_out,
        objective="pretrain",
        method="full",
        max_length=512,
        batch_tokens=2048,
        max_steps=options.steps,
        output=options.output,
        optim={"lr": 5e-5, "weight_decay": 0.1},
    )
    print(f"perplexity on the held-out pages: {run.metrics['eval_perplexity']:.2f}")


if __name__ == "__main__":
    main()
