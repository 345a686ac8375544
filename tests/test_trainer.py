"""The loop: it learns, it does not depend on how a step is cut up, it survives NaNs, signals and full disks."""

import os
import signal

import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.errors import ConfigError, ModelError, TrainingError
from fastpt.objectives.sft import SFT
from fastpt.trainer import Trainer
from tests.runs import chat_rows, run_settings
from tests.tiny import tiny_model, tiny_tokenizer


def _losses(run):
    return [record["loss"] for record in run.history if "loss" in record]


def _trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "dora", "full", {"name": "freeze", "train": [r"layers\.1\.mlp"]}])
def test_every_method_learns(tmp_path, method):
    run = fastpt.train(**run_settings(tmp_path, method=method, max_steps=12))
    assert _losses(run)[-1] < 0.8 * _losses(run)[0]
    assert run.status == "finished"
    assert run.metrics["steps"] == 12


def _sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)  # linear in the gradient, so that weights are compared as gradients would be


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_accumulation_changes_nothing(tmp_path, method):
    """k micro-batches of b rows are one batch of k * b rows, although the rows train different numbers of tokens."""
    whole, cut = (
        fastpt.train(
            **run_settings(tmp_path / str(micro), method=method, batch_rows=6, micro_batch_tokens=micro, optim=_sgd)
        )
        for micro in (4096, 1)
    )
    assert _losses(whole) == pytest.approx(_losses(cut), rel=1e-6)
    for a, b in zip(_trained(whole.model).values(), _trained(cut.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_packed_equals_unpacked_in_float64(tmp_path, family):
    settings = run_settings(tmp_path, model=tiny_model(family).double())
    trainer = Trainer(**settings)
    trainer.prepare()
    trainer.model.double()
    for parameter in trainer.parameters:
        parameter.grad_dtype = torch.float64
    examples = [trainer.feed.data.example(i) for i in range(8)]
    assert len({len(e.input_ids) for e in examples}) > 2

    def loss_and_grads(groups):
        trainer.model.zero_grad()
        total = sum(trainer.objective.loss(trainer.scorer, collate(group))[0] for group in groups)
        total.backward()
        return total.item(), [p.grad.clone() for p in trainer.parameters]

    packed_loss, packed = loss_and_grads([examples])
    single_loss, single = loss_and_grads([[example] for example in examples])
    assert packed_loss == pytest.approx(single_loss, rel=1e-12)
    for a, b in zip(packed, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class _NaNRow(SFT):
    """Makes the loss of one row NaN, as a poisoned sample would."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        return loss * (float("nan") if any(p.endswith("row 3") for p in batch.places) else 1.0), metrics


def test_nan_step_is_skipped_and_its_row_named(tmp_path):
    weights = {}

    class Watch:
        def on_step(self, trainer, record):
            weights[record["step"]] = _trained(trainer.model)

    settings = run_settings(tmp_path, objective=_NaNRow(), data={"path": chat_rows(), "shuffle": False}, max_steps=3)
    run = fastpt.train(**settings, callbacks=[Watch()])
    (skipped,) = [record for record in run.history if record.get("skipped")]
    assert skipped["step"] == 1
    assert len(skipped["rows"]) == 1
    assert skipped["rows"][0].endswith("row 3")
    start = _trained(Trainer_prepared(settings, tmp_path).model)
    for name, value in weights[1].items():
        assert torch.equal(value, start[name]), "the skipped step moved a weight"
    assert any(not torch.equal(value, start[name]) for name, value in weights[2].items())
    assert run.metrics["skipped_steps"] == 1


def Trainer_prepared(settings, tmp_path):
    trainer = Trainer(**{**settings, "model": tiny_model("llama"), "output": tmp_path / "other"})
    trainer.prepare()
    return trainer


def test_nan_in_a_weight_is_found_by_gradient_or_loss(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("z")["input_ids"][0]] = float("nan")
    rows = chat_rows()
    rows[5]["messages"][0]["content"] += " zz"
    run = fastpt.train(**run_settings(tmp_path, model=model, data=rows, max_steps=3))
    named = [row for record in run.history for row in record.get("rows", [])]
    assert len(named) == 1
    assert named[0].endswith("row 6")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    class Kill:
        def on_step(self, trainer, record):
            if record["step"] == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    run = fastpt.train(**run_settings(tmp_path, callbacks=[Kill()]))
    assert run.status == "interrupted"
    assert run.metrics["steps"] == 2
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]
    resumed = fastpt.train(**run_settings(tmp_path, resume=True))
    assert resumed.status == "finished"
    assert resumed.metrics["steps"] == 6


def test_out_of_memory_says_what_to_change(tmp_path):
    class Greedy(SFT):
        def loss(self, model, batch):
            raise MemoryError

    with pytest.raises(TrainingError, match=r"step 1 .* lower micro_batch_tokens"):
        fastpt.train(**run_settings(tmp_path, objective=Greedy()))


def test_own_objective_optimizer_and_callback_are_plain_objects(tmp_path):
    seen = []

    class Callback:
        def on_start(self, trainer):
            seen.append("start")

        def on_end(self, trainer, run):
            seen.append(run.status)

    class Doubled(SFT):
        def loss(self, model, batch):
            loss, _ = super().loss(model, batch)
            return 2 * loss, {"double": loss}

    def optimizer(groups):
        return torch.optim.SGD(groups, lr=1e-3)

    run = fastpt.train(**run_settings(tmp_path, objective=Doubled(), optim=optimizer, callbacks=[Callback()]))
    assert seen == ["start", "finished"]
    assert run.history[0]["loss"] == pytest.approx(2 * run.history[0]["double"], rel=1e-6)


def test_evaluation_and_best_checkpoint(tmp_path):
    settings = run_settings(tmp_path, eval_data=chat_rows(6, seed=1), eval_steps=2, save_steps=1, keep_checkpoints=1)
    run = fastpt.train(**settings)
    assert {"eval_loss", "eval_perplexity", "eval_token_accuracy"} <= set(run.metrics)
    evaluations = [record for record in run.history if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [2, 4, 6]
    best = min(evaluations, key=lambda record: record["eval_loss"])
    assert run.best == {"step": best["step"], "metric": "eval_loss", "value": best["eval_loss"]}
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{best['step']:08d}", "step-00000006"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4, "dropout": 0.1}, "full"], ids=["lora", "full"])
def test_same_seed_same_bits(tmp_path, method, precision):
    """On two threads, with enough tokens that every kernel splits its work between them."""

    def train(name, seed=0):
        model = tiny_model("llama").to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        changes = {"model": model, "method": method, "precision": precision, "data": chat_rows(128), "batch_rows": 64}
        return fastpt.train(**run_settings(tmp_path / name, **changes, max_steps=3, seed=seed))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one, two = train("a"), train("b")
    finally:
        torch.set_num_threads(threads)
    assert one.history[0]["tokens"] > 2000
    assert [(r["loss"], r["grad_norm"]) for r in one.history] == [(r["loss"], r["grad_norm"]) for r in two.history]
    for a, b in zip(_trained(one.model).values(), _trained(two.model).values(), strict=True):
        assert torch.equal(a, b)
    assert _losses(train("c", seed=1)) != _losses(one)


def test_a_run_is_never_overwritten(tmp_path):
    first = fastpt.train(**run_settings(tmp_path))
    second = fastpt.train(**run_settings(tmp_path))
    assert (first.path.name, second.path.name) == ("run", "run-2")


def test_what_cannot_work_is_said_before_any_step(tmp_path):
    with pytest.raises(ModelError, match=r"tokens but the model's embedding only 100 rows"):
        fastpt.train(**run_settings(tmp_path, model=tiny_model("llama", vocab_size=100)))
    with pytest.raises(ModelError, match="does not exist"):
        fastpt.train(**run_settings(tmp_path, model="./no/such/model"))
    with pytest.raises(ConfigError, match=r"matches no parameter"):
        fastpt.train(**run_settings(tmp_path, method={"name": "freeze", "train": ["nonsense"]}))
    with pytest.raises(ConfigError, match="objective 'sfft' is not known"):
        fastpt.train(**run_settings(tmp_path, objective="sfft"))
    with pytest.raises(ConfigError, match="cannot be made"):
        fastpt.train(**run_settings(tmp_path, method={"name": "lora", "targets": ["nothing_here"]}))


def test_pretraining_cuts_long_documents_and_trains_every_token(tmp_path):
    rows = [{"text": "the quick brown fox " * 30}, {"text": "short"}]
    run = fastpt.train(
        **run_settings(tmp_path, objective="pretrain", data=rows, max_length=64, max_steps=2, batch_rows=None)
    )
    assert run.history[0]["trained_tokens"] > 0.9 * run.history[0]["tokens"]


def test_a_model_is_evaluated_without_a_run_as_within_one(tmp_path, capsys):
    rows = chat_rows(6, seed=1)
    run = fastpt.train(**run_settings(tmp_path, eval_data=rows, method="full"))
    given = {"tokenizer": run.tokenizer, "device": "cpu", "precision": "fp32", "max_length": 256, "quiet": True}
    found = fastpt.evaluate(run.model, rows, **given)
    expected = {k.removeprefix("eval_"): v for k, v in run.metrics.items() if k.startswith("eval_")}
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is None for p in run.model.parameters())
