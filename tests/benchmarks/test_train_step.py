"""The training benchmark at toy size: all peers in one run, the same rows and losses for all, memory figures that measure."""

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import harness, rows, toy, train_step
from benchmarks.peers import PEERS, HandWritten, Job, Trl, save_adapter
from fastpt.errors import DataError

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl: pip install trl")
KEYS = {
    "peer", "work", "mode", "tokens_per_s", "step_s", "peak_bytes", "weights_bytes", "peak_above_weights_bytes",
    "losses", "versions", "machine", "rounds_rows_per_s", "fastpt_is",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    toy.write_model(path / "model")
    toy.write_data(path / "data.jsonl")
    save_adapter(str(path / "model"), str(path / "adapter"))
    return path


@pytest.fixture
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def losses_of(peer_class, job):
    peer, losses = peer_class(job), []
    peer.build()
    peer.train(lambda loss, tokens: losses.append(loss))
    return losses


@needs_trl
def test_toy_run_writes_one_line_per_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a toy run sets it; here it must not outlive the test
    monkeypatch.setattr(PEERS["trl-ckpt"], "missing", classmethod(lambda cls: "needs trl: pip install trl"))
    names = [name for name in PEERS if name != "hf-compile"]  # half a minute of compiling
    arguments = ["--toy", "--work", "gsm8k", "--peers", ",".join(names), "--json", str(tmp_path / "r.jsonl")]
    assert train_step.main(arguments) == 0
    records = {r["peer"]: r for r in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())}
    assert list(records) == names
    assert records.pop("trl-ckpt")["skipped"] == "needs trl: pip install trl"
    for record in records.values():
        assert set(record) >= KEYS
        assert record["peak_bytes"] - record["peak_above_weights_bytes"] > record["weights_bytes"]
        assert record["tokens"] == records["hf"]["tokens"]
        assert record["losses"] == pytest.approx(records["hf"]["losses"], rel=1e-2)


def test_a_peer_that_fails_is_reported_with_its_reason():
    job = Job("/nowhere/model", None, [rows.Row([1, 2], [1, 1])], batch_rows=1, lr=1e-3)
    (record,) = train_step.compare({"hf": HandWritten}, job, 2, 1, Console(quiet=True))
    assert record["peer"] == "hf"
    assert "/nowhere/model" in record["failed"]


@needs_trl
@pytest.mark.parametrize("work", ["packed", "gsm8k"])
def test_hand_written_loop_and_trl_have_equal_losses_in_fp32(folder, tokenizer, work):
    examples = rows.load(work, tokenizer, folder / "data.jsonl", count=12, length=48)
    job = Job(str(folder / "model"), str(folder / "adapter"), examples, batch_rows=3, lr=1e-2, is_fp32=True)
    plain, trl = losses_of(HandWritten, job), losses_of(Trl, job)
    assert len(plain) == 4
    assert plain == pytest.approx(trl, abs=1e-5)
    assert plain[-1] < plain[0] - 0.1  # the steps do train


def test_packed_rows_are_full_and_in_order(folder, tokenizer):
    found = rows.load("packed", tokenizer, folder / "data.jsonl", count=5, length=40)
    assert all(len(row.input_ids) == len(row.completion_mask) == sum(row.completion_mask) == 40 for row in found)
    first = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    text = tokenizer.decode([token for row in found for token in row.input_ids])
    assert text.startswith(f"{first['question']}\n{first['answer']}<|end|>What")


def test_only_answers_are_targets(folder, tokenizer):
    first = json.loads((folder / "data.jsonl").read_text().splitlines()[0])
    (row,) = rows.load("gsm8k", tokenizer, folder / "data.jsonl", count=1, length=512)
    assert tokenizer.decode([label for label in row.labels if label != rows.IGNORED]) == first["answer"] + "<|end|>"
    assert tokenizer.decode(row.input_ids).startswith("<|user|>" + first["question"])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "--data"), ('{"question": "a", "answer": "b"}\n', "1 rows of gsm8k, 2 are needed"), ("{\n", r":1 is not")],
)
def test_unusable_data_says_what_to_do(tmp_path, tokenizer, text, message):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        rows.load("gsm8k", tokenizer, path, count=2, length=64)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts resident memory only without a GPU")
def test_peak_memory_sees_what_was_freed_again(monkeypatch, is_exact):
    if not is_exact:
        monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError))
    memory = harness.PeakMemory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    time.sleep(0.1)  # for the sampling thread
    del block
    assert (60 << 20) < memory.peak_bytes - memory.start_bytes < (100 << 20)
