"""What the CPU backend must reach, and where the committed results say how far it is: python -m benchmarks.plot --markdown.

A target is looked up in the files of benchmarks/results; a ratio is always taken within one file, that is within one run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Record = dict[str, Any]
Run = list[Record]  # the records of one file
Select = dict[str, Any]  # field -> value, of text a pattern

TRL = "TRL 1.16"
PACKED: Select = {"work": "packed", "seq": 512, "batch": 4, "precision": "own"}
LORA, FULL = {**PACKED, "mode": "lora"}, {**PACKED, "mode": "full"}
GSM8K: Select = {"work": "gsm8k", "mode": "lora", "precision": "own"}
CLINC: Select = {"work": "clinc150", "precision": "own"}
HEAD: Select = {"op": "linear_cross_entropy", "dtype": "bfloat16"}
ATTENTION: Select = {"op": "attention", "dtype": "bfloat16", "direction": "forward+backward"}
ADAMW: Select = {"op": "adamw", "dtype": "bfloat16"}
GENERATION: Select = {"prompt_tokens": "*", "dtype": "bfloat16", "lora": False}
DPO, CLASSIFY, SEQ2SEQ, GRPO = (
    {"objective": name, "precision": "own"} for name in ("dpo", "classify", "seq2seq", "grpo")
)


def load_runs(folder: Path = RESULTS) -> list[Run]:
    """The records measured without a GPU, file by file in the order of their names."""
    runs = []
    for path in sorted(folder.glob("*.json*")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if found := [record for record in records if record.get("machine", {}).get("gpu") is None]:
            runs.append(found)
    return runs


def matches(record: Record, wanted: Select) -> bool:
    def fits(found: Any, value: Any) -> bool:
        return fnmatchcase(str(found), value) if isinstance(value, str) else found == value

    return all(name in record and fits(record[name], value) for name, value in wanted.items())


def values(runs: list[Run], wanted: Select, key: str, **one: str) -> tuple[Record, dict[str, float]] | None:
    """Our record and `key` of all who did the same work in the first run that has it; `one` names us: peer="fastpt"."""
    (field, name), *_ = one.items()
    for run in runs:
        same = [record for record in run if matches(record, wanted) and key in record]
        ours = next((record for record in same if record[field] == name), None)
        if ours is not None:
            alike = [r for r in same if all(r.get(f) == ours.get(f) for f in ("shape", "batch", "seq", "direction"))]
            return ours, {record[field]: record[key] for record in alike}
    return None


@dataclass(frozen=True)
class Target:
    """One row of the table: what is measured, by how much it must beat which peer, or stay below what."""

    work: str
    peer: str
    sign: str  # "≥" or "≤"
    limit: float
    measure: Callable[[list[Run]], float | None]
    goal: float | None = None
    unit: str = "×"

    @property
    def asked(self) -> str:
        goal = "" if self.goal is None else f" ({self.goal:g}{self.unit})"
        return f"{self.sign} {self.limit:g}{self.unit}{goal}"

    def reached(self, runs: list[Run]) -> str:
        found = self.measure(runs)
        if found is None:
            return "not measured"
        is_met = found >= self.limit if self.sign == "≥" else found <= self.limit
        digits = 1 if self.unit == " %" or found >= 20 else 2
        told = f"{found:.{digits}f}{self.unit}"
        return f"**{told}**" if is_met else f"{told}, not met"


def faster(wanted: Select, *peers: str, ours: str = "fastpt", key: str = "tokens_per_s") -> Callable:
    """How many times the best peer's rate (or, for median_ms, its speed) is ours; peers are patterns."""
    field = "provider" if key == "median_ms" else "peer"

    def measure(runs: list[Run]) -> float | None:
        found = values(runs, wanted, key, **{field: ours})
        if found is None:
            return None
        mine = found[1][ours]
        theirs = [v for name, v in found[1].items() if name != ours and any(fnmatchcase(name, p) for p in peers)]
        if not theirs:
            return None
        return min(theirs) / mine if key == "median_ms" else mine / max(theirs)

    return measure


def leaner(wanted: Select, peer: str, key: str = "peak_above_weights_bytes") -> Callable:
    """Our memory over a peer's."""

    def measure(runs: list[Run]) -> float | None:
        found = values(runs, wanted, key, peer="fastpt")
        return found[1]["fastpt"] / found[1][peer] if found and peer in found[1] else None

    return measure


def value(wanted: Select, key: str, scale: float = 1.0) -> Callable:
    """A figure of the first record that fits."""

    def measure(runs: list[Run]) -> float | None:
        fitting = (record for run in runs for record in run if matches(record, wanted) and key in record)
        return next((scale * record[key] for record in fitting), None)

    return measure


def _curve_distance(runs: list[Run]) -> float | None:
    record = next((r for run in runs for r in run if "fused_bf16_from_eager_fp32" in r), None)
    return record and record["fused_bf16_from_eager_fp32"] / record["spread"]


