"""make cuda-check finds what it looks for: in kernels made for that, compiled here where nvcc is."""

import subprocess
import sys

import pytest

from tests import cuda_check

needs_nvcc = pytest.mark.skipif(cuda_check.nvcc() is None or cuda_check.nvdisasm() is None, reason="no nvcc here")
LINE = "// cuda-check: doubled 1 loads and 1 stores of 16 bytes\n"
WIDE = "__global__ void doubled(float4* p) { float4 v = p[threadIdx.x]; v.x *= 2; p[threadIdx.x] = v; }\n"
NARROW = "__global__ void doubled(float* p) { p[threadIdx.x] *= 2; }\n"
STACK = """__global__ void doubled(float4* p, const int* at) {
  float a[64] = {};
  for (int k = 0; k < 64; ++k) a[at[k]] += 1;
  float4 v = p[0];
  v.x = a[at[64]];
  p[1] = v;
}
"""
WARNING = "__global__ void doubled(float4* p) { int unused = 3; p[1] = p[0]; }\n"


def faults(text, tmp_path):
    source = tmp_path / "doubled.cu"
    source.write_text(text)
    return cuda_check.report(source, 90)


@needs_nvcc
def test_a_streaming_kernel_passes(tmp_path):
    assert faults(LINE + WIDE, tmp_path) == []


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "said"), [(NARROW, "0 accesses of 16 bytes by LDG"), (STACK, "bytes of stack"), (WARNING, "unused")]
)
def test_what_is_wrong_is_said(kernel, said, tmp_path):
    assert any(said in fault for fault in faults(LINE + kernel, tmp_path))


def test_every_kernel_says_what_it_streams_by(tmp_path):
    with pytest.raises(ValueError, match="what doubled streams by"):
        faults(NARROW, tmp_path)


def test_too_many_registers():
    kernel = cuda_check.Compiled("doubled", 0, 0, 129, 0, cuda_check.parse(""))
    assert cuda_check.faults_of(kernel, cuda_check.Stated(0, 0)) == ["129 registers, at most 128"]


def test_a_launch_that_moves_too_much_is_named():
    said = "unpack: 115 bytes, floor 100\npack: 105 bytes, floor 100\n"
    assert cuda_check.traffic_faults(said) == ["unpack moves 1.150 x its floor, at most 1.1"]
    assert cuda_check.traffic_faults("") == ["no launch was counted"]


def test_says_skipped_without_nvcc():
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_check"],
        cwd=cuda_check.ROOT,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "skipped, no nvcc here" in done.stdout
