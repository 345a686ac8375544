"""One row of the data as the model sees it: tokens, which of them are trained, and what else the loss needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

IGNORED = -100  # a target that says nothing, as in torch and transformers


@dataclass(frozen=True)
class Example:
    """Tokens of one row, never split over micro-batches; token t is a target where `trained[t]`, and counts `weights[t]`.

    `targets` says what each position must say where that is not the next token (the class of a token). `source` is the
    encoder's side. `documents` are the lengths of its documents where it has several, such as the two answers of a pair;
    `prefix` counts the first tokens, which come before every one of them. Documents then begin with the last token of the
    prompt, so that no position has two targets. `count` is what the example adds to the divisor of the step's loss, where
    that is not its trained tokens. `fields` are joined along their first axis in `Batch.fields`.
    """

    input_ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool
    weights: np.ndarray | None  # [T] float32
    place: str
    targets: np.ndarray | None = None  # [T] int64
    source: np.ndarray | None = None  # [S] int32
    documents: tuple[int, ...] | None = None
    prefix: int = 0
    count: float | None = None
    fields: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of both sides: what it takes in a batch."""
        return len(self.input_ids) + (0 if self.source is None else len(self.source))

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model sees of it."""
        target = self.prefix + max(self.documents or (len(self.input_ids),))
        return target if self.source is None else max(target, len(self.source))

    @property
    def shares(self) -> bool:
        """Whether several documents share a prompt."""
        return self.prefix > 0 and len(self.documents or ()) > 1

    @property
    def trained_tokens(self) -> list[int]:
        """How many positions have a target, of each document."""
        if self.targets is not None:
            return [int(np.count_nonzero(self.targets != IGNORED))]
        return [int(np.count_nonzero(self.trained[start + 1 : stop])) for start, stop in self.bounds]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each document starts and stops."""
        ends = self.prefix + np.cumsum(self.documents or (len(self.input_ids),))
        return list(zip([self.prefix, *ends[:-1].tolist()], ends.tolist(), strict=True))

    @property
    def is_empty(self) -> bool:
        """Whether it trains nothing: no target, or a document without one where its losses are of documents."""
        found = self.trained_tokens
        if self.count is not None and self.targets is None:
            return bool(self.trained.any() or self.documents) and min(found) == 0
        return sum(found) == 0

    def taking(self, index: np.ndarray | slice, **changes: object) -> Example:
        """With only the chosen tokens."""
        of = lambda array: None if array is None else array[index]  # noqa: E731
        return replace(
            self, input_ids=self.input_ids[index], trained=self.trained[index], weights=of(self.weights),
            targets=of(self.targets), **changes,  # type: ignore[arg-type]
        )  # fmt: skip

    def truncated(self, max_length: int) -> Example:
        """Cut to rows of at most max_length; of what is only read the closing token stays, of answers the end is lost."""
        if self.prefix >= max_length:
            return self.taking(slice(0), prefix=0, documents=tuple(0 for _ in self.documents or ()))
        room = max_length - self.prefix
        kept = [np.arange(self.prefix), *(np.arange(start, min(stop, start + room)) for start, stop in self.bounds)]
        if self.documents is None and not self.trained.any() and len(self.input_ids) > max_length:
            kept[-1] = np.append(kept[-1][:-1], len(self.input_ids) - 1)
        source = self.source
        if source is not None and len(source) > max_length:
            source = np.append(source[: max_length - 1], source[-1:])
        documents = None if self.documents is None else tuple(len(one) for one in kept[1:])
        return self.taking(np.concatenate(kept), documents=documents, source=source)

    def expanded(self) -> Example:
        """With the prefix written out before each document."""
        if self.prefix == 0:
            return self
        index = np.concatenate([np.r_[0 : self.prefix, start:stop] for start, stop in self.bounds])
        documents = tuple(self.prefix + stop - start for start, stop in self.bounds)
        return self.taking(index, prefix=0, documents=documents)
