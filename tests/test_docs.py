"""The README's Python blocks run, and the commands and links that README and docs name exist."""

import json
import re
from pathlib import Path

import pytest

from tests.runs import chat_rows
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """A folder with what the blocks name: a tiny model for the hub id, a data file, a model to hand to TRL."""
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(4)))
    return {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer(), "dataset": Dataset.from_list(chat_rows(4))}


@pytest.mark.parametrize("block", _blocks("python"), ids=lambda block: block.splitlines()[-1].strip()[:40])
def test_readme_python_blocks_run(block, namespace):
    if "trl" in block:
        pytest.importorskip("trl")
    code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny")
    exec(compile(code, "README.md", "exec"), namespace)


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    shell = "\n".join(_blocks("bash"))
    for target in re.findall(r"^make (\w+)", shell, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    cli = (ROOT / "fastpt/cli.py").read_text()
    for command in re.findall(r"^fastpt (\w+)", shell, re.MULTILINE):
        assert f"def {command}(" in cli, command
    for module in re.findall(r"python -m ([\w.]+)", shell):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    if page.name == "design.md":
        return  # also names what later issues bring
    for name in re.findall(r"`((?:fastpt|tests|csrc|benchmarks|examples|kernels)/[\w/.]+)`", text):
        assert (ROOT / name).exists() or "x." in name.rsplit("/", 1)[-1], name
