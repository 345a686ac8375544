"""A fused model computes what the same model computes unfused: outputs, losses and every gradient, family by family."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import fastpt
from fastpt.fusion.blocks import Recipe
from tests.helpers import assert_not_worse
from tests.tiny import DECODERS, FAMILIES, tiny_model

ADAPTERS = {
    "bare": None,
    "lora": {"r": 4, "rank_pattern": {"o_proj": 2, "down_proj": 3}, "target_modules": "all-linear"},
    "some": {"r": 4, "target_modules": ["q_proj", "down_proj", "qkv_proj", "c_attn"], "use_rslora": True},
    "dora": {"r": 4, "use_dora": True, "target_modules": "all-linear"},
    "saved": {"r": 4, "target_modules": ["o_proj", "c_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(family, adapter, **overrides):
    model = tiny_model(family, **overrides)
    if ADAPTERS[adapter] is None:
        return model
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **ADAPTERS[adapter]))


def step(model, **batch):
    """Loss and gradients of one training step."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(got, expected, tolerance=5e-6):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-6)


def tokens(*shape):
    return torch.randint(3, 250, shape)


def fused_blocks(handle):
    """How many decoder blocks are fused; each must have run fused in its last call."""
    assert not handle.reasons
    assert not [patch.fallback for patch in handle.patches if patch.fallback and patch.attribute == "forward"]
    return sum(isinstance(recipe, Recipe) for recipe in handle.recipes.values())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", [*DECODERS, "gpt2"])
