"""Decoding on the static cache: every family's greedy tokens, ragged prompts, stops, adapters, and when it is not served."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import fastpt
from fastpt.fusion.decode import Decoder
from fastpt.fusion.projection import NotFusable
from fastpt.generate import generate_tokens
from tests.helpers import needs_native
from tests.tiny import DECODERS, tiny_model

pytestmark = needs_native

NEW = 14  # past the tiny models' windows of 7 and past a block of 32 cached keys
LENGTHS = (11, 3, 27, 6, 1)


def prompts_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def by_transformers(model, prompts, stop=()):
    """Each prompt alone through model.generate."""
    made = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=list(stop) or None
        )
        made.append(out[0, len(prompt) :].tolist())
    return made


def with_adapter(model, **options):
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def assert_served(model, prompts):
    with fastpt.fuse(model) as handle:
        Decoder(handle, model, 1, max(map(len, prompts)) + NEW)


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_those_of_the_model(family, slots):
    model, prompts = tiny_model(family), prompts_of()
    assert_served(model, prompts)
    expected = by_transformers(model, prompts)
    assert generate_tokens(model, prompts, stop=[], max_new_tokens=NEW, batch_size=slots) == expected
    with fastpt.fuse(model):
        assert generate_tokens(model, prompts, stop=[], max_new_tokens=NEW, batch_size=slots) == expected


@pytest.mark.parametrize("family", DECODERS)
def test_sequences_end_at_their_stop_and_free_their_slot(family):
    model, prompts = tiny_model(family), prompts_of((4, 9, 2, 5, 7, 3))
    full = by_transformers(model, prompts)
    stop = [full[0][2], full[3][5]]
    expected = by_transformers(model, prompts, stop)
    assert len({len(tokens) for tokens in expected}) > 1
    assert generate_tokens(model, prompts, stop=stop, max_new_tokens=NEW, batch_size=2) == expected


def test_a_prompt_asked_several_times_is_computed_once(monkeypatch):
    """The groups of online RL: in one prefill, and in slots that free up while another still holds the prompt."""
    model, distinct = tiny_model("mistral"), prompts_of((40, 5, 33))
    prompts = [prompt for prompt in distinct for _ in range(5)]
    full = by_transformers(model, distinct)
    stop = [full[0][5], full[2][3]]
    expected = [tokens for tokens in by_transformers(model, distinct, stop) for _ in range(5)]
    computed, compute = [], Decoder._compute
    monkeypatch.setattr(Decoder, "_compute", lambda self, new, slots: computed.extend(new) or compute(self, new, slots))
    for slots in (2, 3, 15):
        computed.clear()
        assert generate_tokens(model, prompts, stop=stop, max_new_tokens=NEW, batch_size=slots) == expected
        assert len(computed) <= 4  # two prompts that change places are computed anew


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", DECODERS)
def test_adapters_are_read_unmerged(family, options):
    torch.manual_seed(0)
    prompts = prompts_of()
    plain = by_transformers(tiny_model(family), prompts)
    model = with_adapter(tiny_model(family), **options)
    assert_served(model, prompts)
    expected = by_transformers(model, prompts)
    assert expected != plain
    assert generate_tokens(model, prompts, stop=[], max_new_tokens=NEW, batch_size=3) == expected
    with model.disable_adapter():
        assert generate_tokens(model, prompts, stop=[], max_new_tokens=NEW, batch_size=3) == plain


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_bfloat16_chooses_what_the_model_finds_best_up_to_rounding(family, is_lora):
    torch.manual_seed(0)
    model, prompts = tiny_model(family).to(torch.bfloat16), prompts_of()
    if is_lora:
        model = with_adapter(model)
    assert_served(model, prompts)
    for prompt, tokens in zip(
        prompts, generate_tokens(model, prompts, stop=[], max_new_tokens=NEW, batch_size=4), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
            exact = model.float()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        model.bfloat16()
        best, chosen = logits.amax(-1), logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        spread = (logits - exact).abs().amax(-1)  # what bfloat16 costs the model itself on this prefix
        assert (best - chosen <= 2 * spread + torch.finfo(torch.bfloat16).eps * best.abs()).all()


def test_logits_after_a_prompt_and_after_steps_are_those_of_the_model():
    model, (first, second) = tiny_model("gemma2"), prompts_of((9, 30))
    with fastpt.fuse(model) as handle:
        decoder = Decoder(handle, model, 3, 50)
        logits = [decoder.prefill([first], [2])[0]]
        decoder.prefill([second], [0])
        more = [17, 203, 66]
        for i, token in enumerate(more):
            rows = decoder.step([token, 5 + i], [2, 0], [len(first) + i, len(second) + i])
            logits.append(rows[0])
    with torch.no_grad():
        expected = model(torch.tensor([first + more])).logits[0, len(first) - 1 :]
    torch.testing.assert_close(torch.stack(logits), expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen3").train()
    handle = fastpt.fuse(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    generate_tokens(model, prompts_of(), stop=[], max_new_tokens=3)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    handle.remove()
    generate_tokens(model, prompts_of(), stop=[], max_new_tokens=3)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model.training


def hook_a_block(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)


def hook_the_norm(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def hook_inside_a_block(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)


def scale_the_embedding(model):
    model.model.layers[0].register_forward_pre_hook(lambda _, args: None)


def move_the_tables(model):
    model.model.rotary_emb.rope_type = "dynamic"


@pytest.mark.parametrize(
    "change", [hook_a_block, hook_the_norm, hook_inside_a_block, scale_the_embedding, move_the_tables]
)
def test_what_steps_would_pass_by_is_not_served(change):
    model, prompts = tiny_model("llama"), prompts_of((4,))
    expected = by_transformers(model, prompts)
    with fastpt.fuse(model) as handle:
        change(model)
        with pytest.raises(NotFusable):
            Decoder(handle, model, 1, 20)
    if change is not move_the_tables:
        assert generate_tokens(model, prompts, stop=[], max_new_tokens=NEW) == expected


def test_a_block_that_is_not_recognised_is_not_served():
    model = tiny_model("llama")
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with fastpt.fuse(model) as handle, pytest.raises(NotFusable):
        Decoder(handle, model, 1, 20)


def test_autocast_is_not_served():
    model = tiny_model("llama")
    with (
        fastpt.fuse(model) as handle,
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(NotFusable, match="autocast"),
    ):
        Decoder(handle, model, 1, 20)
