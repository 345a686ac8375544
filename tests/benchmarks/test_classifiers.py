"""The classifier benchmark on a tiny encoder: equal losses in float32 with and without fuse, rows as the file has them."""

import json

import pytest

from benchmarks import rows, train_step
from benchmarks.classifiers import CLASSIFIERS, FastptClassifier, HfTrainer, HfTrainerFused
from benchmarks.peers import Job
from fastpt.errors import DataError
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    tiny_model("bert").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    pairs = [["pay my bill " + "now " * (i % 5), "pay"] for i in range(9)]
    pairs += [["will it rain" + "?" * i, "weather"] for i in range(9)] + [["hello", "greet"]] * 6
    (path / "rows.json").write_text(json.dumps({"train": pairs, "test": []}))
    return path


def load(folder, count, length=64):
    return rows.load("clinc150", tiny_tokenizer(), folder / "rows.json", count=count, length=length)


def test_rows_are_shuffled_once_and_cut(folder):
    found = load(folder, 24, length=10)
    assert found == load(folder, 24, length=10)
    assert [sum(row.label == label for row in found) for label in range(3)] == [6, 9, 9]
    assert [row.label for row in found] != sorted(row.label for row in found)
    assert max(len(row.input_ids) for row in found) == 10
    with pytest.raises(DataError, match="24 rows of clinc150, 25 are needed"):
        load(folder, 25)


def test_other_files_are_named(tmp_path):
    (tmp_path / "rows.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match=r'no list of .* under "train"'):
        rows.load("clinc150", tiny_tokenizer(), tmp_path / "rows.json", count=1, length=8)


def test_losses_of_all_are_equal_in_fp32(folder):
    job = Job(str(folder / "model"), None, load(folder, 24), batch_rows=6, lr=1e-3, length=64, is_fp32=True)

    def losses(peer_class):
        peer, found = peer_class(job), []
        peer.build()
        peer.train(lambda loss, tokens: found.append((loss, tokens)))
        return [loss for loss, _ in found], [tokens for _, tokens in found]

    plain, fused, ours = losses(HfTrainer), losses(HfTrainerFused), losses(FastptClassifier)
    assert plain[0] == pytest.approx(fused[0], abs=1e-4)
    assert plain[0] == pytest.approx(ours[0], abs=1e-4)
    assert len(plain[0]) == 4
    assert plain[1] == fused[1] == ours[1] == [sum(len(row.input_ids) for row in batch) for batch in job.batches]


def test_peers_belong_to_their_work(capsys):
    assert train_step.parse(["--model", "m", "--work", "clinc150"]).names == list(CLASSIFIERS)
    assert train_step.parse(["--model", "m", "--work", "clinc150"]).mode == "full"
    assert train_step.parse(["--model", "m"]).mode == "lora"
    for wrong in (["--work", "clinc150", "--peers", "trl"], ["--work", "packed", "--peers", "hf-trainer"]):
        with pytest.raises(SystemExit):
            train_step.parse(["--model", "m", *wrong])
        assert "unknown peer" in capsys.readouterr().err
