"""LanguageHead and hidden_states: every kind of head, against torch's cross-entropy over the model's own logits."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F

import fastpt
from fastpt.errors import ModelError
from fastpt.fusion.head import LanguageHead, first_position, hidden_states
from tests.tiny import DECODERS, tiny_model

HEADS = {
    "tied": {},
    "plain": {"tie_word_embeddings": False},
    "lora": {"target_modules": ["lm_head", "q_proj"]},
    "dropout": {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.5},  # only the module itself can do it
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_head(kind, family="llama"):
    settings = dict(HEADS[kind])
    model = tiny_model(family, tie_word_embeddings=settings.pop("tie_word_embeddings", kind == "tied"))
    if settings:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    return model


def batch(tokens=14, ignored=4):
    hidden, targets = torch.randn(tokens, 64), torch.randint(0, 272, (tokens,))
    targets[:ignored] = -100
    return hidden.requires_grad_(), targets, torch.arange(ignored, tokens)


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_gradients_of_every_kind_of_head(kind):
    model = with_head(kind).eval()
    head, (hidden, targets, kept) = LanguageHead.of(model), batch()
    trained = [hidden, *(p for name, p in model.named_parameters() if p.requires_grad and "q_proj" not in name)]
    trained = [p for p in trained if p is hidden or p.shape[0] in (272, 4)]
    logits = head.model.get_output_embeddings()(hidden)
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "reduction": "sum"}):
        smooth, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
        expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smooth)
        expected = expected + z_loss * logits[4:].logsumexp(-1).square().sum()
        expected = expected if "reduction" in options else expected / 10
        for given in (None, kept):
            got = head.cross_entropy(hidden, targets, kept=given, **options)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, trained, retain_graph=True, allow_unused=True)
    for a, b in zip(torch.autograd.grad(got, trained, allow_unused=True), wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    stats, log_probs = head.stats(hidden, targets, kept=kept), logits.log_softmax(-1)
    expected = log_probs.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1).masked_fill(targets == -100, 0)
    torch.testing.assert_close(stats.logprob, expected, rtol=1e-5, atol=1e-5)
    entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(targets == -100, 0)
    torch.testing.assert_close(stats.entropy, entropy, rtol=1e-4, atol=1e-5)
    assert torch.equal(stats.is_top1, (log_probs.argmax(-1) == targets))


def test_adapter_dropout_on_the_head_is_applied_in_training():
    model = with_head("dropout").train()
    head, (hidden, targets, _) = LanguageHead.of(model), batch()
    assert (head.cross_entropy(hidden, targets) - head.cross_entropy(hidden, targets)).abs() > 1e-5


def test_a_head_wrapped_by_peft_later_is_seen():
    model = tiny_model("llama", tie_word_embeddings=False)
    head, (hidden, targets, _) = LanguageHead.of(model), batch()
    before = head.cross_entropy(hidden, targets)
    get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head"]))
    assert (head.cross_entropy(hidden, targets) - before).abs() > 1e-3


@pytest.mark.parametrize("family", [*DECODERS, "gpt2"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_hidden_states_of_packed_documents(family, is_fused):
    model, lengths = tiny_model(family), [5, 1, 9]
    ids, positions = torch.randint(3, 250, (15,)), torch.cat([torch.arange(n) for n in lengths])
    alone = torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(lengths)])
    cu_seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    handle = fastpt.fuse(model) if is_fused else None
    hidden = hidden_states(model, ids, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=9)
    torch.testing.assert_close(LanguageHead.of(model).logits(hidden), alone, rtol=1e-5, atol=1e-5)
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("kind", ["Bert", "DebertaV2", "MPNet"])
def test_an_encoder_keeps_packed_documents_apart(kind, is_fused):
    """Those whose attention reads no lengths, unfused or not served at all, get padded rows."""
    import transformers

    sizes = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForTokenClassification")(config).eval()
    lengths, first = [5, 1, 6], first_position(model)
    ids, positions = torch.randint(3, 250, (12,)), torch.cat([torch.arange(n) for n in lengths]) + first
    assert first == (2 if kind == "MPNet" else 0)
    packed = {"position_ids": positions, "cu_seqlens": torch.tensor([0, 5, 6, 12], dtype=torch.int32), "max_seqlen": 6}
    alone = torch.cat([model.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)])
    handle = fastpt.fuse(model) if is_fused else None
    torch.testing.assert_close(hidden_states(model, ids, **packed), alone, rtol=1e-5, atol=1e-5)
    if handle is not None:
        handle.remove()


def test_models_without_a_head_are_named():
    prompted = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="prompt-learning"):
        hidden_states(prompted, torch.tensor([[1]]), position_ids=None, cu_seqlens=None, max_seqlen=None)
    with pytest.raises(ModelError, match="BertForSequenceClassification has no language head"):
        LanguageHead.of(tiny_model("bert"))
    with pytest.raises(ModelError, match="LlamaModel"):
        hidden_states(
            tiny_model("llama").model, torch.tensor([[1]]), position_ids=None, cu_seqlens=None, max_seqlen=None
        )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_of_a_fused_model_follows_transformers(family):
    model, ids = tiny_model(family).train(), torch.randint(3, 250, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    shifted = torch.randint(3, 250, (2, 12))
    calls = [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}]
    expected = [model(input_ids=ids, labels=labels, **extra).loss for extra in calls]
    with fastpt.fuse(model):
        for extra, loss in zip(calls, expected, strict=True):
            outputs = model(input_ids=ids, labels=labels, **extra)
            torch.testing.assert_close(outputs.loss, loss, rtol=1e-5, atol=1e-6)
            assert outputs.logits is None
        assert model(ids, None, labels=labels).logits is None
        assert model(input_ids=ids).logits.shape == (2, 12, 272)
        outputs = model.eval()(input_ids=ids, labels=labels)
        torch.testing.assert_close(outputs.loss, expected[0], rtol=1e-5, atol=1e-6)
        assert outputs.logits is not None


def test_a_wrapper_put_on_top_later_survives_remove():
    model, ids = tiny_model("llama").train(), torch.randint(3, 250, (1, 8))
    expected = model(input_ids=ids, labels=ids).loss
    handle, calls = fastpt.fuse(model), []
    inner = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    assert model(input_ids=ids, labels=ids).logits is None
    handle.remove()
    outputs = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.logits is not None
    assert len(calls) == 2
