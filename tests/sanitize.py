"""Build the C++ kernels with AddressSanitizer and UBSan and run their tests at every instruction set: make sanitize.

The build has a folder of its own and touches no other. What is JIT-compiled (libtorch's brgemm) and libtorch itself are not
instrumented; below AVX-512 the GEMM tiles are loops of ours, so their accesses are checked there. Leaks are not looked for:
the Python interpreter and libtorch keep memory to the end by design. A report fails the run, and so does a failing test:
the bounds hold in scalar order too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/sanitize"
TESTS = ["tests/ops", "tests/optim"]
LEVELS = ["avx512_bf16", "avx512", "avx2", "portable"]  # one that the machine lacks runs as the best it has
REPORTED = 99  # the exit status of a process that a sanitizer stopped


def build() -> Path:
    """The folder that holds the package with an instrumented fastpt._C."""
    shutil.rmtree(BUILD / "lib", ignore_errors=True)  # no module of before when this build fails
    arguments = ["-q", "build", "--build-base", BUILD, "--build-lib", BUILD / "lib"]
    environment = {**os.environ, "FASTPT_NATIVE": "1", "FASTPT_SANITIZE": "1"}
    made = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise SystemExit(f"{made.stdout}\n{made.stderr}\nsanitize: the instrumented build failed")
    (module,) = (BUILD / "lib/fastpt").glob("_C*")
    names = module.read_bytes()
    if b"__asan_report" not in names or b"__ubsan_handle" not in names:
        raise SystemExit(f"sanitize: {module} holds no checks; it would find nothing")
    return BUILD / "lib"


def library(name: str) -> str:
    """Where the C++ compiler keeps a runtime library."""
    compiler = os.environ.get("CXX", "c++")
    answer = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def environment_of(level: str, reports: Path) -> dict[str, str]:
    common = f"log_path={reports / 'report'}:exitcode={REPORTED}"
    return {
        **os.environ,
        "FASTPT_CPU_ISA": level,
        # ASan first of all libraries, and libstdc++ with it: it takes over __cxa_throw when it starts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Use after return stays unchecked: with it GCC 12 misaligns 64-byte vectors on the stack.
        "ASAN_OPTIONS": f"{common}:detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
        "PYTHONPATH": str(ROOT),  # for tests.helpers; the working directory, which has fastpt, comes before it
    }


def is_clean(package: Path, level: str) -> bool:
    """Run the tests against the instrumented package and print what the sanitizers reported."""
    reports = BUILD / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    environment = environment_of(level, reports)
    where = "import fastpt.ops._library, fastpt._C; print(fastpt._C.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    if not found.stdout.startswith(str(package)):
        raise SystemExit(f"sanitize: fastpt._C comes from {found.stdout or found.stderr}, not from {package}")
    # Compiled graphs and opcheck call the same kernels once more.
    chosen = [] if level == LEVELS[0] else ["-k", "not compile and not opcheck"]
    options = [
        "-q",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        f"--rootdir={ROOT}",
        *chosen,
    ]
    paths = [str(ROOT / path) for path in TESTS]
    run = subprocess.run([sys.executable, "-m", "pytest", *options, *paths], cwd=package, env=environment, check=False)
    told = sorted(reports.iterdir())
    for report in told:
        print(report.read_text(errors="replace"))
    return not told and run.returncode == 0


def main() -> int:
    began = time.perf_counter()
    package = build()
    print(f"built with ASan and UBSan in {time.perf_counter() - began:.0f} s", flush=True)
    failed = []
    for level in LEVELS:
        print(f"FASTPT_CPU_ISA={level}", flush=True)
        if not is_clean(package, level):
            failed.append(level)
    took = f"{time.perf_counter() - began:.0f} s"
    print(f"sanitize: {'FAILED at ' + ', '.join(failed) if failed else 'clean at ' + ', '.join(LEVELS)} ({took})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
