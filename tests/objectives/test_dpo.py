"""The DPO family against TRL's own trainer on the same tokens, what must not change it, and rows that are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastpt
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.pairs import joined, pair_example, pair_format
from fastpt.data.sources import load_rows
from fastpt.data.tokenised import tokenise
from fastpt.errors import ConfigError, DataError
from fastpt.objectives import make_objective
from fastpt.objectives._preference_losses import LOSSES, Options, Pairs
from fastpt.scorer import ModelScorer
from tests.objectives.invariance import check_invariance
from tests.runs import WORDS, run_settings
from tests.tiny import tiny_model, tiny_tokenizer

IN_TRL = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop"),
]
SMOOTHED = 0.1


def pair_rows(count=6):
    """Prompts and answers of different lengths."""
    return [
        {
            "prompt": " ".join(WORDS[: 2 + i % 5]),
            "chosen": " ".join(WORDS[i : i + 2 + i % 3]),
            "rejected": " ".join(WORDS[i + 1 : i + 3 + i % 4]),
        }
        for i in range(count)
    ]


def pair_examples(count=6):
    tokenizer, row_format = tiny_tokenizer(), pair_format(None)
    return [pair_example(tokenizer, row, f"rows:{i}", row_format) for i, row in enumerate(pair_rows(count), 1)]


class TwoModels(ModelScorer):
    """A reference that is another model."""

    def __init__(self, model, reference):
        super().__init__(model, has_reference=True)
        self.other = ModelScorer(reference)

    def reference(self):
        test = self

        class Switched:
            def __enter__(self):
                self.model, test.model = test.model, test.other.model
                test.__dict__.pop("head", None)
                self.off = torch.no_grad()
                self.off.__enter__()

            def __exit__(self, *_):
                self.off.__exit__(*_)
                test.model = self.model
                test.__dict__.pop("head", None)

        return Switched()


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    settings = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("dpo")), per_device_train_batch_size=6, report_to="none", use_cpu=True,
        bf16=False, loss_type=["sigmoid"], label_smoothing=SMOOTHED, beta=0.3, max_length=256, gradient_checkpointing=False,
    )  # fmt: skip
    return DPOTrainer(
        tiny_model("llama"), tiny_model("llama", seed=1), args=settings,
        train_dataset=Dataset.from_list(pair_rows()), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def of_trl(inputs) -> list[Example]:
    """TRL's batch, [chosen, rejected] rows padded on either side, as our examples."""
    rows = []
    for ids, mask, answer in zip(*(inputs[k] for k in ("input_ids", "attention_mask", "completion_mask")), strict=True):
        kept = mask.bool()
        rows.append(Example(ids[kept].numpy().astype(np.int32), answer[kept].bool().numpy(), None, "row"))
    half = len(rows) // 2
    return [joined([rows[i], rows[half + i]], "row") for i in range(half)]


@pytest.mark.parametrize("loss_type", [*IN_TRL, "sigmoid+nca_pair"])
def test_loss_and_gradients_are_trls(trl_trainer, loss_type):
    names = loss_type.split("+")
    weights = [1.0, 0.4][: len(names)]
    trl_trainer.loss_types, trl_trainer.loss_weights = names, weights
    inputs = next(iter(trl_trainer.get_train_dataloader()))
    model, reference = trl_trainer.model, trl_trainer.ref_model
    model.zero_grad()
    expected = trl_trainer.compute_loss(model, dict(inputs))
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    objective = make_objective(
        {"name": "dpo", "loss_type": names, "loss_weights": weights, "beta": 0.3, "label_smoothing": SMOOTHED}
    )
    if "sigmoid" in names:  # TRL leaves this one as it is
        objective = objective.model_copy(update={"label_smoothing": 0.0})
    batch = collate(of_trl(inputs))
    loss, _ = objective.loss(TwoModels(model, reference), batch)
    (loss / batch.count).backward()
    torch.testing.assert_close(loss / batch.count, expected, rtol=1e-5, atol=1e-6)
    size = max(float(g.abs().max()) for g in gradients.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, gradients[name], rtol=1e-5, atol=1e-5 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def two_tokens(preferred, other, tokens=(2, 4)):
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (preferred, other))
    zero = torch.zeros(1)
    return Pairs(chosen, rejected, zero, zero, *(torch.tensor([float(n)]) for n in tokens))


def test_losses_without_a_reference_by_hand():
    """log p_w = -1 over 2 tokens, log p_l = -3 over 4; means -0.5 and -0.75."""
    pairs, o = two_tokens(-1.0, -3.0), Options(beta=2.0, gamma=0.3)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    odds = lambda x: math.exp(x) / (1 - math.exp(x))  # noqa: E731
    expected = {
        "sft": 0.5,
        "simpo": -math.log(sigmoid(2 * 0.25 - 0.3)),
        "cpo": -math.log(sigmoid(2 * 2.0)),
        "orpo": 0.5 - 2 * math.log(sigmoid(math.log(odds(-0.5) / odds(-0.75)))),
    }
    for name, value in expected.items():
        assert LOSSES[name](pairs, o).item() == pytest.approx(value, rel=1e-5), name
    LOSSES["simpo"](pairs, o).backward()
    slope = -(1 - sigmoid(0.2)) * 2  # by the mean of the chosen
    assert pairs.chosen.grad.item() == pytest.approx(slope / 2, rel=1e-5)
    assert pairs.rejected.grad.item() == pytest.approx(-slope / 4, rel=1e-5)


