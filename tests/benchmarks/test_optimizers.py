"""The optimizers' benchmark runs, and its table of bytes is what the layouts add up to."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import optimizers


def test_bytes_per_parameter_and_step():
    moved = {name: bytes_moved for name, bytes_moved, _, _ in optimizers.bytes_table()}
    kept = {name: bytes_kept for name, _, bytes_kept, _ in optimizers.bytes_table()}
    assert moved["fastpt adamw_8bit, stochastic"] == pytest.approx(10 + 4 * 4 / 256)
    assert moved["fastpt adamw, masters"] == moved["llm.c, masters"] == 28
    assert moved["fastpt adamw, stochastic"] == moved["bitsandbytes AdamW32bit"] == 22
    assert kept["fastpt adamw_8bit, stochastic"] == kept["bitsandbytes AdamW8bit"] <= 2.1


def test_losses_of_all_runs_and_their_verdict(tmp_path):
    assert optimizers.main(["--toy", "--json", str(tmp_path / "r.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [one["run"] for one in found] == list(optimizers.RUNS)
    exact = found[0]["held_out"]
    for one in found:
        assert one["off_percent"] == pytest.approx(100 * (one["held_out"] / exact - 1))
    assert len({tuple(one["losses"]) for one in found}) == len(found)


def test_the_documented_bytes_are_those_of_the_table():
    text = (Path(__file__).parents[2] / "docs/optimizers.md").read_text()
    figures = [(f"{moved:.2f}", f"{kept:.2f}") for _, moved, kept, _ in optimizers.bytes_table()]
    section = text.split("## Bytes per parameter")[1].split("Sources:")[0]
    assert re.findall(r"\| (\d+\.\d\d) \| (\d+\.\d\d) \|", section) == figures
