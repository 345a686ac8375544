"""Every kernel benchmark runs at toy size and gives one row per provider."""

import json

import pytest

from benchmarks import kernels


@pytest.mark.parametrize("op", kernels.available())
def test_runs_at_toy_size(op, tmp_path):
    kernels.main(["--op", op, "--toy", "--json", str(tmp_path / "r.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {r["dtype"] for r in records} == {"float32", "bfloat16"}
    assert "fastpt" in {r["provider"] for r in records}
    assert all(r["op"] and r["median_ms"] > 0 and r["machine"]["torch"] for r in records)
