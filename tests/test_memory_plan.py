"""The plan: what the trace counts is what a real step holds, what kernels declare is what they take, and limits are kept."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastpt
from fastpt.activations import set_policy
from fastpt.config import MethodConfig, build, parse_bytes
from fastpt.errors import ConfigError
from fastpt.memory_plan import Planner, batch_of, plan
from fastpt.models import quantised_in_place
from fastpt.nf4 import layers_of
from fastpt.objectives import make_objective
from fastpt.optim import make_optimizer
from fastpt.scorer import ModelScorer
from fastpt.skeleton import skeleton
from fastpt.tracing import LiveMemory, MemoryTrace, NothingComputed
from fastpt.trainer import train
from tests.runs import run_settings
from tests.tiny import tiny_model

MIB = 1 << 20


def test_the_trace_counts_what_is_alive_at_once():
    x = torch.ones(MIB)
    with NothingComputed(), MemoryTrace() as trace:
        a = x + 1
        b = a * 2
        del a
        c = b * 2
        del b, c
    assert trace.peak.total == 8 * MIB
    assert trace.live == 0


def test_autograd_sums_gradients_in_place():
    """As it does where no mode is watching: a weight that is used twice has two gradients at once, not three."""
    weight = torch.nn.Parameter(torch.ones(MIB))
    used = (weight * 2.0).sum() + (weight * 3.0).sum()
    with NothingComputed(), MemoryTrace() as trace:
        used.backward()
    assert trace.peak.total - 8 * MIB <= MIB
    assert trace.live == 4 * MIB


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_skeleton_is_the_model_but_for_its_memory(family, method):
    layers = {"num_hidden_layers": 4}
    if family == "gemma3":
        layers["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    real = tiny_model(family, **layers)
    made = skeleton(real.config, MethodConfig(name=method, rank=4), torch.float32)
    if method == "lora":
        real = fastpt.adapters.apply_method(real, MethodConfig(name="lora", rank=4))
    shapes = lambda model: {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}  # noqa: E731
    assert shapes(made) == shapes(real)
    storages = {p.untyped_storage().data_ptr() for n, p in made.named_parameters() if "layers." in n}
    assert len(storages) < sum("layers." in n for n, _ in made.named_parameters())
    assert real.config.num_hidden_layers == made.config.num_hidden_layers == 4


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_plan_of_a_skeleton_is_that_of_the_model(method, policy):
    """The same step, really computed on the real model, holds as much at its worst moment."""
    model = tiny_model("llama", num_hidden_layers=3)
    settings = {
        "model": model,
        "data": [],
        "method": {"name": method, "rank": 4},
        "max_length": 40,
        "precision": "fp32",
    }
    config = build({**settings, "activations": policy, "micro_batch_tokens": 80, "batch_tokens": 80})
    planner = Planner(config)
    found = planner.at(planner.wanted)
    if method == "qlora":
        quantised_in_place(model)
        held = [t for _, layer in layers_of(model) for t in (layer.weight, layer.absmax, layer.nested)]
        others = {id(p): p for p in model.parameters() if p.is_floating_point()}
        assert found.weights == sum(t.nbytes for t in [*held, *others.values()])
    model = fastpt.adapters.apply_method(model, config.method).train()
    with fastpt.fuse(model):
        set_policy(model, policy)
        optimizer = make_optimizer(model, config)
        with MemoryTrace() as trace:
            make_objective(config.objective).loss(ModelScorer(model), batch_of(80, 40, 272))[0].backward()
            optimizer.zero_grad()
    real = found.optimizer + trace.peak.total
    assert (
        abs(real - (found.peak - found.weights - found.adapters)) <= 0.02 * real
    )  # scalars count in a model this small


WORKSPACES = """
import json, torch, fastpt.ops
from fastpt.memory import forget_peak, peak_bytes, release_memory, resident_bytes
from fastpt.ops._library import OPS
torch.manual_seed(0)
device, bf16 = torch.device("cpu"), torch.bfloat16
def matrix(*shape, dtype=bf16): return torch.randn(*shape).to(dtype)
D, I, T, V = 1024, 8192, 512, 16384
x, weight, a, b = matrix(T, D), matrix(I, D), matrix(16, D, dtype=torch.float32), matrix(I, 16, dtype=torch.float32)
packed = fastpt.ops.nf4_quantize(weight)
low, grad = [matrix(T, 16, dtype=torch.float32)], [matrix(T, I)]
q, k = matrix(8192, 4, 64), matrix(8192, 2, 64)
ids, kept = torch.randint(0, V, (T,)), torch.arange(T)
adapted, low_rank = ([weight], [a], [b]), ([a.to(bf16)], [b.to(bf16)])
calls = {
    "lora_linear": (x, [weight], [None], [a], [b], [1.0], 0.0, []),
    "lora_linear_backward": (grad, x, *adapted, low, [1.0], 0.0, [], True, [False, False, True, True]),
    "trained": (grad, x, [weight], [None], [None], [matrix(T, 0).float()], [1.0], 0.0, [], True, [True] + 3 * [False]),
    "linear_cross_entropy": (x, matrix(V, D), ids, kept, -100, None, None, None, None, None, 1.0, 0.0, 0.0, False,
                             [True, True, False, False, False]),
    "nf4_linear": (x, [packed.rows], [packed.absmax], [packed.nested], [None], *low_rank, [1.0], 0.0, []),
    "nf4_linear_backward": (grad, x, [packed.rows], [packed.absmax], [packed.nested], *low_rank, [matrix(T, 16)], [1.0], 0.0,
                            [], True, [False, False, True, True]),
    "attention": (q, k, k, None, None, True, None, None, 0.125),
    "attention_backward": (q, q, k, k, q, matrix(8192, 4, dtype=torch.float32), None, None, True, None, None, 0.125),
}
for name, arguments in calls.items():
    op = OPS[{"trained": "lora_linear_backward"}.get(name, name)]
    outputs = op.overload(*arguments)  # compiled kernels stay
    flat = torch.utils._pytree.tree_leaves(outputs)
    out_bytes = sum(t.nbytes for t in flat)
    del outputs, flat
    release_memory()
    assert forget_peak(device)
    before = resident_bytes()
    op.overload(*arguments)
    print(json.dumps([name, op.workspace(*arguments), peak_bytes(device) - before - out_bytes]))
