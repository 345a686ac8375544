"""Settings as nested tables: read from a file, set from the command line, joined. What they mean is config.py's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastpt.errors import ConfigError


def read_file(path: str | Path) -> dict[str, Any]:
    """The tree of a .toml, .yaml, .yml or .json file.

    Raises: ConfigError for a missing file, an unknown ending or a syntax error (with its line).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; give the path of a .toml or .yaml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            return _toml(text)
        if path.suffix in (".yaml", ".yml", ".json"):
            import yaml

            tree = yaml.safe_load(text) or {}
            if not isinstance(tree, dict):
                raise ConfigError(f"{path} holds a {type(tree).__name__}, not a table of settings")
            return tree
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} cannot be read: {error}") from None
        raise
    raise ConfigError(f"{path}: the ending {path.suffix!r} is not known; use .toml, .yaml or .json")


def parse_override(text: str) -> tuple[str, Any]:
    """("optim.lr", 1e-4) of "optim.lr=1e-4"; the value is read as TOML, or else as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r} is not of the form key=value, e.g. optim.lr=1e-4")
    try:
        return key.strip(), _toml(f"value = {value}")["value"]
    except ValueError:
        return key.strip(), {"None": None, "none": None, "null": None, "True": True, "False": False}.get(value, value)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the (possibly dotted) keys of `over` set; tables are merged, all else is replaced."""
    result = nested(base)
    for key, value in nested(over).items():
        _put(result, key, value)
    return result


def nested(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of the top level as nested tables (deeper keys may hold dots of their own: rank_pattern)."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        first, *others = key.split(".")
        for part in reversed(others):
            value = {part: value}
        _put(result, first, value)
    return result


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set tree[key]; a table joins the table, or the plain name, that is there already."""
    if isinstance(value, dict):
        present = tree.get(key, {})
        table = (
            {_string_field(key): present}
            if isinstance(present, str)
            else dict(present)
            if isinstance(present, dict)
            else {}
        )
        for name, item in value.items():
            _put(table, name, item)
        value = table
    tree[key] = value


def _string_field(key: str) -> str:
    return "path" if key in ("data", "eval_data") else "name"


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
