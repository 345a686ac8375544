"""CUDA kernel bodies on the CPU: every grid and block index, at odd sizes, under AddressSanitizer; and that faults are seen."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
FAULTS = {  # in a header of csrc/cuda: what stands there, what would be wrong
    "out of range": ("adamw_body.h", "left >= kGroup ? kGroup", "left > 0 ? kGroup"),
    "a last program missing": ("adamw.h", "(size + kProgramValues - 1) / kProgramValues", "size / kProgramValues + (size == 1)"),
    "a scale from another thread": ("adamw_body.h", "if (thread % kScaleThreads == 0)", "if (thread % kScaleThreads == 1)"),
    "an address that is not aligned": ("adamw_body.h", "thread * kThreadValues + g * kGroup", "thread * kGroup + g * kGroup"),
    "NF4 out of range": ("nf4_body.h", "left >= most ? most", "left > 0 ? most"),
    "NF4 a last program missing": ("nf4.h", "(size + kNf4ProgramValues - 1) / kNf4ProgramValues", "size / kNf4ProgramValues"),
    "NF4 another block's scale": ("nf4_body.h", "place * kGroup / kNf4Block]", "place * kGroup / (2 * kNf4Block)]"),
    "NF4 halves of a byte": ("nf4_body.h", "i % 2 == 0 ? 4 : 0", "i % 2 == 0 ? 0 : 4"),
    "NF4 another thread's codes": ("nf4_body.h", "pieces[p * kThreads + thread]", "pieces[p * kThreads + (thread ^ 1)]"),
    "NF4 packed out of range": ("nf4_pack_body.h", "left >= kGroup ? kGroup", "left > 0 ? kGroup"),
    "NF4 packed by another's scale": ("nf4_pack_body.h", "thread % kNf4Sharers == 0", "thread % kNf4Sharers == 1"),
    "NF4 a last part as if whole": ("nf4_pack_body.h", "(block + 1) * kNf4Block <= task.size", "block * kNf4Block <= task.size"),
    "NF4 scales of another program": ("nf4_pack_body.h", "kNf4MapSize + 1 + program]", "kNf4MapSize + 1]"),
}  # fmt: skip


def run(name: str, folder: Path, sources: Path = ROOT / "csrc") -> subprocess.CompletedProcess:
    program = folder / name
    command = [COMPILER, "-std=c++20", "-O1", "-g0", "-Wall", "-ffp-contract=off", "-fsanitize=address,undefined",
               "-fno-sanitize-recover=all", f"-I{sources}", f"-I{ROOT / 'tests/cuda'}",
               ROOT / f"tests/cuda/{name}.cpp", "-o", program]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    environment = {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "tensors"), [("adamw", 168), ("nf4", 311)])
def test_a_launch_touches_every_value_and_no_other(name, tensors, tmp_path):
    done = run(f"{name}_emulation", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tensors} tensors" in done.stdout


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file, right, wrong = FAULTS[fault]
    header = tmp_path / "csrc/cuda" / file
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    done = run("nf4_emulation" if "NF4" in fault else "adamw_emulation", tmp_path, tmp_path / "csrc")
    assert done.returncode != 0
    if fault.endswith("out of range"):
        assert "AddressSanitizer" in done.stderr
    elif fault == "an address that is not aligned":
        assert done.returncode == -signal.SIGILL  # load_16_bytes traps
    else:
        assert "wrong:" in done.stdout
