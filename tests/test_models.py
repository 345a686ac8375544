"""Precision is chosen by what the CPU has, else by what a measurement at start-up says."""

import pytest
import torch

from fastpt import models

CPU = torch.device("cpu")


def test_units_decide_without_a_measurement(monkeypatch):
    monkeypatch.setattr(models, "has_bf16_units", lambda: True)
    monkeypatch.setattr(models, "product_rate", lambda dtype: pytest.fail("measured"))
    assert models.choose_precision("auto", CPU)[0] == torch.bfloat16
    assert models.choose_precision("fp32", CPU) == (torch.float32, "as asked")


@pytest.mark.parametrize(("bf16", "fp32", "chosen"), [(30.0, 20.0, torch.bfloat16), (20.0, 30.0, torch.float32)])
def test_without_units_the_faster_product_decides_and_both_rates_are_told(monkeypatch, bf16, fp32, chosen):
    monkeypatch.setattr(models, "has_bf16_units", lambda: False)
    monkeypatch.setattr(models, "product_rate", lambda dtype: bf16 if dtype == torch.bfloat16 else fp32)
    dtype, reason = models.choose_precision("auto", CPU)
    assert dtype == chosen
    assert f"{bf16:.0f} GFLOP/s of bf16" in reason
    assert f"{fp32:.0f} of fp32" in reason


def test_rates_are_measured_and_threads_put_back():
    threads = torch.get_num_threads()
    assert all(models.product_rate(dtype) > 0.1 for dtype in (torch.bfloat16, torch.float32))
    assert torch.get_num_threads() == threads
