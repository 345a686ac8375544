"""Rewards: functions, names and models; what can be wrong with one, with a setting or a prompt is explained; vLLM's interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import fastpt
from fastpt.errors import ConfigError, DataError, ModelError, TrainingError
from fastpt.objectives import _rewards, make_objective
from fastpt.scorer import ModelScorer
from tests.objectives.online import KINDS, ROWS, letters, prepared, rolled_out, settings
from tests.runs import run_settings
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


PROMPTS = ["say cat", [{"role": "user", "content": "say"}], "say one two three"]
ANSWERS = ["dog and bird", [{"role": "assistant", "content": "x"}], ""]


def reward_model(folder, **config):
    model = tiny_model("llama", cls="LlamaForSequenceClassification", **{"num_labels": 1, **config})
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_is_a_reward(tmp_path, kind):
    model, tokenizer = reward_model(tmp_path / "rm"), tiny_tokenizer()
    rewards = [str(tmp_path / "rm"), letters]
    trainer = prepared(tmp_path, kind, {"rewards": rewards, "group_size": 4})
    scores = trainer.objective._functions[0].function(PROMPTS, ANSWERS)
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        talk = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        talk = [*talk, *([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)]
        ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)["input_ids"]
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    first, *_ = rolled_out(trainer)
    told = dict(zip(trainer.objective._names(), first[0].fields["rollout"].reshape(-1, 2), strict=True))
    assert told["reward/rm"][0] != 0
    assert told["reward"][0] == pytest.approx(told["reward/rm"][0] + told["reward/letters"][0], rel=1e-5)


def test_a_reward_model_reads_packed_conversations(tmp_path, monkeypatch):
    """Without padding, in any number of pieces; what is longer than its positions is cut."""
    reward_model(tmp_path / "rm", max_position_embeddings=20)
    rewards, sizes = {}, []

    def hidden(self, batch):
        sizes.append(batch.cu_seqlens.diff().tolist())
        assert batch.input_ids.shape == (1, sum(sizes[-1]))
        return read(self, batch)

    read = ModelScorer.hidden
    monkeypatch.setattr(ModelScorer, "hidden", hidden)
    for most in (4096, 1):
        monkeypatch.setattr(_rewards, "SCORED_TOKENS", most)
        reward = _rewards.load_reward_model(str(tmp_path / "rm"), torch.device("cpu"), torch.float32)
        rewards[most] = reward.function([*PROMPTS, "red " * 30], [*ANSWERS, "x"])
    assert [len(one) for one in sizes] == [4, 1, 1, 1, 1]
    assert max(sizes[0]) == 20
    assert rewards[1] == pytest.approx(rewards[4096], abs=1e-5)


def test_what_is_no_reward_model_is_told(tmp_path):
    reward_model(tmp_path / "classes", num_labels=3)
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    fastpt.train(**run_settings(tmp_path, model=str(tmp_path / "lm"), max_steps=1))
    for folder, said in (
        ("lm", "but a LlamaForCausalLM"),
        ("classes", "but tells 3 classes apart"),
        ("run", "but an adapter for CAUSAL_LM"),
    ):
        with pytest.raises(ModelError, match=rf'{folder} is no reward model {said}: train one with objective "reward"'):
            prepared(tmp_path / "policy", objective={"rewards": str(tmp_path / folder)})