"""


def test_kernels_take_the_workspace_that_they_declare():
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # of two, one may do all the work and the other touch nothing
    done = subprocess.run([sys.executable, "-c", WORKSPACES], capture_output=True, text=True, check=True, env=one)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(told) == 8
    for name, declared, taken in told:
        assert abs(declared - taken) <= 0.05 * taken + MIB / 4, (name, declared / MIB, taken / MIB)


def planned(**settings):
    given = {"model": tiny_model("llama", num_hidden_layers=4), "method": "lora", "max_length": 64, "precision": "fp32"}
    return plan(**{**given, **settings})


def test_a_tighter_limit_takes_fewer_tokens_first_and_then_recomputes():
    free = planned()
    assert free.tokens == 2048
    assert planned(memory_limit=free.peak).tokens == 2048
    fewer = planned(memory_limit=free.peak - 1)
    assert (fewer.tokens, fewer.policy) == (1024, "keep")
    least = planned(micro_batch_tokens=64)
    tightest = planned(memory_limit=least.peak - 1)
    assert tightest.policy == "recompute"
    assert tightest.peak < least.peak
    assert "would take" in tightest.reason


def test_gradients_of_a_step_in_backward_never_exist_at_once():
    settings = {
        "method": "full",
        "optim": {"clip_norm": None},
        "max_length": 8,
        "micro_batch_tokens": 8,
        "batch_tokens": 8,
    }
    kept, gone = planned(**settings), planned(**{**settings, "optim": {"clip_norm": None, "in_backward": True}})
    assert gone.gradients == 0
    assert gone.peak < kept.peak - kept.gradients / 2


def test_moments_of_8_bits_are_planned():
    of = {name: planned(method="full", optim={"name": name}).optimizer for name in ("adamw", "adamw_8bit")}
    assert 0.2 < of["adamw_8bit"] / of["adamw"] < 0.6  # tensors of this model below 4096 values keep 32 bits


def test_what_is_given_is_not_chosen():
    free = planned()
    found = planned(memory_limit=free.peak - 1, micro_batch_tokens=2048)
    assert (found.tokens, found.policy) == (2048, "recompute")
    with pytest.raises(ConfigError, match="nothing fits; the least is"):
        planned(memory_limit=free.peak - 1, micro_batch_tokens=2048, activations="keep")


def test_a_full_run_that_does_not_fit_rounds_stochastically():
    settings = {"method": "full", "precision": "bf16", "model": tiny_model("llama").bfloat16(), "max_length": 32}
    least = min(
        planned(**settings, micro_batch_tokens=32, activations=one).peak for one in ("keep", "recompute", "offload")
    )
    found = planned(**settings, memory_limit=least - 1)
    assert (found.rounding, found.optimizer_name) == ("stochastic", "adamw")
    with pytest.raises(ConfigError, match="nothing fits"):
        planned(**settings, memory_limit=found.peak // 2, optim="adamw")


def test_a_full_run_that_fits_no_other_way_keeps_moments_of_8_bits():
    wide = tiny_model("llama", hidden_size=256, intermediate_size=512).bfloat16()
    settings = {"method": "full", "precision": "bf16", "model": wide, "max_length": 16, "micro_batch_tokens": 16}
    limit = planned(**settings, optim={"rounding": "stochastic"}).peak - MIB
    found = planned(**settings, memory_limit=limit)
    assert found.optimizer_name == "adamw_8bit"
    assert found.peak <= limit


def test_the_longest_row_fits_and_no_longer_one():
    limit, given = 16 * MIB, {"model": tiny_model("llama", max_position_embeddings=1 << 16), "activations": "keep"}
    longest = planned(**given, memory_limit=limit, micro_batch_tokens=64).longest
    at = lambda tokens: planned(**given, micro_batch_tokens=tokens, max_length=tokens).peak  # noqa: E731
    assert at(longest) <= 1.02 * limit
    assert at(int(1.1 * longest)) > limit


def test_a_run_under_a_limit_says_what_it_chose_and_what_it_took(tmp_path):
    run = train(**run_settings(tmp_path, memory_limit="1GiB", max_steps=2))
    assert run.metrics["predicted_peak_bytes"] < 1 << 30
    assert run.metrics["measured_peak_bytes"] > 0


def test_the_command_line_plans(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tmp_path / "model"}"\ndata = "none.jsonl"\nprecision = "fp32"\n')
    command = [sys.executable, "-m", "fastpt", "plan", str(config), "memory_limit=1GB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout
    assert "fits" in done.stdout


def test_sizes_are_read_as_people_write_them():
    assert [parse_bytes(text) for text in ("6GiB", "1.5 GB", "10", "2mb")] == [6 << 30, 1_500_000_000, 10, 2_000_000]
    with pytest.raises(ConfigError, match="memory_limit"):
        build({"model": "m", "data": "d", "memory_limit": "much"})


def test_live_memory_counts_a_storage_once():
    memory = LiveMemory()
    x = torch.zeros(MIB)
    memory.note_result(x)
    memory.note_result(x.view(2, -1))
    assert memory.live == 4 * MIB
