"""Compile what a callable launches, as it launches it, for an architecture that is not there.

    with Capture(90) as capture:
        function(x, w)              # on CPU tensors; nothing is computed
    capture.kernels()               # [Kernel, ...], each specialisation once

The launcher's own code runs, so warps, stages, constants and divisibility are the ones a GPU would get. Needs a process
without TRITON_INTERPRET. Torch ops in between allocate results and compute nothing (integers they do compute: sizes may hang
on them), so real sizes cost no time and memory that is never touched.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from benchmarks.evidence.machine_code.architectures import ARCHITECTURES, occupancy
from benchmarks.evidence.machine_code.driver import NamedDriver
from benchmarks.evidence.machine_code.sass import Code, parse
from fastpt.tracing import NothingComputed

Grid = tuple[int, int, int]
# A load of the program's, into registers or into shared memory: its shape ("4x1024x", none for one element), bits of an element.
_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local) [^\n]*?: (?:tensor<)?((?:\d+x)*)!tt\.ptr<(?:bf|f|i)(\d+)>"
)


@dataclass(frozen=True)
class Kernel:
    """One compiled specialisation and the first grid it was launched with; bytes unless the name says otherwise."""

    name: str
    arch: int
    grid: Grid
    launches: int
    warps: int
    stages: int
    constants: dict[str, Any]
    registers: int
    spill_stored: int
    spill_loaded: int
    shared: int
    programs: int  # that a multiprocessor holds; of these `filled` where the grid is smaller than that
    limited_by: str
    occupancy: float
    filled: int
    in_flight: int | None  # on one multiprocessor; None where loads go by TMA, which is not modelled
    load_widths: dict[int, float]  # accesses by bytes of a thread; one of few elements counts by the threads they need
    store_widths: dict[int, int]
    tensor_cores: dict[str, int]
    instructions: int
    double_precision: int
    calls_in_loops: int
    compile_s: float | None

    @property
    def wide_loads(self) -> float:
        """Part of the loaded bytes that comes by accesses of 16 bytes or more."""
        total = sum(width * count for width, count in self.load_widths.items())
        return sum(width * count for width, count in self.load_widths.items() if width >= 16) / total if total else 1.0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "wide_loads": self.wide_loads}


class Capture:
    def __init__(self, arch: int) -> None:
        if triton.knobs.runtime.interpret:
            raise RuntimeError("Capture compiles: run it in a process without TRITON_INTERPRET")
        self.arch = arch
        self._launches: list[tuple[CompiledKernel, Grid]] = []
        self._seconds: dict[str, float] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Capture:
        patch = self._patch
        patch(CompiledKernel, "run", property(self._recorded))
        patch(CompiledKernel, "launch_metadata", lambda kernel, grid, stream, *args: None)
        patch(triton.knobs.compilation, "listener", self._note_compilation)
        patch(driver, "_active", NamedDriver(self.arch))
        self._stack.enter_context(NothingComputed())
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, owner.__dict__.get(name, getattr(owner, name)))
        setattr(owner, name, value)

    def _recorded(self, kernel: CompiledKernel):
        limit = ARCHITECTURES[self.arch].shared_bytes_per_program
        if kernel.metadata.shared > limit:
            raise RuntimeError(
                f"{kernel.metadata.name} needs {kernel.metadata.shared} bytes of shared memory, sm_{self.arch} has {limit}"
            )
        return lambda x, y, z, *args, **kwargs: self._launches.append((kernel, (x, y, z)))

    def _note_compilation(self, *, metadata, times, cache_hit, **_) -> None:
        if not cache_hit:
            self._seconds[metadata["hash"]] = times.total * 1e-6

    def kernels(self) -> list[Kernel]:
        found: dict[str, list[tuple[CompiledKernel, Grid]]] = {}
        for kernel, grid in self._launches:
            found.setdefault(kernel.hash, []).append((kernel, grid))
        return [self._kernel(*some[0], len(some)) for some in found.values()]

    def _kernel(self, kernel: CompiledKernel, grid: Grid, launches: int) -> Kernel:
        code, registers = disassembled(kernel.asm["cubin"])
        meta = kernel.metadata
        programs, limited_by = occupancy(self.arch, registers, meta.num_warps, meta.shared)
        limits = ARCHITECTURES[self.arch]
        filled = min(programs, -(-grid[0] * grid[1] * grid[2] // limits.processors))
        stored, loaded = code.spilled_bytes
        by_tma = code.count("UTMALDG", "UBLKCP") > 0
        return Kernel(
            name=meta.name,
            arch=self.arch,
            grid=grid,
            launches=launches,
            warps=meta.num_warps,
            stages=meta.num_stages,
            constants=_constants(kernel),
            registers=registers,
            spill_stored=stored,
            spill_loaded=loaded,
            shared=meta.shared,
            programs=programs,
            limited_by=limited_by,
            occupancy=programs * meta.num_warps / limits.warps,
            filled=filled,
            in_flight=None if by_tma else code.in_flight_bytes * 32 * meta.num_warps * filled,
            load_widths=_without(code.widths("LDG", "LDGSTS"), idle_loads(kernel.asm["ttgir"], 32 * meta.num_warps)),
            store_widths=code.widths("STG"),
            tensor_cores=code.tensor_cores,
            instructions=len(code.instructions),
            double_precision=code.double_precision,
            calls_in_loops=code.calls_in_loops,
            compile_s=self._seconds.get(meta.hash),
        )


def _constants(kernel: CompiledKernel) -> dict[str, Any]:
    names = kernel.src.fn.arg_names
    return {
        names[path[0]]: value
        for path, value in kernel.src.constants.items()
        if isinstance(path, tuple) and isinstance(path[0], int) and isinstance(value, (bool, int, float, str))
    }


def idle_loads(ttgir: str, threads: int) -> dict[int, float]:
    """Of loads with fewer elements than a program has threads (one for all rows, one a row), by an element's bytes: the share
    of the threads that have none of their own. Their instruction is off or repeats an address, and moves nothing."""
    idle: collections.defaultdict[int, float] = collections.defaultdict(float)
    for shape, bits in _LOAD.findall(ttgir):
        elements = math.prod(int(n) for n in shape.split("x") if n)
        idle[max(1, int(bits) // 8)] += max(0.0, 1 - elements / threads)
    return idle


def _without(widths: dict[int, int], idle: dict[int, float]) -> dict[int, float]:
    left = {width: count - idle.get(width, 0.0) for width, count in widths.items()}
    return {width: count for width, count in left.items() if count > 0}


def disassembled(cubin: bytes) -> tuple[Code, int]:
    """A cubin's instructions, and its registers per thread."""
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _output(tools.nvdisasm.path, "-c", file.name)
    return parse(text), int(usage.split("REG:")[1].split()[0])


def _output(*command: str | os.PathLike) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
