"""decode_block and decode_logits against float64 truth: families' options, adapters, ragged rows, batches, threads."""

import pytest
import torch

from fastpt.ops import decode_block, decode_logits
from fastpt.ops.decode import (
    BlockWeights,
    _decode_block,
    _decode_logits,
    empty_cache,
    fill_cache,
    logits_reference,
    reference,
)
from tests.helpers import DTYPES, assert_not_worse, check_opcheck, needs_native

D, HEADS, KV_HEADS, HEAD_DIM, INNER = 48, 6, 2, 20, 72
SLOTS, CAPACITY = 20, 96

OPTIONS = {
    "plain": {},
    "bias": {"has_bias": True},
    "lora": {"rank": 3},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "gemma": {"norms": (0, 1, 2, 3, 4, 5), "activation": "gelu_tanh", "casts_first": False, "window": 40},
    "gelu": {"activation": "gelu", "rotary_dim": 8},
}


def case(rows, *, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, has_bias=False, rank=0, norms=(0, 4), window=None,
         softcap=None, activation="silu", casts_first=True, rotary_dim=None):  # fmt: skip
    """Float64 arguments of the op, with caches that hold a few tokens of every slot."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = [(q, D), (kv, D), (kv, D), (D, q), (INNER, D), (INNER, D), (D, INNER)]
    keys, values = (t.copy_(randn(*t.shape)) for t in empty_cache(SLOTS, kv_heads, CAPACITY, head_dim, randn(1)))
    angles = torch.rand(CAPACITY, (rotary_dim or head_dim) // 2, generator=generator).repeat(1, 2).double() * 6
    block = BlockWeights(
        weights=[randn(*shape) / shape[1] ** 0.5 for shape in shapes],
        biases=[randn(shape[0]) if has_bias else None for shape in shapes],
        lora_a=[(randn(rank, shape[1]) / shape[1] ** 0.5).float() if rank else None for shape in shapes],
        lora_b=[(randn(shape[0], rank) / rank**0.5).float() if rank else None for shape in shapes],
        scales=[0.5] * 7,
        norms=[1 + randn(head_dim if i in (1, 2) else D).float() / 3 if i in norms else None for i in range(6)],
        norm_eps=[1e-5] * 6,
        casts_first=casts_first, activation=activation, window=window, softcap=softcap, scale=head_dim**-0.5,
    )  # fmt: skip
    slots = torch.randperm(SLOTS, generator=generator)[:rows]
    positions = torch.randint(0, CAPACITY, (rows,), generator=generator)
    return [randn(rows, D), angles.cos(), angles.sin(), slots, positions, keys, values, block]


def cast(arguments, dtype):
    """The same in `dtype`, but for the tables, adapters and norms, which stay in float32 beside bfloat16."""
    x, cos, sin, slots, positions, keys, values, block = arguments
    wide = torch.promote_types(dtype, torch.float32)

    def to(tensors, dtype):
        return [None if t is None else t.to(dtype) for t in tensors]

    block = block._replace(
        weights=to(block.weights, dtype), biases=to(block.biases, dtype), lora_a=to(block.lora_a, wide),
        lora_b=to(block.lora_b, wide), norms=to(block.norms, wide),
    )  # fmt: skip
    return [
        x.to(dtype),
        cos.to(wide),
        sin.to(wide),
        slots,
        positions,
        keys.to(dtype).clone(),
        values.to(dtype).clone(),
        block,
    ]


def run(function, arguments):
    """Output and caches; the arguments' own caches stay as they are."""
    *head, keys, values, block = arguments
    keys, values = keys.clone(), values.clone()
    out = function(*head, keys, values, block)
    return out, keys, values


def by_reference(*arguments):
    return reference(*arguments[:-1], *arguments[-1])


def check(arguments, dtype):
    rounded = cast(arguments, dtype)
    exact = run(by_reference, cast(rounded, torch.float64))
    eager = run(by_reference, rounded)
    for what, a, b, c in zip(("output", "keys", "values"), run(decode_block, rounded), eager, exact, strict=True):
        assert_not_worse(a, b, c, what=what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("options", OPTIONS)
def test_not_worse_than_eager(options, rows, dtype):
    check(case(rows, **OPTIONS[options]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 64), (4, 2, 16), (9, 3, 64), (5, 1, 32), (8, 1, 128)]
)
def test_head_shapes(heads, kv_heads, head_dim, dtype):
    check(case(4, heads=heads, kv_heads=kv_heads, head_dim=head_dim), dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_at_any_thread_count(dtype):
    x, cos, sin, slots, positions, keys, values, block = cast(case(11, rank=2, has_bias=True), dtype)
    together = run(decode_block, [x, cos, sin, slots, positions, keys, values, block])[0]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            alone = [
                run(
                    decode_block, [x[i : i + 1], cos, sin, slots[i : i + 1], positions[i : i + 1], keys, values, block]
                )[0]
                for i in range(11)
            ]
            assert torch.equal(torch.cat(alone), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_filling_the_cache_is_what_steps_leave_there(dtype):
    x, cos, sin, _, _, keys, values, block = cast(case(1), dtype)
    steps = torch.randn(40, 1, D).to(dtype)
    for position, step in enumerate(steps):
        decode_block(step, cos, sin, torch.tensor([3]), torch.tensor([position]), keys, values, block)
    new_keys = keys[3, :, :2].transpose(1, 2).flatten(2)[..., :40].permute(2, 0, 1).clone()  # [T, Hkv, K]
    new_values = values[3, :, :40].transpose(0, 1).clone()
    other_keys, other_values = keys.clone(), values.clone()
    fill_cache(other_keys, other_values, 5, new_keys, new_values)
    arguments = [x, cos, sin, torch.tensor([3]), torch.tensor([40])]
    expected = decode_block(*arguments, keys, values, block)
    arguments[3] = torch.tensor([5])
    assert torch.equal(decode_block(*arguments, other_keys, other_values, block), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"), [(1, 48, 50), (2, 33, 129), (5, 64, 16), (19, 603, 77), (0, 8, 9)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits(rows, width, vocabulary, has_bias, dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(width)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, vocabulary))
    bias = torch.randn(vocabulary, generator=generator).to(dtype) if has_bias else None
    exact = logits_reference(hidden.double(), weight.double(), None if bias is None else bias.double())
    assert_not_worse(decode_logits(hidden, weight, bias), logits_reference(hidden, weight, bias), exact)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        *arguments, block = cast(case(2, rank=2, has_bias=True), dtype)
        check_opcheck(_decode_block, *arguments, *block)
        check_opcheck(_decode_logits, arguments[0], torch.randn(7, D, dtype=dtype), None)


@needs_native
def test_what_does_not_fit_is_named():
    x, cos, sin, slots, positions, keys, values, block = cast(case(2), torch.float32)
    with pytest.raises(IndexError, match=r"slots\[1\] is"):
        decode_block(x, cos, sin, slots[:1].repeat(2), positions, keys, values, block)
    with pytest.raises(IndexError, match=r"positions\[0\] is 96"):
        decode_block(x, cos, sin, slots, positions * 0 + 96, keys, values, block)
    weights = [w[:, 1:] if i == 3 else w for i, w in enumerate(block.weights)]
    with pytest.raises(RuntimeError, match=r"weights\[3\] is \[48, 119\]"):
        decode_block(x, cos, sin, slots, positions, keys, values, block._replace(weights=weights))
    with pytest.raises(RuntimeError, match=r"weight \[5, 47\]"):
        decode_logits(x, torch.randn(5, 47))
