"""`fastpt doctor`: what this machine offers, which kernel serves which op on it, and what to do about what is missing."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from fastpt import __version__

NEEDED = ("torch", "transformers", "peft", "datasets")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True)
class Finding:
    """One fact about the installation; a "note" could be better, a "problem" should be mended."""

    topic: str
    text: str
    level: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""


def diagnose() -> list[Finding]:
    """Everything that `fastpt doctor` lists above its table of ops."""
    findings = [*_versions()]
    if _version("torch") is None:
        return findings
    return [*findings, *_cpu(), _native(), *_gpu(), *_precision(), *_optional()]


def print_diagnosis() -> bool:
    """Print the findings and the table of ops; true when there is no problem."""
    from fastpt.console import Console

    console = Console()
    findings = diagnose()
    rows = [(f.level if f.level != "problem" else "PROBLEM", f.topic, f.text) for f in findings]
    console.table("this machine", ("", "", ""), rows)
    columns, ops = op_table()
    if ops:
        console.say("")
        console.table("which kernel serves which op", columns, ops)
    for level, title in (("problem", "PROBLEMS"), ("note", "what could be better")):
        listed = [f for f in findings if f.level == level]
        if listed:
            console.say(f"\n{title}")
        for finding in listed:
            console.say(f"  {finding.topic}: {finding.remedy}")
    return all(f.level != "problem" for f in findings)


def op_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows): each op with who serves its forward and its backward on each device present."""
    library = _library()
    if isinstance(library, str):
        return (), []
    import torch

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

    def served(name: str, device: str) -> str:
        forward = library.serving_kernel(name, device)
        if f"{name}_backward" not in library.OPS:
            return forward
        backward = library.serving_kernel(f"{name}_backward", device)
        return forward if backward == forward else f"{forward}, backward {backward}"

    names = [
        name
        for name in sorted(library.OPS)
        if name.removesuffix("_backward") == name or name.removesuffix("_backward") not in library.OPS
    ]
    return ("op", *devices), [(name, *(served(name, device) for device in devices)) for name in names]


def _versions() -> Iterator[Finding]:
    yield Finding(
        "fastpt", f"{__version__} in {Path(__file__).parent}, Python {platform.python_version()}, {platform.platform()}"
    )
    floors = _floors()
    for name in NEEDED:
        found = _version(name)
        wanted = floors.get(name)
        if found is None:
            yield Finding(name, "not installed", "problem", f"pip install '{name}{wanted or ''}'")
        elif wanted is not None and not wanted.contains(found, prereleases=True):
            yield Finding(name, f"{found}, fastpt needs {wanted}", "problem", f"pip install '{name}{wanted}'")
        else:
            yield Finding(name, found)


def _cpu() -> Iterator[Finding]:
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    text = f"{_cpu_model()}: {cores} usable cores, {threads} threads, torch uses {capability}{_memory()}"
    if threads > cores:
        yield Finding(
            "cpu",
            text,
            "problem",
            f"{threads} threads on {cores} cores wait for each other: set OMP_NUM_THREADS={cores}",
        )
    elif 2 * threads < cores:
        yield Finding(
            "cpu", text, "note", f"{threads} threads leave most of {cores} cores idle: set OMP_NUM_THREADS={cores}"
        )
    else:
        yield Finding("cpu", text)


def _native() -> Finding:
    library = _library()
    if isinstance(library, str):
        return Finding("native kernels", f"broken: {library}", "problem", f"rebuild them: {_build_command()}")
    if library.MISSING_NATIVE is not None:
        text = "not built: every op runs its PyTorch reference, which is right but slower"
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        first = "" if compiler else "install a C++ compiler (apt-get install g++), then "
        return Finding("native kernels", text, "problem", f"{first}{_build_command()}")
    from fastpt import _C as native

    info = native.build_info()
    products = f"matrix products: bf16 {info['gemm_bf16']}, fp32 {info['gemm_fp32']}"
    text = f"built for torch {info['torch']}, run as {info['isa']}; {products}"
    sources = Path(__file__).resolve().parent.parent / "csrc"  # there in a source tree only
    changed = max((path.stat().st_mtime for path in sources.rglob("*.*")), default=0.0)
    if changed > Path(native.__file__).stat().st_mtime:
        return Finding("native kernels", f"{text}; older than {sources}", "note", f"rebuild them: {_build_command()}")
    return Finding("native kernels", text)


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
            yield Finding("gpu", "none")
            return
        why = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
        remedy = "install the torch that fits your driver (https://pytorch.org/get-started)"
        yield Finding(
            "gpu", f"an NVIDIA driver is there, but torch {torch.__version__} {why} and sees no GPU", "problem", remedy
        )
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        yield Finding(f"gpu {index}", f"{about.name}, {memory}, compute capability {about.major}.{about.minor}")
    for package, level in (("triton", "problem"), ("flash-attn", "note")):
        found = _version(package)
        if found is None:
            yield Finding(package, "not installed", level, "pip install 'fastpt[gpu]'")  # type: ignore[arg-type]
        else:
            yield Finding(package, found)


def _precision() -> Iterator[Finding]:
    from fastpt.models import choose_device, choose_precision

    device = choose_device("auto")
    dtype, reason = choose_precision("auto", device)
    yield Finding("precision", f"{str(dtype).removeprefix('torch.')} on {device.type}: {reason}")


def _optional() -> Iterator[Finding]:
    gguf = _version("gguf")
    if gguf is None:
        yield Finding("gguf", "not installed: GGUF files cannot be read", "note", "pip install 'fastpt[gguf]'")
    else:
        yield Finding("gguf", gguf)
    there = [f"{name} {found}" for name in TRACKERS if (found := _version(name)) is not None]
    if there:
        yield Finding("trackers", ", ".join(there))
    else:
        text = "none installed; history.jsonl and report.html are always written"
        yield Finding("trackers", text, "note", f"pip install the one you want: {', '.join(TRACKERS)}")


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, and the quota of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, math.ceil(int(allowed) / int(period)))
    return max(1, cores)


def _library() -> Any:
    """fastpt.ops._library with every op registered, or why it cannot be imported."""
    try:
        import fastpt.ops  # noqa: F401  registers the ops
        from fastpt.ops import _library as library
    except (ImportError, OSError) as error:  # a native module of another torch, or with missing symbols
        return str(error)
    return library


def _build_command() -> str:
    """How to get the native kernels: in a source tree in place, elsewhere by reinstalling."""
    root = Path(__file__).resolve().parent.parent
    what = f"-e {root}" if (root / "setup.py").is_file() else "--force-reinstall --no-deps --no-binary fastpt fastpt"
    return f"pip install torch pybind11 ninja setuptools && pip install --no-build-isolation {what}"


def _cpu_model() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory() -> str:
    about = Path("/proc/meminfo")
    if not about.is_file():
        return ""
    kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in about.read_text().splitlines())}
    return f"; memory: {kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB free"


def _floors() -> dict[str, Any]:
    """Version ranges of fastpt's own requirements; empty where it runs from a source tree that was never installed."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(text) for text in requires("fastpt") or ()]
    except PackageNotFoundError:
        return {}
    return {one.name: one.specifier for one in listed if one.marker is None or one.marker.evaluate({"extra": ""})}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
