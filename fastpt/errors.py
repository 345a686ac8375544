"""What fastpt raises: one sentence with the value, the place and the remedy. Each is also the stdlib error it resembles."""

from __future__ import annotations


class FastptError(Exception):
    """Base of every error that fastpt raises on purpose; the CLI prints it without a traceback."""


class ConfigError(FastptError, ValueError):
    """A setting that is unknown, of the wrong type or at odds with another."""


class DataError(FastptError, ValueError):
    """A data set, file or row that cannot be trained on; names file and row."""


class ModelError(FastptError, ValueError):
    """A model, tokenizer or adapter that cannot be found, loaded or used together."""


class CheckpointError(FastptError, RuntimeError):
    """A checkpoint that cannot be written, read or resumed from."""


class TrainingError(FastptError, RuntimeError):
    """A run that cannot go on, with its last good checkpoint left in place."""
