"""Interleaved timing: all providers of a case take turns in one process, so drift hits them alike; medians are reported."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastpt.memory import release_memory
from fastpt.ops._library import Cost

FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU


@dataclass
class Case:
    """One shape of one op: who computes it and what it costs at least.

    Each provider is a callable that does the whole timed work (forward, or forward and backward) and returns its result.
    `cost` is the op's own floor; providers named "fastpt" come first and are the ones that ratios are taken against.
    """

    op: str
    shape: str
    dtype: str
    direction: str  # "forward" or "forward+backward"
    providers: dict[str, Callable[[], Any]]
    cost: Cost


@dataclass
class Timing:
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_extra_bytes: int


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(run: Callable[[], Any]) -> float:
    """Milliseconds of one call; on a GPU by its own clock, with nothing of the last call left in its L2 cache."""
    if torch.cuda.is_available():
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def compare(case: Case, *, budget_s: float = 2.0) -> list[Timing]:
    """Time the providers in turns, each for `budget_s`: at least five rounds, or two of one that takes longer than that.

    The rounds of a slower provider are spread evenly over those of the fastest.
    """
    counts = {}
    for name, run in case.providers.items():
        slowest = time_once(run)  # a first call also compiles and allocates
        seconds = 1e-3 * (slowest if slowest > 1e3 * budget_s else time_once(run))
        counts[name] = max(5 if seconds <= budget_s else 2, min(200, int(budget_s / max(seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    rounds = max(counts.values())
    gc.disable()
    try:
        for i in range(rounds):
            for name, run in case.providers.items():
                if (i + 1) * counts[name] // rounds > i * counts[name] // rounds:
                    samples[name].append(time_once(run))
    finally:
        gc.enable()
    return [_summary(name, values, peak_extra_bytes(case.providers[name])) for name, values in samples.items()]


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """The most memory that one call holds beyond what was there before and the tensors that it returns."""
    memory = PeakMemory()
    result = run()
    returned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(result)}
    return max(0, memory.peak_bytes - memory.start_bytes - sum(returned.values()))


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def _summary(name: str, values: list[float], peak_extra: int) -> Timing:
    ordered = sorted(values)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return Timing(name, statistics.median(ordered), at(0.2), at(0.8), peak_extra)


def forward_backward(function: Callable, *inputs: Any) -> Callable[[], Any]:
    """A provider that runs function(*inputs) and its backward from a fixed incoming gradient."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    out = function(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]

    def run() -> Any:
        result = function(*inputs)
        return torch.autograd.grad(result if isinstance(result, tuple) else (result,), wanted, grads)

    return run


def wanted(providers: dict[str, Callable], peers: str | None) -> dict[str, Callable]:
    """fastpt, and the others whose name holds one of `peers` ("liger" for "Liger 0.8")."""
    names = peers.lower().split(",") if peers else [""]
    return {k: run for k, run in providers.items() if k == "fastpt" or any(name in k.lower() for name in names)}


def rows(case: Case, timings: list[Timing]) -> Iterator[dict[str, Any]]:
    """One JSON-ready row per provider, with its rate over the floor of bytes and FLOPs."""
    ours = next(t for t in timings if t.provider == "fastpt")
    for t in timings:
        yield {
            "op": case.op,
            "shape": case.shape,
            "dtype": case.dtype,
            "direction": case.direction,
            **asdict(t),
            "gb_per_s": case.cost.bytes / t.median_ms / 1e6,
            "gflop_per_s": case.cost.flops / t.median_ms / 1e6,
            "speedup_of_fastpt": t.median_ms / ours.median_ms,
        }


class PeakMemory:
    """The highest memory in use since it was made: allocated bytes on a GPU, else resident bytes of this process.

    Exact where the kernel lets its high-water mark be reset (Linux); elsewhere a thread samples every 10 ms.
    """

    def __init__(self) -> None:
        release_memory()
        self.start_bytes = self._sampled = _bytes_in_use()
        self._is_exact = torch.cuda.is_available()
        if self._is_exact:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._is_exact = True
        except OSError:
            self._lifetime_bytes = _lifetime_peak_bytes()
            threading.Thread(target=self._sample, daemon=True).start()

    @property
    def peak_bytes(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if self._is_exact:
            return max(self.start_bytes, _status_bytes("VmHWM"))
        lifetime = _lifetime_peak_bytes()  # exact once it has grown past what went before
        return lifetime if lifetime > self._lifetime_bytes else self._sampled

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, _bytes_in_use())
            time.sleep(0.01)


def _bytes_in_use() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status_bytes("VmRSS") if Path("/proc/self/status").exists() else _lifetime_peak_bytes()


def _status_bytes(field: str) -> int:
    return next(1024 * int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith(field))


def _lifetime_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions, commit."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str | None:
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def command() -> str:
    """The command line of this process, as one types it."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_json_lines(path: str | Path, records: list[dict[str, Any]]) -> None:
    """One line per record, each with the command that made it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps({**record, "command": command()}) + "\n" for record in records))
