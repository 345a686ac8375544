"""Tokens that a model is taught beside those it has: rows of the embeddings, started at the mean of what stood for them before.

With an adapter, only these rows of the embeddings are trained (PEFT's trainable_token_indices), and saved with it.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpt.errors import ConfigError, ModelError


def read_tokens(given: list[str] | str | Path) -> list[str]:
    """The tokens of a list, or of a text file that has one a line; a line's leading spaces belong to its token.

    Raises: ConfigError for a file that is not there, and for an empty or doubled token, with its place.
    """
    place = "added_tokens"
    if isinstance(given, (str, Path)):
        path = place = Path(given)  # type: ignore[assignment]
        if not path.is_file():
            raise ConfigError(
                f"added_tokens names {path}, which is no file: give a list, or a text file with a token a line"
            )
        given = path.read_text(encoding="utf-8").splitlines()
    for number, token in enumerate(given, 1):
        if not token.strip():
            raise ConfigError(f"{place}:{number} is an empty token: leave it out")
    doubled = next((token for token, count in Counter(given).items() if count > 1), None)
    if doubled is not None:
        places = [n for n, token in enumerate(given, 1) if token == doubled]
        raise ConfigError(f"{place}:{places[1]} is {doubled!r}, as {place}:{places[0]} is: leave it out")
    return given


def add_tokens(model: Any, tokenizer: Any, tokens: list[str]) -> tuple[Any, list[int]]:
    """A tokenizer that has these tokens too, and the rows that the model got for them; those that it has are passed over.

    The model is changed in place. Raises: ModelError where its embeddings cannot grow.
    """
    new = [token for token in tokens if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1]
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(new)
    return grown, grow(model, tokenizer, grown)


def grow(model: Any, before: Any, tokenizer: Any) -> list[int]:
    """Give a model rows for what a tokenizer has beyond another; each is the mean of the rows that stood for it before."""
    ids = list(range(len(before), len(tokenizer)))
    if not ids:
        return ids
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        try:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                f"the embeddings of {type(model).__name__} cannot grow for added_tokens: {error}"
            ) from error
    tables = {
        id(part.weight): part
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
    }
    texts = tokenizer.convert_ids_to_tokens(ids)
    pieces = [before(text, add_special_tokens=False)["input_ids"] for text in texts]
    with torch.no_grad():
        for part in tables.values():
            known = part.weight[: len(before)].float()
            for row, stood in zip(ids, pieces, strict=True):
                part.weight[row] = known[stood or slice(None)].mean(0).to(part.weight.dtype)
            if getattr(part, "bias", None) is not None:
                part.bias[ids] = part.bias[: len(before)].mean()
    return ids


def trained_rows(model: Any, rows: list[int]) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices for rows of a model's embeddings; of tied ones it takes the head along by itself."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    parts = [embedding] if is_tied else [embedding, head]
    return {name: rows for name, part in model.named_modules() if any(part is one for one in parts)}


def check_trained(model: nn.Module, rows: list[int]) -> None:
    """Raise ConfigError where new rows would stay at their start."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if rows and not weight.requires_grad:
        raise ConfigError(
            f"added_tokens gives the embeddings {len(rows)} new rows, which this method does not train: name the embeddings in "
            "method.train, leave them out of method.frozen, or use an adapter"
        )