TIMED, ROWS = {"key": "median_ms"}, {"key": "rows_per_s"}
TARGETS = [
    Target("LoRA r=16, packed 4 × 512", TRL, "≥", 3.0, faster(LORA, "trl"), 4),
    Target("the same", "plain bf16 loop, `torch.compile`", "≥", 1.6, faster(LORA, "hf-compile")),
    Target("the same, memory above the weights", TRL, "≤", 0.3, leaner(LORA, "trl")),
    Target("the same, memory above the weights", f"{TRL}, checkpointing", "≤", 1.0, leaner(LORA, "trl-ckpt")),
    Target("LoRA, `fastpt.fuse` inside TRL", TRL, "≥", 2.0, faster(LORA, "trl", ours="trl+fuse")),
    Target("LoRA on GSM8K rows, answers trained", TRL, "≥", 5.5, faster(GSM8K, "trl"), 7),
    Target("full fine-tuning, packed 4 × 512", TRL, "≥", 2.8, faster(FULL, "trl"), 3.5),
    Target("the same", f"{TRL}, bf16 weights", "≥", 1.8, faster(FULL, "trl-bf16")),
    Target(
        "MiniLM-L6 on CLINC150 rows, `fastpt.fuse`",
        "transformers' Trainer, its better dtype",
        "≥",
        1.7,
        faster(CLINC, "hf-trainer", "hf-trainer-bf16", ours="hf-trainer+fuse", key="rows_per_s"),
    ),
    Target(
        "attention, bf16, 9 heads × 64, 4 × 512",
        "SDPA",
        "≥",
        4,
        faster({**ATTENTION, "shape": "4x512, 9 heads"}, "sdpa", **TIMED),
        5,
    ),
    Target(
        "attention, 1 × 4096", "SDPA", "≥", 2, faster({**ATTENTION, "shape": "1x4096, 9 heads"}, "sdpa", **TIMED), 2.5
    ),
    Target(
        "head and loss, 2048 × 576 × 49152, frozen",
        "the best of eager, TRL's and torch's",
        "≥",
        1.4,
        faster({**HEAD, "shape": "* frozen"}, "*", **TIMED),
    ),
    Target(
        "head and loss, trained",
        "the best of eager, TRL's and torch's",
        "≥",
        1.25,
        faster({**HEAD, "shape": "* trained"}, "*", **TIMED),
    ),
    Target(
        "head and loss, memory beyond the outputs",
        "",
        "≤",
        64,
        value({**HEAD, "provider": "fastpt", "shape": "* trained"}, "peak_extra_bytes", 2**-20),
        unit=" MiB",
    ),
    Target(
        "AdamW, 135M bf16 parameters, fp32 masters",
        "`torch.optim.AdamW(fused=True)`",
        "≥",
        1.3,
        faster({**ADAMW, "shape": "full*M, masters"}, "torch fused", **TIMED),
    ),
    Target(
        "AdamW, stochastic rounding",
        "`torch.optim.AdamW(fused=True)`",
        "≥",
        1.3,
        faster({**ADAMW, "shape": "full*M, stochastic"}, "torch fused", **TIMED),
    ),
    Target(
        "saved activations per token and layer, LoRA",
        "",
        "≤",
        10.5,
        value({"peer": "fastpt", "mode": "lora, float32 adapters"}, "times_2d"),
        unit=" × 2D",
    ),
    Target(
        "LoRA on a row of 8192: peak of resident memory",
        "",
        "≤",
        4,
        value({"seq": 8192, "peer": "fastpt", "mode": "lora"}, "peak_bytes", 2**-30),
        unit=" GiB",
    ),
    Target(
        "LoRA on a row of 8192: time per token",
        "ours at 512",
        "≤",
        3.3,
        value({"seq": 8192, "peer": "fastpt", "mode": "lora"}, "times_of_first"),
    ),
    Target(
        "LoRA step, model FLOPs",
        "bf16 brgemm ceiling",
        "≥",
        70,
        value({"mode": "lora"}, "share_of_ceiling", 100),
        85,
        " %",
    ),
    Target(
        "greedy generation, batch 1",
        "`model.generate`, bf16",
        "≥",
        2,
        faster({**GENERATION, "batch": 1}, "hf", "hf-static"),
    ),
    Target(
        "greedy generation, batch 8",
        "`model.generate`, bf16",
        "≥",
        2,
        faster({**GENERATION, "batch": 8}, "hf", "hf-static"),
    ),
    Target(
        "200 losses on GSM8K: max \\|fused bf16 − eager fp32\\|",
        "max \\|eager bf16 − eager fp32\\|",
        "≤",
        1,
        _curve_distance,
    ),
    Target("DPO, LLMBar pairs, 4 a step", f"{TRL}, its better dtype", "≥", 3, faster(DPO, "trl*", **ROWS)),
    Target(
        "classification, MiniLM-L6 on CLINC150",
        "Trainer, float32 (its default)",
        "≥",
        2.3,
        faster(CLASSIFY, "hf-trainer", **ROWS),
    ),
    Target("the same", "Trainer, bf16 autocast", "≥", 2.3, faster(CLASSIFY, "hf-trainer-bf16", **ROWS)),
    Target(
        "translation from scratch, Multi30k, 64 pairs a step",
        "Seq2SeqTrainer, its better dtype",
        "≥",
        2,
        faster(SEQ2SEQ, "hf-*", **ROWS),
    ),
    Target("GRPO, 4 prompts, 8 answers of 64 tokens", TRL, "≥", 2.5, faster(GRPO, "trl", **ROWS)),
    Target("the same", f"{TRL}, bf16 weights", "≥", 2.5, faster(GRPO, "trl-bf16", **ROWS)),
    Target("the same, rollouts", TRL, "≥", 2, faster(GRPO, "trl", key="rollout_tokens_per_s")),
    Target("the same, rollouts", f"{TRL}, bf16 weights", "≥", 2, faster(GRPO, "trl-bf16", key="rollout_tokens_per_s")),
]


def markdown(runs: list[Run]) -> str:
    lines = ["| work | peer | target (goal) | measured |", "|---|---|---|---|"]
    lines += [f"| {t.work} | {t.peer} | {t.asked} | {t.reached(runs)} |" for t in TARGETS]
    return "\n".join(lines)
