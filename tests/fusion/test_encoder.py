"""A fused encoder computes what the unfused one does, on real tokens alone: outputs, gradients, dropout, adapters, trainers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import fastpt
from fastpt.fusion.encoder import EncoderBlock, EncoderCall, LayerNorm, encoder_block
from fastpt.fusion.encoder_recipe import EncoderRecipe
from fastpt.fusion.head import hidden_states
from fastpt.fusion.layout import Layout
from fastpt.fusion.pieces import Linears
from fastpt.ops import Layer
from tests.helpers import assert_not_worse
from tests.tiny import ENCODERS, tiny_model, tiny_tokenizer

BERT_DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


def padded_batch(rows=4, length=20):
    """Rows padded on the right, within and not at all, with labels."""
    ids, mask = torch.randint(3, 250, (rows, length)), torch.ones(rows, length, dtype=torch.long)
    mask[1, 13:] = 0
    mask[2, 3:] = 0
    mask[3, 6:9] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}


def step(model, **batch):
    """Loss and gradients of one training step, by name."""
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def is_key_bias(name):
    """The softmax does not see a key's bias: its gradient is 0 up to rounding."""
    return "bias" in name and ("key" in name or "k_lin" in name)


def assert_fused(handle, blocks=2):
    assert not handle.reasons
    assert not [patch.fallback for patch in handle.patches if patch.fallback]
    assert sum(isinstance(recipe, EncoderRecipe) for recipe in handle.recipes.values()) == blocks
    assert len(handle.stacks) == 1


def assert_same(got, expected, tolerance=5e-6):
    assert list(got) == list(expected)
    for name, value in expected.items():
        scale = 1e-2 if is_key_bias(name) else value.norm()
        assert (got[name] - value).norm() <= tolerance * scale, name


