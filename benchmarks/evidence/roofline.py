"""Part 4: what the counted bytes and FLOPs need at least on a device, and the memory of a step. Computed, not measured."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.evidence.devices import DEVICES, MEMORIES_GB
from benchmarks.evidence.step import MODELS, Step, step

Record = dict[str, Any]
TOKENS = 4096
GB = 1e9
RESERVE = 2 * GB  # the CUDA context and libraries, and what a kernel needs for a moment, such as a chunk of logits
PEERS = {True: "fastpt", False: "transformers + PEFT"}


def tasks(quick: bool) -> list[Record]:
    """One per model, way of training and peer."""
    models = ["SmolLM2-135M"] if quick else list(MODELS)
    return [
        {"part": "roofline", "case": model, "is_lora": is_lora, "is_fused": is_fused}
        for model in models
        for is_lora in (True, False)
        for is_fused in (True, False)
    ]


def records(task: Record) -> list[Record]:
    counted = step(task["case"], TOKENS, is_lora=task["is_lora"], is_fused=task["is_fused"])
    modes = {"LoRA r=16": False, "QLoRA r=16": True} if task["is_lora"] else {"full": False}
    about = {"case": task["case"], "provider": PEERS[task["is_fused"]], "tokens": TOKENS}
    found = [{**about, "mode": mode, **_of_step(counted, is_quantised)} for mode, is_quantised in modes.items()]
    if task["is_fused"]:
        found[0]["ops"] = _by_op(counted)
    return found


def _of_step(counted: Step, is_quantised: bool) -> Record:
    return {
        "floor_s": {device.name: counted.floor_s(device, is_quantised=is_quantised) for device in DEVICES},
        "peak_bytes": counted.peak_bytes(TOKENS, is_quantised=is_quantised) + RESERVE,
        "longest": {gb: counted.longest(gb * GB - RESERVE, is_quantised=is_quantised) for gb in MEMORIES_GB},
    }


def _by_op(counted: Step) -> list[Record]:
    """fastpt's ops of a whole step: calls, bytes, FLOPs, and the floor of all calls together."""
    found: dict[str, Record] = {}
    for times, ops in ((counted.layers, counted.layer), (1, counted.rest)):
        for name, moved, flops in ops:
            row = found.setdefault(name, {"op": name, "calls": 0, "bytes": 0, "flops": 0, "floor_s": {}})
            row["calls"], row["bytes"] = row["calls"] + times, row["bytes"] + times * moved
            row["flops"] += times * flops
            for device in DEVICES:
                seconds = row["floor_s"].get(device.name, 0.0) + times * device.floor_s(flops, moved)
                row["floor_s"][device.name] = seconds
    return sorted(found.values(), key=lambda row: -row["bytes"])


def show(found: list[Record], console: Console) -> None:
    if found:
        console.print(_steps(found))
        console.print(_memory(found))
    for record in found:
        if "ops" in record and record["mode"] != "full":
            console.print(_ops(record))


def _table(title: str, *columns: str, left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _steps(found: list[Record]) -> Table:
    table = _table(
        f"COMPUTED, NOT MEASURED: least milliseconds of a step on one row of {TOKENS} tokens (bf16, no checkpointing): every "
        "op at the larger of its bytes over the bandwidth and its FLOPs over the peak",
        "model", "training", "of", *(device.name for device in DEVICES),
        left=3,
    )  # fmt: skip
    for r in _ordered(found):
        table.add_row(r["case"], r["mode"], r["provider"], *(f"{1e3 * s:.1f}" for s in r["floor_s"].values()))
    return table


def _memory(found: list[Record]) -> Table:
    table = _table(
        f"COMPUTED, NOT MEASURED: memory at {TOKENS} tokens and the longest row that fits (AdamW with float32 moments and "
        f"master weights; {RESERVE / GB:.0f} GB kept free)",
        "model", "training", "of", "peak GB", *(f"tokens on {gb} GB" for gb in MEMORIES_GB),
        left=3,
    )  # fmt: skip
    for r in _ordered(found):
        longest = [str(tokens // 100 * 100) if tokens >= 100 else "none" for tokens in r["longest"].values()]
        table.add_row(r["case"], r["mode"], r["provider"], f"{r['peak_bytes'] / GB:.1f}", *longest)
    return table


def _ops(record: Record) -> Table:
    table = _table(
        f"COMPUTED, NOT MEASURED: {record['case']}, {record['mode']}: least milliseconds of all calls of an op in that step",
        "op", "calls", "GB", "TFLOP", *(device.name for device in DEVICES),
        left=1,
    )  # fmt: skip
    for row in record["ops"]:
        if row["bytes"] > 0.001 * record["ops"][0]["bytes"]:
            table.add_row(
                row["op"], str(row["calls"]), f"{row['bytes'] / GB:.2f}", f"{row['flops'] / 1e12:.2f}",
                *(f"{1e3 * seconds:.2f}" for seconds in row["floor_s"].values()),
            )  # fmt: skip
    return table


def _ordered(found: list[Record]) -> list[Record]:
    models, modes = list(MODELS), ["LoRA r=16", "QLoRA r=16", "full"]
    return sorted(found, key=lambda r: (models.index(r["case"]), modes.index(r["mode"]), r["provider"]))
