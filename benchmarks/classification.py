"""Classifiers trained on real rows, by fastpt and by transformers' Trainer: what they get right, and how long they train.

    python -m benchmarks.classification --work clinc150 --model .cache/minilm --side fastpt --json results.jsonl

Both sides see the same rows, batches of rows, learning rate (linear to 0 after a warm-up) and epochs, start from the same
weights and train everything. fastpt computes in what it finds fastest (bfloat16 where the processor has units for it), Trainer in
float32, its default, or under bf16 autocast. Data from $FASTPT_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import machine

SETTINGS: dict[str, dict[str, Any]] = {  # epochs, rows a step, learning rate, longest row
    "clinc150": {"objective": "classify", "epochs": 6, "batch_rows": 32, "lr": 3e-4, "max_length": 128},
    "pubmedqa": {"objective": "classify", "epochs": 5, "batch_rows": 16, "lr": 3e-4, "max_length": 128},
    "wnut17": {"objective": "tag", "epochs": 4, "batch_rows": 32, "lr": 3e-4, "max_length": 256},
}
WARMUP = 0.1
Row = dict[str, Any]


def rows_of(work: str, fold: int = 0) -> tuple[list[Row], list[Row]]:
    """(training rows, test rows); PubMedQA has no test set, so a fifth of its rows is held out, drawn by class."""
    folder = Path(os.environ.get("FASTPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if work == "clinc150":
        sets = json.loads((folder / "clinc150_small.json").read_text())
        return tuple([{"text": text, "label": label} for text, label in sets[split]] for split in ("train", "test"))  # type: ignore[return-value]
    if work == "wnut17":
        from fastpt.data.sources import load_rows

        return list(load_rows(folder / "wnut17_train.conll")), list(load_rows(folder / "wnut17_test.conll"))
    papers = json.loads((folder / "pubmedqa_labeled.json").read_text()).values()
    rows = [{"text": p["QUESTION"], "text_pair": " ".join(p["CONTEXTS"]), "label": p["final_decision"]} for p in papers]
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda row: row["label"])
    return [r for i, r in enumerate(rows) if i % 5 != fold], [r for i, r in enumerate(rows) if i % 5 == fold]


def by_fastpt(work: str, model: str, rows: list[Row], held_out: list[Row], seed: int, output: str) -> dict[str, Any]:
    import fastpt

    chosen = SETTINGS[work]
    data, eval_data = ({"path": part, "too_long": "truncate"} for part in (rows, held_out))
    run = fastpt.train(
        model, data, chosen["objective"], "full", eval_data=eval_data, output=output,
        seed=seed, epochs=chosen["epochs"], batch_rows=chosen["batch_rows"], max_length=chosen["max_length"],
        eval_steps=10**9, save_steps=10**9, quiet=True,
        **{"optim.lr": chosen["lr"], "optim.schedule": "linear", "optim.warmup": WARMUP},
    )  # fmt: skip
    found = {name.removeprefix("eval_"): value for name, value in run.metrics.items() if name.startswith("eval_")}
    made = json.loads((run.path / "run.json").read_text())["model"]
    return {"train_s": run.metrics["seconds"], "steps": run.metrics["steps"], "precision": made["precision"], **found}


def by_trainer(
    work: str, model: str, rows: list[Row], held_out: list[Row], seed: int, output: str, is_bf16: bool = False
) -> dict[str, Any]:
    """transformers' Trainer with its collators; its predictions are measured by the code that measures fastpt's."""
    import torch
    import transformers as tf

    from fastpt.data.files import Records
    from fastpt.objectives import make_objective

    chosen = SETTINGS[work]
    torch.manual_seed(seed)  # of the new head
    objective = make_objective(chosen["objective"])
    settings = objective.survey(Records(rows), None, None)
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    is_tagging = chosen["objective"] == "tag"
    kind = tf.AutoModelForTokenClassification if is_tagging else tf.AutoModelForSequenceClassification
    net = kind.from_pretrained(model, **settings, dtype=torch.float32)
    net.config.pad_token_id = tokenizer.pad_token_id  # by which a decoder's head finds the last token
    encode = _encoded_words if is_tagging else _encoded_text
    collator = (tf.DataCollatorForTokenClassification if is_tagging else tf.DataCollatorWithPadding)(tokenizer)
    sets = [
        [encode(tokenizer, row, objective._classes, chosen["max_length"]) for row in part] for part in (rows, held_out)
    ]
    arguments = tf.TrainingArguments(
        output_dir=output, use_cpu=not torch.cuda.is_available(), seed=seed, num_train_epochs=chosen["epochs"],
        per_device_train_batch_size=chosen["batch_rows"], learning_rate=chosen["lr"], lr_scheduler_type="linear",
        warmup_steps=WARMUP, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6,
        bf16=is_bf16,
    )  # fmt: skip
    trainer: Any = tf.Trainer(net, arguments, train_dataset=sets[0], data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    predicted = trainer.predict(sets[1])
    found = _measured(objective, torch.from_numpy(predicted.predictions), torch.from_numpy(predicted.label_ids))
    return {"train_s": seconds, "steps": trainer.state.global_step, **found}


def _encoded_text(tokenizer: Any, row: Row, classes: Any, length: int) -> Row:
    encoded = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=length)
    return {**encoded, "labels": classes.index(row["label"], "")}


def _encoded_words(tokenizer: Any, row: Row, classes: Any, length: int) -> Row:
    """As transformers' own example of token classification: the first token of a word carries its tag."""
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
    words = encoded.word_ids()
    is_first = [word is not None and (at == 0 or words[at - 1] != word) for at, word in enumerate(words)]
    tags = [classes.index(row["tags"][w], "") if new else -100 for w, new in zip(words, is_first, strict=True)]
    return {**encoded, "labels": tags}


