"""The shape of the project: who imports whom, one stem per op, and an import that costs and touches nothing."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Left may import right, never the other way round (docs/design.md, section 5).
LAYERS = [
    {"cli", "__main__", "chat", "doctor"},
    {"trainer"},
    {"run", "preparation", "memory_plan", "predict", "evaluation", "forensics"},
    {"objectives"},
    {
        "data",
        "fusion",
        "checkpoint",
        "adapters",
        "optim",
        "models",
        "nf4_loading",
        "generate",
        "scorer",
        "skeleton",
        "vocabulary",
    },
    {
        "activations",
        "memory",
        "tracing",
        "report",
        "console",
        "trackers",
        "records",
        "interrupt",
        "config",
        "settings",
        "nf4",
    },
    {"ops"},
    {"kernels"},
    {"errors"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _part(path: Path) -> str:
    return path.relative_to(ROOT / "fastpt").parts[0].removesuffix(".py")


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "fastpt")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _sources(folder: str):
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if "kernels" not in p.relative_to(ROOT).parts[:-1]]


@pytest.mark.parametrize("path", _sources("fastpt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = _part(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} has no layer yet: give it one here"
    for module in _imports(path):
        assert module.split(".")[0] not in ("tests", "benchmarks"), f"{path} imports {module}"
        if module.startswith("fastpt.") and module.split(".")[1] in LEVEL:
            other = module.split(".")[1]
            assert LEVEL[part] <= LEVEL[other], f"{part} imports {other}, which is above it"


def test_the_import_scan_sees_a_wrong_direction(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from fastpt import trainer\nimport fastpt.cli\n")
    assert {"fastpt.trainer", "fastpt.cli"} <= set(_imports(wrong))
    assert LEVEL["trainer"] < LEVEL["ops"]


def _op_stems():
    return [p.stem for p in (ROOT / "fastpt/ops").glob("*.py") if not p.stem.startswith("_")]


@pytest.mark.parametrize("stem", _op_stems())
def test_every_op_has_its_test_and_its_benchmark(stem):
    assert (ROOT / f"tests/ops/test_{stem}.py").is_file()
    assert (ROOT / f"benchmarks/ops/bench_{stem}.py").is_file()


@pytest.mark.parametrize("folder", ["fastpt", "benchmarks", "tests", "csrc", "examples"])
def test_files_stay_readable(folder):
    files = [*_sources(folder), *(ROOT / folder).rglob("*.cpp"), *(ROOT / folder).rglob("*.h")]
    long = {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long, f"find the concept to split out: {long}"


def test_kernels_folder_is_ours_and_shadows_nothing():
    assert (ROOT / "fastpt/kernels").is_symlink()
    assert not (ROOT / "kernels/__init__.py").exists()
    assert importlib.util.find_spec("fastpt.kernels") is not None
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_import_is_light_and_touches_nothing():
    code = (
        "import os, sys, time; before = dict(os.environ); start = time.perf_counter(); import fastpt; "
        "took = time.perf_counter() - start; assert dict(os.environ) == before; "
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules); assert not heavy, heavy; "
        "assert took < 0.3, took; import logging; assert not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_resolves():
    import fastpt

    for name in fastpt.__all__:
        assert getattr(fastpt, name) is not None
    with pytest.raises(AttributeError, match="trian"):
        fastpt.trian  # noqa: B018


def test_no_tracked_file_names_a_path_of_a_machine():
    words = ("/wo" + "rk/", "/fa" + "rm/", "/opt/" + "pypi", "/opt/" + "wheels", "/tmp/" + "w/")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file():
            text = path.read_text(errors="ignore")
            assert not any(word in text for word in words), name
