"""A mixture's experts through grouped_linear: Qwen3-MoE, Mixtral and gpt-oss, in full and with PEFT's LoRA on the stacks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpt
from fastpt.fusion.experts import innermost, looks_like_experts
from tests.helpers import DTYPES, assert_not_worse
from tests.tiny import MIXTURES, tiny_model

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(family, *, is_lora=False, stacks=STACKS, **overrides):
    model = tiny_model(family, **overrides)
    if is_lora:
        config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=stacks)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return model.train()


def experts_of(model):
    """The first layer's, with its wrappers."""
    return next(m for m in model.modules() if looks_like_experts(innermost(m)[0]))


def run(experts, inputs, dtype):
    """Output and gradients of one module of experts in a dtype."""
    experts.to(dtype)
    x, indices, weights, grad = inputs
    x, weights = (t.to(dtype).requires_grad_() for t in (x, weights))
    parameters = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    y = experts(x, indices, weights)
    grads = torch.autograd.grad(y, [x, weights, *parameters.values()], grad.to(dtype), allow_unused=True)
    return dict(zip(["output", "x", "weights", *parameters], [y, *grads], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_not_worse_than_eager(family, is_lora, dtype):
    """Every second token goes to experts 0 and 2 and none to the last one, which is empty."""
    model = mixture(family, is_lora=is_lora)
    experts, count = experts_of(model), innermost(experts_of(model))[0].num_experts
    experts.to(dtype)  # all three see the same numbers
    indices = torch.stack([torch.randperm(count - 1)[:2] for _ in range(67)])
    indices[::2] = torch.tensor([0, 2])
    inputs = torch.randn(67, 64).to(dtype), indices, torch.rand(67, 2).to(dtype), torch.randn(67, 64).to(dtype)
    eager = run(experts, inputs, dtype)
    exact = run(experts, inputs, torch.float64)
    with fastpt.fuse(model):
        got = run(experts, inputs, dtype)
    assert set(got) == set(exact)
    for name, value in got.items():
        assert_not_worse(value, eager[name], exact[name], what=name)


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_model_and_removal(family, is_lora):
    model, ids = mixture(family, is_lora=is_lora), torch.randint(3, 250, (2, 9))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    config = innermost(experts_of(model))[0].config
    forwards = [m for m in model.modules() if "forward" in m.__dict__]
    loss, grads = step()
    with fastpt.fuse(model):
        assert config._experts_implementation == "fastpt"
        fused_loss, fused_grads = step()
    assert config._experts_implementation == "eager"
    assert [m for m in model.modules() if "forward" in m.__dict__] == forwards
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    for got, expected in zip(fused_grads, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(step()[0], loss)


def served(model):
    return {row.module.split("layers.0.")[-1]: row for row in fastpt.explain(model) if "layers.0." in row.module}


@pytest.mark.parametrize("is_lora", [False, True])
def test_explain_names_the_experts(is_lora):
    model = mixture("qwen3_moe", is_lora=is_lora)
    rows = served(model)
    assert [rows[f"mlp.{stack}"].op for stack in STACKS] == ["grouped_linear"] * 2
    assert rows["mlp.experts.act_fn"].op == "swiglu"
    assert not any(rows[f"mlp.{stack}"].reason for stack in STACKS)
    assert not any("lora_A" in name for name in rows)


def test_adapters_stay_apart_from_the_weights(monkeypatch):
    """PEFT's way of adding them is not taken; disabled, the weights serve alone; merged, they are not added twice."""
    model, ids = mixture("mixtral", is_lora=True).eval(), torch.randint(3, 250, (1, 8))

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = logits()
    with model.disable_adapter():
        without = logits()
    assert (expected - without).abs().max() > 1e-2
    with fastpt.fuse(model):
        for wrapper in (m for m in model.modules() if hasattr(m, "parameter_name")):
            monkeypatch.setattr(type(wrapper), "get_delta_factors", None)
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
        monkeypatch.undo()
        with model.disable_adapter():
            torch.testing.assert_close(logits(), without, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()


def test_adapters_added_after_fusing_are_served_and_said():
    model, ids = mixture("qwen3_moe"), torch.randint(3, 250, (1, 8))
    with fastpt.fuse(model):
        wrapped = get_peft_model(
            model, LoraConfig(r=2, target_modules=[], target_parameters=STACKS, init_lora_weights=False)
        )
        rows = served(model)
        got = wrapped(input_ids=ids).logits
    assert "fuse again" in rows["mlp.experts.down_proj"].reason
    torch.testing.assert_close(got, wrapped(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stacks", [STACKS[:1], STACKS[1:]])
def test_one_stack_with_adapters(stacks):
    model, ids = mixture("qwen3_moe", is_lora=True, stacks=stacks), torch.randint(3, 250, (1, 8))
    expected = model(input_ids=ids).logits
    with fastpt.fuse(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_with_a_hook_are_left_alone():
    model = mixture("qwen3_moe")
    experts_of(model).register_forward_hook(lambda *_: None)
    with fastpt.fuse(model):
        assert innermost(experts_of(model))[0].config._experts_implementation == "eager"
        assert "hook" in served(model)["mlp.experts"].reason