def _measured(objective: Any, logits: Any, labels: Any) -> dict[str, float]:
    """The objective's own measures of padded logits."""
    kept = labels != -100
    lengths = [kept.sum(1).tolist()] if labels.dim() == 2 else []
    return objective.summarise(objective.measure(logits[kept].float(), labels[kept], *lengths), int(kept.sum()))


def majority_of(rows: list[Row], held_out: list[Row]) -> dict[str, float]:
    """What saying the most frequent class always would reach."""
    (label, _), *_ = Counter(row["label"] for row in rows).most_common(1)
    share, classes = sum(row["label"] == label for row in held_out) / len(held_out), {row["label"] for row in rows}
    return {"majority_accuracy": share, "majority_macro_f1": 2 * share / (1 + share) / len(classes)}


SIDES = {"fastpt": by_fastpt, "trainer": by_trainer, "trainer-bf16": partial(by_trainer, is_bf16=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=list(SETTINGS), required=True)
    parser.add_argument("--model", required=True, help="folder or hub id of an encoder")
    parser.add_argument("--side", choices=list(SIDES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, default=0, help="pubmedqa: which fifth is held out")
    parser.add_argument(
        "--rows", type=int, help="train on so many rows only, drawn by class, to stay within 15 minutes"
    )
    parser.add_argument("--epochs", type=float, help="another number than the work's own")
    parser.add_argument("--lr", type=float, help="another learning rate than the work's own")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args()
    SETTINGS[options.work] |= {n: given for n in ("epochs", "lr") if (given := getattr(options, n)) is not None}
    rows, held_out = rows_of(options.work, options.fold)
    if options.rows is not None:  # of rows in the order of their classes, or of a random one: as many of each class
        rows = [rows[i * len(rows) // options.rows] for i in range(min(options.rows, len(rows)))]
    majority = majority_of(rows, held_out) if SETTINGS[options.work]["objective"] == "classify" else {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        found = SIDES[options.side](options.work, options.model, rows, held_out, options.seed, folder)
    found["cpu_s"] = time.process_time() - started  # of all threads, the evaluation among them
    told = {"work": options.work, "side": options.side, "seed": options.seed, "fold": options.fold, **found, **majority}
    told |= {"rows": len(rows), "settings": SETTINGS[options.work], "model": options.model, "machine": machine()}
    print(json.dumps(told))
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
