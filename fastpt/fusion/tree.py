"""Nested tuples and lists to a flat list of leaves and back.

torch's pytree does the same for anything registered and costs more; a fused block does it several times a step, while the
other cores wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Spec = tuple[type, list["Spec | None"]]  # of a node; of a leaf None


def tree_flatten(tree: Any) -> tuple[list[Any], Spec | None]:
    """The leaves (all that is neither tuple nor list), and what tree_unflatten needs."""
    leaves: list[Any] = []
    return leaves, _spec(tree, leaves)


def tree_unflatten(leaves: Iterable[Any], spec: Spec | None) -> Any:
    """The tree of a spec with other leaves.

    Raises: ValueError when there are more leaves than places, StopIteration when fewer.
    """
    rest = iter(leaves)
    tree = _build(spec, rest)
    if next(rest, rest) is not rest:
        raise ValueError("more leaves than the tree has places")
    return tree


def _spec(tree: Any, leaves: list[Any]) -> Spec | None:
    if isinstance(tree, (tuple, list)):
        return type(tree), [_spec(child, leaves) for child in tree]
    leaves.append(tree)
    return None


def _build(spec: Spec | None, leaves: Iterator[Any]) -> Any:
    if spec is None:
        return next(leaves)
    kind, children = spec
    parts = [next(leaves) if child is None else _build(child, leaves) for child in children]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
