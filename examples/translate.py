"""Teach an encoder-decoder to translate, and read what it says: two files with a sentence a line, side by side.

python examples/translate.py --model Helsinki-NLP/opus-mt-en-de --source multi30k_train.en.gz --target multi30k_train.de.gz
(https://github.com/multi30k/dataset, for research; any BART, Marian or T5, for T5 with --prefix "translate English to German: ")
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import fastpt


def lines(path: Path) -> list[str]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder of an encoder-decoder")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--prefix", default="", help="before each source, as T5 wants it")
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--output", default="runs/translate")
    options = parser.parse_args()
    pairs = zip(lines(options.source), lines(options.target), strict=True)
    rows = [{"source": source, "target": target} for source, target in pairs][: options.rows]
    held = max(1, min(200, len(rows) // 20))
    objective = {"name": "seq2seq", "prefix": options.prefix, "label_smoothing": 0.1, "max_new_tokens": 64}
    run = fastpt.train(
        options.model, {"path": rows[held:], "too_long": "drop"}, objective, "full",
        eval_data={"path": rows[:held], "too_long": "drop"}, output=options.output, epochs=options.epochs, max_length=128,
        batch_rows=64, **{"optim.lr": options.lr},
    )  # fmt: skip
    print(f"BLEU {run.metrics['eval_bleu']:.1f}, chrF {run.metrics['eval_chrf']:.1f} on {held} held-out sentences")
    for row, said in zip(rows[:3], run.predict([options.prefix + row["source"] for row in rows[:3]]), strict=True):
        print(f"{row['source']}\n  -> {said}\n  (wanted: {row['target']})")


if __name__ == "__main__":
    main()