@pytest.mark.parametrize(
    "loss_type", sorted(set(LOSSES) - {"aot", "aot_unpaired"})
)  # whose quantiles are a micro-batch's
def test_packing_accumulation_and_order_change_nothing(loss_type):
    objective = make_objective({"name": "dpo", "loss_type": loss_type, "label_smoothing": SMOOTHED})
    check_invariance(objective, TwoModels(tiny_model("llama"), tiny_model("llama", seed=1)), pair_examples())


def test_a_pair_shares_its_prompt():
    tokenizer = tiny_tokenizer()
    example = pair_examples(2)[1]
    both = [tokenizer.decode(e) for e in np.split(example.expanded().input_ids, [example.expanded().documents[0]])]
    row = pair_rows(2)[1]
    assert all(row["prompt"] in text for text in both)
    assert row["chosen"] in both[0]
    assert row["rejected"] in both[1]
    trained = [example.input_ids[a:b][example.trained[a:b]] for a, b in example.bounds]
    assert row["chosen"] in tokenizer.decode(trained[0])
    assert row["prompt"] not in tokenizer.decode(trained[0])
    assert not any(example.trained[start] for start, _ in example.bounds)  # the last token of the prompt opens each
    assert example.prefix > len(tokenizer(row["prompt"])["input_ids"]) - 2


def test_messages_may_hold_the_prompt():
    said = [{"role": "user", "content": "red one"}]
    sides = {
        side: [*said, {"role": "assistant", "content": text}]
        for side, text in (("chosen", "tea"), ("rejected", "salt"))
    }
    implicit = pair_example(tiny_tokenizer(), sides, "row", pair_format(None))
    plain = {"prompt": "red one", "chosen": "tea", "rejected": "salt"}
    explicit = pair_example(tiny_tokenizer(), plain, "row", pair_format(None))
    assert implicit.input_ids.tolist() == explicit.input_ids.tolist()
    assert (implicit.prefix, implicit.documents) == (explicit.prefix, explicit.documents)


GOOD = {"prompt": "red", "chosen": "tea", "rejected": "salt"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rejected": ...}, r"has no column 'rejected'.*mend or delete"),
        ({"rejected": None}, r"nothing \(None\) as 'rejected'"),
        ({"chosen": "  "}, r"empty 'chosen'"),
        ({"rejected": "tea"}, "prefers an answer to the same answer"),
        ({"prompt": None}, "has no prompt"),
        ({"chosen": 3}, "int 3 as 'chosen'|int as 'chosen'"),
    ],
)
def test_wrong_rows_are_named(change, said):
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not ...}
    with pytest.raises(DataError, match=f"rows.*{said}"):
        pair_example(tiny_tokenizer(), row, "rows:7", pair_format(None))


def test_a_prompt_without_room_for_answers_is_told():
    rows = load_rows([{**GOOD, "prompt": " ".join(WORDS * 4)}])
    prepare = make_objective("dpo").bind(tiny_tokenizer(), rows, None)
    with pytest.raises(DataError, match="longer than max_length=20"):
        tokenise(rows, prepare, max_length=20, too_long="error", cache_key=None, cache_dir=None)
    with pytest.raises(DataError, match="no trained token after truncation"):
        tokenise(rows, prepare, max_length=20, too_long="truncate", cache_key=None, cache_dir=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "sigmod"}, "'sigmod' is not a loss; there are sigmoid"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "1 values for 2 losses"),
        ({"loss_type": "exo_pair"}, "label_smoothing above 0"),
        ({"beta": 0}, "beta"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_objective({"name": "dpo", **settings})


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, "full"])
def test_a_run_learns_to_prefer(tmp_path, method):
    """A fresh adapter is its own reference; for full training it is computed once: the first loss is log 2 in both."""
    run = fastpt.train(
        **run_settings(
            tmp_path,
            method=method,
            objective="dpo",
            data=pair_rows(8),
            eval_data=pair_rows(8),
            max_steps=12,
            batch_rows=8,
        )
    )
    assert run.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert run.history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert run.metrics["eval_accuracy"] == 1.0
    assert run.metrics["eval_margin"] > 0.1
    assert run.metrics["eval_loss"] < 0.65


def test_a_stream_without_a_fresh_adapter_is_told(tmp_path):
    import json

    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows()))
    with pytest.raises(ConfigError, match="do not stream"):
        fastpt.train(
            **run_settings(
                tmp_path, method="full", objective="dpo", data={"path": str(path), "streaming": True}, max_steps=1
            )
        )
