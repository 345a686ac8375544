"""Names of people, places and products in what people write online: an encoder trained on WNUT17's CoNLL files.

python examples/get_minilm.py .cache/minilm
python examples/tag_entities.py --data DATA   # with wnut17_train.conll, wnut17_test.conll
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fastpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/minilm")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", default="runs/tag_entities")
    options = parser.parse_args()
    run = fastpt.train(
        model=options.model,
        data=options.data / "wnut17_train.conll",
        eval_data=options.data / "wnut17_test.conll",
        objective="tag",
        method="full",
        batch_rows=32,
        epochs=options.epochs,
        optim={"lr": 3e-4, "schedule": "linear", "warmup": 0.1},
        best_metric="+eval_f1",
        output=options.output,
    )
    print(f"entities: precision {run.metrics['eval_precision']:.3f}, recall {run.metrics['eval_recall']:.3f}, "
          f"F1 {run.metrics['eval_f1']:.3f}")  # fmt: skip
    sentence = "Anna Berg flew from Oslo to the Empire State Building"
    print(list(zip(sentence.split(), run.predict(sentence), strict=True)))


if __name__ == "__main__":
    main()
