"""Compile the CUDA kernels for every architecture and read their machine code: make cuda-check. No GPU is needed.

What a launch moves is counted in its emulation on the CPU (tests/cuda/), each thread's accesses without a cache, and held
against the floor: each input read and each output written once.

A warning fails, and so do spilled registers or a stack, more than 128 registers, and a kernel with fewer 16-byte accesses
than the line above it says it streams by. That line is `// cuda-check: NAME N loads and M stores of 16 bytes`; each kernel
has one (0 and 0 where it does not stream).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence.machine_code.architectures import ARCHITECTURES, occupancy
from benchmarks.evidence.machine_code.sass import Code, parse

ROOT = Path(__file__).parents[1]
MOST_REGISTERS = 128
MOST_MOVED = 1.1  # of the floor
_STATED = re.compile(r"// cuda-check: (\w+) (\d+) loads and (\d+) stores of 16 bytes")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
_MOVED = re.compile(r"(.+): (\d+) bytes, floor (\d+)")
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
_USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Stated:
    loads: int
    stores: int


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture."""

    symbol: str
    stack_bytes: int
    spilled_bytes: int
    registers: int
    shared_bytes: int
    code: Code


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvdisasm() -> str | None:
    """Its own or the one that Triton comes with."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.nvidia.nvdisasm.path


def stated_in(source: Path) -> dict[str, Stated]:
    """Of every kernel of the file. Raises: ValueError for a kernel without its line."""
    text = source.read_text()
    found = {name: Stated(int(loads), int(stores)) for name, loads, stores in _STATED.findall(text)}
    if missing := set(_KERNEL.findall(text)) - set(found):
        raise ValueError(f"{source.name}: no `// cuda-check:` line says what {', '.join(sorted(missing))} streams by")
    return found


def compiled(source: Path, arch: int) -> list[Compiled]:
    """Raises: subprocess.CalledProcessError for an error or a warning."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc(), "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-Xptxas", "-v",
                   "-Werror", "all-warnings", "-cubin", source, "-o", cubin]  # fmt: skip
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        listing = subprocess.run([nvdisasm(), "-c", cubin], check=True, capture_output=True, text=True).stdout
    kernels = []
    _, *parts = _ENTRY.split(said)
    for symbol, told in zip(parts[::2], parts[1::2], strict=True):
        stack, spilled, registers = (int(n) for n in _USED.search(told).groups())  # type: ignore[union-attr]
        shared = _SHARED.search(told)
        section = listing.split(f".section\t.text.{symbol},", 1)[1].split(".section\t", 1)[0]
        kernels.append(
            Compiled(symbol, stack, spilled, registers, int(shared.group(1)) if shared else 0, parse(section))
        )
    return kernels


def faults_of(kernel: Compiled, stated: Stated) -> list[str]:
    found = []
    if kernel.stack_bytes or kernel.spilled_bytes or any(kernel.code.spilled_bytes):
        found.append(f"{kernel.stack_bytes} bytes of stack, {kernel.spilled_bytes} spilled")
    if kernel.registers > MOST_REGISTERS:
        found.append(f"{kernel.registers} registers, at most {MOST_REGISTERS}")
    for base, wanted in (("LDG", stated.loads), ("STG", stated.stores)):
        wide = sum(n for width, n in kernel.code.widths(base).items() if width >= 16)
        if wide < wanted:
            found.append(f"{wide} accesses of 16 bytes by {base}, stated are {wanted}")
    return found


def report(source: Path, arch: int) -> list[str]:
    """Print a line for each kernel; what is wrong, in sentences."""
    stated, faults = stated_in(source), []
    try:
        kernels = compiled(source, arch)
    except subprocess.CalledProcessError as error:
        return [f"{source.name}, sm_{arch}: {error.stderr.strip()}"]
    for kernel in kernels:
        name = max((n for n in stated if n in kernel.symbol), key=len)
        wrong = faults_of(kernel, stated[name])
        faults += [f"{source.name}, sm_{arch}: {name} has {fault}" for fault in wrong]
        print(f"sm_{arch} {name}: {_told(kernel, arch)}{'  FAILS' if wrong else ''}", flush=True)
    return faults


def _told(kernel: Compiled, arch: int) -> str:
    warps = 8  # kThreads of every kernel so far
    programs, limit = occupancy(arch, kernel.registers, warps, kernel.shared_bytes)
    return (
        f"{kernel.registers} registers, {kernel.shared_bytes} bytes shared, loads by width {kernel.code.widths('LDG')}, "
        f"stores {kernel.code.widths('STG')}, {programs} blocks per multiprocessor ({limit}), "
        f"{len(kernel.code.instructions)} instructions"
    )


def counted(emulation: Path) -> str:
    """What an emulation says its launches move, a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / emulation.stem
        command = ["c++", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", emulation, "-o", program]
        subprocess.run(command, check=True)
        return subprocess.run([program, "traffic"], check=True, capture_output=True, text=True).stdout


def traffic_faults(said: str) -> list[str]:
    """Print a line for each launch; which of them move too much."""
    faults = []
    for what, moved, floor in _MOVED.findall(said):
        times = int(moved) / int(floor)
        print(f"{what}: moves {times:.3f} x its floor of {int(floor):,} bytes", flush=True)
        if times > MOST_MOVED:
            faults.append(f"{what} moves {times:.3f} x its floor, at most {MOST_MOVED}")
    return faults or ([] if said else ["no launch was counted"])


def main() -> None:
    if nvcc() is None or nvdisasm() is None:
        print("cuda-check: skipped, " + ("no nvcc here" if nvcc() is None else "no nvdisasm here"))
        return
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    faults = [fault for source in sources for arch in ARCHITECTURES for fault in report(source, arch)]
    for emulation in sorted((ROOT / "tests/cuda").glob("*_emulation.cpp")):
        faults += traffic_faults(counted(emulation))
    if faults:
        sys.exit("\n".join(["cuda-check failed", *faults]))
    print(f"cuda-check: {len(sources)} files, {len(ARCHITECTURES)} architectures, nothing to object to")


if __name__ == "__main__":
    main()
