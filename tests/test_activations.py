"""Kept, computed again or moved away: the same bits, less memory, and nothing left behind."""

import copy
import errno
import gc
import os

import pytest
import torch

import fastpt
from fastpt import activations
from fastpt.activations import Disk, Offload, set_policy
from fastpt.errors import TrainingError
from tests.fusion.test_blocks import adapted, step, tokens
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def everything_is_offloaded(monkeypatch):
    monkeypatch.setattr(activations, "SMALLEST", 1)


def assert_equal(got, expected):
    assert len(got) == len(expected) > 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("policy", ["recompute", "offload"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
@pytest.mark.parametrize("adapter", ["bare", "lora"])
def test_a_policy_gives_the_same_bits(family, adapter, policy):
    model, ids = adapted(family, adapter), tokens(2, 20)
    with fastpt.fuse(model):
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        assert set_policy(model, policy) == 2
        assert_equal(step(model, input_ids=ids, labels=ids, use_cache=False), expected)


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_dropout_is_drawn_once(policy):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_dropout=0.4, target_modules="all-linear", init_lora_weights=False)
    model, ids = get_peft_model(tiny_model("llama"), config), tokens(1, 30)
    with fastpt.fuse(model):
        torch.manual_seed(3)
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        set_policy(model, policy)
        torch.manual_seed(3)
        assert_equal(step(model, input_ids=ids, labels=ids, use_cache=False), expected)


def test_recomputing_under_autocast_forms_the_same_products():
    model, ids = adapted("llama", "lora"), tokens(1, 20)
    with fastpt.fuse(model):
        results = []
        for policy in ("keep", "recompute"):
            set_policy(model, policy)
            model.train().zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            results.append([loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert_equal(*results)


def test_recomputing_saves_the_input_alone():
    model, ids, sizes = adapted("llama", "lora"), tokens(2, 40), {}
    with fastpt.fuse(model):
        for policy in ("keep", "recompute"):
            saved = {}
            set_policy(model, policy)
            weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
            pack = lambda t, saved=saved: saved.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                model.train()(input_ids=ids, labels=ids, use_cache=False)
            sizes[policy] = sum(size for place, size in saved.items() if place not in weights)
    assert sizes["recompute"] < sizes["keep"] / 3


def test_offloading_writes_to_a_file_without_a_name_and_gives_it_back(tmp_path):
    model, ids, offload = adapted("llama", "lora"), tokens(2, 20), Offload(tmp_path)
    with fastpt.fuse(model):
        set_policy(model, "offload", offload=offload)
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        disk = offload._disk
        assert os.listdir(tmp_path) == []
        assert disk.end > 0
        assert given_back(disk) == 0
        loss.backward()
        del loss
        assert given_back(disk) == disk.end
        before = disk.end
        step(model, input_ids=ids, labels=ids, use_cache=False)
        assert disk.end == before  # used again


def given_back(disk: Disk) -> int:
    gc.collect()
    return sum(size * len(places) for size, places in disk.free.items())


def test_nothing_is_moved_where_there_is_no_backward(tmp_path):
    model, ids, offload = tiny_model("llama"), tokens(1, 20), Offload(tmp_path)
    with fastpt.fuse(model), torch.no_grad():
        set_policy(model, "offload", offload=offload)
        model.train()(input_ids=ids)
        assert offload._disk is None


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_a_kept_graph_can_be_used_twice_and_another_not(policy):
    model, ids = adapted("llama", "lora"), tokens(1, 20)
    with fastpt.fuse(model):
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        set_policy(model, policy)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        assert_equal([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None], expected)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("policy", ["recompute", "offload"])
def test_two_graphs_of_one_model_do_not_know_of_each_other(policy):
    model, first, second = adapted("llama", "lora"), tokens(1, 20), tokens(1, 20)
    with fastpt.fuse(model):
        expected = [step(model, input_ids=ids, labels=ids, use_cache=False)[1:] for ids in (first, second)]
        set_policy(model, policy)
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (first, second)]
        for loss, gradients in zip(losses, expected, strict=True):
            model.zero_grad()
            loss.backward()
            assert_equal([p.grad for p in model.parameters() if p.grad is not None], gradients)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path, monkeypatch):
    model, ids, offload = adapted("llama", "lora"), tokens(1, 20), Offload(tmp_path)
    with fastpt.fuse(model):
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        set_policy(model, "offload", offload=offload)
        with monkeypatch.context() as patch:

            def no_room(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(os, "pwrite", no_room)
            with pytest.raises(TrainingError, match="No space left on device"):
                step(model, input_ids=ids, labels=ids, use_cache=False)
        assert given_back(offload._disk) == offload._disk.end
        assert_equal(step(model, input_ids=ids, labels=ids, use_cache=False), expected)


def test_a_copy_of_the_model_has_its_own_weights_in_mind():
    model, ids = adapted("llama", "lora"), tokens(1, 20)
    with fastpt.fuse(model):
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        set_policy(model, "offload")
        twin = copy.deepcopy(model)
        layers = [m for m in twin.modules() if hasattr(m, "gradient_checkpointing") and activations._is_layer(m)]
        assert all(layer._gradient_checkpointing_func.layer() is layer for layer in layers)
        assert_equal(step(twin, input_ids=ids, labels=ids, use_cache=False), expected)


@pytest.mark.gpu
def test_offloading_from_a_gpu_gives_the_same_bits():
    model, ids = adapted("llama", "lora").cuda(), tokens(2, 200).cuda()
    with fastpt.fuse(model):
        expected = step(model, input_ids=ids, labels=ids, use_cache=False)
        set_policy(model, "offload")
        for _ in range(3):
            assert_equal(step(model, input_ids=ids, labels=ids, use_cache=False), expected)
