"""fastpt trains as TRL + PEFT do: the same losses on the same rows, from the same adapter, in the same order.

TRL pads its batches and fastpt packs them. The rows go in as tokens; how text becomes tokens is tested elsewhere.
"""

import random
from dataclasses import replace

import pytest
import torch
from transformers import Gemma2ForCausalLM

from benchmarks.peers import Fastpt, HandWritten, Job, Trl, TrlFused, save_adapter
from benchmarks.rows import Row
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("trl")
STEPS, BATCH = 20, 3


def rows_of_varying_length():
    draw = random.Random(0)
    rows = []
    for _ in range(STEPS * BATCH):
        length, first = draw.randint(8, 60), draw.randint(3, 20)
        prompt = draw.randint(1, length - 2)
        ids = [first + (7 * i) % 40 for i in range(length)]  # something to learn
        rows.append(Row(ids, [0] * prompt + [1] * (length - prompt)))
    return rows


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    def make(family, *, has_adapter=True, is_fp32=True):
        folder = tmp_path_factory.mktemp(family)
        # weights that both precisions can hold, so that they start from the same numbers
        tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        adapter = save_adapter(str(folder), str(folder / "adapter")) if has_adapter else None
        lr = 1e-2 if has_adapter else 1e-3
        return Job(str(folder), adapter, rows_of_varying_length(), BATCH, lr=lr, is_fp32=is_fp32)

    return make


def losses_of(peer_class, job):
    peer, losses = peer_class(job), []
    peer.build()
    peer.train(lambda loss, tokens: losses.append(loss))
    assert len(losses) == STEPS
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("family", "has_adapter"), [("llama", True), ("llama", False), ("qwen3", True), ("gemma2", True)]
)
def test_losses_equal_those_of_trl_in_fp32(job_of, family, has_adapter):
    if family == "gemma2" and Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("TRL takes this transformers' sdpa, which leaves Gemma 2's softcap out")
    job = job_of(family, has_adapter=has_adapter)
    ours, theirs = losses_of(Fastpt, job), losses_of(Trl, job)
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours[-1] < ours[0] - 0.2  # both learned something


def test_losses_of_trl_stay_the_same_on_a_fused_model(job_of):
    job = job_of("llama")
    assert (losses_of(TrlFused, job) - losses_of(Trl, job)).abs().max() <= 1e-4


def test_bf16_losses_are_within_the_spread_of_eager_bf16(job_of):
    """Over the steps of three models, at a rate where rounding is not amplified from step to step into chance."""
    ours, eager = [], []
    for family in ("llama", "qwen3", "mistral"):
        job = replace(job_of(family, is_fp32=False), lr=1e-3)
        exact = losses_of(HandWritten, replace(job, is_fp32=True))
        eager.append((losses_of(HandWritten, job) - exact).abs())
        ours.append((losses_of(Fastpt, job) - exact).abs())
    assert torch.cat(ours).max() <= torch.cat(eager).max()
