"""make cuda-build reads the op table of what it built; here that of the CPU build."""

import subprocess
import sys

import pytest

from tests import cuda_build
from tests.helpers import needs_native


@needs_native
def test_every_op_that_a_cpp_file_claims_is_registered():
    said = cuda_build.op_table(cuda_build.ROOT)
    assert cuda_build.faults_of(said["table"], ("cpu",)) == []
    assert len(cuda_build.claimed("cpu")) > len(cuda_build.claimed("cuda")) > 0
    if not said["cuda"]:
        faults = cuda_build.faults_of(said["table"])
        assert len(faults) == len(cuda_build.claimed("cuda"))
        assert "nf4_dequantize on cuda is served by reference, not by C++" in faults


def test_an_op_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(cuda_build, "claimed", lambda device: {"forgotten"})
    assert cuda_build.faults_of({}, ("cuda",)) == ["forgotten on cuda is served by nothing, not by C++"]


def test_says_skipped_without_a_cuda_build_of_torch():
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    command = [sys.executable, "-m", "tests.cuda_build"]
    done = subprocess.run(command, cwd=cuda_build.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"cuda-build: skipped: torch {torch.__version__} is no CUDA build")
