"""The tools behind docs/cpu.md at toy size: what they count is right, and what they print comes from their records."""

import json
import os
import signal

import pytest
import torch
from torch import nn

from benchmarks import long_context, loss_curves, plot, profile_step, saved_activations, targets
from benchmarks.model_flops import training_flops
from tests.helpers import needs_native
from tests.tiny import tiny_model


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_bytes_counts_storages_once_and_what_functions_hide():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = {"copy": [x.clone()]}  # 40 bytes that no hook sees
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.randn(10, requires_grad=True)
    assert saved_activations.held_bytes(lambda: (x * x).sum()) == 40  # x, saved twice
    assert saved_activations.held_bytes(lambda: x[:3].exp().sum()) == 12  # only the result
    assert saved_activations.held_bytes(lambda: Hidden.apply(x).sum()) == 40


def test_a_fused_model_keeps_less(tmp_path):
    saved_activations.main(["--toy", "--json", str(tmp_path / "r.jsonl")])
    records = {(r["peer"], r["mode"]): r for r in read(tmp_path / "r.jsonl")}
    assert len(records) == 6
    for mode in saved_activations.MODES:
        assert records["fastpt", mode]["times_2d"] < 0.6 * records["hf", mode]["times_2d"]
        assert records["fastpt", mode]["rest_bytes_per_token"] < records["hf", mode]["rest_bytes_per_token"]


def test_training_flops_of_a_frozen_and_of_a_trained_model():
    model = tiny_model("llama")  # 2 layers of 64 wide, 4 heads of 16, inner 96, 2 key heads, tied head of 272
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    attention = 3 * 4 * 16 * 4 * (3 + 10) * 2  # pairs of documents of 2 and 4 tokens, 2 layers
    trained = 3 * 2 * (6 * 2 * layer + 4 * 272 * 64)
    assert training_flops(model, [2, 4], kept=4) == trained + attention
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(False)
    assert training_flops(model, [2, 4], kept=4) == trained * 2 // 3 + attention


@needs_native
def test_profile_counts_every_op_of_a_step(tmp_path, capsys):
    profile_step.main(["--toy", "--json", str(tmp_path / "r.jsonl")])
    told = capsys.readouterr().out
    for record in read(tmp_path / "r.jsonl"):
        ops = {op["op"]: op for op in record["ops"]}
        assert ops["fastpt::attention"]["calls"] == ops["fastpt::attention_backward"]["calls"] == 2
        assert all(ops[name]["seconds"] > 0 for name in ("fastpt::attention", "fastpt::linear_cross_entropy"))
        assert sum(op["seconds"] for op in record["ops"]) == pytest.approx(record["step_s"], rel=0.02)
        assert sum(op["flops"] for op in record["ops"]) >= 0.9 * record["model_flops"] > 0
        assert f"{record['tokens'] / record['step_s']:.0f} tokens/s" in told


@needs_native
def test_a_profile_that_is_stopped_says_so(monkeypatch):
    after_step = profile_step.Phases.after_step

    def stopped(phases, loss, tokens):
        after_step(phases, loss, tokens)
        if phases.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(profile_step.Phases, "after_step", stopped)
    with pytest.raises(SystemExit, match="stopped by a signal"):
        profile_step.main(["--toy", "--mode", "full"])


def test_long_rows_are_compared_with_the_first_length(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert long_context.main(["--toy", "--json", str(tmp_path / "r.jsonl")]) == 0
    short, long = read(tmp_path / "r.jsonl")
    assert (short["seq"], short["times_of_first"], long["batch"] * long["seq"]) == (16, 1.0, 2048)
    assert long["times_of_first"] == pytest.approx(long["ms_per_token"] / short["ms_per_token"])
    assert min(short["peak_bytes"], long["peak_bytes"]) > 100 << 20


def test_loss_curves_of_three_runs_and_their_verdict(tmp_path):
    assert loss_curves.main(["--toy", "--json", str(tmp_path / "r.jsonl")]) == 0
    (record,) = read(tmp_path / "r.jsonl")
    exact, rounded = (record["curves"][name] for name in ("eager fp32", "eager bf16"))
    assert record["spread"] == max(abs(a - b) for a, b in zip(exact, rounded, strict=True)) > 0
    assert record["fused_bf16_from_eager_fp32"] > 0
    assert record["is_within"] == (record["fused_bf16_from_eager_fp32"] <= record["spread"])


@pytest.fixture
def results(tmp_path):
    about = {"work": "packed", "mode": "lora", "precision": "own", "seq": 512, "batch": 4, "machine": {"gpu": None}}
    rates = {"fastpt": (600, 1.0), "trl": (150, 4.0), "hf-compile": (400, 1.5), "trl+fuse": (290, 1.5)}
    lines = [
        {**about, "peer": peer, "tokens_per_s": rate, "peak_above_weights_bytes": gib * 2**30}
        for peer, (rate, gib) in rates.items()
    ]
    times = {"fastpt": 10.0, "eager": 15.0, "TRL fused head": 13.0}
    head = {"op": "linear_cross_entropy", "shape": "2048x576x49152 frozen", "dtype": "bfloat16"}
    head |= {"direction": "forward+backward", "machine": {"gpu": None}}
    kernels = [{**head, "provider": name, "median_ms": ms} for name, ms in times.items()]
    elsewhere = [{**lines[0], "tokens_per_s": 9e9, "machine": {"gpu": "H100"}}]
    for name, some in (("cpu_a.jsonl", lines), ("cpu_b.jsonl", kernels), ("a_gpu.jsonl", elsewhere)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    return tmp_path


def test_targets_are_held_against_the_best_peer_of_one_run(results):
    found = {(t.work, t.peer): t.reached(targets.load_runs(results)) for t in targets.TARGETS}
    assert found["LoRA r=16, packed 4 × 512", "TRL 1.16"] == "**4.00×**"
    assert found["the same", "plain bf16 loop, `torch.compile`"] == "1.50×, not met"
    assert found["the same, memory above the weights", "TRL 1.16"] == "**0.25×**"
    assert found["LoRA, `fastpt.fuse` inside TRL", "TRL 1.16"] == "1.93×, not met"
    assert next(told for (work, _), told in found.items() if work.endswith("frozen")) == "1.30×, not met"
    assert found["LoRA on GSM8K rows, answers trained", "TRL 1.16"] == "not measured"


def test_the_picture_shows_what_was_measured(results, tmp_path):
    pytest.importorskip("matplotlib")
    runs = targets.load_runs(results)
    assert plot.TRAINING[0].ratios(runs) == {"TRL": 4.0, "plain loop, torch.compile": 1.5}
    assert next(iter(plot.TRAINING[0].memory(runs).items())) == ("fastpt", 1.0)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- targets -->\nold\n<!-- end -->\n<!-- profile -->\n<!-- end -->\nafter\n")
    assert plot.main(["--results", str(results), "--picture", str(tmp_path / "cpu.svg"), "--page", str(page)]) == 0
    assert (tmp_path / "cpu.svg").stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("before\n<!-- targets -->\n| work |")
    assert "old" not in text
    assert text.endswith("<!-- profile -->\nNot measured.\n<!-- end -->\nafter\n")


def test_the_page_says_what_the_results_say():
    page = plot.PAGE.read_text()
    assert page == plot.filled(page, plot.tables(targets.load_runs())), "run python -m benchmarks.plot"
