"""fuse and remove: what is touched, what is put back, what falls back, and what explain says."""

import copy
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastpt
from fastpt.errors import ModelError
from fastpt.fusion.blocks import Recipe
from fastpt.fusion.explain import _attention
from fastpt.fusion.fuse import handle_of
from fastpt.ops import _flash_attention
from fastpt.ops._attention_gpu import serving
from tests.fusion.test_blocks import Calls
from tests.tiny import DECODERS, FAMILIES, tiny_model


def tokens(*shape):
    return torch.randint(3, 250, shape)


# What transformers notes on a class the first time it is asked whether the class can change its attention: a memo, no patch.
MEMO = "_can_set_attn_implementation_cached_value"


def snapshot(model):
    """Everything that remove() has to put back."""
    modules = dict(model.named_modules())
    kinds = {type(module) for module in modules.values()} | {nn.Module, nn.Linear}
    return {
        "instances": {path: dict(module.__dict__) for path, module in modules.items()},
        "classes": {kind: {k: v for k, v in vars(kind).items() if k != MEMO} for kind in kinds},
        "configs": {path: dict(m.config.__dict__) for path, m in modules.items() if hasattr(m, "config")},
        "sys.modules": dict(sys.modules),
        "training": {path: module.training for path, module in modules.items()},
    }


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_everything(family, is_lora):
    model, ids = tiny_model(family), tokens(2, 8)
    if is_lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    before, logits = snapshot(model), model(input_ids=ids).logits
    state, names = {k: v.clone() for k, v in model.state_dict().items()}, [n for n, _ in model.named_parameters()]
    handle = fastpt.fuse(model)
    assert fastpt.fuse(model) is handle
    fused = model.state_dict()
    assert list(fused) == list(state)
    assert all(torch.equal(fused[name], state[name]) for name in state)
    assert [n for n, _ in model.named_parameters()] == names
    model(input_ids=ids)
    handle.remove()
    after = snapshot(model)
    for what in before:
        assert after[what] == before[what], what
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert handle_of(model) is None


def test_leaving_the_with_block_restores_also_after_an_error():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(KeyError), fastpt.fuse(model):
        raise KeyError
    assert snapshot(model) == before


@pytest.mark.parametrize("impl", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [*DECODERS, "gpt2"])
def test_generate_is_unchanged(family, impl):
    if (family, impl) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for gemma2's softcap")
    model = tiny_model(family)
    model.set_attn_implementation(impl)
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": mask,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = model.generate(ids, **options)
    with fastpt.fuse(model):
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
        assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def test_a_hook_inside_sends_its_block_to_the_original():
    model, ids, seen = tiny_model("llama"), tokens(1, 8), []
    expected = model(input_ids=ids).logits
    with fastpt.fuse(model) as handle:
        hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        model.model.layers[0].register_forward_hook(lambda *_: seen.append(0))  # around a block: no reason to fall back
        rows = {row.module: row.reason for row in handle.rows}
        assert rows["model.layers.1"] == "hook on mlp.up_proj"
        assert "model.layers.0" not in rows
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert seen == [0, 1]
        hook.remove()
        model(input_ids=ids)
        assert seen == [0, 1, 0]
        assert not any("layers.1" in row.module and row.reason for row in handle.rows)


def test_a_hook_inside_before_fusing_leaves_the_block_alone():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with fastpt.fuse(model) as handle:
        assert handle.reasons == {"model.layers.0": "hook on self_attn"}


def test_hooks_for_every_module_and_replaced_parts_run_the_original():
    model, ids = tiny_model("llama"), tokens(1, 8)
    with fastpt.fuse(model) as handle:
        seen = []
        hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        model(input_ids=ids)
        hook.remove()
        assert seen.count("LlamaMLP") == 2
        model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp)
        assert "model.layers.0" in {row.module for row in handle.rows if row.reason}
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_inner_outputs_are_given_when_asked_for(family):
    model, ids = tiny_model(family), tokens(2, 8)
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    with fastpt.fuse(model):
        got = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
        model(input_ids=ids)  # transformers' recorder stays, inert: the block is fused again
        again = model(input_ids=ids, output_hidden_states=True)
    assert len(got.attentions) == 2
    for name in ("attentions", "hidden_states"):
        for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.hidden_states[1], expected.hidden_states[1], rtol=1e-5, atol=1e-5)


