"""What GSM8K teaches each side, at toy size: the same rows, one judge in float32 whatever a trainer left behind."""

import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks import rows, sft, toy
from benchmarks.peers import Job, save_adapter

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl: pip install trl")
SIDES = ["fastpt", "trl", "trl-bf16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    toy.write_model(path / "model")
    save_adapter(str(path / "model"), str(path / "adapter"))
    lines = toy.write_data(path / "gsm8k_train.jsonl").read_text().splitlines(keepends=True)
    (path / "gsm8k_test.jsonl").write_text("".join(lines[-3:]))
    return path


@pytest.fixture
def job(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = rows.load("gsm8k", tokenizer, folder / "gsm8k_train.jsonl", count=24, length=64)
    return Job(str(folder / "model"), str(folder / "adapter"), examples, batch_rows=8, lr=1e-2)


@pytest.mark.parametrize("side", SIDES)
def test_what_was_trained_is_judged_in_float32(job, side):
    weights = sft.trained(side, job, None)["weights"]
    model, seen = sft.plain_model(job, weights), set()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters() if name in weights)
    assert any(weight.abs().max() > 1e-2 for name, weight in weights.items() if "lora_B" in name)  # began at 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    sft.held_out_loss(model, job.rows[:1])
    assert seen == {torch.float32}


def test_a_weight_that_one_side_lacks_is_an_error(job):
    with pytest.raises(KeyError):
        sft.plain_model(job, {})


def test_held_out_loss_is_the_mean_over_all_answers_tokens(job):
    model = sft.plain_model(job, sft.trained("fastpt", job, None)["weights"])
    total = count = 0.0
    for row in job.rows[:2]:
        labels = torch.tensor([row.labels])
        kept = int((labels != rows.IGNORED).sum())
        with torch.no_grad():
            total += model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss.item() * kept
        count += kept
    assert sft.held_out_loss(model, job.rows[:2]) == pytest.approx(total / count, rel=1e-5)


def test_a_line_per_side_after_rows_and_after_minutes(folder, monkeypatch):
    monkeypatch.setenv("FASTPT_DATA", str(folder))
    monkeypatch.setattr(sft, "ALL_ROWS", 24)
    line = folder / "found.jsonl"
    for side, *budget in (["fastpt", "--rows", "16"], ["trl", "--rows", "16"], ["trl", "--minutes", "1e-6"]):
        sft.main(["--model", str(folder / "model"), "--side", side, *budget, "--held-out", "3", "--json", str(line)])
    ours, theirs, stopped = map(json.loads, line.read_text().splitlines())
    assert (ours["rows"], theirs["rows"], stopped["rows"]) == (16, 16, 8)
    assert (ours["steps"], theirs["steps"], stopped["steps"]) == (2, 2, 1)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
    assert {"command", "versions", "machine", "threads", "held_out", "lr"} <= ours.keys()
