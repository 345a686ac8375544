"""Rewards: functions, names and models; what can be wrong with one, with a setting or a prompt is explained; vLLM's interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import fastpt
from fastpt.errors import ConfigError, DataError, TrainingError
from fastpt.objectives import make_objective
from tests.objectives.online import ROWS, letters, prepared, rolled_out, settings
from tests.tiny import tiny_model, tiny_tokenizer


def _raises(completions, answer):
    return [1.0 / (word != "two") for word in answer]


BAD_REWARDS = {
    "raises": (_raises, r"_raises raised ZeroDivisionError .* on row \d+, whose answer is .*: let it return a number"),
    "nan": (
        lambda completions: [float("nan")] * len(completions),
        r"gave nan for row \d+, whose answer is .*finite number",
    ),
    "none": (lambda completions: [None] * len(completions), r"gave None for row \d+"),
    "text": (lambda completions: ["good"] * len(completions), r"gave 'good' for row \d+"),
    "too few": (lambda completions: [1.0], r"returned 1 values for 120 completions \(of row \d+ to row \d+\)"),
    "nothing": (lambda completions: None, r"returned NoneType None: let it return a list"),
}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_bad_reward_is_explained(tmp_path, case):
    function, message = BAD_REWARDS[case]
    with pytest.raises(TrainingError, match=message):
        fastpt.train(**settings(tmp_path, objective={"rewards": function}, batch_rows=len(ROWS)))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"rewards": "tests.objectives.online:nothing"},
            "cannot be imported .*nothing.*: check module and function",
        ),
        ({"rewards": []}, "give at least one reward"),
        ({"rewards": [3]}, "3 is no reward"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 rewards"),
        ({"group_size": 1}, "objective.group_size: .*greater than or equal to 2"),
        ({"overlong_buffer": 13}, "overlong_buffer=13 is more than max_new_tokens=12"),
        ({"max_new_tokens": 300}, "max_length=256 leaves no room for a prompt beside objective.max_new_tokens=300"),
        ({"engine": "vllm"}, "not installed: pip install vllm, or leave engine"),
        ({"rewards": "no/such/folder/model"}, "no/such/folder/model does not exist"),
        ({"rewards": lambda completions, solution: []}, "takes 'solution', but row 1 has only prompt, answer"),
    ],
)
def test_a_bad_setting_is_explained_before_the_first_step(tmp_path, objective, message):
    with pytest.raises((ConfigError, fastpt.errors.ModelError), match=message):
        prepared(tmp_path, objective=objective)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "why"}, r'row 1 has no column "prompt" \(it has question\): .*columns = \{prompt = "question"\}'),
        ({"prompt": ""}, "row 1 has an empty 'prompt'"),
        ({"prompt": None}, "row 1 has nothing"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "ends with an assistant turn",
        ),
        ({"prompt": "a " * 200}, "longer than max_length=244 tokens"),
        ({"prompt": "a", "when": {1, 2}}, "row 1 holds what rewards cannot be handed"),
    ],
)
def test_a_bad_row_is_explained(tmp_path, row, message):
    objective = {"rewards": lambda completions, **columns: []}
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, objective=objective, data=[row, *[{"prompt": "b"}] * 3])


class _LLM:
    """Stands for vLLM's class: answers with one token, and looks at what it is asked."""

    def __init__(self, model, **options):
        self.options = options

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        assert (Path(lora_request.path) / "adapter_model.safetensors").is_file()
        assert sampling.stop_token_ids == [2]
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        tokens = [(70, 2), (71, 72)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens[i % 2])]) for i in range(len(prompts))]


def test_vllm_reads_the_adapter_before_each_rollout(tmp_path, monkeypatch):
    class Request(NamedTuple):
        name: str
        number: int
        path: str

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=_LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=Request))
    trainer = prepared(tmp_path, objective={"engine": "vllm", "group_size": 2})
    (step,) = rolled_out(trainer)
    assert [int(token) for token in step[0].input_ids[-5:] if token in (70, 2, 71, 72)] == [70, 2, 71, 72]
    with pytest.raises(ConfigError, match="needs an adapter"):
        prepared(tmp_path / "full", objective={"engine": "vllm"}, method="full")


def test_a_reward_is_known_again_by_its_name():
    """The cache and a resumed run compare objectives by what they print."""
    by_name = make_objective({"name": "grpo", "rewards": "tests.objectives.online:letters"})
    assert repr(by_name) == repr(make_objective({"name": "grpo", "rewards": letters}))
    assert "0x" not in repr(by_name)


def test_a_reward_model_is_a_reward(tmp_path):
    model = tiny_model("llama", cls="LlamaForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path / "rm")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "rm")
    trainer = prepared(tmp_path, objective={"rewards": [str(tmp_path / "rm"), letters], "group_size": 4})
    scores = trainer.objective._functions[0](["say cat", "say"], ["dog and bird", "x"], [[], []], [{}, {}], ["a", "b"])
    for prompt, answer, score in zip(["say cat", "say"], ["dog and bird", "x"], scores.tolist(), strict=True):
        talk = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert rolled_out(trainer)
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(fastpt.errors.ModelError, match="is no reward model"):
        prepared(tmp_path, objective={"rewards": str(tmp_path / "lm")})
