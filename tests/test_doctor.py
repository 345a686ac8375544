"""fastpt doctor: every finding with its remedy, with and without the native kernels."""

import os

import pytest

import fastpt.doctor as doctor
from fastpt.doctor import Finding, diagnose, op_table, print_diagnosis
from fastpt.ops import _library


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_this_machine_is_described():
    found = by_topic(diagnose())
    assert {"fastpt", "torch", "transformers", "peft", "datasets", "cpu", "native kernels", "precision"} <= set(found)
    assert "because" not in found["precision"].text
    assert ": " in found["precision"].text
    assert "usable cores" in found["cpu"].text
    assert all(finding.remedy for finding in found.values() if finding.level != "ok")


def test_every_op_has_one_row():
    columns, rows = op_table()
    assert columns[:2] == ("op", "cpu")
    names = [row[0] for row in rows]
    assert len(names) == len(set(names))
    assert {name.removesuffix("_backward") for name in _library.OPS} == {
        name.removesuffix("_backward") for name in names
    }
    served = dict(zip(names, (row[1] for row in rows), strict=True))
    assert served["swiglu"] == _library.serving_kernel("swiglu", "cpu")


def test_forward_and_backward_are_told_apart(monkeypatch):
    def serving(name, device):
        return "reference" if name.endswith("_backward") else "C++"

    monkeypatch.setattr(_library, "serving_kernel", serving)
    served = {row[0]: row[1] for row in op_table()[1]}
    assert served["swiglu"] == "C++, backward reference"


def test_without_the_native_module(monkeypatch, capsys):
    monkeypatch.setattr(_library, "MISSING_NATIVE", "fastpt._C was not built")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    finding = by_topic(diagnose())["native kernels"]
    assert finding.level == "problem"
    assert "install a C++ compiler" in finding.remedy
    assert "--no-build-isolation" in finding.remedy
    assert print_diagnosis() is False
    printed = capsys.readouterr().out
    assert "PROBLEM" in printed
    assert "swiglu" in printed


def test_a_native_module_of_another_torch(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_library", lambda: "fastpt._C was built for torch 2.10, this is torch 2.13.0")
    assert (
        by_topic(diagnose())["native kernels"].text
        == "broken: fastpt._C was built for torch 2.10, this is torch 2.13.0"
    )
    assert print_diagnosis() is False
    assert "which kernel serves" not in capsys.readouterr().out


def test_a_native_module_older_than_its_sources(monkeypatch, tmp_path):
    native = pytest.importorskip("fastpt._C")
    built = tmp_path / "_C.so"
    built.touch()
    os.utime(built, (0, 0))
    monkeypatch.setattr(native, "__file__", str(built))
    finding = by_topic(diagnose())["native kernels"]
    assert finding.level == "note"
    assert "older than" in finding.text


def test_missing_and_old_packages(monkeypatch):
    versions = {"torch": "2.4.0", "transformers": None, "peft": "99.0", "datasets": "99.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name))
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch>=2.10", "transformers>=5.10", "trl>=1.16; extra == 'dev'"]
    )
    found = by_topic(diagnose())
    assert found["torch"].remedy == "pip install 'torch>=2.10'"
    assert found["transformers"].text == "not installed"
    assert found["peft"].level == "ok"
    assert found["gguf"].level == "note"
    assert found["trackers"].level == "note"


def test_without_torch_the_rest_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert {finding.topic for finding in diagnose()} == {"fastpt", *doctor.NEEDED}


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    (finding,) = doctor._cpu()
    assert finding.level == "problem"
    assert "OMP_NUM_THREADS=2" in finding.remedy


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    (finding,) = doctor._gpu()
    assert finding.level == "problem"


def test_no_problem_no_failure(monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("a", "b"), Finding("c", "d", "note", "e")])
    assert print_diagnosis() is True
