"""What comes out of a run: adapters that peft loads, adapters from peft that go on, merged models, reloaded runs."""

import pytest
import torch

import fastpt
from fastpt.errors import ModelError
from tests.runs import chat_rows, run_settings
from tests.tiny import tiny_model, tiny_tokenizer

PROBE = "red green blue"


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _logits(model, tokenizer, text=PROBE):
    with torch.no_grad():
        return model.eval()(torch.tensor([tokenizer(text)["input_ids"]])).logits


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 4},
        "dora",
        {"name": "lora", "init": "pissa"},
        {"name": "lora", "rank_pattern": {"q_proj": 2}, "rslora": True},
    ],
)
def test_peft_loads_what_fastpt_saved(tmp_path, base, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = fastpt.train(**run_settings(tmp_path, model=str(base), tokenizer=None, method=method))
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = PeftModel.from_pretrained(plain, run.path / "model")
    torch.testing.assert_close(_logits(theirs, tokenizer), _logits(run.model, run.tokenizer), rtol=1e-4, atol=1e-5)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    made = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == run.generate(PROBE, max_new_tokens=8)


def test_an_adapter_made_by_peft_goes_on_in_fastpt(tmp_path, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    trainer = fastpt.trainer.Trainer(**run_settings(tmp_path, model=str(tmp_path / "adapter"), tokenizer=str(base)))
    trainer.prepare()
    tokenizer = tiny_tokenizer()
    torch.testing.assert_close(_logits(trainer.model, tokenizer), _logits(made, tokenizer), rtol=1e-4, atol=1e-5)
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in trainer.model.parameters()) == 8


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "rank": 4},
        "dora",
        {"name": "lora", "init": "pissa"},
        {"name": "lora", "modules_to_save": ["lm_head"]},
    ],
)
def test_merge_agrees_and_says_how_well(tmp_path, base, method, capsys):
    from transformers import AutoModelForCausalLM

    run = fastpt.train(**run_settings(tmp_path, model=str(base), tokenizer=None, method=method))
    report = run.merge(tmp_path / "merged")
    assert report.top1 == 1.0
    assert report.kl < 1e-8
    assert "agree on 100.0 %" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(merged, run.tokenizer), _logits(run.model, run.tokenizer), rtol=1e-3, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merge_notices_a_bad_merge():
    from fastpt.adapters import _compare

    logits = torch.randn(5, 11)
    assert _compare(logits, logits).top1 == 1.0
    worse = _compare(logits, -logits)
    assert worse.top1 < 1.0
    assert worse.kl > 0.1


def test_a_run_is_read_back(tmp_path, base):
    run = fastpt.train(**run_settings(tmp_path, model=str(base), tokenizer=None, eval_data=chat_rows(4, seed=2)))
    again = fastpt.load_run(run.path, precision="fp32")
    assert again.metrics == run.metrics
    assert again.history == run.history
    assert again.generate(PROBE, max_new_tokens=6) == run.generate(PROBE, max_new_tokens=6)
    several = again.generate([PROBE, [{"role": "user", "content": "tea"}]], max_new_tokens=6)
    assert several[0] == again.generate(PROBE, max_new_tokens=6), "left padding must not change an answer"
    assert run.report.is_file()
    with pytest.raises(ModelError, match="no finished run"):
        fastpt.load_run(tmp_path)


def test_a_run_is_the_start_of_another(tmp_path, base):
    run = fastpt.train(**run_settings(tmp_path, model=str(base), tokenizer=None))
    second = fastpt.train(**run_settings(tmp_path, model=str(run.path), tokenizer=None, output=tmp_path / "second"))
    assert second.history[0]["loss"] == pytest.approx(run.history[-1]["loss"], rel=0.5)
    assert second.history[0]["loss"] < run.history[0]["loss"]