@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@pytest.mark.parametrize("family", ENCODERS)
def test_losses_and_gradients_are_those_of_the_unfused_model(family, adapter):
    model, batch = tiny_model(family), padded_batch()
    if adapter is not None:
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, use_dora=adapter == "dora", init_lora_weights=False, target_modules="all-linear"
        )  # fmt: skip
        model = get_peft_model(model, config)
    expected = step(model, **batch)
    with fastpt.fuse(model) as handle:
        got = step(model, **batch)
        assert_fused(handle)
    assert_same(got, expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_layers_see_real_tokens_alone(family, monkeypatch):
    model, batch, seen = tiny_model(family), padded_batch(), []
    with fastpt.fuse(model) as handle:
        forward = Linears.forward
        monkeypatch.setattr(Linears, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert_fused(handle)
    assert set(seen) == {int(batch["attention_mask"].sum())}
    assert len(seen) == 8
    assert hidden.shape == (4, 20, 64)
    assert torch.equal(hidden[1, 13:], torch.zeros(7, 64))


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_changes_nothing(family):
    model, batch = tiny_model(family), padded_batch()
    longer = {
        "input_ids": F.pad(batch["input_ids"], (0, 9), value=7),
        "attention_mask": F.pad(batch["attention_mask"], (0, 9)),
    }
    plain = {name: batch[name] for name in longer}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fastpt.fuse(model):
            short, long = (model.base_model(**b).last_hidden_state for b in (plain, longer))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(long[:, :20], short)


def test_padding_on_the_left_is_kept_where_a_pooler_reads_it():
    model, batch = tiny_model("bert"), padded_batch()
    batch["attention_mask"][2] = batch["attention_mask"][2].flip(0)
    expected = step(model, **batch)
    with fastpt.fuse(model) as handle:
        got = step(model, **batch)
        assert [p.fallback for p in handle.patches if p.fallback] == [
            "padding on the left, where a pooler would read it"
        ]
    assert_same(got, expected)


@pytest.mark.parametrize("family", ENCODERS)
def test_packed_documents_are_as_if_alone(family):
    model, lengths = tiny_model(family), [9, 1, 14]
    ids = torch.randint(3, 250, (sum(lengths),))
    first = 1 if family == "roberta" else 0  # behind its pad id 0
    positions = torch.cat([torch.arange(n) for n in lengths]) + first
    cu_seqlens = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    alone = torch.cat([model.base_model(part[None]).last_hidden_state[0] for part in ids.split(lengths)])
    with fastpt.fuse(model) as handle:
        packed = hidden_states(model, ids, position_ids=positions, cu_seqlens=cu_seqlens, max_seqlen=14)
        assert_fused(handle)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_bfloat16_is_no_worse_than_unfused(family, is_autocast):
    batches = [padded_batch(8, 24) for _ in range(4)]  # one alone compares two numbers that chance picks
    exact, model = tiny_model(family).double(), tiny_model(family)
    rounded = {name: p.to(torch.bfloat16) if p.is_floating_point() else p for name, p in exact.state_dict().items()}
    exact.load_state_dict(rounded)
    model.load_state_dict(rounded)
    if not is_autocast:
        model.to(torch.bfloat16)

    def steps(of):
        found = [step(of, **batch) for batch in batches]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    truth = steps(exact)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        eager = steps(model)
        with fastpt.fuse(model) as handle:
            got = steps(model)
            assert_blocks_fused(handle)
            again = steps(model)
    assert all(torch.equal(got[name], again[name]) for name in got)
    names = [name for name in truth if name != "loss" and not is_key_bias(name)]
    if (
        is_autocast
    ):  # float32 gradients of bfloat16 products: half an ulp of theirs is no floor, so all of them together
        ours, theirs = (
            torch.stack([(x[n] - truth[n]).norm() / truth[n].norm() for n in names]).norm() for x in (got, eager)
        )
        assert ours <= 1.5 * theirs
    else:
        for name in names:
            assert_not_worse(got[name], eager[name], truth[name], what=name)


def assert_blocks_fused(handle):
    """Under autocast the norm of the embeddings runs as it is."""
    fallen = [p.fallback for p in handle.patches if p.fallback and type(p.module) is not torch.nn.LayerNorm]
    assert not fallen


def test_dropout_drops_in_training_only_and_by_the_seed():
    model, batch = tiny_model("bert", **BERT_DROPOUT), padded_batch()
    evaluated = model(**batch).logits
    with fastpt.fuse(model) as handle:
        torch.testing.assert_close(model.eval()(**batch).logits, evaluated, rtol=1e-5, atol=1e-5)
        torch.manual_seed(1)
        first, second = step(model, **batch), step(model, **batch)
        assert_fused(handle)
        torch.manual_seed(1)
        again = step(model, **batch)
        assert {"attention_dropout"} <= {row.op for row in handle.rows}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (first["loss"] - second["loss"]).abs() > 1e-4


def test_dropout_has_the_unfused_models_distribution():
    model, batch = tiny_model("bert", **BERT_DROPOUT), padded_batch()
    model.train()

    def moments():
        with torch.no_grad():
            logits = torch.stack([model(**batch).logits for _ in range(400)])
        return logits.mean(0), logits.std(0)

    mean, spread = moments()
    with fastpt.fuse(model):
        fused_mean, fused_spread = moments()
    assert (fused_mean - mean).abs().max() < 5 * spread.max() / 400**0.5
    torch.testing.assert_close(fused_spread, spread, rtol=0.25, atol=0)


def test_gradients_under_dropout_are_those_of_the_masks_that_forward_drew():
    width, inner, lengths = 8, 12, [3, 1, 5]
    shapes = [(width, width), (width,)] * 4 + [(inner, width), (inner,), (width, inner), (width,)] + [(width,)] * 4
    leaves = [torch.randn(sum(lengths), width).double(), *(torch.randn(s).double() / 2 for s in shapes)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = Layout(1, sum(lengths), torch.device("cpu"), causal=False, cu_seqlens=(cu_seqlens, cu_seqlens))
    call = EncoderCall(layout, 0.5, 4, dropout_p=0.3, seed=2**40 + 3)

    def block(x, *p):
        layers = [Layer(p[i], p[i + 1]) for i in range(0, 12, 2)]
        return encoder_block(x[None], EncoderBlock(
            Linears(tuple(layers[:3])), Linears((layers[3],)), LayerNorm(p[12], p[13], 1e-5, 0.3, 5),
            Linears((Layer(p[8]),)), p[9], "gelu", Linears((layers[5],)), LayerNorm(p[14], p[15], 1e-5, 0.3, 2**33),
        ), call)  # fmt: skip

    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(block, leaves)
    grad = torch.randn(1, sum(lengths), width).double()
    exact = torch.autograd.grad(block(*leaves), leaves, grad)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    native = torch.autograd.grad(block(*single), single, grad.float())
    for i, (a, b) in enumerate(zip(native, exact, strict=True)):
        if i != 4:  # the key's bias
            assert (a - b).norm() <= 1e-5 * b.norm(), i


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_replays_dropout(use_reentrant):
    model, batch = tiny_model("bert", **BERT_DROPOUT), padded_batch()
    with fastpt.fuse(model) as handle:
        torch.manual_seed(1)
        expected = step(model, **batch)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(1)
        got = step(model, **batch)
        assert_fused(handle)
    assert_same(got, expected)


def test_hooks_and_inner_outputs_fall_back():
    model, batch, shapes = tiny_model("bert"), padded_batch(), []
    expected = model(**batch, output_hidden_states=True)
    layers = model.bert.encoder.layer
    with fastpt.fuse(model) as handle:
        got = model(**batch, output_hidden_states=True)
        assert [h.shape for h in got.hidden_states] == [h.shape for h in expected.hidden_states]
        for place in (layers[1], layers[1].intermediate.dense):  # around a block, inside of one
            hook = place.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
            torch.testing.assert_close(model(**batch).logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert shapes == [(4, 20)]
            assert any("hook" in row.reason for row in handle.rows)
            shapes.clear()
            hook.remove()
        model(**batch)
        assert_fused(handle)
    assert handle.patches == []


def test_a_block_that_computes_something_else_is_left_alone():
    model, batch = tiny_model("bert"), padded_batch()
    block = model.bert.encoder.layer[1]
    block.intermediate.register_forward_pre_hook(lambda *_: None)
    kind = type(model.bert.encoder.layer[0])
    other = type("Scaled", (kind,), {"forward": lambda self, *a, **k: 1.5 * kind.forward(self, *a, **k)})
    model.bert.encoder.layer[0].__class__ = other
    expected = model(**batch).logits
    with fastpt.fuse(model) as handle:
        assert "computes something else" in handle.reasons["bert.encoder.layer.0"]
        assert handle.reasons["bert.encoder.layer.1"] == "hook on intermediate"
        assert not handle.stacks
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11's dynamo asserts on the NamedTuple of a block")
def test_a_fused_encoder_compiles():
    model, batch = tiny_model("bert"), padded_batch()
    expected = step(model, **batch)
    torch._dynamo.reset()
    with fastpt.fuse(model):
        got = step(torch.compile(model, backend="aot_eager"), **batch)
    assert_same({n.removeprefix("_orig_mod."): v for n, v in got.items()}, expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer_on_rows_of_many_lengths(bf16, tmp_path):
    texts = ["a b", "how do i do this", "no", "a longer line of text, to be padded", "why", "the sky is blue today"]
    rows = Dataset.from_list(
        [{**tiny_tokenizer()(text), "labels": i % 3} for i, text in enumerate(texts * 4)]
    )  # fmt: skip

    def losses(fuses):
        torch.manual_seed(0)
        model = tiny_model("bert")
        handle = fastpt.fuse(model) if fuses else None
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=6, learning_rate=1e-3, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=bf16,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorWithPadding(tiny_tokenizer()))
        trainer.train()
        if handle is not None:
            assert_blocks_fused(handle)
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return torch.tensor([*found, trainer.evaluate(rows)["eval_loss"]])

    torch.testing.assert_close(losses(True), losses(False), rtol=3e-2 if bf16 else 1e-4, atol=1e-4)
