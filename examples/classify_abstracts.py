"""Medical abstracts: does the study answer its question by yes, no or maybe? PubMedQA, a fifth of its rows held out.

python examples/get_minilm.py .cache/minilm
python examples/classify_abstracts.py --data DATA/pubmedqa_labeled.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import fastpt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/minilm")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--output", default="runs/classify_abstracts")
    options = parser.parse_args()
    papers = list(json.loads(options.data.read_text()).values())
    random.Random(0).shuffle(papers)
    rows = [{"text": p["QUESTION"], "text_pair": " ".join(p["CONTEXTS"]), "label": p["final_decision"]} for p in papers]
    fifth = len(rows) // 5
    run = fastpt.train(
        model=options.model,
        data={"path": rows[fifth:], "too_long": "truncate"},
        eval_data={"path": rows[:fifth], "too_long": "truncate"},
        objective={"name": "classify", "class_weights": "balanced"},  # maybe is rare
        method="full",
        batch_rows=16,
        max_length=512,
        epochs=options.epochs,
        optim={"lr": 1e-4, "schedule": "linear", "warmup": 0.1},
        best_metric="+eval_macro_f1",
        output=options.output,
    )
    (common, times), *_ = Counter(row["label"] for row in rows[:fifth]).most_common()
    print(
        f"{fifth} held-out abstracts: accuracy {run.metrics['eval_accuracy']:.3f}, macro-F1 {run.metrics['eval_macro_f1']:.3f}; "
        f"always saying {common!r} gets {times / fifth:.3f}"
    )


if __name__ == "__main__":
    main()
