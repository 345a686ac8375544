"""Added tokens: rows started at the mean of what stood for them, trained with or without an adapter, saved, read back."""

import shutil

import pytest
import torch

import fastpt
from fastpt import models
from fastpt.adapters import apply_method
from fastpt.config import MethodConfig
from fastpt.errors import ConfigError, ModelError
from fastpt.fusion.fuse import handle_of
from fastpt.fusion.head import LanguageHead, hidden_states
from fastpt.vocabulary import add_tokens, read_tokens
from tests.runs import run_settings
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

TOKENS = [" Katze", "Hund", "é" * 3]
TEXTS = [{"text": text} for text in ("eine Katze und ein Hund", "der Hund sah eine Katze", "Hund, Katze, Hund")]


def taught(**overrides):
    """A tiny model with TOKENS, its tokenizer and their rows."""
    model = tiny_model("llama", **overrides)
    tokenizer, rows = add_tokens(model, tiny_tokenizer(), TOKENS)
    return model, tokenizer, rows


@pytest.mark.parametrize("is_tied", [True, False])
def test_rows_start_at_the_mean_of_their_pieces(is_tied):
    before = tiny_model("llama", tie_word_embeddings=is_tied)
    model, tokenizer, rows = taught(tie_word_embeddings=is_tied)
    old = tiny_tokenizer()
    assert rows == [len(old) + n for n in range(3)]
    assert tokenizer("eine Katze Hund", add_special_tokens=False)["input_ids"].count(rows[0]) == 1
    for part in ("get_input_embeddings", "get_output_embeddings"):
        weight, was = getattr(model, part)().weight, getattr(before, part)().weight
        for row, text in zip(rows, TOKENS, strict=True):
            pieces = old(text, add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(weight[row], was[pieces].mean(0))
        torch.testing.assert_close(weight[: rows[0]], was[: rows[0]])
    assert len(old) < len(tokenizer)  # a tokenizer that was given stays as it was


def test_the_table_grows_where_it_has_no_spare_rows():
    model = tiny_model("llama")
    tokenizer, rows = add_tokens(model, tiny_tokenizer(), [f"<word{n}>" for n in range(VOCAB)])
    assert len(rows) == VOCAB
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == model.config.vocab_size


def test_known_tokens_are_passed_over():
    model = tiny_model("llama")
    tokenizer, rows = add_tokens(model, tiny_tokenizer(), ["a", "<|im_end|>", "ab"])
    assert rows == [len(tiny_tokenizer())]
    assert tokenizer.convert_ids_to_tokens(rows) == ["ab"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_only_the_new_rows_of_the_embeddings_are_trained_beside_an_adapter(is_tied):
    model, _, rows = taught(tie_word_embeddings=is_tied)
    adapted = apply_method(model, MethodConfig(rank=4), "causal", rows)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == (1 if is_tied else 2)
    for parameter in trained.values():
        assert parameter.shape == (3, 64)
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_fused_rows_have_pefts_loss_and_gradients(is_tied, dtype):
    found = {}
    for is_fused in (False, True):
        model, tokenizer, rows = taught(tie_word_embeddings=is_tied)
        torch.manual_seed(0)  # of the adapter
        adapted = apply_method(model.to(dtype), MethodConfig(rank=4), "causal", rows)
        ids = torch.tensor(
            [tokenizer("eine Katze und ein Hund, ééé Katze" * 2)["input_ids"][n:][:16] for n in range(3)]
        )
        if is_fused:
            fastpt.fuse(adapted)
            hidden = hidden_states(adapted, ids, position_ids=None, cu_seqlens=None, max_seqlen=None)
            targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1).flatten()
            loss = LanguageHead.of(adapted).cross_entropy(hidden, targets)
        else:
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        found[is_fused] = loss.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    exact = dtype == torch.float32
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5 if exact else 2e-2, atol=0)
    for name, grad in found[False][1].items():
        ours, largest = found[True][1][name], float(grad.abs().max())
        torch.testing.assert_close(
            ours, grad, rtol=1e-4 if exact else 0.1, atol=(1e-5 if exact else 0.1) * largest, msg=name
        )


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, "full", {"name": "qlora", "rank": 4}])
def test_a_run_learns_saves_and_resumes_them(tmp_path, objective, method):
    rows = (
        TEXTS * 8 if objective == "pretrain" else [{"prompt": "wer?", "completion": row["text"]} for row in TEXTS * 8]
    )
    changes = {"data": rows, "objective": objective, "method": method, "optim.lr": 1e-2}
    changes["added_tokens"] = [
        *TOKENS,
        *(f"<{n}>" for n in range(VOCAB - len(tiny_tokenizer()))),
    ]  # more than spare rows
    settings = run_settings(tmp_path, **{"model": tiny_model("llama"), "max_steps": 6, **changes})
    settings["save_steps"] = 3
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings |= {"model": str(tmp_path / "base"), "tokenizer": None}
    run = fastpt.train(**settings)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    shutil.copytree(run.path, tmp_path / "other", ignore=lambda _, names: [n for n in names if n.endswith("6")])
    resumed = fastpt.train(**settings | {"output": tmp_path / "other", "resume": True})
    ids = torch.tensor([run.tokenizer("eine Katze und Hund")["input_ids"]])
    back = models.load(run.path, dtype=torch.float32, device=torch.device("cpu"))
    assert back.tokenizer(" Katze", add_special_tokens=False)["input_ids"] == [len(tiny_tokenizer())]
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits.float()
        torch.testing.assert_close(back.model.eval()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(resumed.model.eval()(input_ids=ids).logits.float(), expected)
    if method != "full":
        size = (run.path / "model" / "adapter_model.safetensors").stat().st_size
        assert size < 4 * sum(p.numel() for p in run.model.parameters() if p.requires_grad) + 40_000  # no whole table
    assert resumed.history[-1]["loss"] == run.history[-1]["loss"]
    assert isinstance(run.generate("eine Katze", max_new_tokens=3), str)


def test_plain_peft_reads_the_adapter(tmp_path):
    from peft import PeftModel

    model, tokenizer, rows = taught()
    adapted = apply_method(model, MethodConfig(rank=4), "causal", rows)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    base = tiny_model("llama")
    base.resize_token_embeddings(len(tokenizer)) if len(tokenizer) > VOCAB else None
    ids = torch.tensor([tokenizer("eine Katze und Hund")["input_ids"]])
    with torch.no_grad():
        read = PeftModel.from_pretrained(base, str(tmp_path)).eval()
        torch.testing.assert_close(read(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_merging_writes_them_into_the_table(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = run_settings(
        tmp_path, data=TEXTS * 8, objective="pretrain", method={"name": "lora", "rank": 4}, max_steps=3
    )
    settings |= {"model": str(tmp_path / "base"), "tokenizer": None, "added_tokens": TOKENS}
    run = fastpt.train(**settings)
    report = run.merge(tmp_path / "merged")
    assert report.top1 == 1
    assert len(models.load_tokenizer(tmp_path / "merged")) == len(tiny_tokenizer()) + 3


def test_explain_and_remove_leave_pefts_wrapper(tmp_path):
    model, tokenizer, rows = taught()
    adapted = apply_method(model, MethodConfig(rank=4), "causal", rows)
    ids = torch.tensor([tokenizer("eine Katze und Hund")["input_ids"]])
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        with fastpt.fuse(adapted):
            torch.testing.assert_close(adapted(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
            with adapted.disable_adapter():
                off = adapted(input_ids=ids).logits
        assert handle_of(adapted) is None
        torch.testing.assert_close(adapted(input_ids=ids).logits, before)
        assert off.shape == before.shape


def test_what_does_not_fit_is_told(tmp_path):
    for tokens, said in (
        (["a", " "], r"added_tokens:2 is an empty token"),
        (["ab", "cd", "ab"], r"added_tokens:3 is 'ab', as added_tokens:1 is"),
        (tmp_path / "none.txt", r"none\.txt, which is no file"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_tokens(tokens)
    (tmp_path / "words.txt").write_text(" Katze\nHund\n")
    assert read_tokens(tmp_path / "words.txt") == [" Katze", "Hund"]
    with pytest.raises(ConfigError, match="2 new rows, which this method does not train"):
        apply_method(tiny_model("llama"), MethodConfig(name="freeze", train=["layers"]), "causal", [1, 2])
    with pytest.raises(ConfigError, match="plans no added_tokens"):
        fastpt.train(**run_settings(tmp_path, added_tokens=["ab"], memory_limit="1GiB"))
    adapted = apply_method(tiny_model("llama"), MethodConfig(rank=4))
    with pytest.raises(ModelError, match="carries an adapter, whose embeddings cannot get 1 rows"):
        models.load(
            adapted, tokenizer=tiny_tokenizer(), dtype=torch.float32, device=torch.device("cpu"), added_tokens=["ab"]
        )
