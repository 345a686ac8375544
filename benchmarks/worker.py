"""One peer in a process of its own: it builds once, then trains a round of steps whenever it is told to, and waits in between.

Peers drive their own loops (TRL's cannot be stepped from outside), so the pause sits in the call they make after each step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.peers import Job, Peer
from fastpt.memory import release_memory


class Step(NamedTuple):
    loss: float
    tokens: int  # real ones, without padding
    seconds: float
    rollout_s: float = 0.0  # of them, of online RL


class Finished(BaseException):
    """Ends a peer's training from within; no `except Exception` on the way may take it for a failure."""


class Rounds:
    """Counts and times steps; after each round hands them over and waits for the next "go"."""

    def __init__(self, connection: Connection, steps_per_round: int, memory: harness.PeakMemory):
        self._connection, self._steps_per_round, self._memory = connection, steps_per_round, memory
        self._steps: list[Step] = []
        self._began = time.perf_counter()

    def wait(self) -> None:
        release_memory()  # what a waiting peer keeps is taken from the one that computes
        if self._connection.recv() != "go":
            raise Finished
        self._steps, self._began = [], time.perf_counter()

    def after_step(self, loss: float, tokens: int, rollout_s: float = 0.0) -> None:
        harness.synchronize()
        self._steps.append(Step(loss, tokens, time.perf_counter() - self._began, rollout_s))
        if len(self._steps) == self._steps_per_round:
            self._connection.send(("round", {"steps": self._steps, "peak_bytes": self._memory.peak_bytes}))
            self.wait()
        self._began = time.perf_counter()


def main(connection: Connection, entry: type[Peer], job: Job, steps_per_round: int, log: str) -> None:
    """Sends ("ready", ...) once built, ("round", ...) after each round, or ("failed", reason)."""
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, sys.stdout.fileno())
    os.dup2(sink, sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        peer = entry(job)
        peer.build()
        about = _touch_weights(peer.model)
        memory = harness.PeakMemory()
        connection.send(("ready", {**about, "resident_bytes": memory.start_bytes}))
        rounds = Rounds(connection, steps_per_round, memory)
        rounds.wait()
        peer.train(rounds.after_step)
    except Finished:
        pass
    except Exception as error:  # noqa: BLE001 (whatever a peer raises is its result, and the others go on)
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))


def _touch_weights(model: Any) -> dict[str, int]:
    """Read every weight, so that those mapped from a file are resident; their bytes, shared ones counted once."""
    weights = list(model.parameters())
    for weight in weights:
        weight.detach().sum()
    return {"weights_bytes": sum(weight.nbytes for weight in weights)}
