"""A finished (or loaded) run: generate with it, merge it, read its records."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpt import adapters, checkpoint, models, report
from fastpt.adapters import MergeReport
from fastpt.errors import ModelError
from fastpt.generate import Conversation, generate_batch
from fastpt.records import read_history


@dataclass
class Run:
    """What `fastpt.train` returns and `fastpt.load_run` reads back.

    `metrics` is the last evaluation plus totals; `history` one dict per logged step; `best` names the best checkpoint.
    """

    path: Path
    model: nn.Module
    tokenizer: Any
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    status: str = "finished"
    best: dict[str, Any] | None = None
    handle: Any = field(default=None, repr=False)  # of fastpt.fuse, while the model is fused

    @property
    def report(self) -> Path:
        """Path of the HTML report."""
        return self.path / "report.html"

    def generate(self, prompts: Conversation | Sequence[Conversation], **options: Any) -> str | list[str]:
        """The answer to one prompt (a string or a list of messages), or the answers to a list of them.

        Options are those of fastpt.generate.generate_batch: max_new_tokens, temperature, top_p, batch_size.
        """
        from fastpt.fusion import fuse

        self.handle = self.handle or fuse(self.model)  # once, not on every call
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
        answers = generate_batch(self.model, self.tokenizer, [prompts] if single else list(prompts), **options)  # type: ignore[list-item]
        return answers[0] if single else answers

    def predict(self, texts: Any) -> Any:
        """What a trained classifier says: a Prediction for a text or a pair (tuple) of texts, a list of them for a list.

        A tagger gives the tags of a sentence (a string), or a list of them for a list of sentences or of lists of words.
        """
        from fastpt.fusion import fuse
        from fastpt.predict import predict

        self.handle = self.handle or fuse(self.model)
        single = isinstance(texts, (str, tuple))
        found = predict(self.model, self.tokenizer, [texts] if single else texts)
        return found[0] if single else found

    def merge(self, folder: str | Path) -> MergeReport:
        """Write the model with its adapter merged to a plain Hugging Face folder; print and return how well they agree."""
        from fastpt.fusion import fuse

        text = "The quick brown fox jumps over the lazy dog. " + json.dumps(self.metrics)
        probe = torch.tensor([self.tokenizer(text)["input_ids"][:128]])
        if self.handle is not None:
            self.handle.remove()  # the plain model is what gets merged and compared
        try:
            found = adapters.merge(self.model, self.tokenizer, folder, probe)
        finally:
            if self.handle is not None:
                self.handle = fuse(self.model)
        print(f"{folder}: {found}")
        return found

    def save(self, about: dict[str, Any]) -> None:
        """Write the trained model and its tokenizer to `model/`, `about` to run.json, and the HTML report."""

        def fill(folder: Path) -> None:
            adapters.save(self.model, folder)
            self.tokenizer.save_pretrained(str(folder))

        checkpoint.write_folder(self.path / "model", fill)
        (self.path / "run.json").write_text(json.dumps(about, indent=2))
        report.write(self.path)


def load_run(folder: str | Path, *, device: str = "auto", precision: str = "auto") -> Run:
    """A run read back from its folder, ready for generate and merge.

    Raises: ModelError when the folder holds no finished run.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise ModelError(f"{folder} holds no finished run (no run.json); give the `output` folder of fastpt.train")
    about = json.loads((folder / "run.json").read_text())
    where = models.choose_device(device)
    dtype, _ = models.choose_precision(precision, where)
    made = about["model"]
    loaded = models.load(
        folder / "model", dtype=dtype, device=where, task=made.get("task", "causal"), settings=made.get("settings")
    )
    history = read_history(folder / "history.jsonl")
    return Run(folder, loaded.model.eval(), loaded.tokenizer, about["metrics"], history, about["status"], about["best"])


def environment() -> dict[str, Any]:
    """Versions and machine that a run's figures depend on."""
    packages = ("fastpt", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