def test_dense_masks_and_attention_dropout_take_transformers_path():
    model, ids = tiny_model("llama"), tokens(2, 8)
    dense = torch.rand(2, 1, 8, 8) > 0.3
    dense |= torch.eye(8, dtype=torch.bool)
    expected = model(input_ids=ids, attention_mask=dense).logits
    with fastpt.fuse(model) as handle:
        torch.testing.assert_close(model(input_ids=ids, attention_mask=dense).logits, expected)
        assert "dense mask" in next(p.fallback for p in handle.patches if p.fallback)
    dropping = tiny_model("llama", attention_dropout=0.5)
    with fastpt.fuse(dropping) as handle:
        dropping.train()
        assert (dropping(input_ids=ids).logits - dropping(input_ids=ids).logits).abs().max() > 1e-3
        assert "attention dropout 0.5" in handle.patches[0].fallback
        dropping.eval()
        torch.testing.assert_close(dropping(input_ids=ids).logits, dropping(input_ids=ids).logits, rtol=0, atol=0)
        assert handle.patches[0].fallback is None


def test_what_computes_something_else_is_left_alone_and_listed():
    class Doubled(nn.Module):  # the outline of LlamaMLP
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
            )  # fmt: skip

        def forward(self, x):
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model, ids = tiny_model("llama"), tokens(1, 8)
    model.model.layers[0].mlp = Doubled(model.model.layers[0].mlp)
    model.model.layers[1].extra = nn.Linear(2, 2)
    expected = model(input_ids=ids).logits
    with fastpt.fuse(model) as handle:
        assert "computes something else" in handle.reasons["model.layers.0"]
        assert handle.reasons["model.layers.1"] == "it also has extra"
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["granite", "olmo2", "cohere"])
def test_relatives_that_differ_are_right_too(model_type):
    from transformers import AutoConfig

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    extra = {"granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.1}}
    config = AutoConfig.for_model(model_type, **small, **extra.get(model_type, {}))
    model, ids = AutoModelForCausalLM.from_config(config), torch.randint(1, 64, (2, 9))
    model.train()
    expected = model(input_ids=ids, labels=ids).loss
    with fastpt.fuse(model) as handle:
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=1e-5, atol=1e-5)
        assert not any(isinstance(recipe, Recipe) for recipe in handle.recipes.values())
        assert handle.reasons["model.layers.0"]


def test_losses_that_are_not_next_token_prediction_stay():
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    config = AutoConfig.for_model("bart", vocab_size=64, d_model=32, dropout=0.0, decoder_start_token_id=0, **sizes)
    model, ids = AutoModelForSeq2SeqLM.from_config(config).train(), torch.randint(4, 64, (2, 9))
    expected = model(input_ids=ids, labels=ids).loss
    with fastpt.fuse(model) as handle:
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
        assert "decoder inputs" in handle.reasons["BartForConditionalGeneration"]
    model, ids = tiny_model("llama").train(), tokens(1, 9)
    with fastpt.fuse(model) as handle:
        model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
        assert model(input_ids=ids, labels=ids).loss == 42
        assert "a loss of its own" in {row.module: row.reason for row in handle.rows if row.reason}["lm_head"]


