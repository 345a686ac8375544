"""csrc/cpu/region.cpp: rooms are used again, nothing overlaps, free pages can be given back."""

import gc
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch

from fastpt.memory import release_memory, resident_bytes
from fastpt.ops._library import MISSING_NATIVE

pytestmark = pytest.mark.skipif(MISSING_NATIVE is not None, reason="needs the native kernels")
MIB = 1 << 20


def block(size):
    return torch.empty(size, dtype=torch.uint8)


NEIGHBOURS = """
import torch, fastpt.ops
def block(mib): return torch.empty(mib << 20, dtype=torch.uint8)
a, b, c, d, e = (block(n) for n in (3, 5, 1, 4, 1))
start, other = a.data_ptr(), d.data_ptr()
assert start % 64 == 0
del a, b, d
assert block(4).data_ptr() == other  # the smallest that holds it
both = block(8)  # of 3 and 5, which are free side by side
assert both.data_ptr() == start
assert start + (8 << 20) <= c.data_ptr() < e.data_ptr()
f, g, h = (block(n) for n in (30, 50, 90))
start = f.data_ptr()
del g  # the later one first
del f
assert block(80).data_ptr() == start
"""


def test_neighbouring_rooms_become_one_and_the_smallest_that_holds_a_block_takes_it():
    subprocess.run([sys.executable, "-c", NEIGHBOURS], check=True)  # where nothing else has left rooms


def test_blocks_never_overlap():
    generator = torch.Generator().manual_seed(0)
    held = {}
    for step in range(3000):
        size = int(torch.randint(1, 1 << 18, (), generator=generator))
        key = int(torch.randint(0, 40, (), generator=generator))
        if key in held:
            tensor, written = held.pop(key)
            assert tensor.eq(written).all()
        held[key] = block(size).fill_(step % 251), step % 251
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in held.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_threads_take_and_give_at_once():
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(300):
            tensors = [block(int(n)).fill_(seed) for n in torch.randint(1 << 14, 1 << 17, (4,), generator=generator)]
            wrong.extend(t for t in tensors if not t.eq(seed).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_free_pages_are_given_back_and_what_is_in_use_is_kept():
    gc.collect()
    release_memory()
    before = resident_bytes()
    kept, gone, last = block(2 * MIB).fill_(1), block(64 * MIB).fill_(2), block(2 * MIB).fill_(3)
    del gone
    assert resident_bytes() - before > 60 * MIB
    release_memory()
    assert resident_bytes() - before < 10 * MIB
    assert kept.eq(1).all()
    assert last.eq(3).all()
    assert block(64 * MIB).zero_().sum() == 0


def test_the_usual_ways_of_torch_still_work(tmp_path):
    x = block(MIB).fill_(7)
    x.resize_(3 * MIB)[MIB:] = 8
    assert x[:MIB].eq(7).all()
    assert x[MIB:].eq(8).all()
    assert x.clone().numpy().sum() == x.sum(dtype=torch.int64)
    torch.save(x, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt").equal(x)
    del x
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(MIB).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        torch.empty(3 * MIB).fill_(1.0)
    assert max(event.cpu_memory_usage for event in found.key_averages()) == 12 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_region_of_its_own():
    x = block(1 << 14).fill_(5)  # small: a child of a process with OpenMP threads cannot use them
    child = os.fork()
    if child == 0:
        x.fill_(6)
        ok = block(1 << 14).fill_(1).eq(1).all()
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert x.eq(5).all()
