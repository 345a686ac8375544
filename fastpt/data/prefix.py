"""Prompts shared by several documents: which tokens each of them reads, where the prompt is there once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shared_keys(
    prefixes: Sequence[int], documents: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(cu_seqlens_q, keys, cu_seqlens_k, position_ids) of examples end to end, each a prefix and then its documents.

    A sequence is a prefix, which sees itself, or a document, which sees the prefix and itself; a prefix before a single
    document is one sequence with it. Sequence n is the tokens from cu_seqlens_q[n] to cu_seqlens_q[n + 1], int32 [N + 1], and
    sees the tokens keys[cu_seqlens_k[n] : cu_seqlens_k[n + 1]], keys int64 [Tk]; position_ids int64 [T] count from the
    beginning of the prefix. Parts without tokens are left out.
    """
    lengths, keys, positions = [], [], []
    start = 0
    for prefix, some in zip(prefixes, documents, strict=True):
        parts = [length for length in some if length > 0]
        if len(parts) == 1:
            prefix, parts = 0, [prefix + parts[0]]
        shared = np.arange(start, start + prefix)
        start += prefix
        if prefix > 0:
            lengths.append(prefix)
            keys.append(shared)
            positions.append(np.arange(prefix))
        for length in parts:
            lengths.append(length)
            keys.append(np.r_[shared, start : start + length])
            positions.append(np.arange(prefix, prefix + length))
            start += length
    return _bounds(lengths), _joined(keys), _bounds([len(one) for one in keys]), _joined(positions)


def _bounds(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])
