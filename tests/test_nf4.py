"""Models on NF4 weights: bitsandbytes' checkpoints byte for byte, loading without it, training, resuming, merging."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastpt
from fastpt import models
from fastpt.adapters import NOTE
from fastpt.errors import ConfigError, ModelError
from fastpt.fusion.projection import NotFusable, Projection
from fastpt.nf4 import NF4Linear, can_quantise, dequantise_model, layers_of, to_state
from fastpt.ops import nf4_quantize
from tests.runs import run_settings
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model and its tokenizer. Rows are whole blocks: of 96 columns bitsandbytes 0.50.2 reads wrongly."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder, *, is_quantised=True):
    return models.load(
        str(folder), tokenizer=tiny_tokenizer(), dtype=torch.bfloat16, device=CPU, is_quantised=is_quantised
    ).model


def theirs(folder, *, nested=True, kind="nf4"):
    """The same model by transformers and bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None]).logits


def test_every_linear_layer_but_the_head_is_quantised(base):
    model = loaded(base)
    kinds = {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert len(kinds) == 14
    assert set(kinds.values()) == {NF4Linear}


def test_a_saved_model_is_theirs_byte_for_byte(base, tmp_path):
    loaded(base).save_pretrained(tmp_path / "ours")
    theirs(base).save_pretrained(tmp_path / "theirs")
    name = "model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("nested", [True, False])
def test_their_checkpoint_is_read_and_written_without_them(base, tmp_path, nested):
    model = theirs(base, nested=nested).train()  # in eval mode it packs its weights anew
    expected = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    code = f"""
import sys; sys.modules["bitsandbytes"] = None
import torch
from tests.test_nf4 import loaded, logits
model = loaded({str(tmp_path / "theirs")!r}, is_quantised=False)
torch.save(logits(model), {str(tmp_path / "logits")!r})
model.save_pretrained({str(tmp_path / "ours")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)
    written, read = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)


def test_other_formats_are_refused_by_name(base, tmp_path):
    theirs(base, kind="fp4").save_pretrained(tmp_path / "fp4")
    with pytest.raises(ModelError, match="4-bit fp4 of bitsandbytes; of its formats only NF4"):
        loaded(tmp_path / "fp4", is_quantised=False)
    loaded(base).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "ours/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised already"):
        loaded(tmp_path / "ours")
    layer = NF4Linear(nn.Linear(64, 4, device="meta"))
    state = {
        f"weight.{name}": value for name, value in to_state(nf4_quantize(torch.randn(4, 64)), torch.float32).items()
    }
    text = json.dumps({"quant_type": "nf4", "blocksize": 128, "dtype": "float32", "shape": [4, 64]}).encode()
    state["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ModelError, match="in blocks of 128 is not read"):
        layer.load_state_dict({"weight": torch.zeros(128, 1, dtype=torch.uint8), **state}, strict=False)


def test_a_layer_goes_through_state_dict_copies_and_casts():
    linear = nn.Linear(64, 6)
    layer, other = NF4Linear(linear), NF4Linear(nn.Linear(64, 6))
    layer.hold(nf4_quantize(linear.weight), torch.float32)
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, layer.nf4.dequantize(torch.float32), linear.bias)
    torch.testing.assert_close(layer(x), expected)
    other.load_state_dict(layer.state_dict())
    for one in (other, copy.deepcopy(layer), copy.deepcopy(layer).bfloat16().float().double().to("cpu")):
        assert torch.equal(one.nf4.dequantize(torch.float32), layer.nf4.dequantize(torch.float32))
        assert one.absmax.dtype == torch.uint8
        assert one.nested.dtype == torch.float32
    with pytest.raises(ModelError, match="does not fit a layer of 6 rows"):
        layer.hold(nf4_quantize(torch.randn(5, 64)), torch.float32)
    assert not can_quantise(nn.Linear(5, 4))


def test_one_weight_at_a_time_is_whole_while_loading(base, monkeypatch):
    from fastpt import nf4_loading

    alive, most = [], []

    def watched(weight, **options):
        import weakref

        alive.append(weakref.ref(weight))
        most.append(sum(one() is not None for one in alive))
        return nf4_quantize(weight, **options)

    monkeypatch.setattr(nf4_loading, "nf4_quantize", watched)
    loaded(base)
    assert len(alive) == 14
    assert max(most) <= 2  # the one that is quantised, and the last one until its name is taken


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_fused_is_the_dequantised_model_fused(base, source, is_lora):
    from peft import LoraConfig, get_peft_model

    plain = dequantise_model(loaded(base), torch.bfloat16)
    model = loaded(base) if source == "ours" else theirs(base)
    if is_lora:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model, plain = get_peft_model(model, config), get_peft_model(plain, config)
        adapters = {name: p for name, p in plain.named_parameters() if "lora_" in name}
        assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    for parameter in (p for one in (model, plain) for p in one.parameters() if p.dim() == 1):
        parameter.requires_grad_(False)
    with fastpt.fuse(model) as handle, fastpt.fuse(plain) as other:
        assert handle.reasons == other.reasons
        ops = [row.op for row in handle.rows]
        assert ops == [row.op.replace("lora_linear", "nf4_linear") for row in other.rows]
        assert torch.equal(logits(model), logits(plain))
        if is_lora:
            ids = torch.arange(3, 60)[None]
            for one in (model, plain):
                one(input_ids=ids, labels=ids).loss.backward()
            grads = [[p.grad for n, p in one.named_parameters() if "lora" in n] for one in (model, plain)]
            assert len(grads[0]) == 28
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dora_over_4_bits_stays_with_peft(base):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(theirs(base), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with pytest.raises(NotFusable, match="DoRA over a 4-bit weight"):
        Projection.read(layer, "up_proj")


def test_qlora_learns_and_resumes_bit_for_bit(base, tmp_path):
    changes = {"model": str(base), "method": {"name": "qlora", "rank": 4}, "precision": "bf16", "save_steps": 3}
    straight = fastpt.train(**run_settings(tmp_path / "a", **changes, keep_checkpoints=10))
    assert straight.history[-1]["loss"] < straight.history[0]["loss"]
    assert all(type(layer) is NF4Linear for _, layer in layers_of(straight.model))
    middle = straight.path / "checkpoints/step-00000003"
    assert (middle / NOTE).is_file()
    resumed = fastpt.train(**run_settings(tmp_path / "b", **changes, resume=middle))
    pairs = zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_qlora_run_is_read_back_on_its_4_bit_base(base, tmp_path):
    run = fastpt.train(**run_settings(tmp_path, model=str(base), method="qlora", precision="bf16"))
    read = fastpt.load_run(run.path, device="cpu", precision="bf16")
    assert len(list(layers_of(read.model))) == 14
    run.handle.remove()
    assert torch.equal(logits(run.model.eval()), logits(read.model))
    assert isinstance(read.generate("red one", max_new_tokens=3), str)


def test_merging_gives_a_plain_model_and_reports(base, tmp_path):
    run = fastpt.train(**run_settings(tmp_path, model=str(base), method="qlora", precision="bf16"))
    report = run.merge(tmp_path / "merged")
    assert report.top1 > 0.9
    assert 0 < report.max_logit_difference < 1
    assert len(list(layers_of(run.model))) == 14  # the live model is as it was
    merged = loaded(tmp_path / "merged", is_quantised=False)
    assert not list(layers_of(merged))
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    run.handle.remove()
    expected, got = logits(run.model.eval()).float(), logits(merged).float()
    assert (expected - got).abs().max() < 1
    base_alone = logits(loaded(base, is_quantised=False)).float()
    assert (expected - got).norm() < 0.2 * (expected - base_alone).norm()


def test_a_live_model_is_quantised_in_place_and_can_be_saved(base, tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    run = fastpt.train(**run_settings(tmp_path, model=model, method="qlora", precision="bf16", max_steps=1))
    assert len(list(layers_of(run.model))) == 14
    quantised = models.quantised_in_place(loaded(base, is_quantised=False))
    quantised.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved", is_quantised=False)), logits(quantised))


def test_a_live_adapter_is_not_quantised(base):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(loaded(base, is_quantised=False), LoraConfig(r=4, target_modules="all-linear"))
    models.quantised_in_place(model)
    kinds = {path.rpartition(".")[2]: type(module) for path, module in model.named_modules()}
    assert len(list(layers_of(model))) == 14
    assert kinds["base_layer"] is NF4Linear
    assert kinds["default"] is kinds["lm_head"] is nn.Linear


def test_parameters_are_counted_as_numbers(base):
    from fastpt.adapters import count_parameters

    quantised, plain = (count_parameters(loaded(base, is_quantised=is_quantised))[1] for is_quantised in (True, False))
    assert quantised == plain


@pytest.mark.parametrize(
    ("method", "said"),
    [("full", "which method 'full' cannot train"), ("dora", "whose norms DoRA would need")],
)
def test_methods_that_need_plain_weights_say_so(base, tmp_path, method, said):
    loaded(base).save_pretrained(tmp_path / "nf4")
    with pytest.raises(ConfigError, match=said):
        fastpt.train(**run_settings(tmp_path, model=str(tmp_path / "nf4"), method=method))


def test_an_init_from_the_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes a part out of the base's weights"):
        fastpt.train(**run_settings(tmp_path, method={"name": "qlora", "init": "pissa"}))
