"""Build the extension with its CUDA part, import it and read its op table: make cuda-build. No GPU is needed.

It takes a CUDA build of torch (`make cuda-build PYTHON=...` names the interpreter that has one) and nvcc. The build has a
folder of its own. An op that a C++ file claims for the CPU or for CUDA and that torch's dispatcher does not give it fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/cuda"
_CLAIM = re.compile(r'm\.impl\("(\w+)"')
_TABLE = """
import json
import fastpt.ops, fastpt._C as native
from fastpt.ops._library import OPS, serving_kernel
table = {name: {device: serving_kernel(name, device) for device in ("cpu", "cuda")} for name in OPS}
print(json.dumps({"file": native.__file__, "cuda": native.build_info()["cuda"], "table": table}))
"""

Table = dict[str, dict[str, str]]


def why_not() -> str | None:
    """What is missing here for the build."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build (PYTHON=... names an interpreter that has one)"
    if toolkit() is None:
        return "no nvcc with its headers here (CUDA_HOME names the toolkit's folder)"
    if missing := [name for name in ("pybind11", "setuptools", "ninja") if find_spec(name) is None]:
        return f"{sys.executable} has no {', '.join(missing)}"
    return None


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit. nvcc says where it is: what lies on the path may be a wrapper."""
    found = os.environ.get("CUDA_HOME")
    if found is None and (nvcc := shutil.which("nvcc")) is not None:
        with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
            said = subprocess.run([nvcc, "--dryrun", "-cubin", empty.name], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.MULTILINE)
        found = top and top.group(1)
    if not found or not (Path(found) / "include/cuda_runtime_api.h").exists():
        return None
    return Path(found).resolve()


def build() -> Path:
    """The folder that holds the package with its module. Objects that are up to date are kept from the last time."""
    shutil.rmtree(BUILD / "lib", ignore_errors=True)
    arguments = ["-q", "build", "--build-base", BUILD, "--build-lib", BUILD / "lib"]
    environment = {"MAX_JOBS": "1", **os.environ, "FASTPT_NATIVE": "1", "CUDA_HOME": str(toolkit())}
    made = subprocess.run([sys.executable, "setup.py", *arguments], cwd=ROOT, env=environment, check=False)
    if made.returncode != 0:
        raise SystemExit("cuda-build failed: the compiler's words are above")
    return BUILD / "lib"


def op_table(folder: Path) -> dict:
    """What the package in a folder says of itself: "file" of its module, "cuda": built for it, "table" of its ops."""
    done = subprocess.run([sys.executable, "-c", _TABLE], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\ncuda-build failed: fastpt does not import from {folder}")
    return json.loads(done.stdout.splitlines()[-1])


def claimed(device: str) -> set[str]:
    """The ops that the C++ files of a device ("cpu", "cuda") register."""
    files = (ROOT / "csrc" / device).glob("*.cpp")
    return {name for path in files for name in _CLAIM.findall(path.read_text())}


def faults_of(table: Table, devices: tuple[str, ...] = ("cpu", "cuda")) -> list[str]:
    return [
        f"{name} on {device} is served by {table[name][device] if name in table else 'nothing'}, not by C++"
        for device in devices
        for name in sorted(claimed(device))
        if table.get(name, {}).get(device) != "C++"
    ]


def main() -> None:
    if reason := why_not():
        print(f"cuda-build: skipped: {reason}")
        return
    folder = build()
    said = op_table(folder)
    print(f"{'op':28} {'CPU':10} CUDA")
    for name, by in sorted(said["table"].items()):
        print(f"{name:28} {by['cpu']:10} {by['cuda']}")
    faults = faults_of(said["table"])
    if not said["cuda"] or not Path(said["file"]).is_relative_to(folder):
        faults.append(f"{said['file']} is not the module that was built here with its CUDA part")
    if faults:
        sys.exit("\n".join(["cuda-build failed", *faults]))
    import torch

    print(
        f"cuda-build: {len(said['table'])} ops, {len(claimed('cpu'))} in C++ on the CPU and {len(claimed('cuda'))} in CUDA "
        f"C++, all registered (torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
