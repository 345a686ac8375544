"""Every differentiable op at 1, 2 and 3 threads: within the error rule, and the same bits when it is run again."""

import pytest
import torch
import torch.nn.functional as F

from fastpt import ops
from tests.helpers import DTYPES, check_against_eager, run_with_grads
from tests.ops import (
    test_attention,
    test_layer_norm,
    test_linear_cross_entropy,
    test_linear_divergence,
    test_lora_linear,
    test_rms_norm,
    test_rope,
    test_token_stats,
)

TOKENS = 1300  # several tasks for every kernel, the last one shorter


def leaves(*shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def activation():
    return leaves((TOKENS, 96), (TOKENS, 96))


def linear_group_as_layers(x, *weights):
    return tuple(ops.linear_group(x, [ops.Layer(weight) for weight in weights]))


def attention_case():
    lengths = test_attention.cu(700, 1, 599)
    options = {"cu_seqlens_q": lengths}
    return (
        lambda *qkv: ops.attention(*qkv, **options),
        lambda *qkv: test_attention.eager(*qkv, **options),
        test_attention.inputs(TOKENS, 3, 1, 32),
    )


def head_case(op, eager):
    *inputs, targets = test_linear_cross_entropy.make(TOKENS, 64, 700)
    return lambda h, w, b: op(h, w, targets, bias=b), lambda h, w, b: eager(h, w, b, targets), inputs


def divergence_case():
    inputs, teacher, _ = test_linear_divergence.make(TOKENS, 64, 700)
    parts = torch.arange(TOKENS).split(170)  # a sum each: of a single one it is luck which rounding comes nearer

    def op(h, w, b):
        theirs = ops.TeacherHead(*(x.to(w.dtype) for x in teacher))
        return torch.stack([ops.linear_divergence(h, w, theirs, kept, bias=b, beta=0.5) for kept in parts])

    def eager(h, w, b):
        theirs = [x.to(w.dtype) for x in teacher]
        return torch.stack([test_linear_divergence.eager(h, w, b, theirs, kept, beta=0.5) for kept in parts])

    return op, eager, inputs


def cross_entropy_case():
    targets = torch.randint(300, (TOKENS,))
    return (
        lambda z: ops.cross_entropy(z, targets, reduction="none"),
        lambda z: F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets, reduction="none"),
        leaves((TOKENS, 300)),
    )


def lora_swiglu_case():
    def op(x, *tensors):
        return ops.lora_swiglu(x, *(ops.Layer(weight) for weight in tensors))

    def eager(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    return op, eager, leaves((TOKENS, 64), (96, 64), (96, 64))


def rope_case():
    cos, sin = test_rope.tables(TOKENS, 32)

    def at(function):
        return lambda q, k: function(q, k, cos.to(q.dtype), sin.to(q.dtype))

    return at(ops.rope), at(test_rope.reference), test_rope.heads(TOKENS, 3, 1, 32)


def stats(*args, **options):
    return tuple(ops.token_stats(*args, **options))[:3]


# op -> itself, eager PyTorch, inputs
CASES = {
    "add_layer_norm": lambda: (test_layer_norm.fused_add, test_layer_norm.eager_add, test_layer_norm.add_leaves((TOKENS, 96))),
    "add_rms_norm": lambda: (
        test_rms_norm.fused_add("llama"), test_rms_norm.eager_add("llama"), leaves((TOKENS, 96), (TOKENS, 96), (96,))
    ),
    "attention": attention_case,
    "bias_gelu": lambda: (ops.bias_gelu, lambda x, b: F.gelu(x + b), leaves((TOKENS, 96), (96,))),
    "cross_entropy": cross_entropy_case,
    "embedding": lambda: (ops.embedding, F.embedding, [torch.randint(300, (TOKENS,)), *leaves((300, 96))]),
    "geglu": lambda: (ops.geglu, lambda g, u: F.gelu(g, approximate="tanh") * u, activation()),
    "layer_norm": lambda: (test_layer_norm.fused, test_layer_norm.eager, test_layer_norm.leaves((TOKENS, 96))),
    "linear_cross_entropy": lambda: head_case(ops.linear_cross_entropy, test_linear_cross_entropy.eager),
    "linear_divergence": divergence_case,
    "linear_group": lambda: (
        linear_group_as_layers, lambda x, *ws: tuple(F.linear(x, w) for w in ws), leaves((TOKENS, 64), (96, 64), (40, 64))
    ),
    "lora_linear": lambda: (test_lora_linear.op, test_lora_linear.eager, test_lora_linear.make((TOKENS,), 64, 96, 16)),
    "lora_swiglu": lora_swiglu_case,
    "rms_norm": lambda: (test_rms_norm.fused("llama"), test_rms_norm.eager("llama"), leaves((TOKENS, 96), (96,))),
    "rope": rope_case,
    "swiglu": lambda: (ops.swiglu, lambda g, u: F.silu(g) * u, activation()),
    "token_stats": lambda: head_case(stats, test_token_stats.eager),
}  # fmt: skip
# Their own tests hold them to equal bits at 1, 2 and 3 threads; most have no gradients.
ELSEWHERE = {
    "adamw",
    "grad_norm",
    "decode_block",
    "decode_logits",
    "cross_entropy_and_gradient",
    "Layer",
    "TokenStats",
    "TeacherHead",
}
ELSEWHERE |= {"NF4Weight", "nf4_quantize", "nf4_dequantize", "nf4_linear", "adamw_8bit", "dora_norm", "grouped_linear"}


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_not_worse_than_eager_and_the_same_again(name, dtype, threads):
    op, eager, inputs = CASES[name]()
    check_against_eager(op, eager, inputs, dtype=dtype)
    first, second = (run_with_grads(op, inputs, None, dtype) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_no_op_is_left_out():
    assert CASES.keys() | ELSEWHERE == set(ops.__all__)
