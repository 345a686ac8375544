"""Does fused training in bf16 learn as PyTorch does? python -m benchmarks.loss_curves --model DIR [--mode qlora] [--json FILE].

One plain loop trains LoRA (float32 adapters) on the same GSM8K rows three times: fused on bf16 weights, eager on float32
weights, eager on bf16 weights. The spread of two precisions is max |eager bf16 - eager fp32| over the steps; fused bf16
must lie within it of eager fp32. With --mode qlora the bases are NF4: fastpt's own under the fused run, bitsandbytes' under
the eager ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpt
from benchmarks import harness, rows, toy
from benchmarks.peers import Job, load_model, save_adapter

RUNS = {"fused bf16": torch.bfloat16, "eager fp32": torch.float32, "eager bf16": torch.bfloat16}


def batch_of(some: list[rows.Row]) -> dict[str, Tensor]:
    """Rows padded to the longest."""
    longest = max(len(row.input_ids) for row in some)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])

    return {
        "input_ids": padded([row.input_ids for row in some], 0),
        "labels": padded([row.labels for row in some], rows.IGNORED),
        "attention_mask": padded([[1] * len(row.input_ids) for row in some], 0),
    }


def curve(name: str, job: Job) -> list[float]:
    """Losses of one run, step by step."""
    model = load_model(job, RUNS[name], torch.float32, is_ours=name.startswith("fused"))
    if name.startswith("fused"):
        fastpt.fuse(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    losses = []
    for step, some in enumerate(job.batches, start=1):
        loss = model(**batch_of(some), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"{name}: step {step}, mean loss of the last 20 {sum(losses[-20:]) / 20:.4f}", flush=True)
    return losses


def verdict(curves: dict[str, list[float]]) -> dict[str, Any]:
    def largest(name: str) -> float:
        return max(abs(a - b) for a, b in zip(curves[name], curves["eager fp32"], strict=True))

    spread, distance = largest("eager bf16"), largest("fused bf16")
    return {"spread": spread, "fused_bf16_from_eager_fp32": distance, "is_within": distance <= spread}


def plot(curves: dict[str, list[float]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 2))
    for name, losses in curves.items():
        above.plot(losses, label=name, linewidth=1)
    for name in ("eager bf16", "fused bf16"):
        below.plot([a - b for a, b in zip(curves[name], curves["eager fp32"], strict=True)], label=name, linewidth=1)
    above.set_ylabel("loss")
    below.set_ylabel("minus eager fp32")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model")
    parser.add_argument(
        "--data", type=Path, default=rows.default_data("gsm8k"), help="jsonl file with questions and answers"
    )
    parser.add_argument("--mode", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="rows a step")
    parser.add_argument("--json", type=Path, help="write the curves and the verdict as one JSON line")
    parser.add_argument("--plot", help="write a picture (png or svg)")
    parser.add_argument("--toy", action="store_true", help="a random model, made-up rows, 5 steps: checks that it runs")
    options = parser.parse_args(argv)
    if not options.model and not options.toy:
        parser.error("--model names the model to train (or --toy for a made-up one)")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            options.model, options.steps = str(toy.write_model(Path(folder) / "model")), 5
            options.data = toy.write_data(Path(folder) / "toy.jsonl")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        chosen = rows.load("gsm8k", tokenizer, options.data, count=options.steps * options.batch, length=512)
        adapter = save_adapter(options.model, f"{folder}/adapter")
        job = Job(options.model, adapter, chosen, options.batch, lr=2e-4, is_quantised=options.mode == "qlora")
        curves = {name: curve(name, job) for name in RUNS}
    found = verdict(curves)
    if options.json:
        about = {
            "mode": options.mode,
            "steps": options.steps,
            "batch": options.batch,
            "model": options.model,
            "machine": harness.machine(),
        }
        harness.write_json_lines(options.json, [{**found, **about, "curves": curves}])
    if options.plot:
        plot(curves, options.plot)
    print(
        f"max |fused bf16 - eager fp32| = {found['fused_bf16_from_eager_fp32']:.4f}, "
        f"max |eager bf16 - eager fp32| = {found['spread']:.4f}: {'within' if found['is_within'] else 'NOT within'}"
    )
    return 0 if found["is_within"] or options.toy else 1


if __name__ == "__main__":
    sys.exit(main())
