"""nf4 bit for bit against bitsandbytes' CPU backend: dtypes, odd sizes, layouts, zero and non-finite blocks, nested scales."""

import pytest
import torch

from fastpt.ops import NF4Weight, nf4_dequantize, nf4_quantize
from fastpt.ops.nf4 import CODE, SCALE_MAP, dequantize, quantize
from tests.helpers import check_compiles, check_opcheck

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of a whole number of blocks; an odd end; less than a block; the last block of scales partly filled, and more than one
SHAPES = [(64, 64), (3, 43), (1,), (127, 2), (2, 3, 5), (300, 130), (1024, 576)]
REFERENCE = "CompositeExplicitAutograd"


@pytest.fixture(autouse=True)
def oracle_on_the_cpu():
    """On GPUs bitsandbytes finds the nearest of a nested scale's codes, without the steps of its CPU kernel."""
    with torch.device("cpu"):
        yield


def values(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(*shape[:-1], 1, generator=generator) + 0.01
    return (torch.randn(shape, generator=generator) * scales / 20).to(dtype)


def their_nested(state):
    return torch.cat([state.state2.code, state.offset[None], state.state2.absmax])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_the_numbers_are_theirs():
    assert torch.equal(CODE, functional.get_4bit_type("nf4", "cpu"))
    assert torch.equal(SCALE_MAP, functional.create_dynamic_map())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_and_dequantize_are_theirs(shape, dtype, nested):
    weight = values(shape, dtype)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    ours = nf4_quantize(weight, nested=nested)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert same_bits(ours.absmax, state.absmax)
    if nested:
        assert same_bits(ours.nested, their_nested(state))
    for out in DTYPES:
        state.dtype = out
        assert same_bits(nf4_dequantize(ours, out).reshape(-1), functional.dequantize_4bit(packed, state).reshape(-1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_reference(dtype, nested):
    for shape in [*SHAPES, (64, 96)]:  # the last as theirs was meant: 0.50.2 takes the wrong scales in rows of 96
        weight, mapped = values(shape, dtype), SCALE_MAP if nested else None
        arguments = weight, mapped
        ours = quantize(*arguments)
        for a, b in zip(ours, run_reference(quantize, *arguments), strict=True):
            assert same_bits(a, b)
        stored = *ours[:2], ours[2] if nested else None
        for out in DTYPES:
            a, b = dequantize(*stored, shape, out), run_reference(dequantize, *stored, shape, out)
            assert same_bits(a, b)


def run_reference(op, *arguments):
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, REFERENCE))
    return op.redispatch(keys, *arguments)


def test_every_code_comes_back_and_is_the_nearest():
    exact = torch.linspace(-1, 1, 4097, dtype=torch.float64)
    blocks = torch.cat([exact.float().view(-1, 1).expand(-1, 63), torch.ones(4097, 1)], 1)  # of scale 1
    found = nf4_dequantize(nf4_quantize(blocks, nested=False), torch.float32)[:, 0]
    distances = (exact[:, None] - CODE.double()).abs()
    assert torch.equal((exact - found).abs(), distances.min(1).values)
    assert set(found.tolist()) == set(CODE.tolist())


def test_midpoints_go_down():
    middle = (CODE[:-1] + CODE[1:]) / 2
    block = torch.cat([middle, torch.ones(49)])[None]
    packed, _ = functional.quantize_4bit(block, quant_type="nf4")
    ours = nf4_quantize(block, nested=False)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(nf4_dequantize(ours, torch.float32)[0, :15], CODE[:15])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("end", [0, 5])  # whole blocks are divided in another way than a rest
def test_zero_and_tiny_blocks_are_theirs(end, nested):
    weight = torch.zeros(4 * 64 + end)
    weight[64:128] = 1e-42
    weight[-5:] = torch.tensor([0.0, 1e-40, -1e-40, 0.0, 0.0])
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    ours = nf4_quantize(weight, nested=nested)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert same_bits(ours.absmax, state.absmax)
    assert same_bits(nf4_dequantize(ours, torch.float32), functional.dequantize_4bit(packed, state).reshape(-1))


@pytest.mark.parametrize("place", [3, 200, 258])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_block_nan(bad, place):
    weight = values((259,))
    weight[place] = bad
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    ours = nf4_quantize(weight, nested=False)
    assert torch.equal(ours.packed, packed.reshape(-1))
    found = nf4_dequantize(ours, torch.float32)
    theirs = functional.dequantize_4bit(packed, state).reshape(-1)
    assert torch.equal(found.isnan(), theirs.isnan())
    block = torch.arange(259) // 64 == place // 64
    assert not found[block].isfinite().any()
    assert found[~block].isfinite().all()
    everything = nf4_dequantize(nf4_quantize(weight), torch.float32)
    assert not everything.isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_dequantises_to_the_same_bits(dtype, nested):
    for shape in SHAPES:
        ours = nf4_quantize(values(shape), nested=nested)
        moved = NF4Weight(*(None if t is None else t.cuda() for t in (ours.packed, ours.absmax, ours.nested)), shape)
        assert same_bits(nf4_dequantize(moved, dtype).cpu(), nf4_dequantize(ours, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_quantises_to_the_same_bits(dtype, nested):
    for shape in [*SHAPES, (0, 64)]:
        weight = values(shape, dtype)
        packed, absmax, maps = quantize(weight.cuda(), SCALE_MAP.cuda() if nested else None)
        expected = quantize(weight, None)
        assert torch.equal(packed.cpu(), expected[0])
        if nested:  # the GPU's mean, to which the rest is exact
            codes, again = run_reference(quantize, weight.cuda(), SCALE_MAP.cuda())[1:]
            assert torch.equal(absmax, codes)
            assert same_bits(maps, again)
        else:
            assert same_bits(absmax.cpu(), expected[1])


def test_layouts_and_empty():
    weight = values((96, 64))
    ours = nf4_quantize(weight.t())
    assert torch.equal(ours.packed, nf4_quantize(weight.t().contiguous()).packed)
    strided = NF4Weight(ours.packed[:, None].expand(-1, 2)[:, 0], ours.absmax, ours.nested, ours.shape)
    assert torch.equal(nf4_dequantize(strided, torch.float32), nf4_dequantize(ours, torch.float32))
    for nested in (False, True):
        empty = nf4_quantize(torch.empty(0, 64), nested=nested)
        assert nf4_dequantize(empty, torch.bfloat16).shape == (0, 64)


def test_bits_a_value():
    weight = values((1024, 4096))
    plain, nested = nf4_quantize(weight, nested=False), nf4_quantize(weight)
    assert plain.nbytes * 8 / weight.numel() == 4.5
    assert nested.nbytes * 8 / weight.numel() < 4.13


def test_wrong_sizes_are_said():
    ours = nf4_quantize(values((64, 64)))
    for wrong in ((ours.packed[1:], ours.absmax, ours.nested), (ours.packed, ours.absmax[1:], ours.nested),
                  (ours.packed, ours.absmax, None), (ours.packed, ours.absmax, ours.nested[1:]),
                  (ours.packed, ours.absmax.float(), ours.nested)):  # fmt: skip
        with pytest.raises(RuntimeError, match="nf4: packed is"):
            dequantize(*wrong, (64, 64), torch.float32)
    with pytest.raises(RuntimeError, match="no whole bytes"):
        nf4_quantize(values((4, 5))).rows  # noqa: B018


def test_threads_change_nothing():
    weight = values((1024, 576))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(nf4_quantize(weight, nested=False))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].packed, found[1].packed)
    assert torch.equal(found[0].absmax, found[1].absmax)


def test_opcheck_and_compile():
    weight = values((5, 130))
    for mapped in (None, SCALE_MAP):
        check_opcheck(quantize, weight, mapped)
    ours = nf4_quantize(weight)
    check_opcheck(dequantize, ours.packed, ours.absmax, ours.nested, (5, 130), torch.bfloat16)
    check_compiles(lambda w: nf4_dequantize(nf4_quantize(w), torch.float32), weight)
