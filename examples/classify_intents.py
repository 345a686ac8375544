"""A chatbot's intents: an encoder trained on CLINC150, 150 classes with 50 short questions each (two minutes on 2 cores).

python examples/get_minilm.py .cache/minilm
python examples/classify_intents.py --data DATA/clinc150_small.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import fastpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/minilm")
    parser.add_argument("--data", type=Path, required=True, help="lists of [text, class] under train and test")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--output", default="runs/classify_intents")
    options = parser.parse_args()
    sets = json.loads(options.data.read_text())
    rows, held_out = ([{"text": text, "label": label} for text, label in sets[name]] for name in ("train", "test"))
    run = fastpt.train(
        model=options.model,
        data=rows,
        eval_data=held_out,
        objective="classify",
        method="full",
        batch_rows=32,
        epochs=options.epochs,
        optim={"lr": 3e-4, "schedule": "linear", "warmup": 0.1},
        best_metric="+eval_accuracy",
        output=options.output,
    )
    print(f"{len(held_out)} held-out questions: accuracy {run.metrics['eval_accuracy']:.3f}")
    for text in ("my card was swallowed by the machine", "how is the weather in Oslo tomorrow"):
        found = run.predict(text)
        print(f"{text}: {found.label} ({found.probabilities[found.label]:.2f})")


if __name__ == "__main__":
    main()
