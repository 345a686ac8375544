"""Fused blocks on the Triton kernels, in the interpreter: tests of test_blocks.py that take every way through a block."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = (
    "test_losses_and_gradients_are_those_of_the_unfused_model[llama-lora]",
    "test_losses_and_gradients_are_those_of_the_unfused_model[gemma3-some]",
    "test_losses_and_gradients_are_those_of_the_unfused_model[phi3-bare]",
    "test_bfloat16_gradients_are_no_worse_than_unfused[dora]",
    "test_lora_dropout_drops_and_is_replayed_by_checkpointing",
)


def test_a_fused_model_computes_the_same_on_triton_kernels():
    tests = [f"tests/fusion/test_blocks.py::{name}" for name in TESTS]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--triton", *tests],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert f"{len(TESTS)} passed" in ended.stdout
