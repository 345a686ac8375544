"""The search for launch parameters: what it tries, where it stops, what it writes; with a timer that we know the answer to."""

import importlib.util

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks import tune_kernels  # noqa: E402
from benchmarks.tune_kernels import TABLE, agree, climb, neighbours, trying, with_entry, write_table  # noqa: E402
from fastpt.kernels.launch import Launch, choose_for, is_valid  # noqa: E402

START = Launch(columns=256, warps=4)


def cost(launch: Launch) -> float:
    """Fastest at 2048 columns, 8 warps and 3 stages."""
    return abs(launch.columns - 2048) / 2048 + abs(launch.warps - 8) / 8 + abs(launch.stages - 3) / 3 + 1.0


def test_climbs_to_the_fastest_and_reports_where_it_began():
    best, ms, before = climb(START, 90, cost)
    assert best == Launch(columns=2048, warps=8, stages=3)
    assert (ms, before) == (cost(best), cost(START))


def test_passes_over_launches_that_fail_and_stays_where_gains_are_noise():
    best, _, _ = climb(START, 90, lambda launch: None if launch.columns > 512 else cost(launch))
    assert best.columns == 512
    assert climb(START, 90, lambda launch: 1.0 - 1e-3 * (launch.warps == 8))[0] == START
    with pytest.raises(RuntimeError, match="own launch fails"):
        climb(START, 90, lambda launch: None)


def test_tries_one_field_at_a_time_and_nothing_invalid():
    for candidate in neighbours(Launch(rows=64, columns=32, warps=32), 90):
        assert is_valid(candidate, 90)
        changed = [
            f for f in tune_kernels.FIELDS if getattr(candidate, f) != getattr(Launch(rows=64, columns=32, warps=32), f)
        ]
        assert len(changed) == 1
        assert changed[0] != "depth"  # the kernel has none


def test_tries_a_launch_at_every_size_and_takes_it_back():
    before = choose_for("swiglu_forward", 100, 90)
    with trying("swiglu_forward", Launch(columns=64, warps=1)):
        assert choose_for("swiglu_forward", 1 << 40, 120) == Launch(columns=64, warps=1)
    assert choose_for("swiglu_forward", 100, 90) == before


def test_writes_a_table_that_reads_back(tmp_path):
    file = tmp_path / "launch_table.py"
    file.write_text(tune_kernels.FILE.read_text())
    entries = with_entry(TABLE["swiglu_forward"][80], 4096, Launch(columns=512, warps=2))
    table = TABLE | {"swiglu_forward": TABLE["swiglu_forward"] | {90: entries}}
    write_table(table, file)
    spec = importlib.util.spec_from_file_location("launch_table_written", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert table == module.TABLE
    assert module.__doc__ == importlib.import_module("fastpt.kernels.launch_table").__doc__
    assert [limit for limit, _ in module.TABLE["swiglu_forward"][90]] == sorted(limit for limit, _ in entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_launch_that_changes_results_does_not_agree(dtype):
    x = torch.randn(64).to(dtype)
    assert agree([x], [x * (1 + torch.finfo(dtype).eps)])
    assert not agree([x * 1.1], [x])
    assert not agree([x.clone().fill_(float("nan"))], [x])
