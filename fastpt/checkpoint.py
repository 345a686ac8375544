"""Checkpoints that survive kill -9: written beside, fsynced, hashed, renamed; read back bit for bit.

A checkpoint is a folder that peft or transformers can load (save_pretrained), plus what a resumed run needs. Everything
is safetensors or JSON, nothing is pickled. The manifest with the hash of every file is written last, and the folder gets
its final name after that, so a folder that carries a valid manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastpt.adapters import VALUE_HEAD, is_adapter_model
from fastpt.adapters import save as save_model
from fastpt.errors import CheckpointError

MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Make `folder` appear whole or not at all: `fill` writes into a temporary neighbour, which is hashed, synced and renamed.

    Raises: CheckpointError when the disk is full or not writable; nothing that was there before is lost.
    """
    temporary = folder.parent / f".writing-{folder.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): _sha256(p) for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files, temporary / MANIFEST, temporary):
            _fsync(path)
        old = folder.parent / f".old-{folder.name}"
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
        return folder
    except Exception as error:
        if not (isinstance(error, OSError) or "I/O error" in str(error) or "No space left" in str(error)):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(_existing(folder.parent)).free if _existing(folder.parent).exists() else 0
        raise CheckpointError(
            f"{folder} could not be written ({error}); {free / 2**30:.1f} GiB are free there: "
            "make room or choose another output; earlier checkpoints are untouched"
        ) from error


def is_whole(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with its hash."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def newest(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run's `checkpoints` folder."""
    return next((path for path in reversed(listed(folder)) if is_whole(path)), None)


def listed(folder: Path) -> list[Path]:
    """Checkpoints by step, whole or not. One that a crash left between two renames gets its name back."""
    for old in folder.glob(".old-step-*"):
        target = folder / old.name.removeprefix(".old-")
        if not target.exists():
            old.rename(target)
    return sorted(folder.glob("step-*"))


def save(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write a checkpoint: the trained model, the optimizer, the random states and `state` (JSON)."""

    def fill(place: Path) -> None:
        save_model(model, place)
        tensors, rest = _flat_optimizer(optimizer)
        save_file(tensors, place / "optimizer.safetensors")
        save_file(_rng_tensors(), place / "rng.safetensors")
        (place / "state.json").write_text(json.dumps({"run": state, "optimizer": rest, "python_rng": _python_rng()}))

    return write_folder(folder, fill)


def load(folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model, optimizer and random states in place; return the saved `state`.

    Raises: CheckpointError when a file is missing or changed, or does not fit the model.
    """
    state = read_state(folder)
    _load_weights(folder, model)
    _restore_optimizer(optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
    _restore_rng(load_file(folder / "rng.safetensors"), state["python_rng"])
    return state["run"]


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a whole checkpoint."""
    if not is_whole(folder):
        raise CheckpointError(
            f"{folder} is not a whole checkpoint (a file is missing or its hash differs); resume from another one"
        )
    return json.loads((folder / "state.json").read_text())


def prune(folder: Path, keep: int, best: dict[str, Any] | None) -> None:
    """Delete all but the `keep` latest checkpoints and the one of the step of `best`."""
    for path in listed(folder)[:-keep]:
        if best is None or path.name != f"step-{best['step']:08d}":
            shutil.rmtree(path)


def _load_weights(folder: Path, model: nn.Module) -> None:
    if hasattr(model, VALUE_HEAD):
        getattr(model, VALUE_HEAD).load_state_dict(load_file(folder / f"{VALUE_HEAD}.safetensors"))
    if is_adapter_model(model):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        if result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the adapter of this run: it also has {result.unexpected_keys[:3]}"
            )
        return
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(shard))
    result = model.load_state_dict(weights, strict=False)
    loaded = {p.data_ptr() for name, p in model.state_dict().items() if name in weights}
    missing = [
        name
        for name in result.missing_keys
        if model.state_dict()[name].data_ptr() not in loaded and not name.startswith(f"{VALUE_HEAD}.")
    ]  # tied ones are there
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not fit this model: missing {missing[:3]}, unknown {result.unexpected_keys[:3]}"
        )


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tree = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in tree["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "param_groups": tree["param_groups"]}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest["plain"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    now = optimizer.state_dict()["param_groups"]
    configured = (
        "lr",
        "initial_lr",
        "betas",
        "eps",
        "weight_decay",
    )  # a changed setting, where drift is allowed, counts
    groups = [
        {**saved, **{key: new[key] for key in configured if key in new}}
        for saved, new in zip(rest["param_groups"], now, strict=False)
    ]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"the saved optimizer does not fit this run's parameters: {error}") from error


def _rng_tensors() -> dict[str, torch.Tensor]:
    numpy_state: Any = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _python_rng() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [str(numpy_state[0]), *(float(x) for x in numpy_state[2:])]}


def _restore_rng(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, key, int(position), int(has_gauss), cached))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