def test_a_copy_of_a_fused_model_runs_its_own_parts():
    model, ids = tiny_model("llama"), tokens(1, 8)
    with fastpt.fuse(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.9)
        got = twin(input_ids=ids).logits
        assert (got - model(input_ids=ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(twin(input_ids=ids).logits, got, rtol=1e-5, atol=1e-5)


def test_attention_alone_by_its_name():
    for family in ("llama", "gemma2", "bert"):
        model, ids = tiny_model(family), tokens(2, 12)
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("fastpt")
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert "forward" not in model.__dict__


@pytest.mark.parametrize("is_fused", [False, True])
def test_attention_sinks_of_gpt_oss(is_fused):
    """By its name and fused: logits and the gradients of sinks and projections, packed and with padding."""
    model, ids = tiny_model("gpt_oss", attn_implementation="eager").train(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 13:] = 0
    lengths = torch.tensor([0, 12, 20])
    documents = {"position_ids": torch.cat([torch.arange(n) for n in lengths.diff()])[None]}
    calls = [(ids, {"attention_mask": mask}, mask), (ids[:1], documents, mask[:1] * 0 + 1)]

    def run():
        found = []
        for given, extra, kept in calls:
            model.zero_grad()
            logits = model(input_ids=given, **extra).logits[kept.bool()]
            logits.square().mean().backward()
            found.append([logits, *(p.grad for n, p in model.named_parameters() if "self_attn" in n)])
        return found

    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.linspace(-2, 2, 4))
    expected = run()
    with fastpt.fuse(model) if is_fused else nullcontext():
        if not is_fused:
            model.set_attn_implementation("fastpt")
        with Calls() as called:
            got = run()
    assert called.found["fastpt::attention_sinks_backward"] == called.found["fastpt::attention"] == 4
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_explain_lists_every_part(capsys):
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = snapshot(model)
    rows = fastpt.explain(model)
    after = snapshot(model)
    assert all(after[what] == before[what] for what in before if what != "sys.modules")
    found = {(row.module.removeprefix("base_model.model."), row.op): row for row in rows}
    for part in [
        ("model.layers.1.input_layernorm", "rms_norm"), ("model.layers.1.self_attn.q_proj", "lora_linear"),
        ("model.layers.1.self_attn.k_proj", "lora_linear"), ("model.layers.1.self_attn.q_norm", "rms_norm"),
        ("model.layers.1.self_attn", "rope"), ("model.layers.1.self_attn", "attention"),
        ("model.layers.1.post_attention_layernorm", "add_rms_norm"), ("model.layers.1.mlp", "swiglu"),
        ("model.norm", "rms_norm"), ("model.embed_tokens", "embedding"),
        ("lm_head", "linear_cross_entropy"), ("lm_head", "token_stats"),
    ]:  # fmt: skip
        assert found[part].kernel in ("C++", "reference", "torch")
        assert not found[part].reason
    assert "model.layers.0-1.self_attn.q_proj" in capsys.readouterr().out


def test_explain_says_which_attention_kernel_a_gpu_runs_and_why(monkeypatch):
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_flash_attention, "missing", lambda: {"FlashAttention 4": "not installed"})
    serving.cache_clear()
    row = _attention("layer", "attention", weight, 128, None, 30.0)
    dropped = _attention("layer", "attention_dropout", weight, 128)
    sunk = _attention("layer", "attention", weight, 64, sinks=weight)
    serving.cache_clear()
    assert row == ("layer", "attention", "FlashAttention 3", "FlashAttention 4: not installed")
    assert dropped.kernel == "Triton"
    assert "not by the seed" in dropped.reason
    assert sunk.kernel == "Triton"
    assert "FlashAttention 3: no sinks" in sunk.reason


@pytest.mark.parametrize("is_tied", [False, True])
def test_trained_embeddings_get_the_gradient_of_the_rows_used(is_tied):
    model, ids = tiny_model("llama"), tokens(2, 9)
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    gradients = []
    for is_fused in (False, True):
        if is_fused:
            fastpt.fuse(model)
        for _ in range(2):  # adds up
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert gradients[1].any()


def test_embeddings_that_do_more_are_left_alone():
    model = tiny_model("llama")
    model.model.embed_tokens.scale_grad_by_freq = True
    (row,) = [row for row in fastpt.explain(model) if row.module == "model.embed_tokens"]
    assert "scale_grad_by_freq" in row.reason


def test_only_transformers_models_can_be_fused():
    with pytest.raises(ModelError, match="PreTrainedModel"):
        fastpt.fuse(nn.Linear(2, 2))
