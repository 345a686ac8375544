"""Prompts that several documents share are computed once: the same losses and gradients as with the prompt before each."""

import numpy as np
import pytest
import torch

import fastpt
from fastpt.adapters import apply_method
from fastpt.config import MethodConfig
from fastpt.data.batches import collate
from fastpt.data.example import Example
from fastpt.data.prefix import shared_keys
from fastpt.objectives import make_objective
from fastpt.objectives._rollouts import joined
from fastpt.scorer import ModelScorer
from tests.helpers import assert_not_worse
from tests.tiny import tiny_model

SIZES = 4 * [(9, (4, 7)), (1, (3, 2)), (30, (5,)), (17, (8, 1, 12, 6))]  # prompts and their answers


def examples(sizes=SIZES):
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(1, 250, n).astype(np.int32)  # noqa: E731
    prompts = [Example(ids(n), np.zeros(n, bool), None, f"rows:{n}") for n, _ in sizes]
    return [joined(p, [ids(n).tolist() for n in answers]) for p, (_, answers) in zip(prompts, sizes, strict=True)]


def made(family, method, dtype):
    torch.manual_seed(0)
    model = apply_method(tiny_model(family).to(dtype), MethodConfig(name=method, rank=4)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    return model


def logprobs_and_gradients(model, batch, weights):
    """Per document; and the gradient of a weighted sum by each trained parameter."""
    scorer = ModelScorer(model)
    found = batch.per_document(scorer.stats(scorer.hidden(batch), batch).logprob[batch.kept])
    trained = [p for p in model.parameters() if p.requires_grad]
    return found.detach(), torch.autograd.grad((found * weights.to(found.dtype)).sum(), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3: sliding windows
def test_not_worse_than_with_the_prompt_before_each(family, method, dtype):
    some = examples()
    batches = {shares: collate(some, shares) for shares in (True, False)}
    assert batches[True].input_ids.numel() == sum(e.tokens for e in some) < batches[False].input_ids.numel()
    weights = torch.randn(len(batches[True].kept_lengths), generator=torch.Generator().manual_seed(1))
    plain, exact = (made(family, method, d) for d in (dtype, torch.float64))
    exact.load_state_dict(plain.state_dict())
    fused = made(family, method, dtype)
    with fastpt.fuse(fused):
        got, got_grads = logprobs_and_gradients(fused, batches[True], weights)
    base, base_grads = logprobs_and_gradients(plain, batches[False], weights)
    true, true_grads = logprobs_and_gradients(exact, batches[False], weights)
    assert_not_worse(got, base, true, what="log-probabilities")
    flat = lambda gradients: torch.cat([g.flatten() for g in gradients])  # noqa: E731
    for dtypes in {g.dtype for g in base_grads}:
        chosen = [i for i, g in enumerate(base_grads) if g.dtype == dtypes]
        parts = (flat([grads[i] for i in chosen]) for grads in (got_grads, base_grads, true_grads))
        assert_not_worse(*parts, what="gradients")


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_objectives_of_pairs_say_the_same(name):
    sizes = [(9, (4, 7)), (12, (3, 2)), (30, (5, 5))]
    kind = "sequence" if name == "reward" else "causal"
    torch.manual_seed(0)
    model = tiny_model("llama")
    if kind == "sequence":
        from transformers import AutoModelForSequenceClassification

        model.config.num_labels = 1
        model.config.pad_token_id = 0
        model = AutoModelForSequenceClassification.from_config(model.config)
    fastpt.fuse(model)
    some = [
        Example(e.input_ids, e.trained, None, e.place, documents=e.documents, prefix=e.prefix, count=1.0,
                fields={"reference": np.zeros(2, np.float32), "margin": np.zeros(1, np.float32)})
        for e in examples(sizes)
    ]  # fmt: skip
    objective, scorer, found = make_objective(name), ModelScorer(model), []
    assert scorer.shares_prefix
    for batch in (scorer.batch(some), collate(some)):
        model.zero_grad()
        loss, metrics = objective.loss(scorer, batch)
        loss.backward()
        found.append((loss, metrics, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (loss, metrics, gradients), (other, others, expected) = found
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics, others, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_which_models_share():
    some = examples()
    unfused = ModelScorer(tiny_model("llama"))
    assert not unfused.shares_prefix
    assert unfused.batch(some).keys is None
    assert [unfused.size(e) for e in some] == [e.expanded().tokens for e in some]
    scorer = ModelScorer(fastpt.fuse(tiny_model("llama")).model)
    batch = scorer.batch(some)
    assert batch.keys is not None
    assert batch.input_ids.numel() == sum(scorer.size(e) for e in some) == sum(e.tokens for e in some)
    assert scorer.batch([examples([(30, (5,))])[0].expanded()]).keys is None
    assert not ModelScorer(fastpt.fuse(tiny_model("bert")).model).shares_prefix


def test_keys_by_hand():
    """A prompt of 2 before answers of 1 and 2, then one of 1 before a single answer of 2."""
    cu_seqlens, keys, cu_seqlens_k, positions = shared_keys([2, 1], [(1, 2), (2,)])
    assert cu_seqlens.tolist() == [0, 2, 3, 5, 8]
    assert keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert cu_seqlens_k.tolist() == [0, 2, 5, 9, 12]
    assert positions.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