def test_losses_and_gradients_are_those_of_the_unfused_model(family, adapter):
    overrides = {"tie_word_embeddings": False} if adapter == "saved" else {}
    model, ids = adapted(family, adapter, **overrides), tokens(2, 20)
    expected = step(model, input_ids=ids, labels=ids)
    with fastpt.fuse(model) as handle:
        got = step(model, input_ids=ids, labels=ids)
        assert fused_blocks(handle) == (0 if family == "gpt2" else 2)
    assert_same(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_the_same_outputs_at_real_tokens(family):
    model, ids = tiny_model(family), tokens(4, 20)
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[1, 13:] = 0
    mask[2, :15] = 0
    mask[3, 6:9] = 0  # a gap
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family != "bert":
        batch["position_ids"] = positions
    expected = model(**batch).logits
    with fastpt.fuse(model):
        got = model(**batch).logits
    real = mask.bool() if family != "bert" else slice(None)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", [*DECODERS, "gpt2"])
def test_packed_documents_are_as_if_alone(family, is_lora):
    model = adapted(family, "lora" if is_lora else "bare")
    lengths = [9, 1, 14]
    ids, positions = tokens(1, sum(lengths)), torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    given = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 14, "max_length_k": 14}
    with fastpt.fuse(model):
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        told = model(input_ids=ids, position_ids=positions, **given).logits
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(told, found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    model, ids = adapted(family, "lora"), tokens(2, 20)
    expected = step(model, input_ids=ids, labels=ids)
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with fastpt.fuse(model) as handle:
        got = step(model, input_ids=ids, labels=ids)
        if family != "gpt2":
            assert fused_blocks(handle) == 2
            block = next(m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
            assert block.gradient_checkpointing
    assert_same(got, expected)


def test_checkpointed_blocks_save_less():
    model, ids, saved = tiny_model("llama"), tokens(2, 20), []

    def bytes_saved():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            model.train()(input_ids=ids, labels=ids, use_cache=False)
        return sum(saved)

    with fastpt.fuse(model):
        plain = bytes_saved()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert bytes_saved() < plain / 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_bfloat16_is_no_worse_than_unfused(family):
    exact, ids = adapted(family, "lora").double(), tokens(2, 40)
    model = adapted(family, "lora")
    model.load_state_dict(exact.state_dict())
    rounded = {name: p.to(torch.bfloat16) for name, p in exact.state_dict().items()}
    exact.load_state_dict(rounded)
    model.load_state_dict(rounded)
    model.to(torch.bfloat16)
    truth = exact(input_ids=ids).logits
    eager = model(input_ids=ids).logits
    with fastpt.fuse(model) as handle:
        got = model(input_ids=ids).logits
        assert fused_blocks(handle) == 2
    assert_not_worse(got, eager, truth)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_bfloat16_gradients_are_no_worse_than_unfused(adapter):
    """Of float32 adapters beside a bfloat16 base, as PEFT makes them."""
    model, ids = adapted("llama", adapter).to(torch.bfloat16), tokens(2, 40)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    exact = adapted("llama", adapter).double()
    exact.load_state_dict(model.state_dict())
    truth, eager = (step(one, input_ids=ids, labels=ids) for one in (exact, model))
    with fastpt.fuse(model) as handle:
        got = step(model, input_ids=ids, labels=ids)
        assert fused_blocks(handle) == 2
    for a, b, c in zip(got, eager, truth, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-3 * c.norm()


class Calls(TorchDispatchMode):
    """How often each op is called."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.name()] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("family", "expected"), [("llama", 2), ("phi3", 0), ("gemma2", 0)])
def test_gate_up_and_their_activation_are_one_op(family, expected):
    """But where one layer makes both, or the activation is another."""
    model, ids = adapted(family, "lora"), tokens(1, 12)
    with fastpt.fuse(model), Calls() as calls:
        model(input_ids=ids)
    assert calls.found["fastpt::lora_swiglu"] == expected
    assert calls.found["fastpt::swiglu"] + calls.found["fastpt::geglu"] == 2 - expected
    assert calls.found["fastpt::lora_linear"] == (3 if expected else 4) * 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_autocast_is_followed(family):
    model, ids = adapted(family, "lora"), tokens(2, 20)
    truth = step(model, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, input_ids=ids, labels=ids)
        with fastpt.fuse(model) as handle:
            got = step(model, input_ids=ids, labels=ids)
            assert fused_blocks(handle) == 2
    for a, b, c in zip(got, expected, truth, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-3 * c.norm()


def test_adapter_states_are_read_at_call_time():
    model, ids = adapted("llama", "lora"), tokens(1, 12)
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))

    def outputs():
        found = [model(input_ids=ids).logits]
        with model.disable_adapter():
            found.append(model(input_ids=ids).logits)
        model.set_adapter("second")
        found.append(model(input_ids=ids).logits)
        model.base_model.set_adapter(["default", "second"])
        found.append(model(input_ids=ids).logits)
        model.base_model.set_adapter("default")
        model.merge_adapter()
        found.append(model(input_ids=ids).logits)
        model.unmerge_adapter()
        for layer in model.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(0.5)
        found.append(model(input_ids=ids).logits)
        for layer in model.modules():
            if hasattr(layer, "unscale_layer"):
                layer.unscale_layer()
        return torch.stack(found)

    expected = outputs()
    assert (expected[1:] - expected[0]).abs().amax((1, 2, 3))[[0, 1, 2, 4]].min() > 1e-3
    with fastpt.fuse(model) as handle:
        torch.testing.assert_close(outputs(), expected, rtol=1e-4, atol=1e-5)
        assert fused_blocks(handle) == 2


def test_adapters_added_after_fusing_are_seen():
    model, ids = tiny_model("llama"), tokens(1, 12)
    with fastpt.fuse(model):
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, r=4, target_modules="all-linear"))
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert (got - tiny_model("llama")(input_ids=ids).logits).abs().max() > 1e-3


def test_lora_dropout_drops_and_is_replayed_by_checkpointing():
    model, ids = tiny_model("llama"), tokens(2, 20)
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(model, config)
    with fastpt.fuse(model):
        torch.manual_seed(1)
        first = step(model, input_ids=ids, labels=ids)
        second = step(model, input_ids=ids, labels=ids)
        assert (first[0] - second[0]).abs() > 1e-6
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        assert_same(step(model, input_ids=ids, labels=ids), first)


def test_a_fused_model_compiles():
    model, ids = adapted("qwen3", "lora"), tokens(1, 12)
    expected = step(model, input_ids=ids, labels=ids, use_cache=False)
    torch._dynamo.reset()
    with fastpt.fuse(model):
        got = step(torch.compile(model, backend="aot_eager"), input_ids=ids, labels=ids, use_cache=False)
    assert_same(got, expected)
