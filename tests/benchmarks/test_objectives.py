"""The training benchmark beyond fine-tuning, on tiny models: equal losses in float32 where both sides compute the same."""

import dataclasses
import gzip
import json
from importlib.util import find_spec

import pytest
from rich.console import Console

from benchmarks import rows, toy, train_step
from benchmarks.online_peers import GROUP, ONLINE_PEERS, TrlGrpo, TrlGrpoBf16
from benchmarks.peers import Job, save_adapter
from benchmarks.preference_peers import FastptDpo, TrlDpo
from benchmarks.tasks import TASKS, WORKS
from benchmarks.translators import FastptTranslator, HfTranslator
from fastpt.objectives import _online
from tests.tiny import tiny_model, tiny_tokenizer

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs trl: pip install trl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("objectives")
    toy.write_model(path / "model")
    save_adapter(str(path / "model"), str(path / "adapter"))
    return path


def steps_of(entry, job):
    peer, found = entry(job), []
    peer.build()
    peer.train(lambda *step: found.append(step))
    return found


@needs_trl
def test_dpo_has_trls_losses_in_fp32(folder):
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n}!" * (n % 3 + 1), "rejected": f"no {n}"} for n in range(12)]
    job = Job(str(folder / "model"), str(folder / "adapter"), pairs, batch_rows=3, lr=1e-2, length=64, is_fp32=True)
    ours, theirs = ([loss for loss, _ in steps_of(entry, job)] for entry in (FastptDpo, TrlDpo))
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(ours) - min(ours) > 1e-2  # the steps do train


def test_seq2seq_has_the_losses_of_seq2seq_trainer_in_fp32(tmp_path):
    tiny_model("bart").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = [{"source": "cat " * (n % 4 + 1), "target": "Katze " * (n % 3 + 1)} for n in range(12)]
    job = Job(str(tmp_path), None, texts, batch_rows=4, lr=1e-3, length=64, is_fp32=True)
    ours, theirs = (steps_of(entry, job) for entry in (FastptTranslator, HfTranslator))
    assert len(ours) == 3
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in theirs], abs=1e-3)
    assert [tokens for _, tokens in ours] == [tokens for _, tokens in theirs]
    assert ours[-1][0] < ours[0][0]


@needs_trl
def test_grpo_steps_tell_their_rollouts(folder, monkeypatch):
    monkeypatch.setattr(_online, "stop_tokens", _online.stop_tokens)  # a peer replaces it, in a process of its own
    prompts = rows.load("sums", None, count=4, length=6)
    job = Job(str(folder / "model"), str(folder / "adapter"), prompts, batch_rows=2, lr=1e-3, length=6)
    for entry in ONLINE_PEERS.values():
        found = steps_of(entry, job)
        assert [tokens for _, tokens, _ in found] == [2 * GROUP * 6] * 2
        assert all(seconds > 0 for *_, seconds in found)


def test_rollouts_become_a_rate():
    one = train_step.Contestant.__new__(train_step.Contestant)
    one.name, one.absence, one.failure, one.batch_rows, one.peak_bytes = "fastpt", None, None, 2, 3
    one.built = {"resident_bytes": 1}
    step = train_step.worker.Step
    one.rounds = [
        [step(1.0, 10, 9.0, 9.0), step(1.0, 10, 4.0, 2.0)],
        [step(1.0, 10, 9.0, 9.0), step(1.0, 30, 5.0, 3.0)],
    ]
    assert one.record()["rollout_tokens_per_s"] == 40 / 5


def test_trls_weights_for_grpo_are_of_the_peers_dtype(folder):
    job = Job(str(folder / "model"), str(folder / "adapter"), [], batch_rows=2, lr=1e-3)
    for entry, is_fp32, dtype in ((TrlGrpo, False, "32"), (TrlGrpoBf16, False, "bfloat16"), (TrlGrpoBf16, True, "32")):
        peer = entry(dataclasses.replace(job, is_fp32=is_fp32))
        peer.build()
        trained, frozen = (
            {str(p.dtype) for p in peer.model.parameters() if p.requires_grad is is_t} for is_t in (True, False)
        )
        assert trained == {"torch.float32"}
        assert all(name.endswith(dtype) for name in frozen)


def test_ratios_are_taken_round_by_round():
    records = [
        {"peer": "fastpt", "rounds_rows_per_s": [8.0, 2.0, 9.0]},
        {"peer": "trl", "rounds_rows_per_s": [2.0, 1.0, 3.0]},
        {"peer": "trl-bf16", "failed": "in round 3", "rounds_rows_per_s": [4.0, 2.0]},
        {"peer": "hf", "skipped": "not here"},
    ]
    train_step.add_ratios(records)
    assert records[0]["fastpt_is"] == {"median": 1, "lowest": 1, "highest": 1}
    assert records[1]["fastpt_is"] == {"median": 3, "lowest": 2, "highest": 4}
    assert records[2]["fastpt_is"] == {"median": 1.5, "lowest": 1, "highest": 2}
    assert "fastpt_is" not in records[3]
    alone = [{"peer": "trl", "rounds_rows_per_s": [2.0]}]
    train_step.add_ratios(alone)
    assert "fastpt_is" not in alone[0]


def test_every_objective_has_rows_and_peers(capsys):
    for objective, task in TASKS.items():
        options = train_step.parse(["--model", "m", "--objective", objective])
        assert options.work in task.works
        assert options.seq == task.length
        assert set(options.names) <= set(task.entries)
        assert set(task.modes) <= set(task.lr)
    assert WORKS["clinc150"] == "classify"
    for wrong, said in (
        (["--objective", "dpo", "--work", "packed"], "dpo has no --work packed"),
        (["--objective", "seq2seq", "--mode", "lora"], "in --mode lora"),
        (["--objective", "grpo", "--toy"], "--toy makes up rows of sft"),
        (["--objective", "dpo"], "--model names the model"),
    ):
        with pytest.raises(SystemExit):
            train_step.parse(wrong)
        assert said in capsys.readouterr().err


def test_pairs_are_whole_and_translations_side_by_side(tmp_path):
    lines = [{"prompt": "p", "chosen": "a" * n, "rejected": "b"} for n in (1, 2, 300)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows.load("llmbar", tiny_tokenizer(), tmp_path / "pairs.jsonl", count=2, length=64)
    assert sorted(len(row["chosen"]) for row in found) == [1, 2]
    for language, text in (("en", "a cat\n dog\n"), ("de", "eine Katze\n Hund\n")):
        with gzip.open(tmp_path / f"x.{language}.gz", "wt") as file:
            file.write(text)
    found = rows.load("multi30k", None, tmp_path / "x.en.gz", count=2, length=64)
    assert found == [{"source": "a cat", "target": "eine Katze"}, {"source": " dog", "target": " Hund"}]


def test_a_random_translator_needs_no_model(tmp_path):
    for language, text in (("en", "a cat and a dog\n"), ("de", "eine Katze und ein Hund\n")):
        with gzip.open(tmp_path / f"x.{language}.gz", "wt") as file:
            file.write(text * 8)
    options = train_step.parse(
        ["--objective", "seq2seq", "--steps", "1", "--batch", "2", "--data", str(tmp_path / "x.en.gz")]
    )
    job, rounds, steps_per_round = train_step.prepare(options, tmp_path)
    records = train_step.compare({"fastpt": FastptTranslator}, job, steps_per_round, rounds, Console(quiet=True))
    assert records[0]["tokens_per_s"] > 0
