"""Every kernel benchmark runs at toy size and gives one row per provider."""

import json

import pytest
import torch

from benchmarks import gpu_cases, kernels


@pytest.mark.parametrize("op", kernels.available())
def test_runs_at_toy_size(op, tmp_path):
    kernels.main(["--op", op, "--toy", "--json", str(tmp_path / "r.jsonl")])
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {r["dtype"] for r in records} == {"float32", "bfloat16"}
    assert "fastpt" in {r["provider"] for r in records}
    assert all(r["op"] and r["median_ms"] > 0 and r["machine"]["torch"] for r in records)


def test_only_the_peers_asked_for_take_part(tmp_path):
    kernels.main(["--op", "swiglu", "--toy", "--peers", "eager,nobody", "--json", str(tmp_path / "r.jsonl")])
    assert {json.loads(line)["provider"] for line in (tmp_path / "r.jsonl").read_text().splitlines()} == {
        "fastpt",
        "eager",
    }


@pytest.mark.parametrize("op", gpu_cases.stems())
def test_the_cases_of_a_gpu_can_be_timed(op):
    for case in gpu_cases.cases(op, "cpu", torch.bfloat16, "eager", toy=True):
        assert list(case.providers) == ["fastpt", "eager"]
        assert len(case.providers["fastpt"]()) == len(case.providers["eager"]())
        assert case.cost.bytes > 0
