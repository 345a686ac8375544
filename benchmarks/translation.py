"""English to German from nothing in some minutes, by fastpt and by transformers' Seq2SeqTrainer: BLEU on Multi30k's test set.

    python -m benchmarks.translation --side fastpt --minutes 15 --json results.jsonl

Both sides see the same rows in batches of as many, start from the same weights (a BART of 3 + 3 layers, width 256; its tokenizer
is a BPE of 8000 trained on the training text), take the same learning rate after the same warm-up, and stop when their time is
up.
fastpt computes in what it finds fastest, Seq2SeqTrainer in float32, its default, or under bf16 autocast. Answers are greedy. Data
from $FASTPT_DATA, or shared/data beside the repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine

ROWS_A_STEP, LR, WARMUP, LABEL_SMOOTHING, LONGEST = 64, 5e-4, 400, 0.1, 64
Row = dict[str, str]


def sentences(split: str) -> list[Row]:
    folder = Path(os.environ.get("FASTPT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    sides = []
    for language in ("en", "de"):
        with gzip.open(folder / f"multi30k_{split}.{language}.gz", "rt", encoding="utf-8") as file:
            sides.append(file.read().splitlines())
    return [{"source": a, "target": b} for a, b in zip(*sides, strict=True)]


def tokenizer_of(rows: list[Row]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model_of(vocabulary: int, seed: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary, d_model=256, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024, max_position_embeddings=128, dropout=0.1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    )  # fmt: skip


def by_fastpt(model: Any, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    from fastpt.trainer import Trainer

    model.save_pretrained(f"{folder}/start")
    trainer = Trainer(
        model=f"{folder}/start", tokenizer=tokenizer, data={"path": rows, "too_long": "truncate"}, method="full",
        objective={"name": "seq2seq", "label_smoothing": LABEL_SMOOTHING, "generates": False}, batch_rows=ROWS_A_STEP,
        max_length=LONGEST, max_steps=10**6, output=f"{folder}/run", quiet=True, save_steps=10**9, seed=options.seed,
        micro_batch_tokens=8192, **{"optim.lr": LR, "optim.warmup": WARMUP, "optim.schedule": "constant"},
    )  # fmt: skip
    trainer.prepare()
    started = time.perf_counter()
    for _ in trainer.steps():
        if time.perf_counter() - started > 60 * options.minutes:
            break
    seconds = time.perf_counter() - started
    return {"steps": trainer.step, "seconds": seconds, "precision": str(trainer.dtype), "model": trainer.model}


def by_trainer(model: Any, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    import transformers as tf

    class UntilTimeIsUp(tf.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_training_stop = time.perf_counter() - started > 60 * options.minutes

    cut = {"truncation": True, "max_length": LONGEST}
    encoded = [
        {**tokenizer(row["source"], **cut), "labels": tokenizer(text_target=row["target"], **cut)["input_ids"]}
        for row in rows
    ]
    arguments = tf.Seq2SeqTrainingArguments(
        output_dir=folder, use_cpu=not torch.cuda.is_available(), seed=options.seed, max_steps=10**6,
        per_device_train_batch_size=ROWS_A_STEP, learning_rate=LR, lr_scheduler_type="constant_with_warmup", warmup_steps=WARMUP,
        label_smoothing_factor=LABEL_SMOOTHING, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6,
        bf16=options.side.endswith("bf16"),
    )  # fmt: skip
    collator = tf.DataCollatorForSeq2Seq(tokenizer, model)
    trainer = tf.Seq2SeqTrainer(
        model, arguments, train_dataset=encoded, data_collator=collator, callbacks=[UntilTimeIsUp()]
    )
    started = time.perf_counter()
    trainer.train()
    return {"steps": trainer.state.global_step, "seconds": time.perf_counter() - started, "model": model}


SIDES = {"fastpt": by_fastpt, "trainer": by_trainer, "trainer-bf16": by_trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=list(SIDES), required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, help="only so many, of both sets")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args()
    import sacrebleu

    from fastpt.fusion.encoder_decoder import answers

    rows, test = (sentences(split)[: options.rows] for split in ("train", "test_2016_flickr"))
    tokenizer = tokenizer_of(rows)
    model = model_of(len(tokenizer), options.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = SIDES[options.side](model, tokenizer, rows, options, folder)
    weights = {name: weight.float() for name, weight in found.pop("model").state_dict().items()}
    model = model_of(len(tokenizer), options.seed).eval()  # accelerate leaves a trainer's own in autocast
    model.load_state_dict(weights)
    sources = [tokenizer(row["source"])["input_ids"] for row in test]
    said = tokenizer.batch_decode(
        answers(model, sources, max_new_tokens=64, num_beams=1, do_sample=False), skip_special_tokens=True
    )
    wanted = [[row["target"] for row in test]]
    found |= {"bleu": sacrebleu.corpus_bleu(said, wanted).score, "chrf": sacrebleu.corpus_chrf(said, wanted).score}
    found |= {"steps_per_s": found["steps"] / found["seconds"], "side": options.side, "seed": options.seed}
    found |= {"threads": torch.get_num_threads(), "minutes": options.minutes, "example": said[0], "machine": machine()}
    print(json.dumps(found))
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
